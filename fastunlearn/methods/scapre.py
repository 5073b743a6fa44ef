"""ScaPre (arXiv 2601.06162): any number of concepts erased from a text-to-image model by one closed-form solve.

All keys and values of cross-attention are linear in the text. With tokens c of the erased concepts, what they shall become c*, tokens
p that are preserved, S = es sum c c^T + ps sum p p^T, S* = es sum c* c^T + ps sum p p^T:

    robust    min sum |W c - W0 c*|^2 + sum_p |W p - W0 p|^2 + lam_i |w_i - w0_i|^2 + gamma tr((W - W0) R (W - W0)^T)
    paper     eqs. 8 - 10 as written: B W + W (lam I + S + R) = V* C^T, then the Bures step
    official  the system of the authors' code with its published settings (fastunlearn.methods.scapre_official)

`robust` is a reconstruction: eq. 8 shrinks W to zero where it should hold on to W0; the paper's gate of R is of no size at the norms
that text features have; and its relevance is 1 for every row (five samples against the empty prompt are always told apart). Here the
gate sees singular values in units of their median, the objective is anchored at W0, and relevance is measured against concepts
that are preserved. The one product of text and solve is fastunlearn.ops.spectral_solve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastunlearn import ops
from fastunlearn.data.concepts import check_concepts, kept_tokens, noisy, token_pairs
from fastunlearn.data.prompts import empty_feature, last_features, text_width
from fastunlearn.evaluation.residuals import forget_residuals, retain_residuals, spread
from fastunlearn.localize.unet import unet_parameters
from fastunlearn.methods.scapre_official import official

Mode = Literal["robust", "official", "paper"]
#: concepts on which residuals are predicted
FEW = 64


@dataclass
class ScaPreConfig:
    """Settings of `scapre`."""

    mode: Mode = field(
        default="robust", metadata={"help": "The version of the method; see fastunlearn.methods.scapre."}
    )
    preset: Literal["diversi50", "confuse5", "artists", "nsfw"] | None = field(
        default=None, metadata={"help": "Published settings of the authors' code; mode official only."}
    )
    lamb: float = field(default=0.5, metadata={"help": "Weight of the old projection."})
    erase_scale: float = field(default=1.0, metadata={"help": "Weight of what is erased; 0 changes nothing."})
    preserve_scale: float = field(default=1.0, metadata={"help": "Weight of what is preserved."})
    tokens: Literal["last", "all"] = field(
        default="all", metadata={"help": "Of a prompt: its last word, or every position (robust)."}
    )
    padding_weight: float = field(
        default=1.0, metadata={"help": "Of a padding position beside one of a word (robust, tokens all)."}
    )
    template: list[str] | None = field(
        default=None,
        metadata={"help": "Prompts with {} for a concept; every concept goes into every one. None: its name alone."},
    )
    gamma: float = field(
        default=0.0, metadata={"help": "Weight of R, in units of the mean squared norm of the concepts (robust)."}
    )
    gate: Literal["conflict", "code", "paper"] = field(
        default="conflict",
        metadata={"help": "R's weight of a direction: conflict grows with overlap; the paper's and the code's shrink."},
    )
    relevance: Literal["none", "gaussian", "binary"] = field(
        default="none",
        metadata={"help": "Rows by mutual information with the concepts: none, or which estimate (robust)."},
    )
    samples: int = field(default=5, metadata={"help": "Noisy copies of every concept for the mutual information."})
    noise: float = field(default=0.01, metadata={"help": "Of those copies."})
    geometry: float = field(
        default=0.0, metadata={"help": "Share of the way back along the Bures geodesic, in [0, 1] (robust, paper)."}
    )
    guard: float = field(
        default=0.5, metadata={"help": "No such step for a projection that it would turn by more than this share."}
    )
    seed: int = field(default=0, metadata={"help": "Of the noise."})

    def __post_init__(self) -> None:
        for name in ("lamb", "erase_scale", "preserve_scale", "padding_weight", "gamma", "noise", "guard"):
            value = getattr(self, name)
            if not 0 <= value < float("inf") or (name == "lamb" and value == 0):
                raise ValueError(f"{name}: want a finite number {'above' if name == 'lamb' else '>='} 0, got {value}")
        if not 0 <= self.geometry <= 1:
            raise ValueError(f"geometry: want a number in [0, 1], got {self.geometry}")
        if self.samples < 2:
            raise ValueError(f"samples: want at least 2, got {self.samples}")
        for name, words in (
            ("mode", ("robust", "official", "paper")), ("tokens", ("last", "all")), ("gate", ("conflict", "code", "paper")),
            ("relevance", ("none", "gaussian", "binary")), ("preset", (None, "diversi50", "confuse5", "artists", "nsfw")),
        ):  # fmt: skip
            if getattr(self, name) not in words:
                raise ValueError(f"{name}: want one of {', '.join(map(str, words))}; got {getattr(self, name)!r}")
        if self.preset is not None and self.mode != "official":
            raise ValueError(f"preset: only mode official has published settings, mode is {self.mode}")
        if self.template is not None and (not self.template or any("{}" not in text for text in self.template)):
            raise ValueError(f"template: want texts with {{}} in them, got {self.template!r}")


@dataclass
class ScaPreEdit:
    """What `scapre` did, or with `dry_run` would do.

    Attributes:
        weights: name within the U-Net -> new weight; old: the weight before.
        forget: sum |W c - W0 c*|^2 / sum |W0 c - W0 c*|^2 of each weight: 0, all is where it shall be; 1, nothing has moved.
        retain: sum |W p - W0 p|^2 / sum |W0 p|^2 of each weight; None without a preserve set.
        relevance: [rows] in [0, 1], None where it is not measured.
        rotation: of each weight by the geometry step, where there is one.
        condition: of the matrix that is solved with, lamb I + S.
    """

    weights: dict[str, Tensor]
    old: dict[str, Tensor]
    forget: dict[str, float]
    retain: dict[str, float] | None
    relevance: Tensor | None
    rotation: dict[str, float]
    condition: float


def projections(pipeline: Any) -> dict[str, Tensor]:
    """Keys and values of cross-attention by name within the U-Net.

    Raises:
        ValueError: parts are missing, there are no such projections, or they do not take the text encoder's text.
    """
    absent = [part for part in ("unet", "text_encoder", "tokenizer") if getattr(pipeline, part, None) is None]
    if absent:
        raise ValueError(
            f"pipeline: {type(pipeline).__name__} has no {', '.join(absent)}; want one of Stable Diffusion 1.x, 2.x or XL. (In SD 3 "
            "and FLUX the text changes with the image from the first block on: keys and values there are no function of the prompt)"
        )
    named = unet_parameters(pipeline.unet, "xattn_kv")
    weights: dict[str, Tensor] = {name: weight for name, weight in named.items() if name.endswith(".weight")}
    width = text_width(pipeline)
    wrong = [name for name, weight in weights.items() if weight.shape[1] != width]
    if wrong:
        raise ValueError(
            f"pipeline: {wrong[0]} takes text of width {weights[wrong[0]].shape[1]}, the text encoders give {width}"
        )
    return weights


def gate(values: Tensor, kind: str) -> Tensor:
    """R's weight of each direction by its singular value; `conflict` and `code` see it in units of the median."""
    if kind == "paper":
        return (1 - values.sigmoid()) * values
    scaled = values / values.median().clamp_min(1e-300)
    return scaled.square() * (scaled - 1).sigmoid() if kind == "conflict" else 1 - (scaled - 1).sigmoid()


