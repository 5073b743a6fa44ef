#include "adamw.h"

#include "stochastic.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fu::FU_ISA {
namespace {

using namespace fu::masked;

// Round to nearest even; NaN stays NaN.
inline f16 to_f16(float x) {
  const uint32_t u = float_bits(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  const uint32_t normal = (a + 0xfffu + (a >> 13 & 1u) - 0x38000000u) >> 13;
  // Added to 0.5, whose last place is the smallest half, a subnormal half is rounded by the addition itself.
  const uint32_t small = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;
  const uint32_t large = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return f16{uint16_t(sign | (a >= 0x47800000u ? large : a < 0x38800000u ? small : normal))};
}

// How a result is written: nearest, or at random (bf16 with a key).
inline void write(float* p, float x, uint32_t, bool) {
  *p = x;
}
inline void write(f16* p, float x, uint32_t, bool) {
  *p = to_f16(x);
}
inline void write(bf16* p, float x, uint32_t random, bool stochastic) {
  *p = stochastic ? to_bf16_stochastic(x, random) : to_bf16(x);
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

// Positions of the set bits of a block, ascending; room for 16 more than the block is needed.
inline int list_bits(const uint8_t* bits, int n, int32_t* out) {
  int count = 0;
  for (int at = 0; at < n; at += 64) {
    uint64_t word = 0;
    const int left = (n - at + 7) / 8;
    memcpy(&word, bits + at / 8, left < 8 ? left : 8);
#if defined(__AVX512F__)
    if (__builtin_popcountll(word) > 6) {
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      for (int k = 0; k < 64; k += 16) {
        const __mmask16 set = __mmask16(word >> k);
        const __m512i place = _mm512_add_epi32(lane, _mm512_set1_epi32(at + k));
        _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(set, place));
        count += __builtin_popcount(set);
      }
      continue;
    }
#endif
    while (word) {
      out[count++] = at + __builtin_ctzll(word);
      word &= word - 1;
    }
  }
  return count;
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

// One block: `index` lists the entries that may move (null: all n of them), `at` is their place in the
// compact arrays.
template <class Rule, class P, class G>
void update(const Tensor<P, G>& t, const Rule& rule, int64_t start, const int32_t* index, int n, int64_t at) {
  alignas(64) float p[kBlock], g[kBlock], unused[kBlock];
  alignas(64) uint32_t random[kBlock];
  P* const param = t.param + start;
  const G* const grad = t.grad + start;
  if (index) {
    for (int i = 0; i < n; ++i) g[i] = to_float(grad[index[i]]);
    if (!t.master)
      for (int i = 0; i < n; ++i) p[i] = to_float(param[index[i]]);
  } else {
    for (int i = 0; i < n; ++i) g[i] = to_float(grad[i]);
    if (!t.master)
      for (int i = 0; i < n; ++i) p[i] = to_float(param[i]);
  }
  if (t.master) memcpy(p, t.master + at, size_t(n) * sizeof(float));
  float* const first = t.first ? t.first + at : unused;
  float* const second = t.second ? t.second + at : unused;
  const float gs = t.grad_scale;
  if (!t.first || !t.second) memset(unused, 0, size_t(n) * sizeof(float));
  if (t.scale) {
    const float* const scale = t.scale + at;
#pragma omp simd
    for (int i = 0; i < n; ++i) p[i] = rule(p[i], g[i] * gs, first + i, second + i, scale[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) p[i] = rule(p[i], g[i] * gs, first + i, second + i, 1.0f);
  }
  if (t.master) memcpy(t.master + at, p, size_t(n) * sizeof(float));
  if (t.stochastic && sizeof(P) == 2) {
    const RoundKey key = with_high_word(t.key, uint32_t(uint64_t(start) >> 32));
    const uint32_t low = uint32_t(start);
    if (index)
      for (int i = 0; i < n; ++i) random[i] = counter_random(low + uint32_t(index[i]), key);
    else
      for (int i = 0; i < n; ++i) random[i] = counter_random(low + uint32_t(i), key);
  }
  if (index)
    for (int i = 0; i < n; ++i) write(param + index[i], p[i], random[i], t.stochastic);
  else
    for (int i = 0; i < n; ++i) write(param + i, p[i], random[i], t.stochastic);
}

template <class P, class G>
inline void prefetch(const Tensor<P, G>& t, int64_t start, const int32_t* index, int n) {
  for (int i = 0; i < n; ++i) {
    __builtin_prefetch(t.grad + start + index[i], 0, 3);
    __builtin_prefetch(t.param + start + index[i], 1, 3);
  }
}

template <class Rule, class P, class G>
void update_unit(const Work& work, int64_t t, int64_t unit) {
  const Tensor<P, G> tensor(work, t);
  const Rule rule(work.hyper + t * kHyper);
  const int64_t begin = unit * kUnit;
  const int64_t end = begin + kUnit < tensor.numel ? begin + kUnit : tensor.numel;
  if (!tensor.bits) {
    for (int64_t i = begin; i < end; i += kBlock)
      update(tensor, rule, i, nullptr, int(end - i < kBlock ? end - i : kBlock), i);
    return;
  }
  // The list of the next block is made, and its lines are asked for, before the present one is worked on.
  int32_t lists[2][kBlock + 16];
  int counts[2] = {0, 0};
  auto prepare = [&](int64_t i, int slot) {
    const int n = int(end - i < kBlock ? end - i : kBlock);
    counts[slot] = list_bits(tensor.bits + i / 8, n, lists[slot]);
    if (counts[slot] < int(kBlock / 4)) prefetch(tensor, i, lists[slot], counts[slot]);
  };
  prepare(begin, 0);
  int slot = 0;
  for (int64_t i = begin; i < end; i += kBlock, slot ^= 1) {
    if (i + kBlock < end) prepare(i + kBlock, slot ^ 1);
    const int n = counts[slot];
    if (n) update(tensor, rule, i, n == kBlock ? nullptr : lists[slot], n, tensor.prefix[i / kBlock]);
  }
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
  int32_t list[kBlock + 16];
  alignas(64) float g[kBlock];
  double total = 0;
  for (int64_t i = begin; i < end; i += kBlock) {
    int n = int(end - i < kBlock ? end - i : kBlock);
    if (bits) {
      n = list_bits(bits + i / 8, n, list);
      for (int k = 0; k < n; ++k) g[k] = to_float(grad[i + list[k]]);
    } else {
      for (int k = 0; k < n; ++k) g[k] = to_float(grad[i + k]);
    }
    // Sixteen running sums a block in a fixed order: the result does not depend on the number of threads.
    float sums[16] = {};
    int k = 0;
    for (; k + 16 <= n; k += 16)
      for (int lane = 0; lane < 16; ++lane) sums[lane] += g[k + lane] * g[k + lane];
    for (; k < n; ++k) sums[k % 16] += g[k] * g[k];
    for (int lane = 0; lane < 16; ++lane) total += double(sums[lane]);
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
