// topk_mask on a CPU: brackets for the k-th values from a sample of the scores. Included by topk.cpp only.
#pragma once

#include <cmath>
#include <cstdlib>
#include <new>

#include "topk_scan.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fu::FU_ISA {
namespace {

constexpr int64_t kUnit = 16;  // entries sampled together: a cache line of fp32
constexpr int64_t kMostUnits = 1 << 16;
constexpr int64_t kUnitsEach = 16;  // one unit in so many, until there are kMostUnits
constexpr int64_t kSmall = 8192;    // entries below which a sample does not pay
constexpr double kSigmas = 4.5;

// Thrown where no other thread is waiting, and turned into the code that the functions of topk.h return.
struct Failure {
  int code;
};

int available_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <class E>
struct Buffer {
  E* p = nullptr;
  int64_t n = 0, room = 0;
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(p); }
  // False where there is no memory; what was there stays.
  bool reserve(int64_t want) {
    if (want <= room) return true;
    if (want < 2 * room) want = 2 * room;
    void* q = realloc(static_cast<void*>(p), size_t(want) * sizeof(E));
    if (!q) return false;
    p = static_cast<E*>(q);
    room = want;
    return true;
  }
  bool resize(int64_t want) {
    if (!reserve(want)) return false;
    n = want;
    return true;
  }
};

template <class E>
struct Array {
  E* p;
  int64_t n;
  explicit Array(int64_t n_) : p(new (std::nothrow) E[size_t(n_)]()), n(n_) {
    if (!p) throw Failure{kTopkNoMemory};
  }
  Array(const Array&) = delete;
  ~Array() { delete[] p; }
  E& operator[](int64_t i) { return p[i]; }
};

// The r-th largest (r >= 1) of n keys.
uint32_t kth_largest(const uint32_t* keys, int64_t n, int64_t r) {
  Buffer<uint32_t> kept;
  for (;;) {
    uint32_t lo = keys[0], hi = keys[0];
    for (int64_t i = 1; i < n; ++i) {
      lo = keys[i] < lo ? keys[i] : lo;
      hi = keys[i] > hi ? keys[i] : hi;
    }
    if (n <= 4096 || lo == hi) {
      while (lo < hi) {
        const uint32_t mid = lo + (hi - lo) / 2 + 1;
        int32_t count = 0;
        for (int64_t i = 0; i < n; ++i) count += keys[i] >= mid;
        if (count >= r)
          lo = mid;
        else
          hi = mid - 1;
      }
      return lo;
    }
    int shift = 0;
    while ((hi - lo) >> shift >= uint32_t(kTopkBins)) ++shift;
    int64_t bins[kTopkBins] = {};
    for (int64_t i = 0; i < n; ++i) ++bins[(keys[i] - lo) >> shift];
    int b = kTopkBins - 1;
    while (bins[b] < r) r -= bins[b--];
    if (shift == 0) return lo + uint32_t(b);
    const int64_t count = bins[b];
    Buffer<uint32_t> next;
    if (!next.resize(count)) throw Failure{kTopkNoMemory};
    int64_t at = 0;
    for (int64_t i = 0; i < n && at < count; ++i) {
      next.p[at] = keys[i];
      at += (keys[i] - lo) >> shift == uint32_t(b);
    }
    uint32_t* swap = kept.p;
    kept.p = next.p;
    next.p = swap;
    keys = kept.p;
    n = count;
  }
}

// Ascending; `other` has room for n keys.
void sort_keys(uint32_t* keys, int64_t n, uint32_t* other) {
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t place[257] = {};
    for (int64_t i = 0; i < n; ++i) ++place[(keys[i] >> shift & 255u) + 1];
    for (int b = 0; b < 256; ++b) place[b + 1] += place[b];
    for (int64_t i = 0; i < n; ++i) other[place[keys[i] >> shift & 255u]++] = keys[i];
    uint32_t* swap = keys;
    keys = other;
    other = swap;
  }
}

inline uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

