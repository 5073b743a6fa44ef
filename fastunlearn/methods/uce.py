"""UCE: unified concept editing (Gandikota et al. 2024, arXiv 2308.14761, eq. 7), the closed form in its simplest shape.

Keys and values of cross-attention are linear in the text: every projection W of the U-Net (of SD 3 and FLUX: the two layers that
read the text alone) is replaced by the one that sends the text c of a concept to where W sends the text of its guide,
v* = W c_guide, and leaves other concepts p where they were:

    W_new = (lamb W + es sum v* c^T + ps sum W p p^T) (lamb I + es sum c c^T + ps sum p p^T)^-1

which is `fastunlearn.ops.spectral_solve` of these moments: W + es (V* - W C) C^T (lamb I + es C C^T + ps P P^T)^-1 with the concepts
as columns of C and P; at lamb = 0 its limit, the smallest change that does it.

The second factor depends on the text alone: it is found once, in fp64, for all projections. As in the authors' code, a concept's
text is its last word; the prompts they add end with the concept, and where a template goes on behind it, the token is still the last
one of the concept's own. `tokens="all"` takes every position of the prompt, each to where the guide's goes that stands in its place:
what an image is drawn from when the concept is named inside a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastunlearn import ops
from fastunlearn.data.concepts import UCE_WORDS, Moments, check_concepts, concept_moments
from fastunlearn.localize.text_paths import text_paths, write_weights


@dataclass
class UCEConfig:
    """Settings of `uce`, by the authors' names."""

    erase_scale: float = field(default=1.0, metadata={"help": "Weight of every concept that is edited."})
    preserve_scale: float = field(default=1.0, metadata={"help": "Weight of every concept that is preserved."})
    lamb: float = field(
        default=0.5, metadata={"help": "Weight of the old projection; 0: the smallest change that does it."}
    )
    tokens: Literal["last", "all"] = field(
        default="last",
        metadata={"help": "The last word of a concept, or every position of its prompt."},
    )
    template: list[str] | None = field(
        default=None,
        metadata={"help": "Prompts with {} for a concept; every concept goes into every one. None: its name alone."},
    )

    def __post_init__(self) -> None:
        for name in ("erase_scale", "preserve_scale", "lamb"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: want a finite number >= 0, got {value}")
        if self.tokens not in ("last", "all"):
            raise ValueError(f"tokens: want last or all, got {self.tokens!r}")
        if self.template is not None and (not self.template or any("{}" not in text for text in self.template)):
            raise ValueError(f"template: want texts with {{}} in them, got {self.template!r}")


def uce_weights(weights: Sequence[Tensor], text: Moments, config: UCEConfig) -> list[Tensor]:
    """All projections after the edit.

    Args:
        weights: [rows, width] each. text: moments of concepts, guides and what is preserved, without their scales.

    Returns:
        New weights in the old dtypes.
    """
    held = config.preserve_scale * text.kept
    S, S_star = config.erase_scale * text.S + held, config.erase_scale * text.S_star + held
    if config.lamb > 0:
        return ops.spectral_solve(weights, S, S_star, lam=config.lamb)
    # Directions that no concept has are left alone.
    factor = (S_star - S) @ torch.linalg.pinv(S, hermitian=True, rtol=1e-12)
    return [(w.double() + w.double() @ factor).to(w.dtype) for w in weights]


@torch.no_grad()
def edit_text(
    pipeline: Any, edit_concepts: Sequence[str], guide_concepts: Sequence[str], preserve_concepts: Sequence[str],
    solve: Callable[[list[Tensor], Moments], list[Tensor]], *, tokens: str, template: Sequence[str] | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Edits, in place, the layers that read text alone by a solve of the moments of what they read.

    Args:
        solve: (old weights of layers that read the same, moments of it) -> new ones.
        tokens, template: of the concepts, as in `UCEConfig`.

    Returns, raises: as `uce`.
    """
    paths = text_paths(pipeline)
    streams = [stream for path in paths for stream in path.streams]
    edits, guides, kept = check_concepts(streams, edit_concepts, guide_concepts, preserve_concepts, UCE_WORDS)
    made: dict[str, Tensor] = {}
    for path in paths:
        listed = [weight.detach() for weight in path.weights.values()]
        text = concept_moments(path.streams, edits, guides, kept, template, listed[0].device, last=tokens == "last")
        made |= dict(zip(path.weights, solve(listed, text), strict=True))
    return write_weights(paths, made)


def uce(
    pipeline: Any,
    edit_concepts: Sequence[str],
    guide_concepts: Sequence[str],
    preserve_concepts: Sequence[str] = (),
    config: UCEConfig | None = None,
) -> dict[str, Tensor]:
    """Edits the keys and values of a pipeline's cross-attention in place: what was said of a concept is now said of its guide.

    Args:
        pipeline: Stable Diffusion 1.x, 2.x, XL, 3 or FLUX as diffusers loads it (or one with the same parts).
        edit_concepts: names or prompts, each put into every `config.template`.
        guide_concepts: one for each, or one for all.
        preserve_concepts: left where they were as far as `preserve_scale` says.
        config: settings.

    Returns:
        Name within the U-Net, or transformer, -> new weight: what `save_partial_unet` writes.

    Raises:
        TypeError: a text in place of a list of names. ValueError: no concepts, one without a token, one that is its own guide or
        preserved too, unequal numbers, a pipeline without its parts or without layers that read text. Repetitions are warned of.
    """
    config = config or UCEConfig()
    return edit_text(
        pipeline, edit_concepts, guide_concepts, preserve_concepts, lambda old, text: uce_weights(old, text, config),
        tokens=config.tokens, template=config.template,
    )  # fmt: skip
