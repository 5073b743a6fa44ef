"""Any list of tensors: saliency, masked steps and norms, inner products, redistribution, HAMU's step, each against float64."""

from __future__ import annotations

import torch

from fastunlearn import ops
from fastunlearn.ops._slots import memory_order
from fastunlearn.ops.saliency import KINDS
from tests.fuzz.draws import DENSITIES, LAYOUTS, VALUES, Draw, fuzz, near, on, packed, refused
from tests.ops.test_adamw import adamw64, copies, sgd64, step_adamw, step_sgd
from tests.ops.test_adamw import inputs as step_inputs
from tests.ops.test_gram import plain64 as gram64
from tests.ops.test_hamu import _inputs as hamu_inputs
from tests.ops.test_hamu import measure
from tests.ops.test_hamu import plain64 as hamu64
from tests.ops.test_redistribute import closed_form
from tests.ops.test_saliency import plain64 as saliency64
from tests.proof import assert_derived, assert_equal, convert

TINY = 1e-37  # of fp32, whose subnormal numbers some instructions flush


@fuzz("saliency_accumulate_", backends=("native", "reference", "triton"))
def test_saliency(draw: Draw) -> None:
    kind, shapes = draw.pick(list(KINDS)), draw.shapes()
    args = {"kind": kind, "weights": None}
    args["scores"] = [draw.tensor(s, torch.float32, VALUES, written=True) for s in shapes]
    args["grads"] = [draw.tensor(s, kind=VALUES) for s in shapes]
    if kind == "weight_grad":
        args["weights"] = [draw.tensor(s, kind=VALUES) for s in shapes]
    before = [s.double() for s in args["scores"]]
    # What is added is of fp32, too: infinite where its square is beyond that.
    added = saliency64({**args, "scores": [torch.zeros_like(s) for s in args["scores"]]})
    want = [b + a.float() for b, a in zip(before, added)]
    missing = draw.integer(0, len(shapes)) if len(shapes) > 1 else len(shapes)
    if missing < len(shapes):
        args["grads"][missing], want[missing] = None, before[missing]
    got = on(draw.backend, lambda: ops.saliency_accumulate_(args["scores"], args["grads"], args["weights"], kind))
    assert got is args["scores"]
    for g, w, b, a in zip(got, want, before, added):
        if kind == "square":
            # A square beyond fp32 is infinite where it is rounded before it is added, and finite where both are one
            # instruction: -inf + 1e60 is NaN or -inf, -3e38 + 4e38 is inf or 1e38.
            fused = torch.isclose(g, (b + a).float(), rtol=2.5e-7, atol=0, equal_nan=True)
            w = torch.where(a.float().isinf() & fused, g.double(), w)
        near(g, w, 2.5e-7 * (b.abs() + (w - b).abs()) + TINY)


#: in the order of memory; factors on the learning rate are row-major
COMPACT = ("first", "second", "masters")


def _as_it_lies(may: torch.Tensor) -> torch.Tensor:
    """Row-major numbers of the set entries, in the order in which they lie in a "transposed" tensor."""
    places = torch.zeros(may.shape, dtype=torch.int64).masked_scatter(may, torch.arange(int(may.sum())))
    return places.transpose(0, -1)[may.transpose(0, -1)] if may.dim() else torch.arange(int(may.sum()))


def _lay_step(args: dict, params: str, grads: str, draw: Draw) -> dict:
    laid = copies(args)
    laid["params"] = [draw.lay(p, params) for p in laid["params"]]
    laid["grads"] = [draw.lay(g, grads) for g in args["grads"]]
    for name in COMPACT:
        if params == "transposed" and args[name] is not None:
            laid[name] = [x[_as_it_lies(may)] for x, may in zip(args[name], args["masks"])]
    return laid


def _row_major(results: list, args: dict) -> list:
    """What `_lay_step` did to compact state, undone."""
    out = [results[0]]
    for column in results[1:]:
        back = None if column is None else [torch.empty_like(x) for x in column]
        for b, x, may in zip(back or (), column or (), args["masks"]):
            b[_as_it_lies(may)] = x
        out.append(back)
    return out


