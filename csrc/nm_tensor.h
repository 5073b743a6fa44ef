// Compressed N:M tensors: of every m consecutive columns of a row the n whose bit is set, side by side.
//
// values [rows, cols / m * n], cols a multiple of m, row-major, columns in order. Entries are moved, never
// computed with: only their size (2, 4 or 8 bytes) counts.
#pragma once

#include "common.h"

namespace fu::nm {

// Set bits of `row` from column `from` to before column `to`.
FU_HD int count_bits(const uint8_t* row, int64_t from, int64_t to) {
  int sum = 0;
  for (int64_t byte = from / 8; byte * 8 < to; ++byte) {
    uint32_t bits = row[byte];
    if (byte * 8 < from) bits &= 0xffu << (from - byte * 8);
    if (byte * 8 + 8 > to) bits &= (1u << (to - byte * 8)) - 1u;
#if defined(__CUDA_ARCH__)
    sum += __popc(bits);
#else
    sum += __builtin_popcount(bits);
#endif
  }
  return sum;
}

// Where the first value at or after column `col` of a row stands in the row's values.
FU_HD int64_t place_of(const uint8_t* row, int64_t col, int n, int m) {
  const int64_t group = col / m;
  return group * n + count_bits(row, group * m, col);
}

// What no row is: the answer of a check that found nothing wrong.
constexpr int64_t kNoRow = 0x7f7f7f7f7f7f7f7f;

}  // namespace fu::nm

// dense [rows, cols] -> values.
FU_DECLARE(void, nm_gather,
           (const void* dense, const uint8_t* bits, int64_t rows, int64_t cols, int n, int m, int size,
            void* values))
// values -> dense [rows, cols], 0 where the bit is not set.
FU_DECLARE(void, nm_expand,
           (const void* values, const uint8_t* bits, int64_t rows, int64_t cols, int n, int m, int size,
            void* dense))
// The first row with a group that has not n set bits; kNoRow where there is none.
FU_DECLARE(int64_t, nm_first_wrong_row, (const uint8_t* bits, int64_t rows, int64_t cols, int n, int m))

namespace fu::cuda {
// As above. With `wrong_row` the gather also checks the mask: *wrong_row, kNoRow before the call, becomes the
// first wrong row (values of such a row and of those after it are then arbitrary).
void nm_gather(const void* dense, const uint8_t* bits, int64_t rows, int64_t cols, int n, int m, int size,
               void* values, int64_t* wrong_row, int device, uintptr_t stream);
void nm_expand(const void* values, const uint8_t* bits, int64_t rows, int64_t cols, int n, int m, int size,
               void* dense, int device, uintptr_t stream);
}  // namespace fu::cuda