def overlap(concepts: Tensor, kind: str) -> Tensor:
    """R = U diag(gate(s)) U^T of the concepts' last words [m, d]: eq. 4; columns of length 1 unless `paper`."""
    columns = concepts if kind == "paper" else torch.nn.functional.normalize(concepts, dim=1)
    _, s, Vh = torch.linalg.svd(columns, full_matrices=False)
    return (Vh.T * gate(s, kind)) @ Vh


def _pairs(
    pipeline: Any, names: Sequence[str], guides: Sequence[str], config: ScaPreConfig
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    # In the paper a concept is its name.
    last, template = (True, None) if config.mode == "paper" else (config.tokens == "last", config.template)
    return token_pairs(pipeline, names, guides, template, last=last, padding_weight=config.padding_weight)


def _kept(pipeline: Any, names: Sequence[str], config: ScaPreConfig) -> Iterator[Tensor]:
    return kept_tokens(pipeline, names, config.template, last=config.tokens == "last")


def _relevance(pipeline: Any, weights: Sequence[Tensor], concepts: Tensor, kept: Sequence[str], config: ScaPreConfig) -> Tensor:  # fmt: skip
    """Mutual information over its largest, eq. 7; against the preserved concepts, or the empty prompt where there are none."""
    estimator = "binary" if config.mode == "paper" else config.relevance
    others = last_features(pipeline, list(kept)) if kept else empty_feature(pipeline)
    others = others.to(concepts)
    negatives = noisy(others, config.samples, config.noise, config.seed).flatten(0, 1)
    if len(negatives) > config.samples:
        pick = torch.linspace(0, len(negatives) - 1, min(len(negatives), 4 * config.samples)).long()
        negatives = negatives[pick.to(negatives.device)]
    positives = noisy(concepts, config.samples, config.noise, config.seed)
    mi = ops.informax(weights, positives, negatives, estimator=estimator)  # type: ignore[arg-type]
    return mi / mi.max().clamp_min(torch.finfo(mi.dtype).tiny)


def _solve(
    pipeline: Any, weights: Mapping[str, Tensor], names: Sequence[str], guides: Sequence[str] | None, kept: Sequence[str],
    config: ScaPreConfig,
) -> tuple[list[Tensor], Tensor | None, Tensor]:  # fmt: skip
    """Modes robust and paper -> (new weights, relevance, S)."""
    if guides is None:
        raise ValueError(
            "anchors: none given, and so V* = 0, for which eq. 9 has the one solution W = 0: everything would be forgotten. Give "
            'anchors ("" is the empty prompt), or use mode robust'
        )
    listed = list(weights.values())
    alpha: Tensor | None
    R: Tensor | None
    d, device = listed[0].shape[1], listed[0].device
    S, S_star = (torch.zeros(d, d, dtype=torch.float64, device=device) for _ in range(2))
    for c, a, w in _pairs(pipeline, names, guides, config):
        ops.token_moments(c.to(device), config.erase_scale * w.to(device), S)
        ops.token_moments(c.to(device), config.erase_scale * w.to(device), S_star, anchors=a.to(device))
    last = last_features(pipeline, names).to(device)
    if config.mode == "paper":
        # S is of all tokens of the concepts; V* C^T of their last words.
        S.zero_()
        for c in kept_tokens(pipeline, names, None):
            ops.token_moments(c.to(device), out=S)
        S *= config.erase_scale
        alpha = _relevance(pipeline, listed, last, (), config)
        R = overlap(last, "paper")
        return ops.spectral_solve(listed, S, S_star, lam=config.lamb, R=R, gamma=1.0, relevance=alpha, mode="paper"), alpha, S  # fmt: skip
    held = torch.zeros_like(S)
    for p in _kept(pipeline, kept, config):
        ops.token_moments(p.to(device), out=held)
    S, S_star = S + config.preserve_scale * held, S_star + config.preserve_scale * held
    alpha = None if config.relevance == "none" else _relevance(pipeline, listed, last, kept, config)
    R, gamma = None, 0.0
    if config.gamma:
        R, gamma = overlap(last, config.gate), config.gamma * float(last.square().sum(1).mean())
    return ops.spectral_solve(listed, S, S_star, lam=config.lamb, R=R, gamma=gamma, relevance=alpha), alpha, S


@torch.no_grad()
def scapre(
    pipeline: Any,
    concepts: Sequence[str],
    anchors: str | Sequence[str] | None = None,
    *,
    preserve: Sequence[str] = (),
    mode: Mode | None = None,
    config: ScaPreConfig | None = None,
    dry_run: bool = False,
) -> ScaPreEdit:
    """Erases concepts by editing the keys and values of a pipeline's cross-attention in place.

    Args:
        pipeline: StableDiffusionPipeline, StableDiffusionXLPipeline (or one with the same parts).
        concepts: names, each put into every `config.template`; as many as there are.
        anchors: what is drawn instead: one, or one for each. None: the empty prompt (mode paper: nothing, V* = 0, which it refuses).
        preserve: concepts that stay where they are as far as `preserve_scale` says; mode robust only.
        mode: instead of the config's.
        config: settings.
        dry_run: change nothing, only tell.

    Returns:
        `ScaPreEdit`; its `weights` are what `save_partial_unet` writes.

    Raises:
        ValueError: no concepts, one without a token, one that is preserved too, unequal numbers, a pipeline without its parts or
        without cross-attention, mode paper without anchors.

    Example:
        >>> pipe = load_pipeline("canvas")
        >>> edit = scapre(pipe, ["Pop Art", "Mosaic"], "Photo", preserve=["Watercolour"])
    """
    config = config or ScaPreConfig()
    if mode is not None:
        config = ScaPreConfig(**{**vars(config), "mode": mode})
    weights = projections(pipeline)
    given = [""] if anchors is None else [anchors] if isinstance(anchors, str) else list(anchors)
    if isinstance(concepts, str):
        raise TypeError(f"concepts: want a list of names, got the text {concepts!r}")
    names, guides, kept = check_concepts(pipeline, concepts, given, preserve)
    if kept and config.mode != "robust":
        raise ValueError(
            f"preserve: mode {config.mode} has no preserve set (nor has the authors' code); use mode robust"
        )
    old = {name: weight.detach().clone() for name, weight in weights.items()}
    alpha: Tensor | None
    if config.mode == "official":
        new, alpha, S = official(pipeline, old, names, guides, config)
    else:
        new, alpha, S = _solve(pipeline, old, names, None if anchors is None and config.mode == "paper" else guides, kept, config)  # fmt: skip
    rotation: dict[str, float] = {}
    if config.geometry and config.mode != "official":
        moved = ops.bures_geodesic(new, list(old.values()), config.geometry, guard=config.guard, method="svd")
        new, rotation = moved.weights, dict(zip(old, moved.rotation, strict=True))
    made = dict(zip(old, new, strict=True))
    c, a, _ = (spread(part).to(S) for part in zip(*_pairs(pipeline, names[:FEW], guides[:FEW], config), strict=True))
    retain = None
    if kept:
        retain = retain_residuals(made, old, spread(list(_kept(pipeline, kept[:FEW], config))).to(S))
    values = torch.linalg.eigvalsh(S).clamp_min(0)
    condition = float((config.lamb + values[-1]) / (config.lamb + values[0]))
    if not dry_run:
        for name, weight in weights.items():
            weight.copy_(made[name])
    return ScaPreEdit(made, old, forget_residuals(made, old, c, a), retain, alpha, rotation, condition)
