"""csrc/simt.h itself: if the fibres did not behave like a GPU's threads, the proofs built on them would mean nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ on this machine")

PRELUDE = """
#define FU_HOST_SIMT
#include "simt.h"
#include <cstdio>
#define CHECK(x) do { if (!(x)) { std::printf("line %d: %s\\n", __LINE__, #x); return 1; } } while (0)
"""

BLOCK_SUM = """
// Tree in shared memory, warp shuffles, an atomic: with one barrier less the sum is wrong.
__global__ void block_sum(const int* in, int n, int* out) {
  __shared__ int part[32];
  int v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += in[i];
  for (int d = 16; d > 0; d /= 2) v += __shfl_down_sync(0xffffffffu, v, d);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < (blockDim.x + 31) / 32 ? part[threadIdx.x] : 0;
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    if (threadIdx.x == 0) atomicAdd(out, v);
  }
}
// Neighbours exchanged through shared memory: needs the barrier between write and read.
__global__ void reverse(int* x) {
  FU_DYNAMIC_SHARED(int, buffer);
  buffer[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = buffer[blockDim.x - 1 - threadIdx.x];
}
__global__ void lanes(unsigned* ballots, int* up, int* first) {
  const unsigned b = __ballot_sync(0xffffffffu, threadIdx.x % 3 == 0);
  if (threadIdx.x % 32 == 0) ballots[threadIdx.x / 32] = b;
  up[threadIdx.x] = __shfl_up_sync(0xffffffffu, int(threadIdx.x), 2);
  first[threadIdx.x] = __shfl_sync(0xffffffffu, int(threadIdx.x), 5);
}
int main() {
  CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x7210u) == 0x77221100u);
  CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x0345u) == 0x00334455u);
  std::vector<int> in(10007);
  long want = 0;
  for (size_t i = 0; i < in.size(); ++i) want += in[i] = int(i % 91) - 40;
  for (unsigned threads : {32u, 96u, 256u, 1024u}) {
    int out = 0;
    FU_LAUNCH(block_sum, 5, threads, 0, 0, in.data(), int(in.size()), &out);
    CHECK(out == want);
  }
  std::vector<int> x(200);
  for (int i = 0; i < 200; ++i) x[i] = i;
  FU_LAUNCH(reverse, 1, 200, 200 * sizeof(int), 0, x.data());
  for (int i = 0; i < 200; ++i) CHECK(x[i] == 199 - i);

  unsigned ballots[2];
  int up[64], first[64];
  FU_LAUNCH(lanes, 1, 64, 0, 0, ballots, up, first);
  for (int w = 0; w < 2; ++w) {
    unsigned expect = 0;
    for (int l = 0; l < 32; ++l) expect |= unsigned((w * 32 + l) % 3 == 0) << l;
    CHECK(ballots[w] == expect);
  }
  for (int i = 0; i < 64; ++i) {
    CHECK(up[i] == (i % 32 < 2 ? i : i - 2));
    CHECK(first[i] == i / 32 * 32 + 5);
  }
  return 0;
}
"""

DIVERGENT_BARRIER = """
__global__ void wrong(int* x) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __shfl_sync(0xffffffffu, 1, 0);
  }
  *x = 1;
}
int main() {
  int x = 0;
  try {
    FU_LAUNCH(wrong, 1, 64, 0, 0, &x);
  } catch (const std::runtime_error& e) {
    std::printf("%s\\n", e.what());
    return 0;
  }
  return 1;
}
"""

HALF_FLOATS = """
int main() {
  // Every half and every bfloat16 against the compiler's own conversion.
  for (unsigned u = 0; u < 65536; ++u) {
    _Float16 h;
    const uint16_t bits = uint16_t(u);
    memcpy(&h, &bits, 2);
    const float want = float(h), got = fu::to_float(fu::f16{bits});
    CHECK((want != want && got != got) || fu::float_bits(want) == fu::float_bits(got));
    CHECK(want != want || fu::to_f16(want).bits == bits);
    // Between this half and the next: nearest, ties to even, as the compiler rounds.
    for (float nudge : {0.25f, 0.5f, 0.75f}) {
      const float between = want + nudge * (float(fu::to_float(fu::f16{uint16_t(bits ^ 1)})) - want);
      const _Float16 rounded = _Float16(between);
      uint16_t expect;
      memcpy(&expect, &rounded, 2);
      CHECK(between != between || fu::to_f16(between).bits == expect);
    }
    const float wide = fu::to_float(fu::bf16{bits});
    CHECK(wide != wide || fu::to_bf16(wide).bits == bits);
  }
  CHECK(fu::to_bf16(1.00390625f).bits == 0x3f80);   // a tie goes to the even neighbour
  CHECK(fu::to_bf16(1.01171875f).bits == 0x3f82);
  CHECK(fu::to_bf16(3.4e38f).bits == 0x7f80);       // beyond the largest: infinity
  return 0;
}
"""


def run(tmp_path: Path, source: str) -> subprocess.CompletedProcess[str]:
    file, program = tmp_path / "program.cpp", tmp_path / "program"
    file.write_text(PRELUDE + source)
    command = ["g++", "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", str(file), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("source", [BLOCK_SUM, HALF_FLOATS], ids=["threads_and_warps", "half_floats"])
def test_program(tmp_path, source):
    done = run(tmp_path, source)
    assert done.returncode == 0, done.stdout


def test_a_missing_barrier_is_seen(tmp_path):
    """The same kernel without its barrier gives a wrong answer here too, rather than a lucky one."""
    source = BLOCK_SUM.replace("__syncthreads();\n  x[threadIdx.x]", "x[threadIdx.x]")
    assert source != BLOCK_SUM
    assert run(tmp_path, source).returncode == 1


def test_a_divergent_barrier_is_reported(tmp_path):
    done = run(tmp_path, DIVERGENT_BARRIER)
    assert done.returncode == 0
    assert "was not reached by all of its threads" in done.stdout
