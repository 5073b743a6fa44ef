#include <cstdlib>
#include <cstring>

#include "common.h"

namespace fu {

int isa_level() {
  static const int level = [] {
#if defined(__x86_64__) && !defined(FU_SINGLE_ISA)
    int have = 0;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
      have = 3;
    if (have == 3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      have = 4;
    // FASTUNLEARN_ISA=base|v3 asks for less than the machine has: to test the other builds on one machine.
    if (const char* want = std::getenv("FASTUNLEARN_ISA")) {
      if (std::strcmp(want, "base") == 0) return 0;
      if (std::strcmp(want, "v3") == 0 && have >= 3) return 3;
    }
    return have;
#else
    return 0;
#endif
  }();
  return level;
}

}  // namespace fu
