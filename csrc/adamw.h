// AdamW and SGD on lists of tensors of which only some entries may move, and the norm of their gradients.
//
// AdamW: Loshchilov and Hutter, "Decoupled weight decay regularization"; the order of operations is that of
// torch.optim. Moments are compact: entry number c among the set bits of the mask has its moments at place c.
//
// `table` int64 [tensors, kFields], `hyper` float [tensors, kHyper], `keys` uint32 [tensors, 2]: one row a
// tensor. The work is cut into units of kUnit entries: `unit_tensor` int32 [units] names a unit's tensor and
// `first_unit` int64 [tensors] the number of that tensor's first unit. fastunlearn/ops/_slots.py builds all
// of them.
#pragma once

#include "common.h"

namespace fu::masked {

enum Field : int {
  kParam = 0,
  kGrad,
  kBits,    // one row of bits over the flat tensor, padding 0; address 0: every entry may move
  kPrefix,  // int64: set bits before every kBlock-th entry
  kFirst,   // fp32 compact: exp_avg, or SGD's momentum buffer (0: none)
  kSecond,  // fp32 compact: exp_avg_sq
  kMaster,  // fp32 compact copy of the parameter, or 0
  kScale,   // fp32 compact factors on the update, or 0
  kNumel,
  kParamType,
  kGradType,
  kStochastic,  // 1: bf16 parameters are rounded at random
  kFields
};

// AdamW: 1 - beta1, beta2, 1 - beta2, eps, lr * weight_decay, step size, sqrt of the second bias correction,
// sign SGD:   momentum, 1 - dampening, weight decay, lr, nesterov, first step (the buffer becomes the
// gradient), -, sign
constexpr int kHyper = 8;
constexpr int64_t kBlock = 1024;        // entries
constexpr int64_t kUnit = 32 * kBlock;  // entries

struct Work {
  const int64_t* table;
  const float* hyper;
  const uint32_t* keys;
  const int32_t* unit_tensor;
  const int64_t* first_unit;
  int64_t units;
  const float* grad_scale;  // one number, or null
};

}  // namespace fu::masked

FU_DECLARE(void, masked_adamw, (const masked::Work& work))
FU_DECLARE(void, masked_sgd, (const masked::Work& work))
// partial[unit] = sum of squares of the gradients that may move there.
FU_DECLARE(void, masked_sumsq, (const masked::Work& work, double* partial))

namespace fu::cuda {
// As above, with every address on the device. `kinds`: bit 3 * parameter type + gradient type is set for each
// pair of types that occurs (DType numbers).
void masked_adamw(const masked::Work& work, uint32_t kinds, int device, uintptr_t stream);
void masked_sgd(const masked::Work& work, uint32_t kinds, int device, uintptr_t stream);
void masked_sumsq(const masked::Work& work, double* partial, uint32_t kinds, int device, uintptr_t stream);
}  // namespace fu::cuda
