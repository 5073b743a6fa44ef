"""Worlds of styles x objects that a model draws, forgets and is asked about: the canvas, and UnlearnCanvas where it is on disk.

UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846): 50 painting styles and the photographs they were made from (Seed_Images) x 20
objects; names, prompts, seeds and settings are those of the authors' evaluation code. Its classifiers are vit_large_patch16_224 of
timm with a new head (1024 -> 51 styles, 1024 -> 20 objects), images 224x224, normalised by mean and deviation 0.5.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunlearn._stored import read_pickled
from fastunlearn.data.images import SUFFIXES, read_image
from fastunlearn.evaluation.metrics import Kind
from fastunlearn.objectives.language import closest

# A name of two words is written with an underscore, as the data set's folders are.
_THEMES = """
Abstractionism Artist_Sketch Blossom_Season Bricks Byzantine Cartoon Cold_Warm Color_Fantasy Comic_Etch Crayon Cubism Dadaism Dapple
Defoliation Early_Autumn Expressionism Fauvism French Glowing_Sunset Gorgeous_Love Greenfield Impressionism Ink_Art Joy Liquid_Dreams
Magic_Cube Meta_Physics Meteor_Shower Monet Mosaic Neon_Lines On_Fire Pastel Pencil_Drawing Picasso Pop_Art Red_Blue_Ink Rust
Seed_Images Sketch Sponge_Dabbed Structuralism Superstring Surrealism Ukiyoe Van_Gogh Vibrant_Flow Warm_Love Warm_Smear Watercolor
Winter
"""
_OBJECTS = """
Architectures Bears Birds Butterfly Cats Dogs Fishes Flame Flowers Frogs Horses Human Jellyfish Rabbits Sandwiches Sea Statues Towers
Trees Waterfalls
"""
UNLEARNCANVAS_THEMES = tuple(_THEMES.split())
UNLEARNCANVAS_OBJECTS = tuple(_OBJECTS.split())
UNLEARNCANVAS_SEEDS = (188, 288, 588, 688, 888)
#: at which the canvas pipeline is evaluated
CANVAS_GUIDANCE = 3.0


class ImageClassifier(Protocol):
    """Images uint8 [n, 3, H, W] -> features [n, F] -> logits [n, labels]."""

    labels: tuple[str, ...]

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees."""

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The last layer."""


@dataclass(frozen=True)
class Target:
    """What is erased: a style or an object, by name."""

    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass
class Concepts:
    """Styles and objects by name, and the prompts they are asked for with.

    Attributes:
        themes: styles with the surrogate style among them, in the order of the style classifier's labels.
        objects: in the order of the object classifier's labels.
        seed_theme: the style that is no painting style (Photo, Seed_Images).
        prompt: (object, theme) -> text that is evaluated.
        surrogate_theme: name in a prompt of what a style is replaced by.
        settings: whose settings the methods of `fastunlearn.methods.recipes` take; None: those of the world's name.
    """

    name: str
    themes: tuple[str, ...]
    objects: tuple[str, ...]
    seed_theme: str
    prompt: Callable[[str, str], str]
    surrogate_theme: str
    settings: str | None = field(default=None, kw_only=True)

    @property
    def styles(self) -> tuple[str, ...]:
        """What may be erased of the themes."""
        return tuple(theme for theme in self.themes if theme != self.seed_theme)

    def pairs(self) -> list[tuple[int, int]]:
        """Every (number of a theme, number of an object), themes first."""
        return [(i, j) for i in range(len(self.themes)) for j in range(len(self.objects))]

    def prompts(self) -> list[str]:
        """Of `pairs`."""
        return [self.prompt(self.objects[j], self.themes[i]) for i, j in self.pairs()]

    def index(self, target: Target) -> int:
        """Number of the target among themes or objects."""
        return (self.themes if target.kind == "style" else self.objects).index(target.name)

    def target(self, name: str, what: str = "target") -> Target:
        """The style or object of that name; case and underscores do not matter.

        Args:
            what: the argument it came in by, for messages.

        Raises:
            ValueError: unknown (the closest and all names are in the message), or the surrogate style.
        """
        plain = {n.lower().replace("_", " "): Target("style", n) for n in self.styles}
        plain |= {n.lower().replace("_", " "): Target("object", n) for n in self.objects}
        key = str(name).lower().replace("_", " ").strip()
        if key == self.seed_theme.lower().replace("_", " "):
            raise ValueError(f"{what}: {self.seed_theme} is the style that others are replaced by; it cannot be erased")
        if key not in plain:
            near = closest(key, [target.name for target in plain.values()])
            hint = f"{near} " if near.startswith("did you mean") else ""
            raise ValueError(
                f"{what}: {name!r} is unknown; {hint}styles: {', '.join(self.styles)}; objects: {', '.join(self.objects)}"
            )
        return plain[key]

    def held_out_targets(self, each: int = 2) -> list[Target]:
        """So many styles and objects for choosing a method's settings: the same in every study, the last to be drawn for one."""
        return [Target(kind, name) for kind in ("style", "object") for name in self._order(kind, 0)[-each:]]

    def _order(self, kind: Kind, seed: int) -> list[str]:
        """The names of a kind in the order in which a seed draws them; the last two are the same for every seed."""
        names = list(self.styles if kind == "style" else self.objects)
        random.Random(f"{self.name} {kind} held out").shuffle(names)
        first, last = names[:-2], names[-2:]
        random.Random(f"{self.name} {kind} {seed}").shuffle(first)
        return first + last

    def draw_targets(self, styles: int, objects: int, seed: int) -> list[Target]:
        """Targets drawn by a seed, the same for every method; `held_out_targets` come in only where (nearly) all are asked for.

        Raises:
            ValueError: more than there are.
        """
        out: list[Target] = []
        asked: tuple[tuple[Kind, int], ...] = (("style", styles), ("object", objects))
        for kind, count in asked:
            order = self._order(kind, seed)
            if not 0 <= count <= len(order):
                raise ValueError(f"{kind}s: want 0 to {len(order)}, got {count}")
            out += [Target(kind, name) for name in order[:count]]
        return out

    def surrogate_object(self, target: Target) -> str:
        """What an object is replaced by: the first object, the second for the first."""
        return next(name for name in self.objects if name != target.name)

    def forget_prompts(self, target: Target) -> list[str]:
        """The prompts of the target: a style with every object, an object in every style."""
        return [self.prompt(self.objects[j], self.themes[i]) for i, j in self.forget_pairs(target)]

    def forget_pairs(self, target: Target) -> list[tuple[int, int]]:
        index, which = self.index(target), 0 if target.kind == "style" else 1
        return [pair for pair in self.pairs() if pair[which] == index]

    def surrogate_prompts(self, target: Target) -> list[str]:
        """What each of `forget_prompts` should draw instead: the same object as a photograph, another object in the same style."""
        if target.kind == "style":
            return [self.prompt(self.objects[j], self.surrogate_theme) for _, j in self.forget_pairs(target)]
        return [self.prompt(self.surrogate_object(target), self.themes[i]) for i, _ in self.forget_pairs(target)]

    def retain_prompts(self, target: Target) -> list[str]:
        """All other prompts."""
        gone = set(self.forget_pairs(target))
        return [self.prompt(self.objects[j], self.themes[i]) for i, j in self.pairs() if (i, j) not in gone]