template <class T, bool Abs>
class Sampler {
 public:
  Sampler(const TopkTensor* tensors, int64_t n, int threads) : tensors_(tensors), threads_(threads) {
    for (int64_t i = 0; i < n; ++i) {
      total_ += tensors[i].rows * tensors[i].cols;
      units_ += tensors[i].rows * tensors[i].cols / kUnit;
    }
  }

  // A bracket for each of the counts ks; where a sample does not pay it holds everything.
  void first_brackets(int64_t counts, const int64_t* ks, Bracket* out) {
    const bool sampled = total_ >= kSmall && units_ * kUnit * 2 >= total_;
    Array<Probe> probes(counts);
    bool any = false;
    for (int64_t d = 0; d < counts; ++d) {
      out[d] = ks[d] <= 0        ? make_bracket(~0u, ~0u, Abs)
               : ks[d] >= total_ ? make_bracket(0, 0, Abs)
                                 : make_bracket(0, ~0u, Abs);
      probes[d].open = sampled && ks[d] > 0 && ks[d] < total_;
      probes[d].share = double(ks[d]) / double(total_);
      any |= probes[d].open;
    }
    if (!any) return;
    const int64_t units = units_ / kUnitsEach < kMostUnits ? units_ / kUnitsEach : kMostUnits;
    // A coarse bracket from every 32nd unit of the sample.
    const int64_t every = units >= 2048 ? 32 : 1, most = (units / every + 1) * kUnit;
    Buffer<uint32_t> coarse;
    if (!coarse.resize(2 * most)) throw Failure{kTopkNoMemory};
    int64_t n = 0;
    for_units(units, every, 0, units, [&](const T* x) {
      for (int64_t j = 0; j < kUnit; ++j) coarse.p[n + j] = key_of<T, Abs>(x[j]);
      n += kUnit;
    });
    sort_keys(coarse.p, n, coarse.p + most);
    const auto largest = [&](int64_t r) { return coarse.p[n - r]; };
    for (double sigmas = 8; any && sigmas < 200; sigmas *= 4) {
      for (int64_t d = 0; d < counts; ++d) {
        Probe& p = probes[d];
        const double rank = p.share * double(n);
        const double off = sigmas * sqrt(p.share * (1 - p.share) * double(n)) + 2;
        p.hi = rank - off < 1 ? ~0u : largest(int64_t(rank - off));
        p.lo = rank + off > double(n) ? 0 : largest(int64_t(rank + off));
        p.pivot = largest(rank < 1 ? 1 : int64_t(rank));
      }
      probe(units, counts, probes.p);
      any = false;
      for (int64_t d = 0; d < counts; ++d)
        if (probes[d].open) any |= probes[d].open = !fine_bracket(units, probes[d], out + d);
    }
  }

 private:
  // What the sample is asked for one count: how many of its entries lie above `hi` and `pivot`, and the keys
  // of those in [lo, hi].
  struct Probe {
    double share = 0;
    uint32_t lo = 0, hi = ~0u, pivot = 0;
    int64_t above = 0, sum = 0, squares = 0;
    Buffer<uint32_t> keys;
    bool open = false;
  };

  // Calls f(entries of a unit) for `count` of the units spread evenly, each at random in its stretch; only
  // those whose number is a multiple of `every`.
  template <class F>
  void for_units(int64_t count, int64_t every, int64_t first, int64_t last, F f) const {
    const double step = double(units_) / double(count);
    int64_t tensor = 0, base = 0;
    const T* ahead[32];
    int64_t waiting = 0;
    for (int64_t i = first; i < last; i += every) {
      int64_t unit = int64_t(step * (double(i) + double(scramble(uint32_t(i))) * 0x1p-32));
      if (unit >= units_) unit = units_ - 1;
      while (unit - base >= tensors_[tensor].rows * tensors_[tensor].cols / kUnit) {
        base += tensors_[tensor].rows * tensors_[tensor].cols / kUnit;
        ++tensor;
      }
      const T* x = reinterpret_cast<const T*>(tensors_[tensor].scores) + (unit - base) * kUnit;
      __builtin_prefetch(x);
      ahead[waiting++] = x;
      if (waiting == 32) {
        for (int64_t j = 0; j < waiting; ++j) f(ahead[j]);
        waiting = 0;
      }
    }
    for (int64_t j = 0; j < waiting; ++j) f(ahead[j]);
  }