def _step(draw: Draw, step, plain) -> None:
    options = {name: draw.maybe() for name in ("with_scales", "with_masters", "with_clip", "maximize", "stochastic")}
    kinds = {name: draw.pick(("fp32", "fp16", "bf16")) for name in ("params", "grads")}
    layout = draw.pick(LAYOUTS[:-1])
    if layout == "transposed":
        options["stochastic"] = False  # its numbers go by where an entry lies
    args = step_inputs(
        draw.shapes(),
        draw.pick(DENSITIES),
        seed=int(torch.randint(2**31, (), generator=draw.generator)),
        **kinds,
        **options,
    )
    special = draw.pick(("normal", "zeros", "special"))
    for g, may in zip(args["grads"], args["masks"]):
        if special != "normal":
            g[may] = draw.values((int(may.sum()),), special).to(g.dtype)
    want = on("reference", lambda: step(copies(args)))
    laid = _lay_step(args, layout, draw.pick(LAYOUTS[:-1]), draw)
    got = on(draw.backend, lambda: step(laid))
    gaps = any(memory_order(p) is None for p in laid["params"])
    assert isinstance(got, type) == gaps
    if gaps:
        return
    if layout == "transposed":
        got = _row_major(got, args)
    assert_derived(got, want, plain(args))
    for after, before, may in zip(got[0], args["params"], args["masks"]):
        assert_equal(after[~may], before[~may])


@fuzz("masked_adamw_", backends=("native", "triton"))
def test_adamw(draw: Draw) -> None:
    _step(draw, step_adamw, adamw64)


@fuzz("masked_sgd_", backends=("native", "triton"))
def test_sgd(draw: Draw) -> None:
    _step(draw, step_sgd, sgd64)


@fuzz("masked_grad_norm", backends=("native", "reference", "triton"))
def test_grad_norm(draw: Draw) -> None:
    shapes = draw.shapes()
    grads = [draw.tensor(s, kind=("normal", "ties", "zeros", "special")) for s in shapes]
    may = [draw.mask(s) for s in shapes]
    masks = [None if m is None else draw.as_mask(m) for m in (None if draw.maybe() else m for m in may)]
    squares = [
        (g if mask is None else g[m]).double().square().sum() for g, m, mask in zip(grads, may, masks, strict=True)
    ]
    want = torch.stack(squares).sum().sqrt()
    got = on(draw.backend, lambda: ops.masked_grad_norm(grads, masks))
    gaps = any(memory_order(g) is None for g in grads)
    assert isinstance(got, type) == gaps
    if gaps:
        return
    near(got, want, 1e-5 * want.abs())


@fuzz("gram", backends=("native", "reference", "triton"))
def test_gram(draw: Draw) -> None:
    shapes, groups = draw.shapes(), draw.integer(1, 6)
    kinds = ("normal", "ties", "zeros")
    rows = [[draw.tensor(s, kind=kinds) for s in shapes] for _ in range(groups)]
    may = [draw.mask(s) for s in shapes] if draw.maybe() else None
    masks = None if may is None else [draw.as_mask(m) for m in may]
    if may is not None:
        # What does not count may be anything.
        rows = [[torch.where(m, g, draw.pick((float("nan"), float("inf")))) for g, m in zip(row, may)] for row in rows]
    if draw.maybe():
        rows[draw.integer(0, groups - 1)][draw.integer(0, len(shapes) - 1)] = None
    want = gram64({"groups": rows, "may": may})
    norms = want.diagonal(dim1=1, dim2=2).sqrt()
    got = on(draw.backend, lambda: ops.gram(rows, masks=masks))
    near(got, want, 1e-6 * norms[:, :, None] * norms[:, None] + 1e-30)


