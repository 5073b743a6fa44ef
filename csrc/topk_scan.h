// topk_mask on a CPU, the loops over entries: 64 entries are compared with a bracket at once and give two
// words.
//
// Included by topk.cpp only, which is compiled once per instruction set.
#pragma once

#include "topk.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 headers leave a placeholder uninitialised and warn of it wherever they are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fu::FU_ISA {
namespace {

// Comparisons of floats treat subnormals as zero when the caller has set the processor to do so
// (torch.set_flush_denormal): not while we select.
struct ExactFloats {
#if defined(__AVX2__)
  unsigned before = _mm_getcsr();
  ExactFloats() { _mm_setcsr((before & ~0x8040u) | 0x1f80u); }
  ~ExactFloats() { _mm_setcsr(before); }
#else
  ExactFloats() {}
  ~ExactFloats() {}
#endif
  ExactFloats(const ExactFloats&) = delete;
};

// Keys in [lo, hi] are undecided, larger ones are in. `flo`, `fhi`: the same as values.
struct Bracket {
  uint32_t lo, hi;
  float flo, fhi;
};

// Clips to keys that values have, so that comparing keys and comparing values say the same.
inline Bracket make_bracket(uint32_t lo, uint32_t hi, bool absolute) {
  const uint32_t least = topk_key_min(absolute), most = topk_key_max(absolute);
  if (lo < least) lo = least;
  if (hi < least) hi = least;
  if (lo > most) lo = most;
  if (hi > most) hi = most;
  if (!absolute && lo == 0x7fffffffu) lo = 0x80000000u;  // would be -0.0
  if (!absolute && hi == 0x7fffffffu) hi = 0x7ffffffeu;
  return {lo, hi, topk_unkey(lo, absolute), topk_unkey(hi, absolute)};
}

template <class T, bool Abs>
inline uint32_t key_of(T x) {
  return topk_key(float_bits(to_float(x)), Abs);
}

template <class T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<f16> = true;

struct Words {
  uint64_t above, within;
};

// Compares 64 entries. The sum of all values is kept to see NaN: it is NaN when one of them is (or when both
// infinities are there: the caller then looks closer).
template <class T, bool Abs>
struct Scanner {
#if defined(__AVX512F__)
  __m512 lo, hi, sum = _mm512_setzero_ps();
  explicit Scanner(const Bracket& b) : lo(_mm512_set1_ps(b.flo)), hi(_mm512_set1_ps(b.fhi)) {}
  static __m512 load(const T* p) {
    __m512 v;
    if constexpr (sizeof(T) == 4) {
      v = _mm512_loadu_ps(p);
    } else {
      const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      if constexpr (kIsHalf<T>)
        v = _mm512_cvtph_ps(h);
      else
        v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }
    return Abs ? _mm512_abs_ps(v) : v;
  }
  Words operator()(const T* p) {
    const __m512 a = load(p), b = load(p + 16), c = load(p + 32), d = load(p + 48);
    sum = _mm512_add_ps(sum, _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
    const auto join = [](__mmask16 w, __mmask16 x, __mmask16 y, __mmask16 z) {
      return uint64_t(_mm512_kunpackd(_mm512_kunpackw(z, y), _mm512_kunpackw(x, w)));
    };
    const uint64_t above = join(_mm512_cmp_ps_mask(a, hi, _CMP_GT_OQ), _mm512_cmp_ps_mask(b, hi, _CMP_GT_OQ),
                                _mm512_cmp_ps_mask(c, hi, _CMP_GT_OQ), _mm512_cmp_ps_mask(d, hi, _CMP_GT_OQ));
    const uint64_t from = join(_mm512_cmp_ps_mask(a, lo, _CMP_GE_OQ), _mm512_cmp_ps_mask(b, lo, _CMP_GE_OQ),
                               _mm512_cmp_ps_mask(c, lo, _CMP_GE_OQ), _mm512_cmp_ps_mask(d, lo, _CMP_GE_OQ));
    return {above, from & ~above};
  }
  bool odd() const { return _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) != 0; }
#elif defined(__AVX2__)
  __m256 lo, hi, sum = _mm256_setzero_ps();
  explicit Scanner(const Bracket& b) : lo(_mm256_set1_ps(b.flo)), hi(_mm256_set1_ps(b.fhi)) {}
  static __m256 load(const T* p) {
    __m256 v;
    if constexpr (sizeof(T) == 4) {
      v = _mm256_loadu_ps(p);
    } else {
      const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (kIsHalf<T>)
        v = _mm256_cvtph_ps(h);
      else
        v = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }
    return Abs ? _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v) : v;
  }
  Words operator()(const T* p) {
    uint64_t above = 0, from = 0;
    for (int i = 0; i < 8; ++i) {
      const __m256 v = load(p + 8 * i);
      sum = _mm256_add_ps(sum, v);
      above |= uint64_t(uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(v, hi, _CMP_GT_OQ)))) << (8 * i);
      from |= uint64_t(uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(v, lo, _CMP_GE_OQ)))) << (8 * i);
    }
    return {above, from & ~above};
  }
  bool odd() const { return _mm256_movemask_ps(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q)) != 0; }
