// topk_mask on a GPU, global scope: a sample brackets the k-th value; one pass over the scores writes the
// bits that the bracket decides and puts the few entries inside it in a pool. Included by topk.cu only.
#pragma once

#include <cmath>

#include "topk_device.cuh"

namespace fu::cuda {
namespace {

__device__ inline uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// One entry at random from each of `samples` equal stretches of all scores, and how many of them have each
// highest digit.
template <class T, bool Abs>
__global__ void __launch_bounds__(kWide) topk_sample(Job job) {
  __shared__ uint32_t counts[kTopkBins];
  for (int i = threadIdx.x; i < kTopkBins; i += kWide) counts[i] = 0;
  __syncthreads();
  const int64_t i = int64_t(blockIdx.x) * kWide + threadIdx.x;
  if (i < job.samples) {
    const double step = double(job.total) / double(job.samples);
    int64_t entry = int64_t(step * (double(i) + double(scramble(uint32_t(i))) * 0x1p-32));
    if (entry >= job.total) entry = job.total - 1;
    int lo = 0, hi = job.n - 1;
    while (lo < hi) {
      const int mid = (lo + hi + 1) / 2;
      if (job.tensors[mid].first_entry <= entry)
        lo = mid;
      else
        hi = mid - 1;
    }
    const T x = reinterpret_cast<const T*>(job.tensors[lo].scores)[entry - job.tensors[lo].first_entry];
    static_cast<T*>(job.sample)[i] = x;
    atomicAdd(&counts[topk_key(float_bits(widen(x)), Abs) >> 21], 1u);
  }
  __syncthreads();
  for (int j = threadIdx.x; j < kTopkBins; j += kWide)
    if (counts[j]) atomicAdd(&job.first[j], counts[j]);
}

// One block a count: the 22 highest bits of the keys of the sample at both ends of the margin around the
// rank; the rest of a key is worth 2^-13 of a value. Without a sample the bracket holds everything.
template <class T, bool Abs>
__global__ void __launch_bounds__(kWide) topk_bracket(Job job) {
  __shared__ uint32_t counts[2][kTopkBins];
  Problem& p = job.problems[blockIdx.x];
  if (threadIdx.x == 0) {
    p.packed = 0;
    p.room = u64(job.room);
  }
  if (p.done) {
    if (threadIdx.x == 0) set_bracket(p, 0xffffffffu, 0xffffffffu, Abs);
    return;
  }
  const double share = double(p.k) / double(p.total), n = double(job.samples);
  const double off = kSigmas * sqrt(share * (1 - share) * n) + 2;
  const double high = share * n - off, low = share * n + off;
  u64 rank[2] = {high < 1 ? u64(1) : u64(high), low > n ? u64(job.samples) : u64(low)};
  uint32_t key[2] = {0, 0};
  if (job.samples > 0) {
    for (int i = threadIdx.x; i < 2 * kTopkBins; i += kWide) counts[i / kTopkBins][i % kTopkBins] = 0;
    for (int e = 0; e < 2; ++e) {
      u64 higher;
      key[e] = uint32_t(pick_bin(job.first, rank[e], &higher)) << 21;
      rank[e] -= higher;
    }
    const uint4* sample = static_cast<const uint4*>(job.sample);
    constexpr int kWords = int(sizeof(T)) / 2, kAhead = 16 / int(sizeof(T));
    const int64_t eights = job.samples / 8;
    for (int64_t from = threadIdx.x; from < eights; from += kAhead * kWide) {
      // All loads are on their way before the first is used.
      Eight<T> x[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (from + a * kWide < eights) x[a].load(sample + (from + a * kWide) * kWords);
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (from + a * kWide >= eights) break;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t k = topk_key(float_bits(widen(x[a][j])), Abs);
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (k >= key[e] && (k - key[e]) >> 10 < uint32_t(kTopkBins))
              atomicAdd(&counts[e][(k - key[e]) >> 10], 1u);
        }
      }
    }
    __syncthreads();
    for (int e = 0; e < 2; ++e) {
      u64 higher;
      key[e] += uint32_t(pick_bin(counts[e], rank[e], &higher)) << 10;
    }
  }
  if (threadIdx.x != 0) return;
  if (p.k >= p.total)
    set_bracket(p, 0, 0, Abs);
  else
    set_bracket(p, low > n ? 0u : key[1], high < 1 ? 0xffffffffu : key[0] | 1023u, Abs);
  if (sizeof(T) == 2 && (p.hi - p.lo) >> Pool<T, Abs>::kShift < 1u << kOrdinalBits) {
    p.packed = 1;
    p.first = p.lo;
    p.room = 2 * u64(job.room);
  }
}

constexpr int kOwnSums = 16;  // counts whose entries above the bracket a block adds up itself

// A thread holds 32 entries: 64 registers suffice where those are 16 bits each.
template <class T, bool Abs>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 4 : 3) topk_stream(Job job) {
  __shared__ uint32_t found, larger;
  __shared__ u64 base;
  __shared__ u64 above_sums[kOwnSums];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < kOwnSums) above_sums[threadIdx.x] = 0;
  __syncthreads();
  uint32_t nan = 0;
  Walk w = walk(job);
  for (; w.tile < w.last; ++w.tile) {
    const Tile tile = at(job, w);
    Eight<T> x[kPerThread];
    int have[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t byte = tile.byte + i * kThreads + threadIdx.x;
      have[i] = byte < tile.bytes ? load8(*tile.tensor, byte, x[i]) : 0;
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < have[i]) {
          const float v = widen(x[i][j]);
          nan += v != v;
        }
    for (int d = 0; d < job.counts; ++d) {
      Problem& p = job.problems[d];
      const float lo = topk_unkey(p.lo, Abs), hi = topk_unkey(p.hi, Abs);
      uint8_t* bits = bits_of(job, d, tile.index);
      uint32_t inside = 0, over = 0;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (have[i] == 0) continue;
        uint32_t above = 0, from = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float v = value_of<T, Abs>(x[i][j]);
          above |= uint32_t(v > hi) << j;
          from |= uint32_t(v >= lo) << j;
        }
        bits[tile.byte + i * kThreads + threadIdx.x] = uint8_t(above);
        over += __popc(above);
        inside |= (from & ~above) << (8 * i);
      }
      const uint32_t mine = __popc(inside);
      if (threadIdx.x == 0) found = larger = 0;
      __syncthreads();
      uint32_t place = mine ? atomicAdd(&found, mine) : 0u;
      over = warp_sum32(over);
      if (lane == 0 && over) atomicAdd(&larger, over);
      __syncthreads();
      if (threadIdx.x == 0) {
        const int64_t record = d * job.tiles + w.tile;
        base = found ? atomicAdd(&p.pool, u64(found)) : 0;
        const bool fits = base + found <= p.room;
        job.start[record] = uint32_t(base);
        job.count[record] = fits ? found : 0;
        if (!fits) base = ~u64(0);
        if (d < kOwnSums)
          above_sums[d] += larger;
        else if (larger)
          atomicAdd(&p.above, u64(larger));
      }
      __syncthreads();
      if (mine && base != ~u64(0)) {
        const Pool<T, Abs> pool(job, p, d, int64_t(base));
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if (inside >> (8 * i + j) & 1u)
              pool.put(place++, x[i][j], uint32_t((i * kThreads + threadIdx.x) * 8 + j));
      }
    }
  }
  const u64 all = warp_sum(nan);
  if (lane == 0 && all) atomicAdd(&job.problems[0].nan, all);
  if (threadIdx.x == 0)
    for (int d = 0; d < job.counts && d < kOwnSums; ++d)
      if (above_sums[d]) atomicAdd(&job.problems[d].above, above_sums[d]);
}

// Is the k-th entry in the pool?
__global__ void topk_judge(Job job) {
  if (threadIdx.x == 0) *job.nan = job.problems[0].nan;
  const u64 nan = job.problems[0].nan;
  for (int d = threadIdx.x; d < job.counts; d += blockDim.x) {
    Problem& p = job.problems[d];
    if (p.done) {
      p.mode = kPool;
      continue;
    }
    const u64 valid = p.total - nan, k = p.k < valid ? p.k : valid;
    if (k < p.above || k - p.above > p.pool || p.pool > p.room) {
      count_scores(p);
      continue;
    }
    p.mode = kPool;
    p.rank = k - p.above;
    if (p.packed) p.lo = 0;
    p.shift = p.packed ? 0 : shift_for(p.lo, p.hi);
    p.bins = kTopkBins;
    if (p.rank == 0) settle(p, 0xffffffffu, 0, 0);
  }
}

}  // namespace
}  // namespace fu::cuda
