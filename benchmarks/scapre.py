"""The study of ScaPre at scale: time and memory from 1 to 10,000 concepts on SD 1.5's shapes, residuals, conditioning, precision.

    python -m benchmarks quality scapre

Weights and text are random and labelled so: text has a mean and a power-law spectrum, tokens of norm near 28 as CLIP's last hidden
states have, TOKENS of them a concept that are alike; the text encoder's time is in none of the numbers. Rows of the result:

    scaling     seconds and peak memory of the moments and of the solve, by the number of concepts; peers beside them
    official    the authors' algorithm as its code runs it, row by row: ROWS rows and one concept are timed and scaled to all
    stress      forget and retain residuals, the condition of lam I + S, errors of float32 against float64
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, shapes
from fastunlearn import ops
from fastunlearn.evaluation.residuals import forget_residuals, retain_residuals
from fastunlearn.report.cost import measured

LAYERS = [s for s in shapes.sd14_unet() if "attn2.to_k" in s[0] or "attn2.to_v" in s[0]]
D, TOKENS, NORM, LAM = 768, 75, 28.0, 0.5
COUNTS = (1, 10, 50, 100, 1000, 10_000)
#: concepts whose tokens are held at once
BATCH = 100
#: rows of the official algorithm that are timed, of rows that are compared in float32 and float64
ROWS, COMPARED = 256, 64
#: concepts that the residuals are taken on, and tokens that are preserved
SEEN, KEPT = 20, 2000
SETTLED = 3


def text(concepts: int, seed: int = 0, *, only: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens of concepts and of their anchors, [batch * TOKENS, D] fp32 twice, a batch at a time; the same for every count."""
    world = torch.Generator().manual_seed(99)
    spectrum = torch.arange(1, D + 1).float() ** -0.5
    turn = torch.linalg.qr(torch.randn(D, D, generator=world)).Q
    mean = torch.randn(D, generator=world)
    mean = mean / mean.norm()

    def tokens(batch: int, generator: torch.Generator) -> Tensor:
        name, place = (torch.randn(batch, n, D, generator=generator) for n in (1, TOKENS))
        x = (name + 0.5 * place) * spectrum
        x = x @ turn.T / spectrum.norm() + 0.7 * mean
        return NORM * (x / x.norm(dim=-1, keepdim=True)).flatten(0, 1)

    generator = torch.Generator().manual_seed(seed)
    left = min(concepts, only or concepts)
    while left > 0:
        # Whole batches are drawn, so that the first concepts are the same ones in every number of them.
        c, a = tokens(BATCH, generator), tokens(BATCH, generator)
        yield c[: left * TOKENS], a[: left * TOKENS]
        left -= BATCH


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Random projections of SD 1.5's shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * D**-0.5 for name, shape in LAYERS}


def moments(count: int) -> tuple[Tensor, Tensor, float, float | None]:
    """S, S*, the seconds of their sums alone, and MiB at the most above what the text itself takes."""
    S, S_star = (torch.zeros(D, D, dtype=torch.float64) for _ in range(2))
    seconds, peak = 0.0, 0.0
    for c, a in text(count):

        def add(c: Tensor = c, a: Tensor = a) -> None:
            ops.token_moments(c, out=S)
            ops.token_moments(c, out=S_star, anchors=a)

        _, cost = measured(add, c.device)
        seconds, peak = seconds + cost.seconds, max(peak, cost.peak_mib or 0.0)
    return S, S_star, seconds, peak


