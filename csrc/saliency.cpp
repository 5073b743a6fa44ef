#include "saliency.h"

#if defined(__AVX2__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operand inside its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

namespace fu::FU_ISA {
namespace {

// Entries of a piece: small enough to share a short list fairly, long enough to stream.
constexpr int64_t kPiece = 1 << 15;

inline float absolute(float x) {
  return bits_float(float_bits(x) & 0x7fffffffu);
}

template <int Kind>
inline float term(float g, float w) {
  if constexpr (Kind == kAbs) return absolute(g);
  if constexpr (Kind == kSquare) return g * g;
  if constexpr (Kind == kSigned) return g;
  return absolute(w * g);
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Reg = __m512;
inline Reg load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline Reg load(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline Reg load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(float* p, Reg x) {
  _mm512_storeu_ps(p, x);
}
inline Reg absolute(Reg x) {
  return _mm512_abs_ps(x);
}
inline Reg add(Reg a, Reg b) {
  return _mm512_add_ps(a, b);
}
inline Reg mul(Reg a, Reg b) {
  return _mm512_mul_ps(a, b);
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Reg = __m256;
inline Reg load(const float* p) {
  return _mm256_loadu_ps(p);
}
inline Reg load(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline Reg load(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(float* p, Reg x) {
  _mm256_storeu_ps(p, x);
}
inline Reg absolute(Reg x) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x);
}
inline Reg add(Reg a, Reg b) {
  return _mm256_add_ps(a, b);
}
inline Reg mul(Reg a, Reg b) {
  return _mm256_mul_ps(a, b);
}

#endif

template <int Kind, class G, class W>
void run(float* s, const G* g, const W* w, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + kLanes <= n; i += kLanes) {
    Reg x = load(g + i);
    if constexpr (Kind == kSquare) x = mul(x, x);
    if constexpr (Kind == kWeightGrad) x = mul(load(w + i), x);
    if constexpr (Kind == kAbs || Kind == kWeightGrad) x = absolute(x);
    store(s + i, add(load(s + i), x));
  }
#endif
  for (; i < n; ++i) s[i] += term<Kind>(to_float(g[i]), Kind == kWeightGrad ? to_float(w[i]) : 0.f);
}

template <int Kind, class G>
void by_weight(const SaliencyItem& t, int64_t at, int64_t n) {
  const G* g = static_cast<const G*>(t.grad) + at;
  if constexpr (Kind != kWeightGrad) {
    run<Kind>(t.score + at, g, static_cast<const float*>(nullptr), n);
  } else if (t.weight_dtype == kF32) {
    run<Kind>(t.score + at, g, static_cast<const float*>(t.weight) + at, n);
  } else if (t.weight_dtype == kF16) {
    run<Kind>(t.score + at, g, static_cast<const f16*>(t.weight) + at, n);
  } else {
    run<Kind>(t.score + at, g, static_cast<const bf16*>(t.weight) + at, n);
  }
}

template <int Kind>
void by_grad(const SaliencyItem& t, int64_t at, int64_t n) {
  if (t.grad_dtype == kF32)
    by_weight<Kind, float>(t, at, n);
  else if (t.grad_dtype == kF16)
    by_weight<Kind, f16>(t, at, n);
  else
    by_weight<Kind, bf16>(t, at, n);
}

void by_kind(int kind, const SaliencyItem& t, int64_t at, int64_t n) {
  switch (kind) {
    case kAbs:
      return by_grad<kAbs>(t, at, n);
    case kSquare:
      return by_grad<kSquare>(t, at, n);
    case kSigned:
      return by_grad<kSigned>(t, at, n);
    default:
      return by_grad<kWeightGrad>(t, at, n);
  }
}

}  // namespace

void saliency_accumulate(const SaliencyItem* items, int64_t count, int kind, int64_t* first_piece) {
  first_piece[0] = 0;
  for (int64_t t = 0; t < count; ++t)
    first_piece[t + 1] = first_piece[t] + (items[t].numel + kPiece - 1) / kPiece;
  const int64_t pieces = first_piece[count];
#pragma omp parallel for schedule(static) if (pieces > 1)
  for (int64_t i = 0; i < pieces; ++i) {
    int64_t low = 0, high = count;  // first_piece[low] <= i < first_piece[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_piece[middle] <= i ? low : high) = middle;
    }
    const int64_t at = (i - first_piece[low]) * kPiece, left = items[low].numel - at;
    by_kind(kind, items[low], at, left < kPiece ? left : kPiece);
  }
}

}  // namespace fu::FU_ISA
