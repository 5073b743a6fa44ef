// topk_mask on a GPU: what its kernels share. Included by topk.cu only.
//
// A problem is one count k in one scope (all tensors, or a tensor). A tile is a run of kTileBytes bytes of
// the bits of a tensor; a thread works on a byte, 8 entries, at a time.
#pragma once

#include <type_traits>

#include "simt.h"
#include "topk.h"

namespace fu::cuda {
namespace {

using u64 = unsigned long long;

constexpr int kThreads = 256;
constexpr int kPerThread = 4;
constexpr int kTileBytes = kThreads * kPerThread;
constexpr int kWide = 1024;
constexpr double kSigmas = 3;
constexpr int64_t kSmall = 1 << 16;  // entries that the pool takes whole
constexpr int kOrdinalBits = 3;      // of an entry of a packed pool; the other 13 are its place in the tile
static_assert(8 * kTileBytes == 1 << (16 - kOrdinalBits), "a place and an ordinal share 16 bits");

enum Mode : uint32_t { kPool = 0, kScores = 1 };

struct Problem {
  uint32_t mode, done;  // first: the tests read them in the workspace
  u64 k, total;
  u64 above, within, nan;  // counted by the stream
  u64 rank;                // of the entry looked for among those with a digit still open
  u64 take, ties;          // entries equal to `key` to select, and all of them
  u64 pool;                // entries in the pool, or that did not fit any more
  uint32_t lo, hi;         // the bracket, then the range whose digits are counted
  uint32_t shift, bins;
  uint32_t key;            // the k-th largest
  uint32_t packed, first;  // of the pool: see Pool
  u64 room;
};

struct Job {
  const TopkCudaTensor* tensors;
  const u64* bits;  // [counts, n]
  const int64_t* params;
  int n, counts, scopes;
  int64_t total, tiles, room, samples;
  Problem* problems;  // [counts, scopes]
  u64* histograms;    // [counts, scopes, kTopkBins]
  u64* before;        // [counts, tiles]: ties of a tile, then those before it
  uint32_t* start;    // [counts, tiles]: where a tile's entries stand in the pool
  uint32_t* count;
  char* pool;  // [counts]: see Pool
  void* sample;
  uint32_t* first;  // [kTopkBins]: the sample by the highest digit of its keys
  u64* nan;
};

// ---- small things ---------------------------------------------------------------------------------------

__device__ inline u64 warp_sum(u64 v) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

__device__ inline uint32_t warp_sum32(uint32_t v) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

// Inclusive scan over the threads of a block; *sum is the total. Starts and ends with a barrier.
__device__ inline u64 block_scan(u64 v, u64* sum) {
  __shared__ u64 sums[32];
  const int lane = threadIdx.x % 32, w = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int d = 1; d < 32; d *= 2) {
    const u64 u = __shfl_up_sync(0xffffffffu, v, d);
    if (lane >= d) v += u;
  }
  __syncthreads();
  if (lane == 31) sums[w] = v;
  __syncthreads();
  u64 before = 0, all = 0;
  for (int i = 0; i < warps; ++i) {
    if (i < w) before += sums[i];
    all += sums[i];
  }
  *sum = all;
  __syncthreads();
  return v + before;
}

// The bin from the top in which the rank-th entry lies; *higher = entries in the bins above it. All threads
// get the answer. The counts hold at least `rank` >= 1 entries.
template <class Count>
__device__ int pick_bin(const Count* counts, u64 rank, u64* higher) {
  __shared__ int found;
  __shared__ u64 over;
  const int per = kTopkBins / int(blockDim.x), top = kTopkBins - 1 - int(threadIdx.x) * per;
  u64 mine = 0, all;
  for (int i = 0; i < per; ++i) mine += counts[top - i];
  u64 sum = block_scan(mine, &all) - mine;
  if (sum < rank && rank <= sum + mine) {
    int i = 0;
    while (sum + counts[top - i] < rank) sum += counts[top - i++];
    found = top - i;
    over = sum;
  }
  __syncthreads();
  const int bin = found;
  *higher = over;
  __syncthreads();
  return bin;
}

__device__ inline uint32_t shift_for(uint32_t lo, uint32_t hi) {
  uint32_t shift = 0;
  while ((hi - lo) >> shift >= uint32_t(kTopkBins)) ++shift;
  return shift;
}

// to_float, on a GPU by its own instruction (a NaN may lose its payload: all have key 0).
template <class T>
__device__ inline float widen(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same<T, f16>::value) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(x.bits));
    return v;
  }
#endif
  return to_float(x);
}

template <class T, bool Abs>
__device__ inline float value_of(T x) {
  const float v = widen(x);
  return Abs ? bits_float(float_bits(v) & 0x7fffffffu) : v;
}

// 8 entries in registers as they came from memory.
template <class T>
struct Eight {
  uint32_t words[2 * sizeof(T)];
  __device__ inline T operator[](int j) const {
    T x;
    if constexpr (sizeof(T) == 4) {
      x = bits_float(words[j]);
    } else {
      x.bits = uint16_t(words[j / 2] >> (16 * (j % 2)));
    }
    return x;
  }
  __device__ inline void set(int j, T x) {
    if constexpr (sizeof(T) == 4) {
      words[j] = float_bits(x);
    } else {
      words[j / 2] = (words[j / 2] & ~(0xffffu << (16 * (j % 2)))) | uint32_t(x.bits) << (16 * (j % 2));
    }
  }
  __device__ inline void load(const uint4* p) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T)) / 2; ++i) {
      const uint4 raw = p[i];
      words[4 * i] = raw.x;
      words[4 * i + 1] = raw.y;
      words[4 * i + 2] = raw.z;
      words[4 * i + 3] = raw.w;
    }
  }
};

