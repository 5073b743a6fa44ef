// Inner products of G lists of gradients, tensor by tensor: what every constrained step of unlearning is
// computed from (fastunlearn/reference/gram.py). Each gradient is read once.
//
// `table` int64 [tensors, 2 + 2 * groups]: entries, address of bits (one row over the flat tensor; 0: every
// entry counts), the addresses of the groups' gradients (0: a gradient of zeros), their DType numbers. The
// work is cut into units of kUnit entries: `unit_tensor` int32 [units] names a unit's tensor, `first_unit`
// int64 [tensors] the number of that tensor's first unit. fastunlearn/ops/gram.py builds all of them.
#pragma once

#include "common.h"

namespace fu::gram {
constexpr int64_t kUnit = 32 * 1024;  // entries

constexpr int64_t pairs(int64_t groups) {
  return groups * (groups + 1) / 2;
}
}  // namespace fu::gram

// `partial` double [units, pairs]: workspace. `out` double [tensors, groups, groups]. The order of the sums
// depends on sizes alone, not on the number of threads.
FU_DECLARE(void, gram_products,
           (const int64_t* table, int64_t tensors, int64_t groups, const int32_t* unit_tensor,
            const int64_t* first_unit, int64_t units, double* partial, double* out))
