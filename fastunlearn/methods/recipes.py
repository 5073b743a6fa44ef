"""From a style or an object of a world to what each method asks for: prompts, surrogates, what to keep.

    METHODS["uce"](pipeline, world, target, seed, **settings) -> weights to keep

changes the pipeline in place, as `fastunlearn.evaluation.canvas.evaluate` wants it. The settings in `DEFAULTS` are to be those
that `python -m benchmarks.canvas tune` finds best on targets that no table holds; until that has run they are the methods' own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fastunlearn.evaluation.worlds import Concepts, Target
from fastunlearn.methods.finetune_surrogate import FinetuneConfig, finetune_surrogate
from fastunlearn.methods.scapre import ScaPreConfig, scapre
from fastunlearn.methods.uce import UCEConfig, uce
from fastunlearn.objectives.language import closest

#: method -> its settings, by the kind of target
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "finetune": {"style": {}, "object": {}},
    "uce": {"style": {"tokens": "all"}, "object": {"tokens": "all"}},
    "scapre": {"style": {}, "object": {}},
}


def concept_template(world: Concepts, kind: str) -> list[str]:
    """The world's prompts with {} where a style, or an object, is named."""
    if kind == "style":
        return [world.prompt(thing, "{}") for thing in world.objects]
    return [world.prompt("{}", theme) for theme in world.themes]


def _name(world: Concepts, name: str) -> str:
    return name.replace("_", " ") if name in world.themes else name


def finetune_target(
    pipeline: Any, world: Concepts, target: Target, seed: int, *, progress: bool = True, **settings: Any
) -> dict[str, Tensor]:
    """`finetune_surrogate` with every prompt of the target; all other prompts are the retain set."""
    config = FinetuneConfig(**{"seed": seed} | DEFAULTS["finetune"][target.kind] | settings)
    forget, surrogate = world.forget_prompts(target), world.surrogate_prompts(target)
    return finetune_surrogate(pipeline, forget, surrogate, world.retain_prompts(target), config, progress=progress)


def uce_target(pipeline: Any, world: Concepts, target: Target, seed: int, **settings: Any) -> dict[str, Tensor]:
    """`uce` of the target toward its surrogate; all other concepts of its kind are preserved. Nothing in it is random."""
    settings = {"template": concept_template(world, target.kind)} | DEFAULTS["uce"][target.kind] | settings
    guide, kept = _guide(world, target)
    return uce(pipeline, [_name(world, target.name)], [guide], kept, UCEConfig(**settings))


def _guide(world: Concepts, target: Target) -> tuple[str, list[str]]:
    """What stands for the target, and all other names of its kind."""
    if target.kind == "style":
        guide, others = world.surrogate_theme, (world.surrogate_theme, *world.styles)
    else:
        guide, others = world.surrogate_object(target), world.objects
    return guide, [_name(world, name) for name in dict.fromkeys(others) if name != target.name]


def scapre_target(pipeline: Any, world: Concepts, target: Target, seed: int, **settings: Any) -> dict[str, Tensor]:
    """`scapre` of the target toward its surrogate; mode robust preserves all other concepts of its kind."""
    chosen: dict[str, Any] = {"template": concept_template(world, target.kind), "seed": seed}
    config = ScaPreConfig(**chosen | DEFAULTS["scapre"][target.kind] | settings)
    guide, kept = _guide(world, target)
    name = _name(world, target.name)
    return scapre(pipeline, [name], guide, preserve=kept if config.mode == "robust" else (), config=config).weights


METHODS: Mapping[str, Callable[..., dict[str, Tensor]]] = {
    "finetune": finetune_target,
    "uce": uce_target,
    "scapre": scapre_target,
}


def method_of(name: str) -> Callable[..., dict[str, Tensor]]:
    """A method by name.

    Raises:
        ValueError: unknown; the closest are named.
    """
    if name not in METHODS:
        raise ValueError(f"method: {name!r} is unknown; {closest(name, list(METHODS))}")
    return METHODS[name]