// The 8 entries of a byte of the bits; past the end of a row they are NaN. Returns how many there are.
template <class T>
__device__ inline int load8(const TopkCudaTensor& t, int64_t byte, Eight<T>& x) {
  const T* p = reinterpret_cast<const T*>(t.scores);
  if (t.cols % 8 == 0) {
    p += byte * 8;
    if ((t.scores & 15) == 0) {
      x.load(reinterpret_cast<const uint4*>(p));
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) x.set(j, p[j]);
    }
    return 8;
  }
  const int64_t width = (t.cols + 7) / 8, row = byte / width, col = (byte - row * width) * 8;
  const int have = t.cols - col < 8 ? int(t.cols - col) : 8;
  p += row * t.cols + col;
#pragma unroll
  for (int i = 0; i < int(2 * sizeof(T)); ++i) x.words[i] = 0xffffffffu;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (j < have) x.set(j, p[j]);
  return have;
}

// The entries inside the bracket, by tile: `room` values and then `room` places in the tile. Where a bracket
// holds few 16-bit values (ties widen it: there are few of them), an entry is 16 bits in all, its place and
// which of those values it has, and twice as many fit.
template <class T, bool Abs>
struct Pool {
  // Keys of different 16-bit values lie at least this many bits apart.
  static constexpr int kShift = sizeof(T) == 4 ? 0 : std::is_same<T, f16>::value ? 13 : 16;
  T* values;
  uint16_t* places;
  bool packed;
  uint32_t first;

  __device__ inline Pool(const Job& job, const Problem& p, int64_t d, int64_t start)
      : packed(p.packed != 0), first(p.first) {
    char* base = job.pool + d * job.room * int64_t(sizeof(T) + 2);
    values = reinterpret_cast<T*>(base) + start;
    places = reinterpret_cast<uint16_t*>(packed ? base : base + job.room * int64_t(sizeof(T))) + start;
  }
  __device__ static inline uint32_t whole_key(T x) { return topk_key(float_bits(widen(x)), Abs); }
  // In the order of the keys; a packed pool has ordinals 0 to 7.
  __device__ inline uint32_t key(int64_t i) const {
    return packed ? places[i] & ((1u << kOrdinalBits) - 1u) : whole_key(values[i]);
  }
  __device__ inline uint32_t place(int64_t i) const {
    return packed ? uint32_t(places[i]) >> kOrdinalBits : uint32_t(places[i]);
  }
  __device__ inline void put(int64_t i, T x, uint32_t at) const {
    if (packed) {
      places[i] = uint16_t(at << kOrdinalBits | (whole_key(x) - first) >> kShift);
    } else {
      values[i] = x;
      places[i] = uint16_t(at);
    }
  }
};

// Bytes of the bits of the tile at `tile` that thread threadIdx.x works on: first, first + kThreads, ...
struct Tile {
  const TopkCudaTensor* tensor;
  int index;
  int64_t byte, bytes;  // the tile's first byte, the tensor's bytes
};

// Walks through the tiles [first, last) of this block.
struct Walk {
  int64_t tile, last;
  int tensor;
};

// The last tensor that begins at or before the tile (or row).
__device__ inline int tensor_of(const Job& job, int64_t tile) {
  int lo = 0, hi = job.n - 1;
  while (lo < hi) {
    const int mid = (lo + hi + 1) / 2;
    if (job.tensors[mid].first_tile <= tile)
      lo = mid;
    else
      hi = mid - 1;
  }
  return lo;
}

__device__ inline Walk walk(const Job& job) {
  const int64_t first = job.tiles * int64_t(blockIdx.x) / int64_t(gridDim.x);
  return {first, job.tiles * (int64_t(blockIdx.x) + 1) / int64_t(gridDim.x), tensor_of(job, first)};
}

__device__ inline Tile at(const Job& job, Walk& w) {
  while (w.tensor + 1 < job.n && job.tensors[w.tensor + 1].first_tile <= w.tile) ++w.tensor;
  const TopkCudaTensor* t = job.tensors + w.tensor;
  return {t, w.tensor, (w.tile - t->first_tile) * kTileBytes, t->rows * ((t->cols + 7) / 8)};
}

__device__ inline uint8_t* bits_of(const Job& job, int d, int tensor) {
  return reinterpret_cast<uint8_t*>(job.bits[int64_t(d) * job.n + tensor]);
}

__device__ inline void set_bracket(Problem& p, uint32_t lo, uint32_t hi, bool absolute) {
  const uint32_t least = topk_key_min(absolute), most = topk_key_max(absolute);
  p.lo = lo < least ? least : lo > most ? most : lo;
  p.hi = hi < least ? least : hi > most ? most : hi;
  if (!absolute && p.hi == 0x7fffffffu) p.hi = 0x7ffffffeu;  // would be -0.0, which equals 0.0
}

__device__ inline void settle(Problem& p, uint32_t key, u64 take, u64 ties) {
  p.key = key;
  p.take = take;
  p.ties = ties;
  p.done = 1;
}

__device__ inline void count_scores(Problem& p) {
  p.mode = kScores;
  p.lo = 0;
  p.shift = 21;
  p.bins = kTopkBins;
}

// The lowest `n` set bits of a word.
__device__ inline uint32_t lowest_bits(uint32_t word, u64 n) {
  if (n >= 32) return word;
  uint32_t out = 0;
  for (; n > 0 && word; --n) {
    out |= word & (~word + 1u);
    word &= word - 1u;
  }
  return out;
}

}  // namespace
}  // namespace fu::cuda
