#include "hamu.h"

#include "stochastic.h"
#include "widen.h"

namespace fu::FU_ISA {
namespace {

using namespace fu::hamu;

constexpr int kBlock = 1024;

template <class T>
inline void add(const T* from, int n, float factor, float* to) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Float16 x = load_lanes(to + i) + factor * load_lanes(from + i);
    memcpy(to + i, &x, sizeof x);
  }
  for (; i < n; ++i) to[i] += factor * to_float(from[i]);
}

// What is written where the bits say so; `place`: number of the first entry, for the random numbers.
inline float written(float x, uint32_t, bool, const float*) {
  return x;
}
inline f16 written(float x, uint32_t, bool, const f16*) {
  return to_f16(x);
}
inline bf16 written(float x, uint32_t random, bool stochastic, const bf16*) {
  return stochastic ? to_bf16_stochastic(x, random) : to_bf16(x);
}

template <class P>
void combine(const int64_t* row, int64_t groups, const float* factors, const uint32_t* keys, int64_t begin,
             int64_t end) {
  P* const param = reinterpret_cast<P*>(row[kParam]);
  const uint8_t* const bits = reinterpret_cast<const uint8_t*>(row[kBits]);
  const bool stochastic = row[kStochastic] != 0;
  alignas(64) float change[kBlock];
  alignas(64) P after[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = int(end - at < kBlock ? end - at : kBlock);
    memset(change, 0, sizeof change);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t address = row[kFields + g], dtype = row[kFields + groups + g];
      if (!address || factors[g] == 0.f) continue;
      if (dtype == kF32)
        add(reinterpret_cast<const float*>(address) + at, n, factors[g], change);
      else if (dtype == kF16)
        add(reinterpret_cast<const f16*>(address) + at, n, factors[g], change);
      else
        add(reinterpret_cast<const bf16*>(address) + at, n, factors[g], change);
    }
    const uint64_t first = uint64_t(row[kFirst] + at);
    const RoundKey key = with_high_word({keys[0], keys[1]}, uint32_t(first >> 32));
    if (!stochastic) {
      for (int i = 0; i < n; ++i) after[i] = written(to_float(param[at + i]) + change[i], 0, false, param);
    } else if (uint32_t(first >> 32) == uint32_t((first + uint64_t(n)) >> 32)) {
      for (int i = 0; i < n; ++i)
        after[i] = written(to_float(param[at + i]) + change[i],
                           counter_random(uint32_t(first) + uint32_t(i), key), true, param);
    } else {
      for (int i = 0; i < n; ++i) {
        const uint64_t index = first + uint64_t(i);
        const RoundKey own = with_high_word({keys[0], keys[1]}, uint32_t(index >> 32));
        after[i] =
            written(to_float(param[at + i]) + change[i], counter_random(uint32_t(index), own), true, param);
      }
    }
    if (!bits) {
      memcpy(param + at, after, size_t(n) * sizeof(P));
      continue;
    }
    for (int i = 0; i < n; i += 8) {
      const uint8_t byte = bits[(at + i) / 8];
      if (!byte) continue;
      const int m = n - i < 8 ? n - i : 8;
      for (int k = 0; k < m; ++k) param[at + i + k] = byte >> k & 1 ? after[i + k] : param[at + i + k];
    }
  }
}

}  // namespace

void hamu_combine(const int64_t* table, int64_t groups, const float* factors, const uint32_t* keys,
                  const int32_t* unit_tensor, const int64_t* first_unit, int64_t units) {
  const int64_t fields = kFields + 2 * groups;
#pragma omp parallel for schedule(static) if (units > 1)
  for (int64_t i = 0; i < units; ++i) {
    const int64_t t = unit_tensor[i], begin = (i - first_unit[t]) * kUnit;
    const int64_t* const row = table + t * fields;
    const int64_t end = begin + kUnit < row[kNumel] ? begin + kUnit : row[kNumel];
    if (row[kParamType] == kF32)
      combine<float>(row, groups, factors + t * groups, keys + 2 * t, begin, end);
    else if (row[kParamType] == kF16)
      combine<f16>(row, groups, factors + t * groups, keys + 2 * t, begin, end);
    else
      combine<bf16>(row, groups, factors + t * groups, keys + 2 * t, begin, end);
  }
}

}  // namespace fu::FU_ISA
