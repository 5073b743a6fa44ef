"""Ops that cannot be in a CUDA graph say so to torch.compile, which keeps them out of its graphs."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module

import pytest
import torch

from fastunlearn import ops

#: waits for the device, or uploads a table of addresses in every call
NOT_CAPTURED = {
    "block_weight_grad", "block_weight_grad_", "gram", "hamu_step_", "informax", "linear_loss", "linear_loss_backward", "masked_adamw_",
    "masked_grad_norm", "masked_sgd_", "nm_gather", "nm_masks", "polar", "redistribution", "redistribution_out", "row_entropy", "saliency_accumulate_",
    "spectral_solve", "spectral_trace", "token_moments_", "topk_mask",
}  # fmt: skip


def overloads():
    for module in pkgutil.iter_modules(ops.__path__):
        import_module(f"fastunlearn.ops.{module.name}")
    names = {name.removeprefix("fastunlearn::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastunlearn::")}  # fmt: skip
    return {name: getattr(torch.ops.fastunlearn, name).default for name in names}


def test_tags():
    tagged = {name for name, op in overloads().items() if torch.Tag.cudagraph_unsafe in op.tags}
    assert tagged == NOT_CAPTURED


@pytest.mark.gpu
def test_a_loss_in_a_compiled_step_with_cuda_graphs():
    hidden = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(100, 32, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(100, (64,), device="cuda")

    def loss(x):
        return ops.linear_nll(x * 2, head, labels).mean()

    compiled = torch.compile(loss, mode="reduce-overhead")
    want = loss(hidden)
    for _ in range(4):
        torch.testing.assert_close(compiled(hidden), want)


def test_the_list_is_of_ops_that_are_there():
    assert set(overloads()) >= NOT_CAPTURED
    assert inspect.isfunction(ops.linear_nll)
