// A step that is a combination of G gradients, its factors known (fastunlearn/ops/_hamu_solve.py):
// p += sum_g factor[g] * g, in fp32, rounded once (fastunlearn/reference/hamu.py).
//
// `table` int64 [tensors, kFields + 2 * groups], then `factors` float [tensors, groups] and `keys` uint32
// [tensors, 2]. Units as in gram.h.
#pragma once

#include "common.h"

namespace fu::hamu {
constexpr int64_t kUnit = 32 * 1024;  // entries

enum Field : int {
  kNumel = 0,
  kBits,  // one row of bits over the flat tensor; 0: every entry may move
  kParam,
  kParamType,
  kStochastic,  // 1: bf16 is rounded at random, by key and number of the entry
  kFirst,       // number of the first entry
  kFields,      // then addresses of the gradients (0: zeros), then their DType numbers
};
}  // namespace fu::hamu

FU_DECLARE(void, hamu_combine,
           (const int64_t* table, int64_t groups, const float* factors, const uint32_t* keys,
            const int32_t* unit_tensor, const int64_t* first_unit, int64_t units))
