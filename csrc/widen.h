// Sixteen entries of any element type at once as floats, and blocks of them with zeros where a mask says so.
// For files that are compiled once per instruction set.
#pragma once

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operand inside its own AVX-512 intrinsics for a mistake; and how a
// vector would be passed to a function that is not inlined does not matter here.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fu::FU_ISA {
namespace {

constexpr int kLanes = 16;
using Float16 = float __attribute__((vector_size(kLanes * 4)));
using Double16 = double __attribute__((vector_size(kLanes * 8)));
using Word16 = uint32_t __attribute__((vector_size(kLanes * 4)));
using Half16 = uint16_t __attribute__((vector_size(kLanes * 2)));

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline Float16 load_lanes(const float* p) {
  Float16 x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline Float16 load_lanes(const bf16* p) {
  Half16 x;
  memcpy(&x, p, sizeof x);
  return as<Float16>(__builtin_convertvector(x, Word16) << 16);
}
inline Float16 load_lanes(const f16* p) {
#if defined(__AVX512F__)
  return as<Float16>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  Float16 x;
  for (int half = 0; half < 2; ++half) {
    const __m256 y = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * half)));
    memcpy(reinterpret_cast<char*>(&x) + 32 * half, &y, 32);
  }
  return x;
#else
  Float16 x;
  for (int l = 0; l < kLanes; ++l) x[l] = to_float(p[l]);
  return x;
#endif
}

// Rounded once, to nearest even.
inline void store_lanes(const Float16& x, float* to) {
  memcpy(to, &x, sizeof x);
}
inline void store_words(const Word16& x, void* to) {
  const Half16 narrow = __builtin_convertvector(x, Half16);
  memcpy(to, &narrow, sizeof narrow);
}
// to_bf16 and to_f16, sixteen at once.
inline void store_lanes(const Float16& x, bf16* to) {
  const Word16 u = as<Word16>(x);
  const Word16 nan = as<Word16>((u & 0x7fffffffu) > 0x7f800000u);
  const Word16 rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16, quiet = u >> 16 | 0x40u;
  store_words((quiet & nan) | (rounded & ~nan), to);
}
inline void store_lanes(const Float16& x, f16* to) {
  const Word16 u = as<Word16>(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  const Word16 normal = (a + 0xfffu + (a >> 13 & 1u) - 0x38000000u) >> 13;
  const Word16 small = as<Word16>(as<Float16>(a) + 0.5f) - 0x3f000000u;
  const Word16 nan = as<Word16>(a > 0x7f800000u);
  const Word16 large = (nan & 0x7e00u) | (~nan & 0x7c00u);
  const Word16 is_large = as<Word16>(a >= 0x47800000u), is_small = as<Word16>(a < 0x38800000u);
  const Word16 finite = (is_small & small) | (~is_small & normal);
  store_words(sign | (is_large & large) | (~is_large & finite), to);
}

#if !defined(__AVX512F__)
// All bits of a lane where its bit is set. `bits`: two bytes.
inline Word16 lanes_set(const uint8_t* bits) {
  uint16_t word;
  memcpy(&word, bits, 2);
  const Word16 place = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                        1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const Word16 set = (Word16{} + word) & place;
  return as<Word16>(set == place);
}
#endif

// Zeros where the bit is not set, whatever stood there (NaN too). `bits`: two bytes.
inline Float16 keep_lanes(const uint8_t* bits, const Float16& x) {
#if defined(__AVX512F__)
  uint16_t word;
  memcpy(&word, bits, 2);
  return as<Float16>(_mm512_maskz_mov_ps(__mmask16(word), as<__m512>(x)));
#else
  return as<Float16>(as<Word16>(x) & lanes_set(bits));
#endif
}

// `yes` where the bit is set, `no` elsewhere, bit for bit. `bits`: two bytes.
inline Float16 choose_lanes(const uint8_t* bits, const Float16& yes, const Float16& no) {
#if defined(__AVX512F__)
  uint16_t word;
  memcpy(&word, bits, 2);
  return as<Float16>(_mm512_mask_mov_ps(as<__m512>(no), __mmask16(word), as<__m512>(yes)));
#else
  const Word16 set = lanes_set(bits);
  return as<Float16>((as<Word16>(yes) & set) | (as<Word16>(no) & ~set));
#endif
}

template <class T>
inline void widen_as(const T* from, int n, const uint8_t* bits, float* to) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Float16 x = load_lanes(from + i);
    if (bits) x = keep_lanes(bits + i / 8, x);
    memcpy(to + i, &x, sizeof x);
  }
  for (; i < n; ++i) to[i] = !bits || (bits[i / 8] >> (i % 8) & 1) ? to_float(from[i]) : 0.f;
}

// `n` entries from place `at` (a multiple of 16) of the tensor at `address` -> `to`. `bits`: of the first of
// them, or null.
inline void widen(int64_t address, int64_t dtype, int64_t at, int n, const uint8_t* bits, float* to) {
  if (dtype == kF32)
    widen_as(reinterpret_cast<const float*>(address) + at, n, bits, to);
  else if (dtype == kF16)
    widen_as(reinterpret_cast<const f16*>(address) + at, n, bits, to);
  else
    widen_as(reinterpret_cast<const bf16*>(address) + at, n, bits, to);
}

}  // namespace
}  // namespace fu::FU_ISA
