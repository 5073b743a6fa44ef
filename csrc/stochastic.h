// Stochastic rounding of fp32 to bf16 with a counter-based generator: the same bits on a CPU, in CUDA, in
// Triton (kernels/adamw.py) and in PyTorch (fastunlearn/reference/stochastic.py).
//
// The random number of an entry is a function of (key, index of the entry); the two-word key is mixed on the
// host from (seed, step, number of the tensor). So a run can be resumed, or split over threads, without a
// change of a bit. The mixer is two rounds of xor-shift and multiply (the finaliser construction of
// MurmurHash3) with the key added before each.
#pragma once

#include "common.h"

namespace fu {

struct RoundKey {
  uint32_t a, b;
};

// The part of the key that holds for 2^32 entries: `high` is the upper word of the entry's index.
FU_HD RoundKey with_high_word(RoundKey key, uint32_t high) {
  return RoundKey{key.a, key.b ^ (high * 0x9e3779b9u)};
}

FU_HD uint32_t counter_random(uint32_t index, RoundKey key) {
  uint32_t x = index + key.a;
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x += key.b;
  x ^= x >> 15;
  x *= 0xc2b2ae35u;
  x ^= x >> 16;
  return x;
}

// Rounds up with a probability equal to the share of a bf16 step that would be cut off: unbiased. Infinities
// stay, NaN stays NaN. Branch-free, so that loops over it vectorise.
FU_HD bf16 to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t u = float_bits(x);
  const bool special = (u & 0x7f800000u) == 0x7f800000u;
  const uint32_t quiet = (u & 0x007fffffu) != 0 ? 0x00400000u : 0u;
  return bf16{uint16_t((special ? (u | quiet) : u + (random & 0xffffu)) >> 16)};
}

}  // namespace fu
