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

// One entry at random from each of `samples` equal stretches of all scores.
template <class T>
__global__ void topk_sample(Job job) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= job.samples) return;
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
  const T* p = reinterpret_cast<const T*>(job.tensors[lo].scores);
  static_cast<T*>(job.sample)[i] = p[entry - job.tensors[lo].first_entry];
}

// One block a count: the keys of the sample at both ends of the margin around the rank. Without a sample the
// bracket holds everything.
template <class T, bool Abs>
__global__ void __launch_bounds__(kWide) topk_bracket(Job job) {
  __shared__ uint32_t counts[2][kTopkBins];
  Problem& p = job.problems[blockIdx.x];
  if (p.done) {
    if (threadIdx.x == 0) set_bracket(p, 0xffffffffu, 0xffffffffu, Abs);
    return;
  }
  const double share = double(p.k) / double(p.total), n = double(job.samples);
  const double off = kSigmas * sqrt(share * (1 - share) * n) + 2;
  const double high = share * n - off, low = share * n + off;
  u64 rank[2] = {high < 1 ? u64(1) : u64(high), low > n ? u64(job.samples) : u64(low)};
  uint32_t key[2] = {0, 0}, shift = 21, bins = kTopkBins;
  const T* sample = static_cast<const T*>(job.sample);
  for (int level = 0; level < 3 && job.samples > 0; ++level) {
    for (int i = threadIdx.x; i < 2 * kTopkBins; i += blockDim.x) counts[i / kTopkBins][i % kTopkBins] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < job.samples; i += blockDim.x) {
      const uint32_t x = topk_key(float_bits(to_float(sample[i])), Abs);
      for (int e = 0; e < 2; ++e)
        if (x >= key[e] && (x - key[e]) >> shift < bins) atomicAdd(&counts[e][(x - key[e]) >> shift], 1u);
    }
    __syncthreads();
    for (int e = 0; e < 2; ++e) {
      u64 higher;
      key[e] += uint32_t(pick_bin(counts[e], rank[e], &higher)) << shift;
      rank[e] -= higher;
    }
    bins = shift == 21 ? 2048u : 1024u;
    shift = shift == 21 ? 10 : 0;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (p.k >= p.total)
    set_bracket(p, 0, 0, Abs);
  else
    set_bracket(p, low > n ? 0u : key[1], high < 1 ? 0xffffffffu : key[0], Abs);
}

template <class T, bool Abs>
__global__ void __launch_bounds__(kThreads) topk_stream(Job job) {
  __shared__ uint32_t found;
  __shared__ u64 base;
  const int lane = threadIdx.x % 32;
  u64 nan = 0;
  Walk w = walk(job);
  for (; w.tile < w.last; ++w.tile) {
    const Tile tile = at(job, w);
    T x[kPerThread][8];
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
          const float v = to_float(x[i][j]);
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
      if (threadIdx.x == 0) found = 0;
      __syncthreads();
      uint32_t place = mine ? atomicAdd(&found, mine) : 0u;
      const u64 sum = warp_sum(over);
      if (lane == 0 && sum) atomicAdd(&p.above, sum);
      __syncthreads();
      if (threadIdx.x == 0) {
        const int64_t record = d * job.tiles + w.tile;
        base = found ? atomicAdd(&p.pool, u64(found)) : 0;
        const bool fits = base + found <= u64(job.room);
        job.start[record] = uint32_t(base);
        job.count[record] = fits ? found : 0;
        if (!fits) base = ~u64(0);
      }
      __syncthreads();
      if (mine && base != ~u64(0)) {
        T* values = static_cast<T*>(job.values) + d * job.room + base;
        uint16_t* places = job.places + d * job.room + base;
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if (inside >> (8 * i + j) & 1u) {
              values[place] = x[i][j];
              places[place++] = uint16_t((i * kThreads + threadIdx.x) * 8 + j);
            }
      }
    }
  }
  nan = warp_sum(nan);
  if (lane == 0 && nan) atomicAdd(&job.problems[0].nan, nan);
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
    if (k < p.above || k - p.above > p.pool || p.pool > u64(job.room)) {
      count_scores(p);
      continue;
    }
    p.mode = kPool;
    p.rank = k - p.above;
    p.shift = shift_for(p.lo, p.hi);
    p.bins = kTopkBins;
    if (p.rank == 0) settle(p, 0xffffffffu, 0, 0);
  }
}

}  // namespace
}  // namespace fu::cuda
