#include "adamw.h"

#include "stochastic.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header sets off the warning in every function that uses an intrinsic with a zeroing mask.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace fu::FU_ISA {
namespace {

using namespace fu::masked;

// What is written of a result: itself, or its rounding to nearest or (bf16) at random.
inline float rounded(float x, uint32_t, bool, const float*) {
  return x;
}
inline f16 rounded(float x, uint32_t, bool, const f16*) {
  return to_f16(x);
}
inline bf16 rounded(float x, uint32_t random, bool stochastic, const bf16*) {
  return stochastic ? to_bf16_stochastic(x, random) : to_bf16(x);
}

struct Adam {
  float w1, beta2, w2, eps, lr_decay, step_size, root_correction;

  explicit Adam(const float* h)
      : w1(h[0]), beta2(h[1]), w2(h[2]), eps(h[3]), lr_decay(h[4]), step_size(h[5]), root_correction(h[6]) {}

  inline float operator()(float p, float g, float* m, float* v, float s) const {
    p -= lr_decay * s * p;
    *m += w1 * (g - *m);
    *v = *v * beta2 + w2 * g * g;
    return p - step_size * s * (*m / (sqrtf_(*v) / root_correction + eps));
  }

  static inline float sqrtf_(float x) { return __builtin_sqrtf(x); }
};

struct Sgd {
  float momentum, gain, decay, lr;
  bool nesterov, first;

  explicit Sgd(const float* h)
      : momentum(h[0]), gain(h[1]), decay(h[2]), lr(h[3]), nesterov(h[4] != 0), first(h[5] != 0) {}

  inline float operator()(float p, float g, float* m, float*, float s) const {
    g += decay * p;
    const float b = first ? g : *m * momentum + gain * g;
    *m = b;
    return p - lr * s * (nesterov ? g + momentum * b : b);
  }
};

// Room that list_bits needs behind what it lists.
constexpr int kSlack = 16;

// The first `places` set bits of `word` (garbage behind the last one), without a branch.
template <int places>
inline void list_word(uint64_t word, int32_t at, int32_t* out) {
  for (int k = 0; k < places; ++k) {
    out[k] = at + int32_t(__builtin_ctzll(word | 1ull << 63));
    word &= word - 1;
  }
}

// Positions of the set bits of a block of n entries, plus `base`, ascending. `count`: how many there are,
// known beforehand; the choice of the way by it keeps branches predictable.
inline void list_bits(const uint8_t* bits, int n, int count, int32_t base, int32_t* out) {
  const int words = (n + 63) / 64;
  for (int w = 0; w < words; ++w) {
    uint64_t word = 0;
    const int left = (n + 7) / 8 - w * 8;
    if (left >= 8)
      memcpy(&word, bits + w * 8, 8);
    else
      memcpy(&word, bits + w * 8, size_t(left));
    const int set = __builtin_popcountll(word), at = base + w * 64;
    if (count <= words && set <= 4) {
      list_word<4>(word, at, out);
    } else if (count <= 4 * words && set <= 8) {
      list_word<8>(word, at, out);
    } else {
#if defined(__AVX512F__)
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      int32_t* to = out;
      for (int k = 0; k < 64; k += 16) {
        const __mmask16 here = __mmask16(word >> k);
        const __m512i place = _mm512_add_epi32(lane, _mm512_set1_epi32(at + k));
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(here, place));
        to += __builtin_popcount(here);
      }
#else
      int32_t* to = out;
      while (word) {
        *to++ = at + __builtin_ctzll(word);
        word &= word - 1;
      }
#endif
    }
    out += set;
  }
}

template <class P, class G>
struct Tensor {
  P* param;
  const G* grad;
  const uint8_t* bits;
  const int64_t* prefix;
  float *first, *second, *master;
  const float* scale;
  int64_t numel;
  float grad_scale;
  bool stochastic;
  RoundKey key;

  Tensor(const Work& work, int64_t t) {
    const int64_t* row = work.table + t * kFields;
    param = reinterpret_cast<P*>(row[kParam]);
    grad = reinterpret_cast<const G*>(row[kGrad]);
    bits = reinterpret_cast<const uint8_t*>(row[kBits]);
    prefix = reinterpret_cast<const int64_t*>(row[kPrefix]);
    first = reinterpret_cast<float*>(row[kFirst]);
    second = reinterpret_cast<float*>(row[kSecond]);
    master = reinterpret_cast<float*>(row[kMaster]);
    scale = reinterpret_cast<const float*>(row[kScale]);
    numel = row[kNumel];
    grad_scale = work.hyper[t * kHyper + 7] * (work.grad_scale ? *work.grad_scale : 1.0f);
    stochastic = row[kStochastic] != 0;
    key = RoundKey{work.keys[2 * t], work.keys[2 * t + 1]};
  }
};

