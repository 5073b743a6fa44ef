"""UCE: unified concept editing (Gandikota et al. 2024, arXiv 2308.14761, eq. 7), the closed form in its simplest shape.

Keys and values of cross-attention are linear in the text: every projection W of the U-Net is replaced by the one that sends the
text c of a concept to where W sends the text of its guide, v* = W c_guide, and leaves other concepts p where they were:

    W_new = (lamb W + es sum v* c^T + ps sum W p p^T) (lamb I + es sum c c^T + ps sum p p^T)^-1

which is W + es (V* - W C) C^T (lamb I + es C C^T + ps P P^T)^-1 with the concepts as columns of C and P: the same, without the
rounding error of W W^-1, and at lamb = 0 its limit, the smallest change that does it.

The second factor depends on the text alone: it is solved once, in fp64, for all projections. As in the authors' code, a concept's
text is its last word (the last token before the ending one); `tokens="all"` takes every position of the prompt, each to where the
guide's goes that stands in its place: what an image is drawn from when the concept is named inside a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastunlearn.data.concepts import in_templates as in_templates
from fastunlearn.data.prompts import aligned_features, encode_prompts, last_features
from fastunlearn.localize.unet import unet_parameters
from fastunlearn.sampling import check_pipeline


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
        metadata={"help": "Of a prompt: its last word, or every position."},
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


def uce_weight(weight: Tensor, edit: Tensor, guide: Tensor, solved: Tensor, erase_scale: float) -> Tensor:
    """One projection after the edit.

    Args:
        weight: [out, width]. edit, guide: fp64 [concepts, width], rows c and c_guide. solved: what `uce_solve` gave for them.

    Returns:
        fp64 [out, width].
    """
    old = weight.double()
    return old + erase_scale * (old @ (guide - edit).T) @ solved


def uce_solve(edit: Tensor, preserve: Tensor | None, config: UCEConfig) -> Tensor:
    """C^T (lamb I + es C C^T + ps P P^T)^-1, what all projections share.

    Args:
        edit: fp64 [concepts, width], rows c. preserve: fp64 [concepts, width], rows p, or None.

    Returns:
        fp64 [concepts, width].
    """
    width = edit.shape[1]
    moments = config.lamb * torch.eye(width, dtype=torch.float64, device=edit.device)
    moments += config.erase_scale * edit.T @ edit
    if preserve is not None and len(preserve):
        moments += config.preserve_scale * preserve.T @ preserve
    if config.lamb > 0:
        return torch.linalg.solve(moments, edit.T).T
    # Directions that no concept has are left alone.
    return edit @ torch.linalg.pinv(moments, hermitian=True, rtol=1e-12)


@torch.no_grad()
def uce(
    pipeline: Any,
    edit_concepts: Sequence[str],
    guide_concepts: Sequence[str],
    preserve_concepts: Sequence[str] = (),
    config: UCEConfig | None = None,
) -> dict[str, Tensor]:
    """Edits the keys and values of a pipeline's cross-attention in place: what was said of a concept is now said of its guide.

    Args:
        pipeline: StableDiffusionPipeline (or one with the same parts).
        edit_concepts: names or prompts, each put into every `config.template`.
        guide_concepts: one for each, or one for all.
        preserve_concepts: left where they were as far as `preserve_scale` says.
        config: settings.

    Returns:
        Name within the U-Net -> new weight: what `save_partial_unet` writes.

    Raises:
        ValueError: no concepts, a guide that is its own concept, unequal numbers, a pipeline without its parts.
    """
    config = config or UCEConfig()
    check_pipeline(pipeline)
    edits, guides = list(edit_concepts), list(guide_concepts)
    if len(guides) == 1:
        guides = guides * len(edits)
    if not edits:
        raise ValueError("edit_concepts: none given; there is nothing to erase")
    if len(guides) != len(edits):
        raise ValueError(
            f"guide_concepts: want one, or one for each of the {len(edits)} edit_concepts, got {len(guides)}"
        )
    same = [edit for edit, guide in zip(edits, guides, strict=True) if edit == guide]
    if same:
        raise ValueError(f"guide_concepts: {same[0]!r} is its own guide; nothing would be erased")
    template = config.template or ["{}"]
    edits, guides = in_templates(edits, template), in_templates(guides, template)
    kept = in_templates(preserve_concepts, template)
    preserve = None
    if config.tokens == "last":
        edit, guide = last_features(pipeline, edits), last_features(pipeline, guides)
        preserve = last_features(pipeline, kept) if kept else None
    else:
        edit, guide, _ = aligned_features(pipeline, edits, guides)
        preserve = encode_prompts(pipeline, kept).double().flatten(0, 1) if kept else None
    solved = uce_solve(edit, preserve, config)
    weights = unet_parameters(pipeline.unet, "xattn_kv")
    for name, weight in weights.items():
        if not name.endswith(".weight"):
            continue
        mine, theirs, shared = (t.to(weight.device) for t in (edit, guide, solved))
        weight.copy_(uce_weight(weight, mine, theirs, shared, config.erase_scale))
    return {name: weight.detach().clone() for name, weight in weights.items() if name.endswith(".weight")}
