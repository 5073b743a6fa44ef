"""The methods of the TOFU study with the grids they are tuned on, and the lines of the evidence on SAU's claim."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.tofu_runs import PATTERN
from fastunlearn.methods.hamu import HAMUConfig, HAMUTrainer
from fastunlearn.methods.sau import SAUConfig, SAUTrainer
from fastunlearn.trainer import UnlearnConfig, UnlearnTrainer

SETTINGS = ("dense", PATTERN)
RATES = (1e-5, 3e-5, 1e-4, 3e-4)


def _rates(**more: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"learning_rate": rate, **more} for rate in RATES)


@dataclass(frozen=True)
class Method:
    """A method of the study.

    Attributes:
        trials: settings tried, as many for every method.
        options: of its configuration, in every trial.
        settings: where it runs; SAU has no dense form.
    """

    trials: tuple[dict[str, Any], ...]
    options: dict[str, Any] = field(default_factory=dict)
    config: type = UnlearnConfig
    trainer: type = UnlearnTrainer
    settings: tuple[str, ...] = SETTINGS


def _objective(name: str, trials: tuple[dict[str, Any], ...] | None = None, **options: Any) -> Method:
    return Method(trials or _rates(), {"objective": name, **options})


_SGD = tuple(
    {"learning_rate": rate, "hamu_share": share} for rate, share in ((1e-2, 0.5), (3e-2, 0.5), (1e-1, 0.5), (1e-1, 0.8))
)
_CERTIFIED = {"on_infeasible": "largest", "certificate_every": 3}
# Trust balls in the geometry of Adam have its rates.
_ADAM = {"update": "hamu-q", "hamu_geometry": "adam", **_CERTIFIED}
METHODS: dict[str, Method] = {
    "GradAscent": _objective("GradAscent"),
    "GradDiff": _objective("GradDiff"),
    "KL": _objective("KL"),
    "NPO": _objective("NPO"),
    "SimNPO": _objective("SimNPO"),
    "IdkDPO": _objective("IdkDPO"),
    "AltPO": _objective("AltPO"),
    "RMU": _objective("RMU"),
    "UNDIAL": _objective("UNDIAL"),
    "WGA": _objective("WGA"),
    "SatImp": _objective("SatImp"),
    "CEU": _objective("CEU"),
    "PDU": _objective("PDU"),
    "PCGrad, NPO": _objective("NPO", update="pcgrad"),
    "GRU, NPO": _objective("NPO", update="gru"),
    "HAMU-Q": Method(_SGD, {"update": "hamu-q", **_CERTIFIED}, HAMUConfig, HAMUTrainer),
    "HAMU-U": Method(_SGD, {"update": "hamu-u", **_CERTIFIED}, HAMUConfig, HAMUTrainer),
    "HAMU-Q, adam": Method(_rates(hamu_share=0.5), _ADAM, HAMUConfig, HAMUTrainer),
    "HAMU-Q, adam, WGA": Method(_rates(hamu_share=0.5), {**_ADAM, "objective": "WGA"}, HAMUConfig, HAMUTrainer),
    "HAMU-Q, adam, CEU": Method(_rates(hamu_share=0.5), {**_ADAM, "objective": "CEU", "alpha": 1.0}, HAMUConfig, HAMUTrainer),
    "SAU, NPO": Method(_rates(), {"objective": "NPO"}, SAUConfig, SAUTrainer, (PATTERN,)),
    "SAU x HAMU": Method(
        _SGD, {"objective": "GradDiff", "update": "hamu-q", **_CERTIFIED, "weight_decay": 0.0, "warmup_epochs": 0.0,
               "lr_scheduler_type": "constant"}, SAUConfig, SAUTrainer, (PATTERN,),
    ),
    "SAU x HAMU, adam": Method(
        _rates(hamu_share=0.5), {"objective": "GradDiff", **_ADAM, "weight_decay": 0.0, "warmup_epochs": 0.0,
                                 "lr_scheduler_type": "constant"}, SAUConfig, SAUTrainer, (PATTERN,),
    ),
}  # fmt: skip
#: of SAU's claim: name -> (method whose tuned settings are used, options, whether the masks hold, when it is pruned)
EVIDENCE: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    "unlearn, then prune": ("NPO", {}, False, "after"),
    "prune, then unlearn, no mask": ("NPO", {}, False, "before"),
    "prune, then unlearn, no mask, prune again": ("NPO", {}, False, "both"),
    "prune, then unlearn, mask": ("SAU, NPO", {}, True, "before"),
    "mask, redistribution update": ("SAU, NPO", {"redistribution": "update"}, True, "before"),
    "mask, redistribution obs": ("SAU, NPO", {"redistribution": "obs"}, True, "before"),
    "mask, redistribution retain": ("SAU, NPO", {"redistribution": "retain"}, True, "before"),
    "mask, HAMU": ("SAU x HAMU", {}, True, "before"),
    "mask, HAMU, adam": ("SAU x HAMU, adam", {}, True, "before"),
}
