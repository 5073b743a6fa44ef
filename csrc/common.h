// What every file of csrc shares: element types, the choice of instruction set, the split of work.
//
// No torch header is included anywhere in csrc: tensors come in as addresses and sizes, so that one build
// serves every torch.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FU_HD __host__ __device__ __forceinline__
#else
#define FU_HD inline
#endif

namespace fu {

// The numbers are the ABI towards Python (fastunlearn/_native.py: DTYPES).
enum DType : int { kF32 = 0, kF16 = 1, kBF16 = 2, kF64 = 3 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FU_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
#endif
}

FU_HD float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  memcpy(&x, &u, 4);
  return x;
#endif
}

FU_HD float to_float(float x) {
  return x;
}
FU_HD float to_float(bf16 x) {
  return bits_float(uint32_t(x.bits) << 16);
}

// IEEE half -> float without a subnormal operand or result, so that it is right where the processor flushes
// those to zero (torch.set_flush_denormal). Infinities and NaN keep their payload.
FU_HD float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  const uint32_t special = rest >= 0x7c00u ? 0x7f800000u : 0u;
  const uint32_t normal = ((rest << 13) + 0x38000000u) | special;
  const uint32_t small = float_bits(float(int32_t(rest)) * 0x1p-24f);
  return bits_float((rest < 0x400u ? small : normal) | sign);
}

// Round to nearest even; NaN stays NaN.
FU_HD bf16 to_bf16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40u)};
  return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

// Round to nearest even; NaN stays NaN. Branch-free, so that loops over it vectorise.
FU_HD f16 to_f16(float x) {
  const uint32_t u = float_bits(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  const uint32_t normal = (a + 0xfffu + (a >> 13 & 1u) - 0x38000000u) >> 13;
  // Added to 0.5, whose last place is the smallest half, a subnormal half is rounded by the addition itself.
  const uint32_t small = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;
  const uint32_t large = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return f16{uint16_t(sign | (a >= 0x47800000u ? large : a < 0x38800000u ? small : normal))};
}

template <class T>
FU_HD T from_float(float x);
template <>
FU_HD float from_float<float>(float x) {
  return x;
}
template <>
FU_HD bf16 from_float<bf16>(float x) {
  return to_bf16(x);
}

template <>
FU_HD f16 from_float<f16>(float x) {
  return to_f16(x);
}

FU_HD int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace fu

// ---- instruction sets -----------------------------------------------------------------------------------
// The files with loops over elements are compiled once per instruction set, each into a namespace of its own
// (FU_ISA, given by the build), and chosen at run time: a wheel runs anywhere and still uses AVX-512.
// Such a file must not instantiate templates of the standard library outside an anonymous namespace: the
// linker would merge the copies and an AVX-512 one could be called on an older machine.
#if defined(__x86_64__) && !defined(FU_SINGLE_ISA)
#define FU_DECLARE(ret, name, args) \
  namespace fu {                    \
  namespace isa_base {              \
  ret name args;                    \
  }                                 \
  namespace isa_v3 {                \
  ret name args;                    \
  }                                 \
  namespace isa_v4 {                \
  ret name args;                    \
  }                                 \
  }
#define FU_CALL(name, ...)                                    \
  (::fu::isa_level() >= 4   ? ::fu::isa_v4::name(__VA_ARGS__) \
   : ::fu::isa_level() == 3 ? ::fu::isa_v3::name(__VA_ARGS__) \
                            : ::fu::isa_base::name(__VA_ARGS__))
#else
#define FU_DECLARE(ret, name, args) \
  namespace fu {                    \
  namespace isa_base {              \
  ret name args;                    \
  }                                 \
  }
#define FU_CALL(name, ...) ::fu::isa_base::name(__VA_ARGS__)
#endif

namespace fu {
// 4: AVX-512 (x86-64-v4), 3: AVX2 and FMA (x86-64-v3), 0: the baseline of the architecture.
int isa_level();
// Asks for less than the machine has, to test the other builds on one machine; returns what was in force.
int set_isa_level(int level);
}  // namespace fu
