// topk_mask on a GPU, scope of rows: a warp or a block for each row. TopkCudaTensor::first_tile counts rows
// here. Included by topk.cu only.
#pragma once

#include "topk_device.cuh"

namespace fu::cuda {
namespace {

// A warp a row of at most 256 entries; lane l holds byte l of the row's bits.
template <class T, bool Abs>
__global__ void __launch_bounds__(kThreads) topk_short_rows(Job job) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / 32);
  for (int64_t item = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; item < job.tiles;
       item += warps) {
    const int tensor = tensor_of(job, item);
    const TopkCudaTensor t = job.tensors[tensor];
    const int64_t width = (t.cols + 7) / 8, first = (item - t.first_tile) * width;
    if (width > 32) continue;
    uint32_t x[8];
    uint32_t valid = 0;
    Eight<T> v;
    if (lane < width) load8(t, first + lane, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      x[j] = lane < width ? topk_key(float_bits(widen(v[j])), Abs) : 0;
      valid += x[j] != 0;
    }
    valid = warp_sum32(valid);
    if (lane == 0 && valid < uint32_t(t.cols)) atomicAdd(job.nan, u64(t.cols) - valid);
    for (int d = 0; d < job.counts; ++d) {
      const u64 k = u64(job.params[4 * (int64_t(d) * job.n + tensor)]);
      const uint32_t rank = k < valid ? uint32_t(k) : valid;
      // The largest key that `rank` entries reach, bit by bit.
      uint32_t key = 0;
      for (int b = 31; b >= 0 && rank > 0; --b) {
        const uint32_t trial = key | 1u << b;
        uint32_t reach = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) reach += x[j] >= trial;
        if (warp_sum32(reach) >= rank) key = trial;
      }
      if (rank == 0) key = 0xffffffffu;
      uint32_t above = 0, equal = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        above |= uint32_t(x[j] > key) << j;
        equal |= uint32_t(x[j] == key) << j;
      }
      const uint32_t left = rank - warp_sum32(__popc(above));
      uint32_t upto = __popc(equal);
      for (int s = 1; s < 32; s *= 2) {
        const uint32_t u = __shfl_up_sync(0xffffffffu, upto, s);
        if (lane >= s) upto += u;
      }
      const uint32_t earlier = upto - __popc(equal);
      equal = lowest_bits(equal, earlier < left ? left - earlier : 0);
      if (lane < width) bits_of(job, d, tensor)[first + lane] = uint8_t(above | equal);
    }
  }
}

// A block a row of more than 256 entries.
template <class T, bool Abs>
__global__ void __launch_bounds__(kThreads) topk_long_rows(Job job) {
  __shared__ uint32_t counts[kTopkBins];
  for (int64_t item = blockIdx.x; item < job.tiles; item += gridDim.x) {
    const int tensor = tensor_of(job, item);
    const TopkCudaTensor t = job.tensors[tensor];
    const int64_t width = (t.cols + 7) / 8, first = (item - t.first_tile) * width;
    if (width <= 32) continue;
    for (int d = 0; d < job.counts; ++d) {
      uint32_t lo = 0, shift = 21, bins = kTopkBins;
      u64 rank = 0, ties = 0;
      for (int level = 0; level < 3; ++level) {
        for (int i = threadIdx.x; i < kTopkBins; i += kThreads) counts[i] = 0;
        __syncthreads();
        for (int64_t b = threadIdx.x; b < width; b += kThreads) {
          Eight<T> v;
          load8(t, first + b, v);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const uint32_t x = topk_key(float_bits(widen(v[j])), Abs);
            if (x != 0 && x >= lo && (x - lo) >> shift < bins) atomicAdd(&counts[(x - lo) >> shift], 1u);
          }
        }
        __syncthreads();
        if (level == 0) {
          u64 mine = 0, valid;
          for (int i = threadIdx.x; i < kTopkBins; i += kThreads) mine += counts[i];
          block_scan(mine, &valid);
          const u64 k = u64(job.params[4 * (int64_t(d) * job.n + tensor)]);
          rank = k < valid ? k : valid;
          if (d == 0 && threadIdx.x == 0 && valid < u64(t.cols)) atomicAdd(job.nan, u64(t.cols) - valid);
          if (rank == 0) break;
        }
        u64 higher;
        const int bin = pick_bin(counts, rank, &higher);
        ties = counts[bin];
        rank -= higher;
        lo += uint32_t(bin) << shift;
        bins = shift == 21 ? 2048u : 1024u;
        shift = shift == 21 ? 10 : 0;
        __syncthreads();
      }
      if (rank == 0) lo = 0xffffffffu;
      // `rank` ties are taken, in order.
      uint8_t* bits = bits_of(job, d, tensor);
      u64 taken = 0;
      for (int64_t from = 0; from < width; from += kThreads) {
        const int64_t b = from + threadIdx.x;
        uint32_t above = 0, equal = 0;
        if (b < width) {
          Eight<T> v;
          load8(t, first + b, v);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const uint32_t x = topk_key(float_bits(widen(v[j])), Abs);
            above |= uint32_t(x > lo) << j;
            equal |= uint32_t(x == lo && x != 0) << j;
          }
        }
        if (rank < ties) {
          u64 sum;
          const u64 earlier = taken + block_scan(__popc(equal), &sum) - __popc(equal);
          equal = lowest_bits(equal, earlier < rank ? rank - earlier : 0);
          taken += sum;
        }
        if (b < width) bits[first + b] = uint8_t(above | equal);
      }
      __syncthreads();
    }
  }
}

}  // namespace
}  // namespace fu::cuda
