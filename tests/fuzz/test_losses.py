"""Any tokens, any images: the losses without logits and the loss of score identity distillation, with their gradients."""

from __future__ import annotations

import torch

from fastunlearn import ops
from fastunlearn.ops.linear_divergence import KINDS
from tests.fuzz.draws import FLOATS, WIDE, Draw, fuzz, on
from tests.ops.linear_loss_proof import assert_few_tokens, inputs, leaves_of, ours, results
from tests.ops.linear_loss_proof import budget as budget_of
from tests.ops.test_sid import in_images
from tests.proof import assert_derived

BYTES = (1, 300, 3000, 1 << 20)


def _linear_loss(draw: Draw, kind: str) -> None:
    dtype = draw.pick(FLOATS if draw.backend == "reference" else (torch.float32, torch.float16))
    shape = tuple(draw.integer(0, 6) for _ in range(draw.integer(1, 3)))
    reduction = draw.pick(("sequence", "token"))
    args = inputs(
        shape, draw.integer(1, 20), draw.integer(2, 70), dtype, kind=kind, trains=draw.pick(("h", "w", "hw", "hb", "hwb")),
        bias=draw.maybe(), scale=draw.pick((1.0, 0.5)), softcap=draw.pick((None, 5.0)), ignored=draw.pick((0.0, 0.5, 1.0)),
        reduction=reduction, bytes_=draw.pick(BYTES), spread=draw.pick((1.0, 0.0, 8.0)),
    )  # fmt: skip
    if args["bias"] is None:
        args["trains"] = args["trains"].replace("b", "")
    for name in ("hidden", "weight", "ref_hidden", "ref_weight", "labels"):
        args[name] = draw.lay(args[name])

    def run():
        leaves = leaves_of(args)
        with budget_of(args["budget"]):
            value, counts = ours(kind, args, leaves, reduction)
            counted = (args["labels"] != -100).long()
            assert torch.equal(counts, counted if reduction == "token" else counted.sum(-1))
            return results(args, value, leaves)

    assert_few_tokens(on(draw.backend, run), args)


@fuzz("linear_nll", backends=("reference", "triton"))
def test_linear_nll(draw: Draw) -> None:
    _linear_loss(draw, "nll")


@fuzz("linear_divergence", backends=("reference", "triton"))
def test_linear_divergence(draw: Draw) -> None:
    _linear_loss(draw, draw.pick(list(KINDS)))


@fuzz("linear_nll", "linear_divergence", backends=("reference",))
def test_labels_outside_the_vocabulary(draw: Draw) -> None:
    """Refused, wherever it stands."""
    args = inputs((draw.integer(1, 4), draw.integer(1, 5)), 8, draw.integer(2, 20), kind="undial", ignored=0.0)
    vocabulary = len(args["weight"])
    args["labels"].view(-1)[draw.integer(0, args["labels"].numel() - 1)] = draw.pick((vocabulary, -1, -99, 2**40))
    for kind in ("nll", "undial"):
        got = on(draw.backend, lambda kind=kind: ours(kind, args, leaves_of(args), "sequence"))
        assert got is ValueError


@fuzz("sid_loss", backends=("reference", "native", "triton"))
def test_sid_loss(draw: Draw) -> None:
    narrow = (torch.float32, torch.float16, *([torch.bfloat16] if draw.backend == "native" else []))
    dtype = draw.pick(WIDE if draw.backend == "reference" else narrow)
    shape = (draw.integer(0, 4), *draw.shape(draw.integer(0, 2)))
    kinds = ("normal", "normal", "ties", "zeros")
    teacher, fake, noise = (draw.tensor(shape, dtype, kinds) for _ in range(3))
    k = torch.rand(shape[:1], generator=draw.generator) * 5 + 0.1
    alpha, up = draw.pick((1.0, 1.2)), torch.randn(shape[:1], generator=draw.generator)
    leaves = [t.detach().requires_grad_() for t in (teacher, fake)]

    def run():
        loss = ops.sid_loss(*leaves, noise, k.to(loss_type), alpha=alpha)
        assert loss.dtype == loss_type
        return [loss.detach(), *torch.autograd.grad(loss, leaves, up.to(loss.dtype))]

    def written_out(wide):
        a, b = (t.detach().to(wide).requires_grad_() for t in leaves)
        loss = in_images(a, b, noise.to(wide), k.to(wide), alpha)
        return [loss.detach(), *(g.to(wide) for g in torch.autograd.grad(loss, (a, b), up.to(wide)))]

    loss_type = torch.float64 if dtype == torch.float64 else torch.float32
    got = on(draw.backend, run)
    if min(shape) == 0:
        assert all(bool((t == 0).all()) for t in got)
        return
    # Where teacher and noise agree omega is at its floor of 1e-5, and the form in images divides rounding by it.
    exact = written_out(torch.float64)
    for mine, theirs in zip(got, exact, strict=True):
        # There k^2 / omega takes a gradient out of float16.
        assert bool(mine.isfinite()[theirs.abs() < torch.finfo(mine.dtype).max / 2].all())
    if bool((noise.double() - teacher.double()).abs().mean(tuple(range(1, noise.dim()))).ge(1e-3).all()) if noise.dim() > 1 else False:  # fmt: skip
        scale = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
        assert_derived(got, got, exact, scale, factor=0)
