// SAU's importance-aware redistribution (fastunlearn/reference/redistribute.py): factors on the updates of
// the entries that survive pruning, larger where a row has lost much and the entry matters much.
#pragma once

#include "common.h"

namespace fu {
// One tensor of the list; eight bytes a field, as Python's table has them.
struct RedistributeItem {
  const void* importance;  // [rows, cols]
  const uint8_t* bits;     // of a BitMask
  float* out;              // one factor for each set bit, row-major
  int64_t rows, cols;
  int64_t dtype;      // kF32, kF16, kBF16
  int64_t first_row;  // rows of the tensors before this one
  int64_t first_unit;
};

// Rows that are worked on together, as one piece of one thread's work.
struct RedistributeUnit {
  int64_t tensor, row, rows;
  int64_t survivors;  // of the unit
  int64_t start;      // survivors of the tensor before the unit
  double sumsq;       // of the factors before they are normalised; NaN where an importance is no importance
};

inline int64_t redistribute_unit_rows(int64_t cols) {
  constexpr int64_t kEntries = 1 << 15;
  return cols >= kEntries ? 1 : kEntries / (cols > 0 ? cols : 1);
}
}  // namespace fu

// `units`: those of all tensors, tensor and row and rows filled in. `row_scale` [all rows], `normaliser`
// [count]: workspace. Returns the first tensor that holds a negative, infinite or NaN importance or a row
// whose sum is beyond fp32 (the factors of such a tensor are NaN), or -1.
FU_DECLARE(int64_t, redistribute,
           (const fu::RedistributeItem* items, int64_t count, float beta, float clip,
            fu::RedistributeUnit* units, int64_t n_units, double* row_scale, float* normaliser))