// Entries that are worked on at once: their parameters and gradients side by side in fp32.
constexpr int kBatch = 256;
// Blocks with a larger share of entries that may move than 1 / kDenseShare<P> go vector by vector (measured).
template <class P>
constexpr int kDenseShare = sizeof(P) == 4 ? 40 : 12;
constexpr int kRoom = kBatch + int(kBlock) + kSlack;

struct Buffers {
  alignas(64) float p[kRoom];
  alignas(64) float g[kRoom];
  alignas(64) float unused[kRoom];
  alignas(64) uint16_t narrow[kRoom];
  // Two lists of places in a unit: one is worked on while the lines of the other are on their way.
  alignas(64) int32_t list[2][kRoom];
};

// The rule on n entries whose compact state starts at place `at`; parameters and gradients stand in the
// buffers.
template <class Rule, class P, class G>
void apply(const Tensor<P, G>& t, const Rule& rule, Buffers& b, int n, int64_t at) {
  float* const p = b.p;
  const float* const g = b.g;
  float* const first = t.first ? t.first + at : b.unused;
  float* const second = t.second ? t.second + at : b.unused;
  if (!t.first) memset(b.unused, 0, size_t(n) * sizeof(float));
  if (t.master) memcpy(p, t.master + at, size_t(n) * sizeof(float));
  const float gs = t.grad_scale;
  if (t.scale) {
    const float* const scale = t.scale + at;
#pragma omp simd
    for (int i = 0; i < n; ++i) p[i] = rule(p[i], g[i] * gs, first + i, second + i, scale[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) p[i] = rule(p[i], g[i] * gs, first + i, second + i, 1.0f);
  }
  if (t.master) memcpy(t.master + at, p, size_t(n) * sizeof(float));
}

// The entries of a list; `start` is the place of the list's zero in the tensor.
template <class Rule, class P, class G>
void update_list(const Tensor<P, G>& t, const Rule& rule, Buffers& b, int64_t start, const int32_t* list,
                 int n, int64_t at) {
  P* const param = t.param + start;
  const G* const grad = t.grad + start;
  for (int i = 0; i < n; ++i) b.g[i] = to_float(grad[list[i]]);
  if (!t.master)
    for (int i = 0; i < n; ++i) b.p[i] = to_float(param[list[i]]);
  apply(t, rule, b, n, at);
  if constexpr (sizeof(P) == 4) {
    for (int i = 0; i < n; ++i) param[list[i]] = b.p[i];
  } else {
    // Apart from the scatter, so that the rounding vectorises.
    if (t.stochastic) {
      const RoundKey key = with_high_word(t.key, uint32_t(uint64_t(start) >> 32));
      for (int i = 0; i < n; ++i) {
        const uint32_t random = counter_random(uint32_t(start) + uint32_t(list[i]), key);
        b.narrow[i] = rounded(b.p[i], random, true, param).bits;
      }
    } else {
      for (int i = 0; i < n; ++i) b.narrow[i] = rounded(b.p[i], 0, false, param).bits;
    }
    for (int i = 0; i < n; ++i) param[list[i]].bits = b.narrow[i];
  }
}

// All of n entries.
template <class Rule, class P, class G>
void update_all_of(const Tensor<P, G>& t, const Rule& rule, Buffers& b, int64_t start, int n, int64_t at) {
  P* const param = t.param + start;
  const G* const grad = t.grad + start;
  for (int i = 0; i < n; ++i) b.g[i] = to_float(grad[i]);
  if (!t.master)
    for (int i = 0; i < n; ++i) b.p[i] = to_float(param[i]);
  apply(t, rule, b, n, at);
  if (t.stochastic) {
    const RoundKey key = with_high_word(t.key, uint32_t(uint64_t(start) >> 32));
    for (int i = 0; i < n; ++i) {
      const uint32_t random = counter_random(uint32_t(start) + uint32_t(i), key);
      param[i] = rounded(b.p[i], random, true, param);
    }
  } else {
    for (int i = 0; i < n; ++i) param[i] = rounded(b.p[i], 0, false, param);
  }
}

#if defined(__AVX512F__)
inline __m512 load16(const float* p, __mmask16 k) {
  return _mm512_maskz_loadu_ps(k, p);
}
inline __m512 load16(const bf16* p, __mmask16 k) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, p)), 16));
}
inline __m512 load16(const f16* p, __mmask16 k) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(k, p));
}