@dataclass
class World(Concepts):
    """Styles and objects with everything that is needed to ask a model about them.

    Attributes:
        seeds, steps, guidance_scale: of the answer set.
        real: (theme, object, number) -> uint8 [3, size, size], or None where the file cannot be read.
        real_count: real images a theme and object.
        classifiers: "style" and "object".
        feature_name: of the Frechet distance in the classifiers' features.
        sample_batch_size: images that are drawn at once where nobody says how many.

    Raises:
        ValueError: a classifier has other labels.
    """

    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    real: Callable[[str, str, int], Tensor | None]
    real_count: int
    classifiers: Mapping[str, ImageClassifier]
    feature_name: str
    sample_batch_size: int = field(default=100, kw_only=True)

    def __post_init__(self) -> None:
        for kind, wanted in (("style", self.themes), ("object", self.objects)):
            labels = tuple(self.classifiers[kind].labels)
            if labels != wanted:
                raise ValueError(
                    f"classifiers: the {kind} classifier knows {len(labels)} labels that are not the world's"
                )


def canvas_concepts() -> Concepts:
    """The styles and objects of the canvas."""
    from fastunlearn.data import canvas

    return Concepts(
        "canvas", tuple(canvas.THEMES), tuple(canvas.OBJECTS), canvas.SEED_STYLE, canvas.prompt, canvas.SEED_STYLE
    )


def canvas_world(device: Any = None) -> World:
    """The canvas that comes with fastunlearn, drawn by code; its classifiers come with it.

    Args:
        device: of the classifiers; None: the CPU.
    """
    from fastunlearn.data import canvas
    from fastunlearn.evaluation.classifiers import load_classifiers

    def real(theme: str, thing: str, number: int) -> Tensor:
        at = (canvas.THEMES.index(theme), canvas.OBJECTS.index(thing), number)
        image = canvas.draw(thing, theme, np.random.default_rng([0xF1D, *at]))
        return torch.from_numpy(image).permute(2, 0, 1)

    return World(
        **vars(canvas_concepts()),
        seeds=(188, 288),
        steps=10,
        guidance_scale=CANVAS_GUIDANCE,
        real=real,
        real_count=5,
        classifiers=load_classifiers(device=device or "cpu"),
        feature_name="fid_canvas_features",
    )


