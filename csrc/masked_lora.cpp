#include "masked_lora.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operand inside its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

namespace fu::FU_ISA {
namespace {

// Entries up to which one thread is done before the others are awake.
constexpr int64_t kSerial = 1 << 16;

// n entries of one row.
template <class W, class O>
void add_run(const W* w, const float* d, const uint8_t* bits, int64_t n, float scale, O* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint32_t byte = bits[i / 8];
    for (int j = 0; j < 8; ++j) {
      const float x = to_float(w[i + j]), y = x + scale * d[i + j];
      out[i + j] = from_float<O>(byte >> j & 1u ? y : x);
    }
  }
  for (; i < n; ++i) {
    const float x = to_float(w[i]);
    out[i] = from_float<O>(bits[i / 8] >> (i & 7) & 1 ? x + scale * d[i] : x);
  }
}

#if defined(__AVX512F__)
template <>
void add_run<float, float>(const float* w, const float* d, const uint8_t* bits, int64_t n, float scale,
                           float* out) {
  const __m512 s = _mm512_set1_ps(scale);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    uint16_t m;
    memcpy(&m, bits + i / 8, 2);
    const __m512 x = _mm512_loadu_ps(w + i);
    _mm512_storeu_ps(out + i, _mm512_mask3_fmadd_ps(s, _mm512_loadu_ps(d + i), x, m));
  }
  for (; i < n; ++i) {
    const float y = __builtin_fmaf(scale, d[i], w[i]);
    out[i] = bits[i / 8] >> (i & 7) & 1 ? y : w[i];
  }
}
#endif

// Of the bits of an entry, whatever its type: what is masked out becomes +0, also NaN and infinity.
template <class U>
void keep_run(U* x, const uint8_t* bits, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  constexpr int kLanes = 64 / sizeof(U);
  for (; i + kLanes <= n; i += kLanes) {
    uint32_t m = 0;
    memcpy(&m, bits + i / 8, kLanes / 8);
    if constexpr (sizeof(U) == 4)
      _mm512_storeu_si512(x + i, _mm512_maskz_loadu_epi32(static_cast<__mmask16>(m), x + i));
    else
      _mm512_storeu_si512(x + i, _mm512_maskz_loadu_epi16(m, x + i));
  }
#endif
  for (; i + 8 <= n; i += 8) {
    const uint32_t byte = bits[i / 8];
    for (int j = 0; j < 8; ++j) x[i + j] &= U(0u - (byte >> j & 1u));
  }
  for (; i < n; ++i) x[i] &= U(0u - (bits[i / 8] >> (i & 7) & 1u));
}

template <class W, class O>
void add_rows(const void* weight, const float* delta, const uint8_t* bits, int64_t rows, int64_t cols,
              float scale, void* out) {
  const int64_t width = ceil_div(cols, 8);
#pragma omp parallel for schedule(static) if (rows * cols > kSerial)
  for (int64_t r = 0; r < rows; ++r)
    add_run<W, O>(static_cast<const W*>(weight) + r * cols, delta + r * cols, bits + r * width, cols, scale,
                  static_cast<O*>(out) + r * cols);
}

template <class U>
void keep_rows(void* x, const uint8_t* bits, int64_t rows, int64_t cols) {
  const int64_t width = ceil_div(cols, 8);
#pragma omp parallel for schedule(static) if (rows * cols > kSerial)
  for (int64_t r = 0; r < rows; ++r) keep_run(static_cast<U*>(x) + r * cols, bits + r * width, cols);
}

}  // namespace

void masked_lora_weight(const void* weight, int weight_dtype, const float* delta, const uint8_t* bits,
                        int64_t rows, int64_t cols, float scale, void* out, int out_dtype) {
  if (weight_dtype == kF16)
    add_rows<f16, f16>(weight, delta, bits, rows, cols, scale, out);
  else if (weight_dtype == kBF16)
    add_rows<bf16, bf16>(weight, delta, bits, rows, cols, scale, out);
  else if (out_dtype == kF16)
    add_rows<float, f16>(weight, delta, bits, rows, cols, scale, out);
  else if (out_dtype == kBF16)
    add_rows<float, bf16>(weight, delta, bits, rows, cols, scale, out);
  else
    add_rows<float, float>(weight, delta, bits, rows, cols, scale, out);
}

void masked_lora_keep(void* x, int dtype, const uint8_t* bits, int64_t rows, int64_t cols) {
  if (dtype == kF32)
    keep_rows<uint32_t>(x, bits, rows, cols);
  else
    keep_rows<uint16_t>(x, bits, rows, cols);
}

}  // namespace fu::FU_ISA
