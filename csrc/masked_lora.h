// The two passes of a masked low-rank adapter over a weight on a CPU (fastunlearn/reference/masked_lora.py).
// The products before and after them are BLAS's.
#pragma once

#include "common.h"

// out = weight + scale * delta where the bit is set, and the weight itself elsewhere. [rows, cols] of
// row-major memory each, `bits` of a BitMask; `out` is of the weight's type, or a 16-bit one for fp32
// weights.
FU_DECLARE(void, masked_lora_weight,
           (const void* weight, int weight_dtype, const float* delta, const uint8_t* bits, int64_t rows,
            int64_t cols, float scale, void* out, int out_dtype))
// x = 0 where the bit is not set, in place.
FU_DECLARE(void, masked_lora_keep, (void* x, int dtype, const uint8_t* bits, int64_t rows, int64_t cols))
