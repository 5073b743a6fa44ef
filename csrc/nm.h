// N:M masks: in every group of m consecutive columns of a row the n highest scores keep their bit.
//
// Order of a group: higher score first, -0.0 equals 0.0, NaN after everything (-inf too), ties by the lowest
// column. The rank of a column is the number of columns that come before it; it is kept when rank < n.
#pragma once

#include "common.h"

namespace fu::nm {

constexpr int kMaxGroup = 64;

// A score as an integer of the same order. NaN is the lowest, and still one above the least integer, so that
// key - 1 never wraps.
constexpr int32_t kNanKey = -0x7fffffff;
FU_HD int32_t key_of(float x) {
  const uint32_t u = float_bits(x), rest = u & 0x7fffffffu;
  if (rest > 0x7f800000u) return kNanKey;
  return u >> 31 ? -int32_t(rest) : int32_t(rest);
}
FU_HD bool is_nan(float x) {
  return (float_bits(x) & 0x7fffffffu) > 0x7f800000u;
}

// The mask byte of eight columns, M = 2, 4 or 8 a group. A rank needs three bits: all eight live in the
// nibbles of one word, and one comparison of a pair moves both of its ranks by one addition. Of the pair
// (i, j), i < j, j stands first only when it is greater. K: float (then without NaN) or the integer key.
template <int M, class K>
FU_HD uint32_t byte_of(const K* key, int n) {
  uint32_t rank = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) rank |= uint32_t(j % M) << (4 * j);
#pragma unroll
  for (int j = 1; j < 8; ++j)
#pragma unroll
    for (int i = j / M * M; i < j; ++i)
      if (key[j] > key[i]) rank += (1u << (4 * i)) - (1u << (4 * j));
  // rank + 8 - n has its bit 3 set when rank >= n.
  uint32_t keep = ~(rank + uint32_t(8 - n) * 0x11111111u) & 0x88888888u;
  keep >>= 3;
  keep = (keep | keep >> 3) & 0x03030303u;
  keep = (keep | keep >> 6) & 0x000f000fu;
  return (keep | keep >> 12) & 0xffu;
}

// Comparators of Batcher's odd-even merge sort of M keys, M a power of two: after (low[i], high[i]) for every
// i, each a minimum and a maximum, keys ascend.
template <int M>
struct Network {
  static constexpr int count() {
    int n = 0;
    for (int p = 1; p < M; p *= 2)
      for (int k = p; k >= 1; k /= 2)
        for (int j = k % p; j + k < M; j += 2 * k)
          for (int i = 0; i < k && i < M - j - k; ++i) n += (i + j) / (2 * p) == (i + j + k) / (2 * p);
    return n;
  }
  int low[count()] = {}, high[count()] = {};
  constexpr Network() {
    int n = 0;
    for (int p = 1; p < M; p *= 2)
      for (int k = p; k >= 1; k /= 2)
        for (int j = k % p; j + k < M; j += 2 * k)
          for (int i = 0; i < k && i < M - j - k; ++i)
            if ((i + j) / (2 * p) == (i + j + k) / (2 * p)) low[n] = i + j, high[n] = i + j + k, ++n;
  }
};
template <int M>
constexpr Network<M> kNetwork{};

}  // namespace fu::nm

namespace fu {
// One tensor of a list; eight bytes a field, as Python's table has them.
struct NmItem {
  const void* scores;  // [rows, cols], cols a multiple of m
  uint8_t* bits;
  int64_t rows, cols;
  int64_t dtype;  // kF32, kF16, kBF16
  int64_t first;  // pieces (CUDA: tiles) of the tensors before this one; on a CPU filled in by the call
};
}  // namespace fu

// Masks of a list, 0 < n < m <= kMaxGroup. Returns 1 when there was a NaN, else 0.
FU_DECLARE(int, nm_mask, (fu::NmItem * items, int64_t count, int n, int m))

namespace fu::cuda {
// Mask bytes of a tile. A tensor has ceil(bytes / kNmTile) of them, with rows * ceil(cols / 8) bytes.
constexpr int64_t kNmTile = 1024;
// `items` on the device, all of `dtype`, with `first` filled in; `tiles` of them together. One tensor alone
// needs no table on the device: `items` is null and `one` is on the host. *nan_seen becomes 1 when there was
// a NaN; the caller sets it to 0 before.
void nm_mask(const NmItem* items, const NmItem* one, int64_t count, int64_t tiles, int dtype, int n, int m,
             int* nan_seen, int device, uintptr_t stream);
}  // namespace fu::cuda
