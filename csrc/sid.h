// The two passes of score identity distillation on a CPU (fastunlearn/reference/sid.py).
#pragma once

#include "common.h"

namespace fu::sid {

// Entries of an image that are summed by themselves: the same sums whatever the number of threads.
constexpr int64_t kUnit = 4096;

// Inputs [n, size] of row-major memory: teacher and fake of type `dtype`, noise of the same or fp32.
struct Inputs {
  const void *teacher, *fake, *noise;
  int dtype, noise_dtype;
  int64_t n, size;
  float alpha;
};

}  // namespace fu::sid

// out fp32 [n, 2]: sums of |u| and of v (u - alpha v). `partial`: fp64 [n, ceil(size / kUnit), 2].
FU_DECLARE(void, sid_sums, (const fu::sid::Inputs& x, double* partial, float* out))
// Both gradients, of the type of the predictions; factor fp32 [n].
FU_DECLARE(void, sid_gradients,
           (const fu::sid::Inputs& x, const float* factor, void* of_teacher, void* of_fake))
