// Saliency scores of a list of tensors: s += |g|, g^2, g or |w g|, fp32 whatever g and w are.
#pragma once

#include "common.h"

namespace fu {
// The numbers are the ABI towards Python (fastunlearn/ops/saliency.py: KINDS).
enum SaliencyKind : int { kAbs = 0, kSquare = 1, kSigned = 2, kWeightGrad = 3 };

// One tensor of the list. `weight` is read by kWeightGrad only.
struct SaliencyItem {
  float* score;
  const void* grad;
  const void* weight;
  int64_t numel;
  int grad_dtype, weight_dtype;  // kF32, kF16, kBF16
};
}  // namespace fu

// `first_piece` [count + 1]: workspace. The list is cut into one flat run of pieces, shared by the threads.
FU_DECLARE(void, saliency_accumulate,
           (const fu::SaliencyItem* items, int64_t count, int kind, int64_t* first_piece))
