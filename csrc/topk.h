// topk_mask: exact selection of the k largest entries over lists of tensors, written as bits.
//
// Every value has a 32-bit key whose order is the order of the values: -0.0 and 0.0 share a key, NaN has key
// 0 and is never selected. Among equal keys the entry that comes first (order of the list, then row-major)
// wins.
#pragma once

#include "common.h"

namespace fu {

// One contiguous tensor of scores as a mask sees it. Four int64 in Python's table: address, rows, cols, 0.
struct TopkTensor {
  uint64_t scores;
  int64_t rows, cols, unused;
};

constexpr int kTopkBins = 2048;

// What the functions for a CPU return.
enum TopkResult : int { kTopkDone = 0, kTopkNoMemory = 1, kTopkNotFound = 2 };

// Keys of -inf and inf: the least and the largest that a value can have.
FU_HD uint32_t topk_key_min(bool absolute) {
  return absolute ? 1u : 0x007fffffu;
}
FU_HD uint32_t topk_key_max(bool absolute) {
  return absolute ? 0x7f800001u : 0xff800000u;
}

// `u`: bits of an fp32 value (16-bit values are widened first: exact, and the order stays).
FU_HD uint32_t topk_key(uint32_t u, bool absolute) {
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t key = u ^ (uint32_t(int32_t(u) >> 31) | 0x80000000u);
  key = magnitude == 0 ? 0x80000000u : key;
  key = absolute ? magnitude + 1u : key;
  return magnitude > 0x7f800000u ? 0u : key;
}

// The value of a key that some value has.
FU_HD float topk_unkey(uint32_t key, bool absolute) {
  if (absolute) return bits_float(key - 1u);
  return bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

}  // namespace fu

// bits[d * n + i]: address of the bits of tensor i at the d-th count ks[d], at most the number of entries.
// Writes all bits; *nan = entries that are NaN.
FU_DECLARE(int, topk_select,
           (const fu::TopkTensor* tensors, int64_t n, int dtype, bool absolute, int64_t counts,
            const int64_t* ks, const uint64_t* bits, int64_t* nan))
// The same with every tensor on its own; ks[d * n + i]: entries to keep in tensor i.
FU_DECLARE(int, topk_tensors,
           (const fu::TopkTensor* tensors, int64_t n, int dtype, bool absolute, int64_t counts,
            const int64_t* ks, const uint64_t* bits, int64_t* nan))
// The same with every row of every tensor on its own; ks[d * n + i]: entries to keep in each row of tensor i.
FU_DECLARE(int, topk_rows,
           (const fu::TopkTensor* tensors, int64_t n, int dtype, bool absolute, int64_t counts,
            const int64_t* ks, const uint64_t* bits, int64_t* nan))
// out[i * bins + b] = entries of tensor i that are no NaN and have (key - lo[i]) >> shift[i] == b, for b <
// bins.
FU_DECLARE(int, topk_histogram,
           (const fu::TopkTensor* tensors, int64_t n, int dtype, bool absolute, const int64_t* lo,
            const int64_t* shift, int64_t bins, int64_t* out))
// bits[i]: entries of tensor i with a key above key[i], and the first take[i] whose key is key[i].
FU_DECLARE(int, topk_write,
           (const fu::TopkTensor* tensors, int64_t n, int dtype, bool absolute, const int64_t* key,
            const int64_t* take, const uint64_t* bits))

namespace fu::cuda {
// Row of Python's table: int64 each. `first_tile`: tiles of topk_tile_bytes() bytes of bits before the
// tensor's own; for topk_rows the rows before its own.
struct TopkCudaTensor {
  uint64_t scores;
  int64_t rows, cols, first_entry, first_tile;
};

struct TopkCudaCall {
  const TopkCudaTensor* tensors;  // [n], on the device like all that follows
  const uint64_t* bits;           // [counts, n] addresses
  const int64_t* params;          // [counts, scopes, 4]: k, lo or key, shift, take
  int64_t n, counts, scopes;      // scopes: 1, or n (a scope for each tensor)
  int64_t total, tiles;           // entries and tiles (for topk_rows: rows) of all tensors
  int dtype;
  bool absolute;
  uintptr_t workspace;  // topk_workspace() bytes, 256-byte aligned
  int64_t* nan;         // out: entries that are NaN
  int device;
  uintptr_t stream;
};

int64_t topk_tile_bytes();
// `pooled`: for topk_select with one scope.
int64_t topk_workspace(int64_t counts, int64_t scopes, int64_t total, int64_t tiles, int dtype, bool pooled);
void topk_select(const TopkCudaCall& call);
void topk_rows(const TopkCudaCall& call);
// out [n, kTopkBins], counts 1, scopes n: as the function of that name above.
void topk_histogram(const TopkCudaCall& call, int64_t* out);
void topk_write(const TopkCudaCall& call);
}  // namespace fu::cuda