  // One pass over the sample for all counts.
  void probe(int64_t units, int64_t counts, Probe* probes) {
    const int parts = units >= 2048 ? threads_ : 1;
    bool failed = false;
    Array<Probe> of_parts(counts * parts);
    for (int64_t d = 0; d < counts; ++d) {
      probes[d].above = probes[d].sum = probes[d].squares = 0;
      probes[d].keys.n = 0;
    }
#pragma omp parallel num_threads(parts)
    {
      const int64_t part = thread_index(), piece = (units + parts - 1) / parts;
      const int64_t first = part * piece, last = first + piece < units ? first + piece : units;
      Probe* mine = of_parts.p + part * counts;
      bool ok = true;
      for (int64_t d = 0; d < counts; ++d) ok &= mine[d].keys.reserve((last - first) / 2 + 2 * kUnit);
      if (ok)
        for_units(units, 1, first, last, [&](const T* x) {
          uint32_t unit[kUnit];
          for (int64_t j = 0; j < kUnit; ++j) unit[j] = key_of<T, Abs>(x[j]);
          for (int64_t d = 0; d < counts; ++d) {
            if (!probes[d].open) continue;
            const uint32_t lo = probes[d].lo, hi = probes[d].hi, pivot = probes[d].pivot;
            int32_t larger = 0, over = 0, inside = 0;
            for (int64_t j = 0; j < kUnit; ++j) {
              larger += unit[j] > pivot;
              over += unit[j] > hi;
              inside += unit[j] >= lo;
            }
            mine[d].above += over;
            mine[d].sum += larger;
            mine[d].squares += int64_t(larger) * larger;
            if (inside == over) continue;
            Buffer<uint32_t>& keys = mine[d].keys;
            if (!keys.reserve(keys.n + kUnit + 1)) {
              ok = false;
              return;
            }
            for (int64_t j = 0; j < kUnit; ++j) {
              keys.p[keys.n] = unit[j];
              keys.n += unit[j] >= lo && unit[j] <= hi;
            }
          }
        });
#pragma omp critical(fu_topk)
      for (int64_t d = 0; d < counts; ++d) {
        Probe& all = probes[d];
        all.above += mine[d].above;
        all.sum += mine[d].sum;
        all.squares += mine[d].squares;
        const int64_t at = all.keys.n;
        if (!ok || !all.keys.resize(at + mine[d].keys.n))
          failed = true;
        else if (mine[d].keys.n)
          memcpy(all.keys.p + at, mine[d].keys.p, size_t(mine[d].keys.n) * sizeof(uint32_t));
      }
    }
    if (failed) throw Failure{kTopkNoMemory};
  }

  // Order statistics of the whole sample around the share, found among its keys in [lo, hi]; false when they
  // lie outside. Entries of a unit resemble each other: the spread of the units' counts gives the margin.
  static bool fine_bracket(int64_t units, const Probe& p, Bracket* out) {
    const double values = double(units * kUnit), mean = double(p.sum) / double(units);
    const double clustered = double(p.squares) - mean * double(p.sum);
    const double plain = p.share * (1 - p.share) * values;
    const double off = kSigmas * sqrt(clustered > plain ? clustered : plain) + 3;
    const double high = p.share * values - off, low = p.share * values + off;
    uint32_t to = ~0u, from = 0;
    if (high >= 1) {
      const int64_t r = int64_t(high) - p.above;
      if (r < 1 || r > p.keys.n) return false;
      to = kth_largest(p.keys.p, p.keys.n, r);
    }
    if (low <= values) {
      const int64_t r = int64_t(low) + 1 - p.above;
      if (r < 1 || (r > p.keys.n && p.lo != 0)) return false;
      if (r <= p.keys.n) from = kth_largest(p.keys.p, p.keys.n, r);
    }
    *out = make_bracket(from, to, Abs);
    return true;
  }

  const TopkTensor* tensors_;
  int64_t total_ = 0, units_ = 0;
  int threads_;
};

}  // namespace
}  // namespace fu::FU_ISA