// counter_random of sixteen entries in a row.
inline __m512i random16(uint32_t first, RoundKey key) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i x = _mm512_add_epi32(lane, _mm512_set1_epi32(int32_t(first + key.a)));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  x = _mm512_mullo_epi32(x, _mm512_set1_epi32(int32_t(0x85ebca6bu)));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 13));
  x = _mm512_add_epi32(x, _mm512_set1_epi32(int32_t(key.b)));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
  x = _mm512_mullo_epi32(x, _mm512_set1_epi32(int32_t(0xc2b2ae35u)));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}
// As `rounded`, of sixteen entries in a row.
inline __m256i round16(__m512 x, bool stochastic, uint32_t first, RoundKey key, const bf16*) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i add =
      stochastic ? _mm512_and_si512(random16(first, key), _mm512_set1_epi32(0xffff))
                 : _mm512_add_epi32(_mm512_set1_epi32(0x7fff),
                                    _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1)));
  const __m512i inf = _mm512_set1_epi32(0x7f800000);
  const __mmask16 special = _mm512_cmpeq_epi32_mask(_mm512_and_si512(u, inf), inf);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  __m512i r = _mm512_mask_mov_epi32(_mm512_add_epi32(u, add), special, u);
  r = _mm512_mask_or_epi32(r, nan, r, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
inline __m256i round16(__m512 x, bool, uint32_t, RoundKey, const f16*) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Parameters and gradients of a block are pressed together, and parameters spread out again, vector by
// vector: less work than lists where more than some entries of a vector may move.
template <class Rule, class P, class G>
void update_dense(const Tensor<P, G>& t, const Rule& rule, Buffers& b, int64_t start, int n, int count,
                  int64_t at) {
  P* const param = t.param + start;
  const G* const grad = t.grad + start;
  uint16_t masks[kBlock / 16] = {};
  memcpy(masks, t.bits + start / 8, size_t(n + 7) / 8);
  const int vectors = (n + 15) / 16;
  int done = 0;
  for (int v = 0; v < vectors; ++v) {
    const __mmask16 k = masks[v];
    // The next block's lines, all of them: left to itself the hardware stops at every block to wait for
    // memory.
    __builtin_prefetch(grad + v * 16 + kBlock, 0, 3);
    __builtin_prefetch(param + v * 16 + kBlock, 0, 3);
    _mm512_storeu_ps(b.g + done, _mm512_maskz_compress_ps(k, load16(grad + v * 16, k)));
    if (!t.master) _mm512_storeu_ps(b.p + done, _mm512_maskz_compress_ps(k, load16(param + v * 16, k)));
    done += __builtin_popcount(k);
  }
  apply(t, rule, b, count, at);
  if constexpr (sizeof(P) == 4) {
    done = 0;
    for (int v = 0; v < vectors; ++v) {
      const __mmask16 k = masks[v];
      _mm512_mask_storeu_ps(param + v * 16, k, _mm512_maskz_expand_ps(k, _mm512_loadu_ps(b.p + done)));
      done += __builtin_popcount(k);
    }
  } else {
    const RoundKey key = with_high_word(t.key, uint32_t(uint64_t(start) >> 32));
    done = 0;
    for (int v = 0; v < vectors; ++v) {
      const __mmask16 k = masks[v];
      const __m512 x = _mm512_maskz_expand_ps(k, _mm512_loadu_ps(b.p + done));
      const uint32_t first = uint32_t(start) + uint32_t(v) * 16;
      _mm256_mask_storeu_epi16(param + v * 16, k, round16(x, t.stochastic, first, key, param));
      done += __builtin_popcount(k);
    }
  }
}
#endif

template <class P, class G>
inline void prefetch(const Tensor<P, G>& t, int64_t start, const int32_t* list, int n) {
  for (int i = 0; i < n; ++i) {
    __builtin_prefetch(t.grad + start + list[i], 0, 3);
    __builtin_prefetch(t.param + start + list[i], 1, 3);
  }
}

template <class Rule, class P, class G>
void update_unit(const Work& work, int64_t t, int64_t unit) {
  const Tensor<P, G> tensor(work, t);
  const Rule rule(work.hyper + t * kHyper);
  const int64_t begin = unit * kUnit;
  const int64_t end = begin + kUnit < tensor.numel ? begin + kUnit : tensor.numel;
  Buffers b;
  if (!tensor.bits) {
    for (int64_t i = begin; i < end; i += kBlock)
      update_all_of(tensor, rule, b, i, int(end - i < kBlock ? end - i : kBlock), i);
    return;
  }
  int slot = 0, counts[2] = {0, 0};
  int64_t places[2] = {0, 0};
  // Works off the list before the present one, and starts a new one.
  auto turn = [&] {
    const int other = slot ^ 1;
    if (counts[other]) update_list(tensor, rule, b, begin, b.list[other], counts[other], places[other]);
    counts[other] = 0;
    slot = other;
  };
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = int(end - i < kBlock ? end - i : kBlock);
    const int64_t at = tensor.prefix[i / kBlock];
    const int count = int(tensor.prefix[i / kBlock + 1] - at);
    if (count == 0) continue;
    if (count == n) {
      update_all_of(tensor, rule, b, i, n, at);
      if (counts[slot]) turn();
      continue;
    }
#if defined(__AVX512F__)
    if (count >= n / kDenseShare<P>) {
      update_dense(tensor, rule, b, i, n, count, at);
      if (counts[slot]) turn();
      continue;
    }
#endif
    int32_t* const list = b.list[slot] + counts[slot];
    if (counts[slot] == 0) places[slot] = at;
    list_bits(tensor.bits + i / 8, n, count, int32_t(i - begin), list);
    prefetch(tensor, begin, list, count);
    counts[slot] += count;
    if (counts[slot] >= kBatch) turn();
  }
  turn();
  turn();
}