class ViTClassifier(nn.Module):
    """UnlearnCanvas' classifier: a ViT of timm, from its checkpoint.

    Args:
        path: torch checkpoint with "model_state_dict", as the authors' code saves it, or a state dict.
        labels: in the order of the outputs.
        architecture: of timm.

    Raises:
        ImportError: timm is missing or does not load. ValueError: no such file, or weights that do not fit.
    """

    def __init__(
        self, path: str | Path, labels: Sequence[str], architecture: str = "vit_large_patch16_224.augreg_in21k"
    ):
        super().__init__()
        try:
            timm = importlib.import_module("timm")
        except (ImportError, RuntimeError) as error:
            raise ImportError(f"UnlearnCanvas' classifiers need timm (pip install timm): {error}") from error
        path = Path(path).expanduser()
        if not path.is_file():
            raise ValueError(f"classifier: there is no file {path}")
        state = read_pickled(path)
        state = state.get("model_state_dict", state) if isinstance(state, dict) else state
        self.labels = tuple(labels)
        self.model = timm.create_model(architecture, pretrained=False, num_classes=len(self.labels))
        try:
            self.model.load_state_dict(state)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"classifier: {path} does not fit {architecture}: {' '.join(str(error).split())[:300]}"
            ) from None
        self.eval().requires_grad_(False)

    def _prepare(self, images: Tensor) -> Tensor:
        first = next(self.parameters())
        x = images.to(first.device).to(first.dtype) / 255 if images.dtype == torch.uint8 else images.to(first)
        if x.shape[-2:] != (224, 224):
            x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True, align_corners=False)
        return (x - 0.5) / 0.5

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, [n, 1024]."""
        out: Tensor = self.model.forward_head(self.model.forward_features(self._prepare(images)), pre_logits=True)
        return out

    @property
    def head(self) -> nn.Module:
        out: nn.Module = self.model.head
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Logits, [n, labels]."""
        out: Tensor = self.head(self.features(images))
        return out


def unlearncanvas_concepts() -> Concepts:
    """The styles and objects of UnlearnCanvas."""

    def prompt(thing: str, theme: str) -> str:
        return f"A {thing} image in {theme.replace('_', ' ')} style."

    return Concepts("unlearncanvas", UNLEARNCANVAS_THEMES, UNLEARNCANVAS_OBJECTS, "Seed_Images", prompt, "Photo")


def unlearncanvas_world(
    images: str | Path, style_classifier: str | Path | ImageClassifier, object_classifier: str | Path | ImageClassifier,
    *, size: int = 512, real_count: int = 5, device: Any = None,
) -> World:  # fmt: skip
    """The real UnlearnCanvas: images in {theme}/{object}/{number}.jpg, numbers from 1.

    Args:
        images: folder of the data set.
        style_classifier, object_classifier: checkpoints of the ViTs, or classifiers.
        size: pixels of a real image's side.
        real_count: images of each theme and object for the Frechet distance, the first ones.
        device: of the classifiers.

    Raises:
        ValueError: no such folder, folders of themes or objects that are missing. ImportError: timm is missing.
    """
    root = Path(images).expanduser()
    if not root.is_dir():
        raise ValueError(f"images: there is no folder {root}")
    absent = [f"{t}/{o}" for t in UNLEARNCANVAS_THEMES for o in UNLEARNCANVAS_OBJECTS if not (root / t / o).is_dir()]
    if absent:
        raise ValueError(f"images: {root} lacks {len(absent)} of its folders: {', '.join(absent[:3])}")

    def real(theme: str, thing: str, number: int) -> Tensor | None:
        stem = root / theme / thing / str(number + 1)
        path = next((p for suffix in SUFFIXES if (p := stem.with_suffix(suffix)).is_file()), None)
        return None if path is None else read_image(path, size)

    given = {"style": (style_classifier, UNLEARNCANVAS_THEMES), "object": (object_classifier, UNLEARNCANVAS_OBJECTS)}
    classifiers: dict[str, Any] = {
        kind: ViTClassifier(source, labels).to(device or "cpu") if isinstance(source, (str, Path)) else source
        for kind, (source, labels) in given.items()
    }
    return World(
        **vars(unlearncanvas_concepts()),
        seeds=UNLEARNCANVAS_SEEDS,
        steps=100,
        guidance_scale=9.0,
        real=real,
        real_count=real_count,
        classifiers=classifiers,
        feature_name="fid_vit_features",
        # Of 512 x 512 pixels in fp32, twice as many in the U-Net with guidance.
        sample_batch_size=4,
    )
