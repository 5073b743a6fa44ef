"""The norm of the gradients that may move: against double precision, on every backend, also where squares leave fp32."""

from __future__ import annotations

import pytest
import torch

import fastunlearn
from fastunlearn import BitMask, ops
from tests.ops.test_adamw import FEW, Masked, _cases
from tests.proof import Aot


class TestNorm(Masked):
    op = "masked_grad_norm"
    backends = ("native", "triton")
    cuda_bodies = True
    exact = False
    cases = {k: v for k, v in _cases().items() if not k.startswith(("scaled", "clipped"))}
    few = tuple(k for k in FEW if not k.startswith(("scaled", "clipped")))
    aot = (
        Aot(
            "fastunlearn.kernels.adamw:masked_sumsq_kernel",
            {"table": "*i64", "block_tensor": "*i32", "first_block": "*i64", "partial": "*fp64"},
            {"G": "tl.bfloat16", "BLOCK_SIZE": 1024},
        ),
    )

    def run(self, args):
        return ops.masked_grad_norm(args["grads"], args["masks"])

    def _run64(self, args):
        return sum((g[m].double() ** 2).sum() for g, m in zip(args["grads"], args["masks"])).sqrt().cpu()

    def library_calls(self, args):
        bits = [BitMask.pack(m).bits for m in args["masks"]]
        yield torch.ops.fastunlearn.masked_grad_norm.default, (args["grads"], bits)


def _norms_beyond_fp32(backend, device="cpu"):
    """Gradients from the smallest of fp32 to near its largest, in blocks of their own and beside others."""
    every = 10 ** torch.linspace(-44, 37, 2500)
    with fastunlearn.backend(backend):
        for g in (
            torch.tensor([1e-45]),
            torch.tensor([2e38, 1e38]),
            every[:400],
            every[:1100],
            every,
            every.bfloat16(),
        ):
            for may in (None, torch.arange(len(g)) % 3 == 0):
                want = (g if may is None else g[may]).double().square().sum().sqrt().float()
                mask = None if may is None else may.to(device)
                got = ops.masked_grad_norm([torch.zeros(1030, device=device), g.to(device)], [None, mask])
                torch.testing.assert_close(got.cpu(), want, rtol=3e-7, atol=0)


@pytest.mark.parametrize(("backend", "isa"), [("reference", 99), *(("native", i) for i in (0, 3, 99)), ("triton", 99)])
def test_norms_whose_squares_are_beyond_fp32(backend, isa):
    before = fastunlearn._native._C.set_isa_level(isa)
    try:
        _norms_beyond_fp32(backend)
    finally:
        fastunlearn._native._C.set_isa_level(before)


def test_norms_whose_squares_are_beyond_fp32_in_the_cuda_bodies(simt_module):
    with fastunlearn._native.host_cuda(simt_module):
        _norms_beyond_fp32("native")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_norms_whose_squares_are_beyond_fp32_on_a_gpu(backend):
    _norms_beyond_fp32(backend, "cuda")