template <class Rule, class P>
void update_typed(const Work& work, int64_t t, int64_t unit) {
  switch (work.table[t * kFields + kGradType]) {
    case kF16:
      return update_unit<Rule, P, f16>(work, t, unit);
    case kBF16:
      return update_unit<Rule, P, bf16>(work, t, unit);
    default:
      return update_unit<Rule, P, float>(work, t, unit);
  }
}

template <class Rule>
void update_all(const Work& work) {
#pragma omp parallel for schedule(static) if (work.units > 1)
  for (int64_t u = 0; u < work.units; ++u) {
    const int64_t t = work.unit_tensor[u], unit = u - work.first_unit[t];
    switch (work.table[t * kFields + kParamType]) {
      case kF16:
        update_typed<Rule, f16>(work, t, unit);
        break;
      case kBF16:
        update_typed<Rule, bf16>(work, t, unit);
        break;
      default:
        update_typed<Rule, float>(work, t, unit);
    }
  }
}

template <class G>
double sumsq_unit(const Work& work, int64_t t, int64_t unit) {
  const int64_t* row = work.table + t * kFields;
  const G* const grad = reinterpret_cast<const G*>(row[kGrad]);
  const uint8_t* const bits = reinterpret_cast<const uint8_t*>(row[kBits]);
  const int64_t begin = unit * kUnit;
  const int64_t end = begin + kUnit < row[kNumel] ? begin + kUnit : row[kNumel];
  const int64_t* const prefix = reinterpret_cast<const int64_t*>(row[kPrefix]);
  int32_t list[kBlock + kSlack];
  alignas(64) float g[kBlock];
  double total = 0;
  for (int64_t i = begin; i < end; i += kBlock) {
    int n = int(end - i < kBlock ? end - i : kBlock);
    if (bits) {
      const int count = int(prefix[i / kBlock + 1] - prefix[i / kBlock]);
      list_bits(bits + i / 8, n, count, 0, list);
      n = count;
      for (int k = 0; k < n; ++k) g[k] = to_float(grad[i + list[k]]);
    } else {
      for (int k = 0; k < n; ++k) g[k] = to_float(grad[i + k]);
    }
    // Sixteen running sums a block in a fixed order: the result does not depend on the number of threads. In
    // fp64, as squares of numbers below 1e-19 and above 1e19 leave the range of fp32.
    double sums[16] = {};
    int k = 0;
    for (; k + 16 <= n; k += 16)
      for (int lane = 0; lane < 16; ++lane) sums[lane] += double(g[k + lane]) * double(g[k + lane]);
    for (; k < n; ++k) sums[k % 16] += double(g[k]) * double(g[k]);
    for (int lane = 0; lane < 16; ++lane) total += sums[lane];
  }
  return total;
}

}  // namespace

void masked_adamw(const masked::Work& work) {
  update_all<Adam>(work);
}

void masked_sgd(const masked::Work& work) {
  update_all<Sgd>(work);
}

void masked_sumsq(const masked::Work& work, double* partial) {
#pragma omp parallel for schedule(static) if (work.units > 1)
  for (int64_t u = 0; u < work.units; ++u) {
    const int64_t t = work.unit_tensor[u], unit = u - work.first_unit[t];
    switch (work.table[t * kFields + kGradType]) {
      case kF16:
        partial[u] = sumsq_unit<f16>(work, t, unit);
        break;
      case kBF16:
        partial[u] = sumsq_unit<bf16>(work, t, unit);
        break;
      default:
        partial[u] = sumsq_unit<float>(work, t, unit);
    }
  }
}

}  // namespace fu::FU_ISA
