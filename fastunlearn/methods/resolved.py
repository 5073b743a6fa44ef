"""What a method of `recipes` runs with on a kind of target once its defaults are filled in: a study keeps it in every row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastunlearn.methods.finetune_surrogate import FinetuneConfig
from fastunlearn.methods.rece import RECEConfig
from fastunlearn.methods.recipes import DEFAULTS, OWN, SMALL, TRAINERS, method_of
from fastunlearn.methods.scapre import ScaPreConfig
from fastunlearn.methods.speed import SPEEDConfig
from fastunlearn.methods.time_edit import TIMEConfig
from fastunlearn.methods.uce import UCEConfig

#: methods that are no trainer: their settings, whole
CONFIGS: dict[str, type[Any]] = {
    "finetune": FinetuneConfig, "uce": UCEConfig, "time": TIMEConfig, "rece": RECEConfig, "speed": SPEEDConfig,
    "scapre": ScaPreConfig,
}  # fmt: skip


def resolved_settings(method: str, kind: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings of a method for a style or an object, `given` over the recipe's over the method's own.

    What the study itself chooses (the seed, the world's prompts as a template) is not among them. Of a trainer they are what the
    recipe sets; what it leaves alone is as the trainer's class has it.

    Raises:
        ValueError: an unknown method.
    """
    method_of(method)
    chosen = DEFAULTS[method][kind] | dict(given or {})
    if method in TRAINERS:
        return SMALL | OWN.get(method, {}) | chosen
    own = {name: value for name, value in asdict(CONFIGS[method]()).items() if name not in ("seed", "template")}
    return own | chosen
