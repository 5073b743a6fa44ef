"""What the proofs of linear_nll and linear_divergence share: cases, and values and gradients against torch's from whole logits."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastunlearn
from fastunlearn import ops
from fastunlearn.ops import _linear_loss
from tests.proof import OpProof, assert_derived, convert, tensors

LARGE = 1 << 27


def from_logits(kind: str, args: dict[str, Any], leaves: dict[str, Tensor]) -> Tensor:
    """The loss of every token, 0 where it is ignored, from the logits of all, as torch alone says it."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = F.linear(hidden, weight, bias)
        z = (z if z.dtype == torch.float64 else z.float()) * args["scale"]
        return z if args["softcap"] is None else args["softcap"] * torch.tanh(z / args["softcap"])

    kept = args["labels"] != -100
    z = logits(leaves["hidden"], leaves["weight"], leaves.get("bias"))[kept]
    labels = args["labels"][kept]
    label = F.one_hot(labels, z.shape[1]).bool()
    if kind == "nll":
        value = F.cross_entropy(z, labels, reduction="none")
    elif kind == "pdu":
        value = (z.max(-1)[0] - z.mean(-1)) ** 2
    elif kind == "ce_u":
        target = z.detach().masked_fill(label, float("-inf")).softmax(-1)
        value = -(target * z.log_softmax(-1)).sum(-1)
    else:
        r = logits(args["ref_hidden"], args["ref_weight"], args["ref_bias"])[kept]
        if kind == "undial":
            value = -((r - args["strength"] * label).softmax(-1) * z.log_softmax(-1)).sum(-1)
        else:
            value = F.kl_div(z.log_softmax(-1), r.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return torch.zeros(kept.shape, dtype=z.dtype, device=z.device).masked_scatter(kept, value)


def ours(kind: str, args: dict[str, Any], leaves: dict[str, Tensor], reduction: str) -> tuple[Tensor, Tensor]:
    options = {
        "bias": leaves.get("bias"),
        "reduction": reduction,
        "logit_scale": args["scale"],
        "softcap": args["softcap"],
    }
    if kind == "nll":
        return ops.linear_nll(leaves["hidden"], leaves["weight"], args["labels"], **options)
    has = kind in ("kl", "undial")
    return ops.linear_divergence(
        leaves["hidden"], leaves["weight"], args["ref_hidden"] if has else None, args["ref_weight"] if has else None,
        args["labels"], kind=kind, strength=args["strength"], ref_bias=args["ref_bias"] if has else None, **options,
    )  # fmt: skip


@contextmanager
def budget(bytes_: int):
    """Of the buffer; of it a CPU takes a third at a time."""
    before, cached = dict(_linear_loss.BUDGET), _linear_loss._CACHED
    _linear_loss.BUDGET.update(dict.fromkeys(before, bytes_))
    _linear_loss._CACHED = bytes_ // (3 * torch.get_num_threads())
    try:
        yield
    finally:
        _linear_loss.BUDGET.update(before)
        _linear_loss._CACHED = cached


def inputs(
    shape=(3, 5), width=16, vocabulary=40, dtype=torch.float32, *, kind="nll", trains="", bias=False, scale=1.0, softcap=None,
    ignored=0.4, reduction="sequence", bytes_=LARGE, spread=1.0, device="cpu",
) -> dict[str, Any]:  # fmt: skip
    """trains: which of h(idden), w(eight), b(ias) take a gradient. bytes_: of the logits in memory at once."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size, factor=1.0):
        return (factor * torch.randn(size, generator=generator)).to(dtype).to(device)

    labels = torch.randint(vocabulary, shape, generator=generator)
    labels = torch.where(torch.rand(shape, generator=generator) < ignored, -100, labels).to(device)
    return {
        "hidden": normal(*shape, width, factor=spread),
        "weight": normal(vocabulary, width),
        "bias": normal(vocabulary) if bias else None,
        "ref_hidden": normal(*shape, width + 3, factor=spread),
        "ref_weight": normal(vocabulary, width + 3),
        "ref_bias": normal(vocabulary) if bias else None,
        # Every sequence a factor of its own, as NPO has it.
        "upstream": torch.randn(shape if reduction == "token" else shape[:-1], generator=generator).to(device),
        "labels": labels, "kind": kind, "trains": trains or "h", "scale": scale, "softcap": softcap, "strength": 3.0,
        "reduction": reduction, "budget": bytes_,
    }  # fmt: skip


def case(**options):
    return lambda device: inputs(device=device, **options)


def by_token(args: dict[str, Any]) -> Tensor:
    """The factor of every token."""
    up = args["upstream"]
    return up if args["reduction"] == "token" else up[..., None].expand(args["labels"].shape)


def leaves_of(args: dict[str, Any]) -> dict[str, Tensor]:
    names = [n for n in ("hidden", "weight", "bias") if args[n] is not None]
    return {n: args[n].detach().clone().requires_grad_(n[0] in args["trains"]) for n in names}


def results(args: dict[str, Any], value: Tensor, leaves: dict[str, Tensor]) -> list[Tensor]:
    """Value and gradients of the weighted sum."""
    trained = [t for t in leaves.values() if t.requires_grad]
    return [value.detach(), *torch.autograd.grad((value * args["upstream"]).sum(), trained)]


def torch_alone(args: dict[str, Any]) -> list[Tensor]:
    leaves = leaves_of(args)
    value = from_logits(args["kind"], args, leaves)
    return results(args, value if args["reduction"] == "token" else value.sum(-1), leaves)


def magnitudes(args: dict[str, Any]) -> list[Tensor]:
    """Of every one of the `results` the sum of its terms' moduli: of |u_t g_tv w_v| over the vocabulary, of |u_t g_tv h_t| over
    the tokens, g the gradient of a token's loss over its logits. The sums may be 0: rows of the weight that are all the same
    have sum_v g_tv w_v = 0.

    Args:
        args: in float64.
    """
    hidden, labels = args["hidden"].flatten(0, -2), args["labels"].flatten()
    # Weights of 0 that meet a token each: their gradient is that over the logits.
    apart = hidden.new_zeros(len(args["weight"]), len(hidden), requires_grad=True)
    leaves = leaves_of({**args, "trains": "-"}) | {
        "hidden": torch.cat([hidden, torch.eye(len(hidden), dtype=hidden.dtype)], 1),
        "weight": torch.cat([args["weight"], apart], 1),
    }
    flat = {**args, "labels": labels, "ref_hidden": args["ref_hidden"].flatten(0, -2)}
    value = from_logits(args["kind"], flat, leaves)
    g = torch.autograd.grad((value * by_token(args).flatten()).sum(), apart)[0].abs()
    sizes = {
        "hidden": (g.T @ args["weight"].abs()).view_as(args["hidden"]),
        "weight": g @ hidden.abs(),
        "bias": g.sum(1),
    }
    value = value.detach().abs().view_as(args["labels"])
    trained = [n for n, t in leaves_of(args).items() if t.requires_grad]
    return [value if args["reduction"] == "token" else value.sum(-1), *(sizes[n] for n in trained)]


def assert_few_tokens(out: Any, args: dict[str, Any], eps: float = 1e-5) -> None:
    """`out` is as exact as torch alone is from whole logits, where the luck of one rounding counts."""
    exact = convert(args, lambda t: t.double() if t.is_floating_point() else t)
    if args["hidden"].element_size() == 2:
        # A term of a gradient is rounded at most four times, by half an eps each: the gradient over the logits; the sum of a
        # block of the vocabulary (on a CPU), or the hidden state by its factor; the sum of all; and that of float16 by the
        # largest factor. What rounded logits do to a loss is in torch's own error, in other places by the order of sums.
        eps = 4 * torch.finfo(args["hidden"].dtype).eps / 2
    assert_derived(out, torch_alone(args), torch_alone(exact), eps, factor=4, sizes=magnitudes(exact))


class LinearLossProof(OpProof):
    """Values and gradients, held to torch's own from whole logits in the same type and in float64."""

    backends = ("triton",)
    differentiable = True
    exact = False
    #: cases small enough for finite differences
    differences: tuple[str, ...] = ()
    #: whose head is to have one row only
    cancelling: tuple[Any, ...] = ()

    def run(self, args):
        leaves = leaves_of(args)
        with budget(args["budget"]):
            value, counts = ours(args["kind"], args, leaves, args["reduction"])
            assert torch.equal(counts, self.counts(args))
            assert value.dtype == torch.promote_types(args["hidden"].dtype, torch.float32)
            got = results(args, value, leaves)
        for g, t in zip(got[1:], [t for t in leaves.values() if t.requires_grad]):
            assert g.dtype == t.dtype
        return got

    @staticmethod
    def counts(args):
        counted = (args["labels"] != -100).long()
        return counted if args["reduction"] == "token" else counted.sum(-1)

    def _compare(self, out, args):
        cpu = convert(args, lambda t: t.cpu())
        exact = convert(cpu, lambda t: t.double() if t.is_floating_point() else t)
        # Of 16 bits: gradients are rounded before the factor of their sequence too, which torch multiplies in first.
        factor = 3.0 if args["hidden"].element_size() == 2 else 2.0
        assert_derived(out, torch_alone(cpu), torch_alone(exact), self.eps, factor)

    def test_reference(self, case):
        args = self.cases[case]("cpu")
        self._compare(self._run("reference", args), args)

    def test_gradients_that_cancel(self):
        """Rows of the weight that are all the same: what is left of them is what was rounded."""
        for args in (f("cpu") for f in self.cancelling):
            args["weight"] = args["weight"][:1].expand_as(args["weight"])
            assert_few_tokens(self._run("reference", args), args)

    def test_gradient(self, few_case):
        args = convert(self.cases[few_case]("cpu"), lambda t: t.double() if t.is_floating_point() else t)
        names = [n for n, t in leaves_of(args).items() if t.requires_grad]

        def f(*values):
            leaves = leaves_of(args) | dict(zip(names, values))
            value, _ = ours(args["kind"], args, leaves, args["reduction"])
            return value, (value * args["upstream"]).sum()

        leaves = [args[n].clone().requires_grad_() for n in names]
        with fastunlearn.backend("reference"), budget(args["budget"]):
            # The target of ce_u is a constant that moves with the point: finite differences would see it move.
            if few_case not in self.differences or args["kind"] == "ce_u":
                want = torch.autograd.grad((from_logits(args["kind"], args, leaves_of(args) | dict(zip(names, leaves))) * by_token(args)).sum(), leaves)  # fmt: skip
                got = torch.autograd.grad(f(*leaves)[1], leaves)
                for g, w in zip(got, want):
                    torch.testing.assert_close(g, w)
            else:
                assert torch.autograd.gradcheck(f, leaves)

    def test_fullgraph(self, few_case):
        args = self.cases[few_case]("cpu")
        torch._dynamo.reset()

        def f(leaves):
            return ours(args["kind"], args, leaves, args["reduction"])[0]

        leaves = leaves_of(args)
        with fastunlearn.backend("reference"), budget(args["budget"]):
            value = torch.compile(f, fullgraph=True, backend="aot_eager")(leaves)
            out = results(args, value, leaves)
        assert fastunlearn.explain(self.op).last == "reference:cpu"
        self._compare(out, args)

    def library_calls(self, args):
        width, has = args["hidden"].shape[-1], args["kind"] in ("kl", "undial")
        hidden = args["hidden"].reshape(-1, width)
        reference = (
            (args["ref_hidden"].reshape(-1, width + 3), args["ref_weight"], args["ref_bias"]) if has else (None,) * 3
        )
        numbers = (self.op, args["kind"], args["strength"], args["scale"], args["softcap"] or 0.0)
        labels = args["labels"].reshape(-1)
        op = torch.ops.fastunlearn.linear_loss.default
        for hidden_trains, head_trains in ((False, False), (True, False), (True, True)):
            h = hidden.detach().clone().requires_grad_(hidden_trains)
            w = args["weight"].detach().clone().requires_grad_(head_trains)
            yield op, (h, w, args["bias"], *reference, labels, *numbers, hidden_trains, head_trains)
        stats = op(hidden, args["weight"], args["bias"], *reference, labels, *numbers, False, True)[1]
        factor = torch.rand(len(labels))
        yield (
            torch.ops.fastunlearn.linear_loss_backward.default,
            (factor, stats, hidden, args["weight"], args["bias"], *reference, labels, *numbers),
        )


def memory_of(kind: str, vocabulary: int, trains: str, bytes_: int) -> int:
    """Bytes of the largest tensor that is made beyond inputs and gradients."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fastunlearn.reference import linear_divergence, linear_nll

    args = inputs((64,), 8, vocabulary, kind=kind, ignored=0)
    code, has = (linear_nll if kind == "nll" else linear_divergence), kind in ("kl", "undial")
    spec = _linear_loss.Spec("linear_nll" if kind == "nll" else "linear_divergence", kind, 1.0, 1.0, 0.0)
    head = _linear_loss.Head(
        args["hidden"], args["weight"], None, args["ref_hidden"] if has else None, args["ref_weight"] if has else None, None
    )  # fmt: skip
    known = {args["weight"].untyped_storage().data_ptr(), args["ref_weight"].untyped_storage().data_ptr()}
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, call=(), kwargs=None):
            nonlocal largest
            out = func(*call, **(kwargs or {}))
            for t in tensors(out):
                if t.shape == args["weight"].shape:
                    known.add(t.untyped_storage().data_ptr())
                if t.untyped_storage().data_ptr() not in known:
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with budget(bytes_), Watch():
        result = _linear_loss.forward(code, spec, head, args["labels"], True, "w" in trains, keep=True)
        if "w" in trains:
            wants = (True, True, False)
            _linear_loss.backward(
                code, spec, head, args["labels"], result.stats, result.grad_logits, torch.ones(64), wants
            )
    return largest
