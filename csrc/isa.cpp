// Which instruction set the element loops use: detected once, lowered by FASTUNLEARN_ISA=base|v3 or by a
// test.
#include <cstdlib>
#include <cstring>

#include "common.h"

namespace fu {
namespace {

int detect() {
#if defined(__x86_64__) && !defined(FU_SINGLE_ISA)
  int have = 0;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    have = 3;
  if (have == 3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    have = 4;
  return have;
#else
  return 0;
#endif
}

int initial() {
  const int have = detect();
  const char* want = std::getenv("FASTUNLEARN_ISA");
  if (want && std::strcmp(want, "base") == 0) return 0;
  if (want && std::strcmp(want, "v3") == 0 && have >= 3) return 3;
  return have;
}

int level = initial();

}  // namespace

int isa_level() {
  return level;
}

int set_isa_level(int wanted) {
  const int before = level, have = detect();
  level = wanted < have ? wanted : have;
  return before;
}

}  // namespace fu
