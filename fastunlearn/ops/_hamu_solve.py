"""What a HAMU step does to every tensor, from the Gram matrices of its gradients alone, in float64.

Hardness-Aware Multi-Objective Unlearning (arXiv 2606.02119): HAMU-Q and HAMU-U in closed form, tensor by tensor. The form for K
retain groups and the exact test whether retain damage can be avoided are reconstructions: convex duals in K + 1 variables.

Groups are numbered 0 .. K - 1 (retain) and K (forget). A change of tensor t is sum_g coefficient[t, g] * gradient[t, g].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: squared sine of the angle between two gradients below which they count as parallel: that of fp32 products is noise there
PARALLEL = 4e-7


@dataclass(frozen=True)
class Problem:
    """One step, as the public op takes it; `gram` float64 [tensors, K + 1, K + 1]."""

    gram: np.ndarray
    lr: float
    demand: float  #: Q of variant "q", U of variant "u"
    variant: str
    scope: str
    allocation: str
    rule: str
    budgets: np.ndarray | None  #: of the clipped gradients, as demand is
    clip: np.ndarray  #: factor on each group's gradient
    share: float | None = None  #: demand is this share of the largest feasible one


@dataclass(frozen=True)
class Plan:
    """coefficients [tensors, K + 1] on the gradients as they were given; the others: ops.hamu.Certificate."""

    coefficients: np.ndarray
    demand: float
    s: float
    capacity: float
    hardness: float
    needed: float
    flagged: bool
    largest: float
    multipliers: np.ndarray
    predicted: np.ndarray
    step_norm: float


class InfeasibleError(ValueError):
    """More was asked for than the trust ball allows; `largest` would be feasible."""

    def __init__(self, largest: float, demand: float, variant: str, lr: float):
        self.largest = largest
        name, what = ("Q", "forgetting") if variant == "q" else ("U", "retain improvement")
        super().__init__(
            f"{'q' if variant == 'q' else 'q (U)'}: {name} = {demand:.6g} of {what} lies beyond the trust ball; the largest "
            f"feasible {name} of this step is {largest:.6g} (ratio = {name} / lr: {largest / lr:.6g}); share asks for a share of it"
        )


def _norms(squares: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(squares, 0))


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def angle_form(rr: np.ndarray, rf: np.ndarray, ff: np.ndarray, lr: float, s: float) -> tuple[np.ndarray, np.ndarray]:
    """HAMU-Q in angles: factors (a, b) of the change a g_r + b g_f of every block.

    With R_i = lr ||g_r,i|| and Q_i ~ ||g_r,i|| ||g_f,i|| the paper's rectified and direct steps are a step of length R_i rotated
    from -g_r towards g_f until sin(angle beyond orthogonal) is s, the same for all blocks.
    """
    nr, nf = _norms(rr), _norms(ff)
    cosine = np.clip(_over(rf, nr * nf), -1, 1)
    square = 1 - cosine**2
    parallel = square <= PARALLEL
    sine = np.sqrt(np.where(parallel, 1.0, square))
    rest = np.where(parallel, 0.0, np.sqrt(max(0.0, 1 - s * s)) / sine)
    direct = (cosine <= -s) | (nf == 0)
    a = np.where(direct, -lr, -lr * rest)
    b = np.where(direct, 0.0, lr * _over(nr, nf) * (s + rest * cosine))
    still = nr == 0
    return np.where(still, 0.0, a), np.where(still, 0.0, b)


def least_sum_1d(radii: np.ndarray, rr: np.ndarray, rf: np.ndarray, ff: np.ndarray, cost: float) -> tuple[float, float]:
    """(lam, value) of min over lam >= 0 of sum_i R_i ||g_f,i - lam g_r,i|| + cost lam."""
    # A norm that vanishes has a kink: rounded off far below what fp32 gradients resolve.
    floor = 1e-20 * float((ff + rr).max(initial=0.0)) + 1e-300

    def norms(lam: float) -> np.ndarray:
        return np.sqrt(np.maximum(rr * lam * lam - 2 * rf * lam + ff, 0) + floor)

    def slope(lam: float) -> float:
        return float((radii * (rr * lam - rf) / norms(lam)).sum()) + cost

    if slope(0.0) >= 0:
        return 0.0, float((radii * _norms(ff)).sum())
    low, high = 0.0, float(np.sqrt(ff.sum() / max(rr.sum(), 1e-300))) or 1.0
    for _ in range(200):
        if slope(high) >= 0:
            break
        low, high = high, 2 * high
    lam = 0.5 * (low + high)
    bend = np.maximum(rr * ff - rf * rf, 0) + floor * rr
    for _ in range(100):
        n = norms(lam)
        first = float((radii * (rr * lam - rf) / n).sum()) + cost
        low, high = (low, lam) if first >= 0 else (lam, high)
        second = float((radii * bend / n**3).sum())
        step = lam - first / second if second > 0 else low
        after = step if low < step < high else 0.5 * (low + high)
        if abs(after - lam) <= 1e-15 * high:
            break
        lam = after
    n = np.sqrt(np.maximum(rr * lam * lam - 2 * rf * lam + ff, 0))
    return lam, float((radii * n).sum()) + cost * lam


def least_sum(
    gram: np.ndarray, radii: np.ndarray, cost: np.ndarray, simplex: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """min of sum_i R_i ||sum_k x_k h_k,i|| + cost . x over x >= 0 with sum_{k in simplex} x_k = 1.

    A primal-dual interior-point method. Norms are rounded off at a radius that goes to zero with the barrier, so that blocks whose
    sum vanishes give the step inside their ball that the constraints ask for.

    Args:
        gram: [blocks, n, n] inner products of the h_k. radii: [blocks]. cost: [n]. simplex: bool [n].

    Returns:
        (x [n], weights [blocks]): the minimising direction of block i is -weights[i] * sum_k x_k h_k,i.
    """
    n = len(cost)
    sizes = _norms(np.einsum("bkk->k", gram))
    sizes = np.where(sizes > 0, sizes, 1.0)
    scale = float((radii * _norms(np.einsum("bkk->bk", gram).max(1, initial=0.0))).sum()) or 1.0
    # In units in which every h has norm 1 and the objective is about 1.
    m = gram / (sizes[:, None] * sizes)
    r = radii * sizes.max() / scale
    unit = sizes.max()
    c = cost / sizes * unit / scale
    a = np.where(simplex, unit / sizes, 0.0)
    x = np.where(simplex, 1 / max(1, simplex.sum()) / np.where(simplex, a, 1.0), 1.0)
    z, y, t = np.ones(n), 0.0, 1.0

    def terms(x: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        mx = m @ x
        return mx, np.sqrt(np.maximum(mx @ x, 0) + 1e-3 * t)

    def residual(x: np.ndarray, z: np.ndarray, y: float, t: float) -> tuple[np.ndarray, float, np.ndarray]:
        mx, norm = terms(x, t)
        return (r / norm) @ mx + c - z - y * a, float(a @ x) - 1, x * z - t

    tries = 0
    for _ in range(200):
        mx, norm = terms(x, t)
        one, two, three = residual(x, z, y, t)
        if max(np.abs(one).max(), abs(two), t) < 1e-13:
            break
        bent = mx * np.sqrt(r / norm**3)[:, None]
        hessian = np.einsum("b,bkl->kl", r / norm, m) - bent.T @ bent
        system = np.zeros((n + 1, n + 1))
        system[:n, :n] = hessian + np.diag(z / x)
        system[:n, n], system[n, :n] = -a, a
        right = np.append(-one - three / x, -two)
        try:
            move = np.linalg.solve(system, right)
        except np.linalg.LinAlgError:
            move = np.linalg.lstsq(system, right, rcond=None)[0]
        dx, dy = move[:n], float(move[n])
        dz = -(three + z * dx) / x
        length = 1.0
        for value, change in ((x, dx), (z, dz)):
            falling = change < 0
            if falling.any():
                length = min(length, 0.99 * float((-value[falling] / change[falling]).min()))
        before = np.linalg.norm(np.concatenate([one, [two], three]))
        for _ in range(30):
            after = residual(x + length * dx, z + length * dz, y + length * dy, t)
            if np.linalg.norm(np.concatenate([after[0], [after[1]], after[2]])) <= (1 - 1e-4 * length) * before:
                break
            length *= 0.5
        x, z, y = x + length * dx, z + length * dz, y + length * dy
        # The barrier falls where the present one is about solved.
        now = residual(x, z, y, t)
        tries += 1
        if max(np.abs(now[0]).max(), abs(now[1]), np.abs(now[2]).max()) <= 0.5 * t + 1e-14:
            # Slowly where the norms bend much.
            t, tries = max(1e-14, t * (0.02 if tries == 1 else 0.1 if tries < 4 else 0.4)), 0
    mx, norm = terms(x, t)
    return x / sizes * unit, radii / (norm * unit)


def _signed(gram: np.ndarray) -> np.ndarray:
    """The Gram matrices with the forget gradient negated: those of g_1 .. g_K, -g_f."""
    out = gram.copy()
    out[:, -1, :] *= -1
    out[:, :, -1] *= -1
    return out


def _capacity(blocks: np.ndarray, radii: np.ndarray, budgets: np.ndarray) -> tuple[float, np.ndarray]:
    """(most forgetting with <g_k, change> <= budgets_k inside the balls, a multiplier for every group)."""
    k = blocks.shape[1] - 1
    if k == 1:
        lam, value = least_sum_1d(radii, blocks[:, 0, 0], blocks[:, 0, 1], blocks[:, 1, 1], float(budgets[0]))
        return value, np.array([lam])
    forget = np.arange(k + 1) == k
    x, _ = least_sum(_signed(blocks), radii, np.append(budgets, 0.0), forget)
    norms = _norms(np.einsum("k,bkl,l->b", x, _signed(blocks), x))
    return float((radii * norms).sum() + budgets @ x[:k]), x[:k]


def solve(p: Problem) -> Plan:
    """The step of a problem.

    Raises:
        InfeasibleError: the ball does not hold that much.
    """
    gram = p.gram * p.clip[:, None] * p.clip
    blocks = gram.sum(0, keepdims=True) if p.scope == "global" else gram
    k = gram.shape[1] - 1
    budgets = np.zeros(k) if p.budgets is None else p.budgets
    weights = np.full(k, 1 / k)
    mean = np.einsum("k,bkl,l->b", weights, blocks[:, :k, :k], weights)
    ff = blocks[:, k, k]
    quota = p.variant == "q"
    radii = p.lr * _norms(mean if quota else ff)
    # What the ball allows: of forgetting for Q, of improvement of the worst group for U.
    if quota:
        largest = float((radii * _norms(ff)).sum())
    elif k == 1:
        largest = float((radii * _norms(blocks[:, 0, 0])).sum()) + (budgets[0] if p.budgets is not None else 0.0)
    else:
        x, _ = least_sum(blocks[:, :k, :k], radii, budgets, np.ones(k, dtype=bool))
        norms = _norms(np.einsum("k,bkl,l->b", x, blocks[:, :k, :k], x))
        largest = float((radii * norms).sum() + budgets @ x)
    demand = p.demand if p.share is None else p.share * max(0.0, largest)
    if demand > largest * (1 + 1e-9) or (not quota and largest < 0):
        raise InfeasibleError(largest, demand, p.variant, p.lr)
    demand = min(demand, largest)
    room = float((radii * _norms(ff if quota else mean)).sum())
    s = min(1.0, demand / room) if room else 0.0
    limits = budgets if quota else budgets - demand
    if p.allocation == "norms":
        rr, rf = blocks[:, 0, 0], blocks[:, 0, 1]
        if quota:
            a, b = angle_form(rr, rf, ff, p.lr, s)
            coefficients = np.stack([a, b], 1)
        else:
            # HAMU-U is HAMU-Q of (-g_f, -g_r).
            a, b = angle_form(ff, rf, rr, p.lr, s)
            coefficients = np.stack([-b, -a], 1)
    else:
        signed = _signed(blocks)
        if quota:
            x, weight = least_sum(signed, radii, np.append(budgets, -demand), np.arange(k + 1) < k)
        else:
            x, weight = least_sum(signed, radii, np.append(limits, 0.0), np.arange(k + 1) == k)
        coefficients = -weight[:, None] * x * np.append(np.ones(k), -1.0)
    if p.rule == "paper":
        square = blocks[:, 0, 0] * ff - np.maximum(blocks[:, 0, 1], 0) ** 2
        capacity, needed = p.lr * float(_norms(square).sum()), demand
        multipliers = np.array([float(capacity < needed)])
    else:
        capacity, multipliers = _capacity(blocks, radii, limits)
        needed = demand if quota else 0.0
    free = capacity
    if p.rule == "paper" or np.any(limits):
        free, _ = _capacity(blocks, radii, np.zeros(k))
    all_forgetting = float((radii * _norms(ff)).sum())
    coefficients = np.broadcast_to(coefficients, (len(gram), k + 1))
    changes = np.einsum("th,thg->g", coefficients, gram)
    return Plan(
        coefficients=coefficients * p.clip,
        demand=demand,
        s=s,
        capacity=capacity,
        hardness=min(1.0, max(0.0, 1 - free / all_forgetting)) if all_forgetting else 1.0,
        needed=needed,
        flagged=bool(capacity < needed * (1 - 1e-9) - 1e-300),
        largest=largest,
        multipliers=multipliers,
        predicted=changes / p.clip,
        step_norm=float(_norms(np.einsum("th,thg,tg->", coefficients, gram, coefficients))),
    )


def binding(multipliers: Sequence[float], norms: Sequence[float]) -> tuple[int, ...]:
    """Groups whose multiplier is not about zero: what it takes from the forget gradient is more than a millionth of that."""
    return tuple(i for i, (m, size) in enumerate(zip(multipliers, norms)) if m * size > 1e-6 * norms[-1])
