// The two passes of a masked low-rank adapter over a weight on a CPU (fastunlearn/reference/masked_lora.py),
// with the factors' thin products inside of them. The wide products before and after are BLAS's.
#pragma once

#include "common.h"

namespace fu::masked_lora {

// Columns that are summed by themselves, so that the sums are the same whatever the number of threads: strips
// of equal width, a multiple of four of them.
inline int64_t strip(int64_t cols) {
  const int64_t fours = ceil_div(cols, 1024), strips = 4 * (fours < 8 ? fours : 8);
  return ceil_div(ceil_div(cols, strips), 16) * 16;
}

}  // namespace fu::masked_lora

// out = weight + scale * B A where the bit is set, and the weight itself elsewhere. [rows, cols] of row-major
// memory each, `bits` of a BitMask; A [rank, cols] and B [rows, rank] fp32; `out` is of the weight's type, or
// a 16-bit one for fp32 weights.
FU_DECLARE(void, masked_lora_effective,
           (const void* weight, int weight_dtype, const float* A, const float* B, const uint8_t* bits,
            int64_t rows, int64_t cols, int64_t rank, float scale, void* out, int out_dtype))
// With G [rows, cols] taken as 0 where the bit is not set: dB [rows, rank] = G A^T, dA [rank, cols] += B^T G.
// For few ranks: of many a keep and BLAS are faster. `partial`: [ceil(cols / strip(cols)), rows, rank].
FU_DECLARE(void, masked_lora_contract,
           (const void* G, int dtype, const float* A, const float* B, const uint8_t* bits, int64_t rows,
            int64_t cols, int64_t rank, float* partial, float* dA, float* dB))
// x = 0 where the bit is not set, in place.
FU_DECLARE(void, masked_lora_keep, (void* x, int dtype, const uint8_t* bits, int64_t rows, int64_t cols))