#else
  uint32_t lo, hi;
  bool nan = false;
  explicit Scanner(const Bracket& b) : lo(b.lo), hi(b.hi) {}
  Words operator()(const T* p) {
    Words w{0, 0};
    for (int i = 0; i < 64; ++i) {
      const uint32_t key = key_of<T, Abs>(p[i]);
      nan |= key == 0;
      w.above |= uint64_t(key > hi) << i;
      w.within |= uint64_t(key >= lo && key <= hi) << i;
    }
    return w;
  }
  bool odd() const { return nan; }
#endif
};

inline void store_word(uint8_t* dst, uint64_t word, int64_t entries) {
  memcpy(dst, &word, size_t(entries >= 64 ? 8 : (entries + 7) / 8));
}

inline void or_word(uint8_t* dst, uint64_t word, int64_t entries) {
  for (int64_t i = 0; i < (entries >= 64 ? 8 : (entries + 7) / 8); ++i) dst[i] |= uint8_t(word >> (8 * i));
}

// The lowest `n` set bits.
inline uint64_t lowest_bits(uint64_t word, int64_t n) {
  uint64_t out = 0;
  for (; n > 0 && word; --n) {
    out |= word & (~word + 1);
    word &= word - 1;
  }
  return out;
}

template <class T, bool Abs>
int64_t count_nan(const T* x, int64_t n) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += key_of<T, Abs>(x[i]) == 0;
  return sum;
}

// Compares a run of n entries: the decided bits go to `dst` (which starts on a byte), the undecided ones to
// within[ceil(n / 64)]. Adds up what it saw.
struct Seen {
  int64_t above = 0, within = 0, nan = 0;
};

template <class T, bool Abs>
void scan_run(const T* x, int64_t n, const Bracket& bracket, uint8_t* dst, uint64_t* within, Seen* seen) {
  Scanner<T, Abs> scan(bracket);
  int64_t above = 0, inside = 0, i = 0;
  for (; i + 64 <= n; i += 64) {
    const Words w = scan(x + i);
    store_word(dst + i / 8, w.above, 64);
    within[i / 64] = w.within;
    above += __builtin_popcountll(w.above);
    inside += __builtin_popcountll(w.within);
  }
  if (i < n) {
    T tail[64] = {};
    memcpy(tail, x + i, size_t(n - i) * sizeof(T));
    const Words w = scan(tail);
    const uint64_t valid = (uint64_t(1) << (n - i)) - 1;
    store_word(dst + i / 8, w.above & valid, n - i);
    within[i / 64] = w.within & valid;
    above += __builtin_popcountll(w.above & valid);
    inside += __builtin_popcountll(w.within & valid);
  }
  seen->above += above;
  seen->within += inside;
  if (scan.odd()) seen->nan += count_nan<T, Abs>(x, n);
}

}  // namespace
}  // namespace fu::FU_ISA
