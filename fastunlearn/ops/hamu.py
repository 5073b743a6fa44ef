"""The HAMU step: at least Q of forgetting for the least retain damage inside a trust ball, with a certificate.

Hardness-Aware Multi-Objective Unlearning (arXiv 2606.02119). The maths is in fastunlearn/ops/_hamu_solve.py; the gradients are
read twice: once for their inner products, once for the update.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunlearn import _backend, _native
from fastunlearn.ops._certificate import Certificate, pack, size
from fastunlearn.ops._hamu_solve import InfeasibleError, Plan, Problem, solve
from fastunlearn.ops._slots import check_not_negated, check_param, local, memory_order, units
from fastunlearn.ops.gram import UNIT, Flat, Mask, as_mask, at, check_groups, products, too_many
from fastunlearn.ops.mask import BitMask
from fastunlearn.reference import hamu as reference
from fastunlearn.reference.stochastic import rounding_keys

__all__ = ["Certificate", "InfeasibleError", "hamu_step_"]

_OP = _backend.register("hamu_step_", native=("cpu",), triton=("cuda",))

_CHOICES = {
    "variant": ("q", "u"),
    "scope": ("tensor", "global"),
    "allocation": ("norms", "joint"),
    "rule": ("exact", "paper"),
}


def _check_gram(values: np.ndarray) -> None:
    """
    Raises:
        ValueError: a gradient that is not finite, or zero everywhere.
    """
    k = values.shape[1] - 1
    squares = np.einsum("tgg->tg", values)
    for g in range(k + 1):
        name = "g_forget" if g == k else "g_retain" if k == 1 else f"g_retain[{g}]"
        wrong = np.flatnonzero(~np.isfinite(squares[:, g]))
        if len(wrong):
            raise ValueError(f"{name}: the gradient of tensor {wrong[0]} is not finite; nothing was changed")
        if not squares[:, g].any():
            why = (
                "there is nothing to forget"
                if g == k
                else "an empty group, or a retain term at its minimum? Nothing holds the step back"
            )
            raise ValueError(f"{name}: zero in every entry that may move ({why}); want a gradient, nothing was changed")


class _Step:
    """The checked lists of one step, flat, device by device."""

    def __init__(self, params: Sequence[Tensor], rows: Sequence[Sequence[Tensor | None]], masks: Any):
        self.count, self.groups = len(params), len(rows)
        self.params = params
        by_device: dict[torch.device, list[int]] = {}
        for t, param in enumerate(params):
            # They are changed by their addresses.
            check_not_negated(param, f"params[{t}]")
            if memory_order(param) is None:
                raise ValueError(
                    f"params[{t}]: strides {param.stride()} of shape {tuple(param.shape)} overlap or leave gaps in memory; want "
                    "a tensor that is contiguous in some order of its dimensions"
                )
            by_device.setdefault(param.device, []).append(t)
        self.parts: list[tuple[list[int], Flat]] = []
        for members in by_device.values():
            own = [[row[t] for t in members] for row in (params, *rows)]
            mine = [masks[t] for t in members]
            self.parts.append((members, Flat(own, mine if any(m is not None for m in mine) else None)))

    def scale(self, scales: Sequence[Tensor], *, back: bool = False) -> None:
        """Multiplies every gradient by its scales, in place (back: divides); a tensor that stands in several lists once."""
        for members, flat in self.parts:
            done = set()
            for t, *column in zip(members, *flat.groups[1:]):
                param = self.params[t]
                # As the flat gradients: in the order in which the parameter lies in memory.
                order = None if param.is_contiguous() else memory_order(param)
                d = scales[t] if order is None else scales[t].permute(order)
                for x in column:
                    if x is None or not x.numel() or x.data_ptr() in done:
                        continue
                    done.add(x.data_ptr())
                    x.div_(d) if back else x.mul_(d)

    def gram(self) -> np.ndarray:
        """float64 [tensors, groups, groups]; waits for the devices."""
        out = np.zeros((self.count, self.groups, self.groups))
        for members, flat in self.parts:
            if any(x is not None for row in flat.groups[1:] for x in row):
                out[members] = products(flat, 1).cpu().numpy()
        return out

    def apply(self, factors: np.ndarray, keys: np.ndarray, stochastic: bool, firsts: np.ndarray) -> None:
        for members, flat in self.parts:
            self._apply(flat, factors[members], keys[members], stochastic, firsts[members])
            params = [self.params[t] for t in members]
            torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])

    def _apply(self, flat: Flat, factors: np.ndarray, keys: np.ndarray, stochastic: bool, firsts: np.ndarray) -> None:
        # Views of what is changed: rows of memory in the order in which it lies there (`__init__` has seen to that).
        params = [p.view(-1) for p in flat.groups[0] if p is not None]
        rows = [[None if x is None else x.reshape(-1) for x in row] for row in flat.groups[1:]]
        rounds = [stochastic and p.dtype == torch.bfloat16 for p in params]
        backend = _backend.resolve(_OP, params[0].device, too_many(rows))
        factors = factors.astype(np.float32)
        if backend == "reference":
            for t, may in enumerate(flat.may()):
                column = [row[t] for row in rows]
                key = keys[t].tolist() if rounds[t] else None
                reference.combine_(params[t], column, factors[t].tolist(), may, key, int(firsts[t]))
            return
        if backend == "triton":
            from fastunlearn.kernels import hamu as kernels

            kernels.combine_(params, rows, flat.bits, factors, keys, rounds, firsts.tolist())
            return
        codes = _native.DTYPES
        table = np.array(
            [
                flat.sizes,
                list(map(at, flat.bits)),
                list(map(at, params)),
                [codes[p.dtype] for p in params],
                rounds,
                firsts,
                *(list(map(at, row)) for row in rows),
                *([0 if x is None else codes[x.dtype] for x in row] for row in rows),
            ],
            dtype=np.int64,
        )
        table, factors, keys = np.ascontiguousarray(table.T), np.ascontiguousarray(factors), np.ascontiguousarray(keys)
        unit_tensor, first_unit = units(flat.sizes, UNIT)
        _native.library().hamu_combine_cpu(
            table.ctypes.data,
            len(rows),
            factors.ctypes.data,
            keys.ctypes.data,
            unit_tensor.ctypes.data,
            first_unit.ctypes.data,
            len(unit_tensor),
        )


def _all_reduce(values: np.ndarray, sizes: Sequence[int], group: Any, device: torch.device) -> tuple[np.ndarray, Any]:
    """(the Gram matrices of all ranks together, entries of every tensor on the ranks before this one); one small all-reduce."""
    import torch.distributed as dist

    world, rank = dist.get_world_size(group), dist.get_rank(group)
    n, count = values.shape[1], len(sizes)
    upper = np.triu_indices(n)
    parts = np.zeros((world, count))
    parts[rank] = sizes
    vector = torch.from_numpy(np.concatenate([values[:, upper[0], upper[1]].ravel(), parts.ravel()]))
    vector = vector.to(device if dist.get_backend(group) == "nccl" else "cpu")
    dist.all_reduce(vector, group=group)
    summed = vector.cpu().numpy()
    out = np.zeros_like(values)
    pairs = count * len(upper[0])
    out[:, upper[0], upper[1]] = out[:, upper[1], upper[0]] = summed[:pairs].reshape(count, -1)
    before = summed[pairs:].reshape(world, count)[:rank].sum(0)
    return out, before.astype(np.int64)


def _planned(
    values: np.ndarray, options: dict[str, Any], max_grad_norm: float | None, descent: bool
) -> tuple[Plan, Problem]:
    """The step for these Gram matrices, retain groups and the forget gradient, and its problem.

    Raises:
        ValueError: gradients that are zero or not finite, and more than the ball holds (InfeasibleError).
    """
    _check_gram(values)
    k = values.shape[1] - 1
    if descent:
        # Gradients of descent on the forget term: g_f is their opposite.
        values[:, :k, k] *= -1
        values[:, k, :k] *= -1
    norms = np.sqrt(np.einsum("tgg->g", values))
    clip = np.ones(k + 1) if max_grad_norm is None else np.minimum(1.0, max_grad_norm / norms)
    budgets = options["budgets"]
    # A budget is of the loss; the problem is one of clipped gradients.
    problem = Problem(gram=values, clip=clip, **options | {"budgets": None if budgets is None else budgets * clip[:k]})
    return solve(problem), problem


def _run(
    params: Sequence[Tensor], rows: Sequence[Sequence[Tensor | None]], masks: Sequence[BitMask | None],
    options: dict[str, Any], max_grad_norm: float | None, descent: bool, skip_flagged: bool, stochastic: bool, seed: int,
    step: int, process_group: Any = None, scales: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """All checked; rows are the retain groups and the forget gradient, local. Returns the values of the certificate."""
    lists = _Step(params, rows, masks)
    if scales is not None:
        lists.scale(scales)
    values, firsts = lists.gram(), np.zeros(len(params), dtype=np.int64)
    if process_group is not None:
        sizes = [p.numel() for p in params]
        values, firsts = _all_reduce(values, sizes, process_group, params[0].device)
    try:
        plan, problem = _planned(values, options, max_grad_norm, descent)
    except ValueError:
        if scales is not None:
            lists.scale(scales, back=True)
        raise
    k = len(rows) - 1
    if plan.flagged and skip_flagged:
        return pack(plan, problem, False)
    factors = plan.coefficients.copy()
    if descent:
        factors[:, k] *= -1
    count = len(params)
    column = np.full(count, 1, dtype=np.uint64)
    keys = rounding_keys(
        column * np.uint64(seed & 0xFFFFFFFFFFFFFFFF), column * np.uint64(step), np.arange(count, dtype=np.uint64)
    )
    if scales is not None:
        lists.scale(scales)
    lists.apply(factors, keys, stochastic, firsts)
    return pack(plan, problem, True)


_library = torch.library.Library("fastunlearn", "FRAGMENT")
_library.define(
    "hamu_step_(Tensor(a!)[] params, Tensor[] grads, int groups, Tensor[] bits, float lr, float demand, float? share, str[] choices, "
    "float[]? budgets, float? max_grad_norm, bool descent, bool skip_flagged, bool stochastic_rounding, int seed, int step) -> Tensor",
    tags=_backend.NOT_CAPTURED,
)


def _hamu_op(
    params: list[Tensor], grads: list[Tensor], groups: int, bits: list[Tensor], lr: float, demand: float, share: float | None,
    choices: list[str], budgets: list[float] | None, max_grad_norm: float | None, descent: bool, skip_flagged: bool,
    stochastic_rounding: bool, seed: int, step: int,
) -> Tensor:  # fmt: skip
    count = len(params)
    # An empty tensor stands for a missing gradient or mask.
    rows = [
        [x if x.shape == p.shape else None for x, p in zip(grads[g * count : (g + 1) * count], params)]
        for g in range(groups)
    ]
    masks = [BitMask(b, p.shape) if b.numel() else None for b, p in zip(bits, params)]
    options = {
        "lr": lr,
        "demand": demand,
        "share": share,
        "budgets": None if budgets is None else np.array(budgets),
        **dict(zip(_CHOICES, choices)),
    }
    with torch.no_grad():
        return _run(params, rows, masks, options, max_grad_norm, descent, skip_flagged, stochastic_rounding, seed, step)


_library.impl("hamu_step_", _hamu_op, "CompositeExplicitAutograd")


@torch.library.register_fake("fastunlearn::hamu_step_", lib=_library)
def _(params: list[Tensor], grads: list[Tensor], groups: int, *args: Any) -> Tensor:
    return torch.empty(size(len(params), groups - 1), dtype=torch.float64, device="cpu")


def _choice(name: str, value: Any) -> str:
    if value not in _CHOICES[name]:
        raise ValueError(f"{name}: want one of {', '.join(map(repr, _CHOICES[name]))}, got {value!r}")
    return value


def _positive(name: str, value: float | None, *, zero: bool = False) -> None:
    if value is not None and not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise ValueError(f"{name}: want a finite number {'>= 0' if zero else '> 0'}, got {value}")


def _demand(ratio: float | None, q: float | None, share: float | None, lr: float, variant: str, budgets: Any) -> float:
    if sum(value is not None for value in (ratio, q, share)) > 1:
        raise ValueError("q, ratio, share: give one of them (q = ratio * lr), got several")
    _positive("ratio", ratio, zero=True)
    _positive("q", q, zero=True)
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"share: want a number in [0, 1], got {share}")
    if q is not None:
        return float(q)
    if ratio is None and variant == "u" and budgets is not None:
        # HAMU-U with budgets is told by them what must be kept.
        return 0.0
    return (0.5 if ratio is None else float(ratio)) * lr


def _retain_lists(g_retain: Any) -> list[Any]:
    if isinstance(g_retain, Tensor) or not isinstance(g_retain, Sequence):
        raise TypeError(f"g_retain: want a list of tensors, or K such lists, got {type(g_retain).__name__}")
    if not len(g_retain):
        raise ValueError("g_retain: empty; without a retain gradient nothing holds the step back")
    several = [isinstance(x, Sequence) and not isinstance(x, Tensor) for x in g_retain]
    if all(several):
        for k, group in enumerate(g_retain):
            if not len(group) or all(x is None for x in group):
                raise ValueError(f"g_retain[{k}]: an empty group; leave it out")
        return list(g_retain)
    if any(several):
        raise TypeError("g_retain: mixes tensors and lists; want a list of tensors, or K such lists")
    if all(x is None for x in g_retain):
        raise ValueError("g_retain: every gradient is None; call backward() of the retain loss first")
    return [g_retain]


def group_of(params: Sequence[Any], process_group: Any = None) -> Any:
    """The process group over which the parameters are sharded; None: they are whole."""
    if process_group is not None or "torch.distributed.tensor" not in sys.modules:
        return process_group
    meshes = set()
    for p in params:
        if hasattr(p, "device_mesh") and any(place.is_shard() for place in p.placements):
            meshes.add(p.device_mesh)
    if not meshes:
        return None
    mesh = meshes.pop()
    if meshes or mesh.ndim != 1:
        raise ValueError("process_group: the parameters are sharded over several meshes or dimensions; name the group")
    return mesh.get_group()


def hamu_step_(
    params: Sequence[Tensor],
    g_retain: Sequence[Any],
    g_forget: Sequence[Tensor | None],
    *,
    lr: float,
    ratio: float | None = None,
    q: float | None = None,
    variant: str = "q",
    masks: Sequence[Mask] | None = None,
    budgets: Sequence[float] | None = None,
    process_group: Any = None,
    share: float | None = None,
    scope: str = "tensor",
    allocation: str | None = None,
    rule: str = "exact",
    max_grad_norm: float | None = None,
    descent: bool = False,
    skip_flagged: bool = False,
    stochastic_rounding: bool = True,
    seed: int = 0,
    step: int = 1,
    scales: Sequence[Tensor] | None = None,
) -> Certificate:
    """One step of HAMU, in place: two passes over the gradients, one wait for their inner products.

    Variant "q": the change D of least <g_retain, D> with <g_forget, D> >= Q inside the ball of a retain step. Variant "u": the
    most <g_forget, D> with <g_retain, D> <= -U inside the ball of a forget step. g_forget is the gradient of what must GROW (the
    loss on the forget set). Of K retain groups "q" keeps the worst of <g_k, D> - budgets[k] least, "u" keeps <g_k, D> <= -U.

    Args:
        params: float32, float16 or bfloat16; on any devices. DTensors: this process's part of each.
        g_retain: one gradient for each parameter (None: not reached), or K such lists. g_forget: likewise.
        lr: eta: a ball has radius lr ||g_retain,i|| ("u": lr ||g_forget,i||); of K groups that of their mean.
        ratio, q: Q (or U) = ratio * lr, or given as q, in units of clipped gradients; neither: ratio 0.5, the paper's.
        share: Q (or U) as a share of the largest that the ball holds, in [0, 1]; never infeasible.
        masks: for each parameter a BitMask, a bool tensor or None; only entries whose bit is set count and move.
        budgets: K numbers: by how much each retain loss may grow in this step, in units of the losses (not clipped). In "q" they
            shift the groups against each other and are what `flagged` tests; in "u" they replace -U.
        process_group: gradients are sharded (by rows, rank after rank): only their inner products are all-reduced. Parameters
            that are DTensors bring their group with them.
        scope: "tensor" (a ball for each) or "global" (one for all).
        allocation: "norms": Q is shared out as ||g_retain,i|| ||g_forget,i||, the paper's rule, in closed form; "joint": the best
            share, by a convex dual, which is how K groups and budgets of "u" are solved. None: "norms" where it can be.
        rule: of the flag: "exact" (could any change inside the balls?) or "paper": lr sum_i sqrt(||g_r||^2 ||g_f||^2 - max(kappa,
            0)^2) < Q, which is sufficient only and for one group.
        max_grad_norm: each group's gradient is clipped to that norm by itself.
        descent: g_forget holds the gradient of descent on the forget term: its opposite.
        skip_flagged: a flagged step is not taken.
        scales: for each parameter a float32 tensor D > 0 of its shape: everything is of the gradients D g, and the change is D times
            that of those, so that the ball holds ||change / D||. Promises and predictions stay those of the losses; lengths and inner
            products in the certificate are of D g and of change / D. The gradients are overwritten; where the step is refused they
            are multiplied back, in 16 bits nearly.
        stochastic_rounding: of bfloat16, by (seed, step, number of the tensor, entry): rounded to nearest nearly every step is lost.

    Returns:
        The `Certificate`.

    Raises:
        InfeasibleError (a ValueError): Q or U beyond the ball; it says the largest feasible. ValueError, TypeError: a gradient that
        is zero everywhere or not finite, an empty group, lists that do not fit. All before anything is changed.

    Example:
        >>> certificate = fastunlearn.ops.hamu_step_(params, g_retain, g_forget, lr=1e-4, ratio=0.5, max_grad_norm=1.0)
        >>> certificate.flagged, certificate.predicted_forget
    """
    choices = {"variant": _choice("variant", variant), "scope": _choice("scope", scope), "rule": _choice("rule", rule)}
    _positive("lr", lr)
    _positive("max_grad_norm", max_grad_norm)
    demand = _demand(ratio, q, share, lr, variant, budgets)
    retain = _retain_lists(g_retain)
    k = len(retain)
    if budgets is not None:
        budgets = [float(b) for b in budgets]
        if len(budgets) != k:
            raise ValueError(f"budgets: want {k}, one for each retain group, got {len(budgets)}")
        if not all(map(math.isfinite, budgets)):
            raise ValueError(f"budgets: want finite numbers, got {budgets}")
        if variant == "u" and not (ratio is None and q is None and share is None):
            raise ValueError('budgets: with variant "u" they say what must be kept; give them, or q, ratio, share')
    simple = k == 1 and (budgets is None or variant == "q")
    if allocation is None:
        allocation = "norms" if simple else "joint"
    choices["allocation"] = _choice("allocation", allocation)
    if allocation == "norms" and not simple:
        raise ValueError(
            'allocation: "norms" is for one retain group (and in variant "u" without budgets); want "joint"'
        )
    if rule == "paper" and (k > 1 or budgets is not None):
        raise ValueError('rule: "paper" is for one retain group without budgets; want "exact"')
    if isinstance(params, Tensor) or not isinstance(params, Sequence):
        raise TypeError(f"params: want a list, got {type(params).__name__}")
    if not params:
        raise ValueError("params: empty")
    process_group = group_of(params, process_group)
    given = []
    for i, p in enumerate(params):
        check_param(p, f"params[{i}]")
        given.append(local(p))
    if isinstance(g_forget, Tensor) or not isinstance(g_forget, Sequence):
        raise TypeError(f"g_forget: want a list, got {type(g_forget).__name__}")
    for name, group in [*((f"g_retain[{j}]", g) for j, g in enumerate(retain)), ("g_forget", g_forget)]:
        if len(group) != len(params):
            raise ValueError(
                f"{name}: want {len(params)} gradients, one (or None) for each parameter, got {len(group)}"
            )
    if all(x is None for x in g_forget):
        raise ValueError("g_forget: every gradient is None; call backward() of the forget loss first")
    rows = check_groups([given, *retain, g_forget], "gradients (number 0: params)")[1:]
    if masks is not None and len(masks) != len(params):
        raise ValueError(f"masks: want {len(params)}, one (or None) for each parameter, got {len(masks)}")
    packed = [None if masks is None else as_mask(masks[i], p, f"masks[{i}]") for i, p in enumerate(given)]
    if scales is not None:
        if isinstance(scales, Tensor) or not isinstance(scales, Sequence) or len(scales) != len(given):
            raise ValueError(f"scales: want {len(given)} tensors, one for each parameter")
        scales = [local(d) for d in scales]
        for i, (d, p) in enumerate(zip(scales, given)):
            if d.shape != p.shape or d.dtype != torch.float32 or d.device != p.device:
                raise ValueError(
                    f"scales[{i}]: want float32 {tuple(p.shape)} on {p.device}, got {d.dtype} {tuple(d.shape)} on {d.device}"
                )
    if _backend.traced(given, *rows):
        if process_group is not None or scales is not None:
            raise ValueError(
                "process_group, scales: not under torch.compile; leave the step outside of what is compiled"
            )
        grads = [p.new_empty(_absent(p)) if x is None else x for row in rows for x, p in zip(row, given)]
        bits = [p.new_empty(0, dtype=torch.uint8) if m is None else m.bits for m, p in zip(packed, given)]
        values = torch.ops.fastunlearn.hamu_step_(
            given, grads, k + 1, bits, float(lr), demand, share, [choices[name] for name in _CHOICES], budgets, max_grad_norm,
            descent, skip_flagged, stochastic_rounding, seed, step,
        )  # fmt: skip
        return Certificate(values, k, len(params))
    places = [p.data_ptr() for p in given if p.numel()]
    if len(set(places)) != len(places):
        raise ValueError("params: the same memory twice in the list; a shared parameter has one gradient")
    options: dict[str, Any] = {"lr": float(lr), "demand": demand, "share": share, **choices}
    options["budgets"] = None if budgets is None else np.array(budgets)
    with torch.no_grad():
        values = _run(
            given, rows, packed, options, max_grad_norm, descent, skip_flagged, stochastic_rounding, seed, step,
            process_group, scales,
        )  # fmt: skip
    return Certificate(values, k, len(params))


def _absent(param: Tensor) -> tuple[int, ...]:
    """A shape that is not the parameter's: of the empty tensor that stands for None."""
    return (0, 0) if tuple(param.shape) == (0,) else (0,)