def median_seconds(run: Callable[[], Any], times: int) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def scaling(
    counts: Sequence[int], listed: list[Tensor], say: Callable[[dict[str, Any]], None]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Rows "scaling"; count -> S, S*."""
    found = {}
    # A relevance for every row, as where it is measured: all of one would be one Cholesky factor, without the eigenvectors.
    relevance = torch.full((sum(len(w) for w in listed),), 0.5)
    for count in counts:
        S, S_star, seconds, peak = moments(count)

        def solve(S: Tensor = S, S_star: Tensor = S_star) -> Any:
            return ops.spectral_solve(listed, S, S_star, lam=LAM, relevance=relevance)

        solve()
        _, cost = measured(solve, S.device)
        say(
            {
                "what": "scaling", "provider": "fastunlearn", "concepts": count, "moments_s": seconds,
                "solve_s": median_seconds(solve, SETTLED), "moments_peak_mib": peak, "solve_peak_mib": cost.peak_mib,
            }
        )  # fmt: skip
        found[count] = S, S_star
    return found


def _heights(listed: Sequence[Tensor]) -> dict[int, int]:
    """rows -> projections that have so many."""
    rows = [len(w) for w in listed]
    return {height: rows.count(height) for height in sorted(set(rows))}


def peers(counts: Sequence[int], listed: list[Tensor], moment: dict[int, tuple[Tensor, Tensor]], say: Callable[[dict[str, Any]], None]) -> None:  # fmt: skip
    """UCE and TIME as their code sums and inverts, projection by projection, and scipy's Sylvester solver: one projection of each
    height is timed and counted as often as there are."""
    import scipy.linalg

    by_height = {height: next(w for w in listed if len(w) == height) for height in _heights(listed)}

    def total(run: Callable[[Tensor], Any]) -> float:
        return sum(n * median_seconds(lambda h=h: run(by_height[h]), 1) for h, n in _heights(listed).items())

    def sums(w: Tensor, tokens: int, pairs: Tensor) -> tuple[Tensor, Tensor]:
        left, right = LAM * w, LAM * torch.eye(D)
        for c, a in zip(*(p.view(-1, TOKENS, D)[:, :tokens] for p in pairs)):
            left, right = left + (w @ a.T) @ c, right + c.T @ c
        return left, right

    for count in [c for c in counts if c <= 1000]:
        pairs = torch.stack([torch.cat(part) for part in zip(*text(count, only=min(count, 100)))])
        share = count / (pairs.shape[1] // TOKENS)
        for name, tokens in (("UCE, last words", 1), ("TIME, all tokens", TOKENS)):
            made = {height: sums(w, tokens, pairs) for height, w in by_height.items()}
            # The sums grow with the concepts, the inverse does not.
            summed = total(lambda w, t=tokens, p=pairs: sums(w, t, p))
            solved = total(lambda w, m=made: m[len(w)][0] @ torch.inverse(m[len(w)][1]))
            say(
                {
                    "what": "scaling",
                    "provider": name,
                    "concepts": count,
                    "solve_s": share * summed + solved,
                    "scaled": True,
                }
            )
    S, S_star = moment[max(c for c in counts if c <= 50)]
    system = (S + LAM * torch.eye(D, dtype=S.dtype)).numpy()

    def sylvester(w: Tensor) -> Any:
        rows = torch.full((len(w),), 0.5, dtype=S.dtype).diag().numpy()
        return scipy.linalg.solve_sylvester(rows, system, (w.double() @ S_star).numpy())

    say({"what": "scaling", "provider": "scipy's Sylvester solver", "concepts": 50, "solve_s": total(sylvester), "scaled": True})  # fmt: skip


def _information(w: Tensor, samples: Tensor, y: Tensor) -> float:
    """The official code's mutual information of one row and one concept."""
    z = samples @ w
    z = (z > z.median()).float()
    out = 0.0
    for a in (0.0, 1.0):
        for b in (0.0, 1.0):
            joint = ((z == a) & (y == b)).float().mean() + 1e-8
            out += float(
                joint * torch.log(joint / (((z == a).float().mean() + 1e-8) * ((y == b).float().mean() + 1e-8)))
            )
    return out


def official(listed: list[Tensor], S: Tensor, say: Callable[[dict[str, Any]], None], counts: Sequence[int]) -> None:
    """The authors' loops in float32: for every row a mask for every concept, a right-hand side, a Cholesky factor."""
    joined = torch.cat(listed)
    rows = joined[:: len(joined) // ROWS][:ROWS]
    c, a = next(iter(text(1)))
    S = S.float()
    pi, eye = torch.outer(c[0], c[0]) / c[0].square().sum(), torch.eye(D)
    samples = torch.cat([c[:1].repeat(5, 1), a[:1].repeat(5, 1)]) + 0.01 * torch.randn(10, D)
    y = torch.tensor([1.0] * 5 + [0.0] * 5)

    def concept() -> None:
        for w in rows:
            _information(w, samples, y)
            (a @ w)[:, None].mul(c).sum(0)

    def solves() -> None:
        for w in rows:
            factor = torch.linalg.cholesky(LAM * eye + S + 0.3 * pi)
            torch.cholesky_solve(w[:, None], factor)

    part, fixed = median_seconds(concept, 1), median_seconds(solves, 1)
    share = len(joined) / len(rows)
    for count in counts:
        say(
            {
                "what": "official", "provider": f"official: {ROWS} rows and one concept, scaled", "concepts": count,
                "cholesky_s": fixed * share, "solve_s": (fixed + count * part) * share, "scaled": True,
            }
        )  # fmt: skip


def stress(count: int, named: dict[str, Tensor], S: Tensor, S_star: Tensor) -> dict[str, Any]:
    """One row of residuals, conditioning and errors."""
    kept = torch.cat([c for c, _ in text(KEPT // TOKENS + 1, seed=1)])[:KEPT].double()
    held = ops.token_moments(kept)
    listed = list(named.values())
    c, a = (torch.cat(part)[: SEEN * TOKENS].double() for part in zip(*text(count, only=SEEN)))
    values = torch.linalg.eigvalsh(S + held).clamp_min(0)
    out: dict[str, Any] = {"what": "stress", "provider": "fastunlearn", "concepts": count}
    out["condition"] = float((LAM + values[-1]) / (LAM + values[0]))

    def solve(w: list[Tensor], preserved: bool) -> list[Tensor]:
        extra = held if preserved else torch.zeros_like(held)
        relevance = torch.ones(sum(len(x) for x in w))
        return ops.spectral_solve(w, S + extra, S_star + extra, lam=LAM, relevance=relevance)  # type: ignore[no-any-return]

    for preserved, name in ((False, "alone"), (True, "with preserved text")):
        new = dict(zip(named, solve(listed, preserved)))
        forget, retain = forget_residuals(new, named, c, a), retain_residuals(new, named, kept)
        out[f"forget, {name}"] = sum(forget.values()) / len(forget)
        out[f"retain, {name}"] = sum(retain.values()) / len(retain)
    few = [w[:COMPARED] for w in listed[:4]]
    wide = torch.cat(solve([w.double() for w in few], True))
    size = float(wide.abs().max())
    out["error float32"] = float((torch.cat(solve(few, True)).double() - wide).abs().max()) / size
    # The same rows, one float32 Cholesky factor for each as in the official code.
    joined, eye = torch.cat(few), torch.eye(D)
    system, right = (S + held).float() + LAM * eye, (S_star + held).float() + LAM * eye
    factor = torch.linalg.cholesky(system)
    single = torch.cholesky_solve((joined @ right).T, factor).T
    out["error float32, official"] = float((single.double() - wide).abs().max()) / size
    return out


def run(counts: Sequence[int] = COUNTS, *, official_counts: Sequence[int] = (1, 50, 1000)) -> dict[str, Any]:
    """The study; each row is printed as it is found."""
    rows: list[dict[str, Any]] = []

    def say(row: dict[str, Any]) -> None:
        rows.append({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()})
        print(rows[-1], flush=True)

    named = weights()
    listed = list(named.values())
    load = machine.OtherLoad()
    start = time.perf_counter()
    with load:
        moment = scaling(counts, listed, say)
        middle = min(counts, key=lambda count: abs(count - 50))
        official(listed, moment[middle][0], say, official_counts)
        peers(counts, listed, moment, say)
        for count in counts:
            say(stress(count, named, *moment[count]))
    facts = machine.meta(torch.device("cpu"))
    meta = {
        "model": f"{len(listed)} random projections of SD 1.5's shapes, {sum(len(w) for w in listed):,} rows, {D} columns",
        "text": f"random, {TOKENS} tokens a concept, no text encoder; preserved: {KEPT} other tokens",
        "seconds": round(time.perf_counter() - start),
        "machine": facts["device"], "threads": torch.get_num_threads(), "torch": facts["torch"], "commit": facts["commit"],
        "date": facts["date"],
    }  # fmt: skip
    share = load.share()
    meta |= {"other load": f"{share:.0%}"} if share is not None else {}
    return {"meta": meta, "rows": rows}


def plot(result: dict[str, Any], path: Any) -> None:
    """Seconds and peak memory by the number of concepts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "fastunlearn"
    ours = [r for r in result["rows"] if r["what"] == "scaling" and r["provider"] == "fastunlearn"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    x = [r["concepts"] for r in ours]
    left.plot(x, [r["solve_s"] for r in ours], "o-", color="#0b7a75", label="solve")
    left.plot(x, [r["moments_s"] for r in ours], "o--", color="#0b7a75", label="S and S* of the tokens")
    others = dict.fromkeys(r["provider"] for r in result["rows"] if r["what"] != "stress" and r not in ours)
    for provider, colour in zip(others, ("#c0392b", "#9aa0a6", "#d9c27a", "#5b6770")):
        mine = [r for r in result["rows"] if r["provider"] == provider]
        left.plot([r["concepts"] for r in mine], [r["solve_s"] for r in mine], "s-", color=colour, ms=4, label=provider)
    right.plot(x, [r["solve_peak_mib"] for r in ours], "o-", color="#0b7a75", label="solve")
    right.plot(x, [r["moments_peak_mib"] for r in ours], "o--", color="#0b7a75", label=f"S, {BATCH} concepts at once")
    for axis, what in ((left, "seconds"), (right, "peak MiB above weights and text")):
        axis.set_xscale("log")
        axis.set_xlabel("concepts")
        axis.set_title(what, fontsize=9, loc="left")
        axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=2, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yscale("log")
    figure.suptitle(f"{result['meta']['model']} - {result['meta']['machine']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
