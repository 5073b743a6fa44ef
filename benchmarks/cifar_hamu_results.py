"""What the study of HAMU on images answers (benchmarks/cifar_hamu.py): mean hardness by rho, which methods improve one loss without
hurting the other, certificates; and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

#: where the methods are compared; of the hardness
COMPARED, RHOS = 0.75, (0.0, 0.5, 1.0)
#: method -> (update, factor of the forget gradient of descent, of the retain gradient)
METHODS: dict[str, tuple[str, float, float]] = {
    "fine-tuning": ("sum", 0.0, 1.0),
    "GradAscent": ("sum", 1.0, 0.0),
    "GradDiff": ("sum", 0.5, 0.5),
    "PCGrad": ("pcgrad", 1.0, 1.0),
    "GRU": ("gru", 1.0, 1.0),
    "HAMU-Q": ("hamu-q", 1.0, 1.0),
    "HAMU-U": ("hamu-u", 1.0, 1.0),
}
OURS = ("HAMU-Q", "HAMU-U")


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation."""
    return float(torch.corrcoef(torch.tensor([x, y], dtype=torch.float64))[0, 1])


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the study answers: the mean hardness of every HAMU by rho, and at rho .75 what each method did to both losses.

    A method improves a loss that moves its way in the mean of all seeds, and hurts one that moves the other way.
    """
    out: list[dict[str, Any]] = []
    for method in OURS:
        mine = [row for row in rows if row["method"] == method and row["rho"] in RHOS]
        if {row["rho"] for row in mine} != set(RHOS):
            continue
        means = {rho: _mean(mine, "hardness", rho) for rho in RHOS}
        out.append(
            {
                "what": "mean hardness", "method": method, **{f"rho {rho:g}": value for rho, value in means.items()},
                "Pearson, every run": pearson([row["rho"] for row in mine], [row["hardness"] for row in mine]),
                "Pearson, means": pearson(list(means), list(means.values())), "runs": len(mine),
            }
        )  # fmt: skip
    compared = [row for row in rows if row["rho"] == COMPARED]
    for batch, method in ((b, m) for b in sorted({row["batch"] for row in compared}) for m in METHODS):
        mine = [row for row in compared if (row["method"], row["batch"]) == (method, batch)]
        if not mine:
            continue
        forget, retain = (_mean(mine, f"{name} change", COMPARED) for name in ("forget", "retain"))
        out.append(
            {
                "what": f"rho {COMPARED:g}, batches of {batch} images", "method": method, "forget change": forget, "retain change": retain, "seeds": len(mine),
                "improves one, hurts none": (forget > 0 or retain < 0) and not (forget < 0 or retain > 0),
                "in every seed": all(row["forget change"] >= 0 >= row["retain change"] for row in mine),
            }
        )  # fmt: skip
    ours = [row for row in rows if row["method"] in OURS]
    if ours:
        held, checked = (sum(row[name] for row in ours) for name in ("held", "checked"))
        out.append(
            {"what": "certificates", "method": "both", "held": held, "checked": checked, "share": held / checked}
        )
    return out


def _mean(rows: Sequence[Mapping[str, Any]], name: str, rho: float) -> float:
    values = [row[name] for row in rows if row["rho"] == rho]
    return sum(values) / len(values)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Mean hardness by rho, a dot a run, and at rho .75 the changes of both losses, a dot a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "fastunlearn"
    batches = sorted({row["batch"] for row in result["rows"]})
    figure, (left, *rights) = plt.subplots(
        1, 1 + len(batches), figsize=(4.5 * (1 + len(batches)), 3.6), layout="constrained"
    )
    for method, mark, colour in zip(OURS, "os", ("#0b7a75", "#c0392b")):
        rows = [row for row in result["rows"] if row["method"] == method and row["batch"] == batches[0]]
        rhos = sorted({row["rho"] for row in rows})
        left.plot([row["rho"] for row in rows], [row["hardness"] for row in rows], mark, color=colour, ms=4, alpha=0.6)
        left.plot(rhos, [_mean(rows, "hardness", rho) for rho in rhos], color=colour, label=method)
    left.set(xlabel="rho: share of the forget set that is of the rest", ylabel="mean hardness of a run")
    left.legend(fontsize=7)
    colours = plt.get_cmap("tab10")
    for batch, axis in zip(batches, rights):
        for number, method in enumerate(METHODS):
            rows = [r for r in result["rows"] if (r["method"], r["rho"], r["batch"]) == (method, COMPARED, batch)]
            x, y = [row["forget change"] for row in rows], [-row["retain change"] for row in rows]
            axis.plot(x, y, "o", color=colours(number), ms=5, label=method)
        axis.axhline(0, color="#9aa0a6", lw=0.8)
        axis.axvline(0, color="#9aa0a6", lw=0.8)
        axis.set(
            xlabel="change of the forget loss, nats (up: forgotten)", ylabel="- change of the retain loss (up: kept)"
        )
        axis.set_title(f"rho {COMPARED:g}, batches of {batch}", fontsize=9, loc="left")
    rights[0].legend(fontsize=6)
    for axis in (left, *rights):
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