@fuzz("redistribution", backends=("native", "reference", "triton"))
def test_redistribution(draw: Draw) -> None:
    shapes = draw.shapes()
    kinds = ("normal", "ties", "zeros", "special", "tiny")
    importance = [draw.tensor(s, kind=kinds) for s in shapes]
    wrong = draw.pick((False, False, True))
    if not wrong:
        importance = [draw.lay(x.abs().nan_to_num(0, 0, 0).clamp(max=6e4)) for x in importance]
    may = [draw.mask(s) for s in shapes]
    beta, clip = draw.pick((0.0, 1.0, draw.number(0, 1))), draw.pick((1.0, 5.0, draw.number(1, 20)))
    bits = [packed(m) for m in may]
    got = on(draw.backend, lambda: ops.redistribution(importance, bits, beta=beta, clip=clip))
    sums = [x.float().sum() if x.numel() else torch.zeros(()) for x in importance]
    none = any(bool((~((x >= 0) & x.isfinite())).any()) for x in importance) or not all(s.isfinite() for s in sums)
    assert isinstance(got, type) == none, (got, none)
    if none:
        return
    for f, x, m in zip(got, importance, may, strict=True):
        exact = closed_form(x, m, beta, clip)
        near(f, exact, 3e-6 * exact.abs())
        assert len(f) == 0 or abs(float(f.double().square().mean()) - 1) < 1e-5


@fuzz("hamu_step_", backends=("native", "reference", "triton"))
def test_hamu_step(draw: Draw) -> None:
    shapes = [s for s in draw.shapes() if torch.Size(s).numel()] or [(3,)]
    retain, variant = draw.integer(1, 3), draw.pick(("q", "u"))
    options = {"variant": variant, "scope": draw.pick(("tensor", "global")), "ratio": draw.pick((0.0, 0.1, 0.3))}
    options |= {"max_grad_norm": draw.pick((None, 1.0, 100.0)), "descent": draw.maybe()}
    if options["max_grad_norm"] is None:
        options.pop("max_grad_norm")
    kinds = [draw.pick((torch.float32, torch.float16, torch.bfloat16)) for _ in range(draw.integer(1, 2))]
    args = hamu_inputs(
        shapes, retain, kinds, draw.pick((torch.float32, torch.float16)), draw.pick((None, 0.3, 0.9, 1.1)),
        conflict=draw.number(-2, 2), seed=int(torch.randint(2**31, (), generator=draw.generator)), **options,
    )  # fmt: skip
    if draw.pick((False, False, False, True)):
        args["rows"][draw.integer(0, retain)][0].fill_(float("nan"))

    def run():
        params = [draw.lay(p.clone(), layout) for p, layout in zip(args["params"], layouts)]
        rows = [[draw.lay(g, layout) for g, layout in zip(row, layouts)] for row in args["rows"]]
        own = dict(args["options"])
        groups = rows[:-1] if retain > 1 else rows[0]
        try:
            c = ops.hamu_step_(params, groups, rows[-1], lr=own.pop("lr"), masks=args["may"], **own)
        except ValueError:
            for p, before in zip(params, args["params"]):
                assert_equal(p, before)
            raise
        return [*params, measure(c)]

    layouts = [draw.pick(LAYOUTS[:-1]) for _ in shapes]
    want, got = on("reference", run), on(draw.backend, run)
    if refused(want, got):
        return
    exact = hamu64(args)
    # Angles near 0 and the dual of several groups are ill-conditioned in the inner products, which differ by rounding.
    assert_derived(got, want, exact, eps=2e-4 if retain > 1 else 2e-5, factor=4)
    if args["may"] is not None:
        for after, before, may in zip(got, args["params"], args["may"]):
            assert_equal(after[~may], before[~may])


@fuzz("hamu_step_", backends=("native",))
def test_hamu_refuses_alike(draw: Draw) -> None:
    """What is no problem at all: no backend takes it, and nothing has moved."""
    shapes = draw.shapes(2)
    kind = draw.pick(("zeros", "special", "normal"))
    rows = [[draw.tensor(s, kind=kind) for s in shapes] for _ in range(2)]
    params = [torch.randn(s, generator=draw.generator) for s in shapes]

    def run():
        mine = [p.clone() for p in params]
        try:
            ops.hamu_step_(mine, *rows, lr=1e-2, share=0.5)
        except ValueError:
            assert_equal(mine, params)
            raise
        return mine

    want, got = on("reference", run), on(draw.backend, run)
    if not refused(want, got):
        assert_derived(got, want, convert(want, torch.Tensor.double), eps=1e-4)
