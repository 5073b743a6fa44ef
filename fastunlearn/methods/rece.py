"""RECE: reliable and efficient concept erasure (Gong et al. 2024, arXiv 2407.12383): UCE, and again UCE of what still draws the concept.

After an edit from W_0 to W there may be text c' that W takes where W_0 took the concept c. The one that comes closest, over all
projections together, is a closed form (eq. 7 of the paper, in this project's letters):

    c' = argmin sum_l |W_l c' - W_0l c|^2 + ridge |c'|^2 = (ridge I + sum_l W_l^T W_l)^-1 (sum_l W_l^T W_0l) c = T c

It is sent to the guide as the concept was, and so on for some epochs. T is linear: the moments of the tokens c' are T S T^T and
those of guide and c' are S* T^T, and every epoch is one `fastunlearn.ops.spectral_solve`, however many concepts there are.
A reconstruction: each epoch starts from the weights of the one before (guides and what is preserved are read by them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastunlearn.data.concepts import Moments
from fastunlearn.methods.uce import UCEConfig, edit_text, uce_weights


@dataclass
class RECEConfig:
    """Settings of `rece`; the defaults are those published for styles and objects (nudity: ridge 0.1, three epochs)."""

    erase_scale: float = field(default=0.1, metadata={"help": "Weight of every concept that is edited."})
    preserve_scale: float = field(default=0.1, metadata={"help": "Weight of every concept that is preserved."})
    lamb: float = field(default=0.1, metadata={"help": "Weight of the old projection, above 0."})
    ridge: float = field(default=1e-3, metadata={"help": "Of the search for text that still draws a concept, above 0."})
    epochs: int = field(default=1, metadata={"help": "Searches, each followed by an edit; 0 is UCE."})
    tokens: Literal["last", "all"] = field(
        default="last", metadata={"help": "The last word of a concept, or every position of its prompt."}
    )
    template: list[str] | None = field(
        default=None,
        metadata={"help": "Prompts with {} for a concept; every concept goes into every one. None: its name alone."},
    )

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or not 0 <= self.epochs <= 1000:
            raise ValueError(f"epochs: want a whole number from 0 to 1000, got {self.epochs!r}")
        for name in ("ridge", "lamb"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: want a finite number above 0, got {getattr(self, name)}")
        self.uce()

    def uce(self) -> UCEConfig:
        """Settings of every epoch's edit."""
        return UCEConfig(self.erase_scale, self.preserve_scale, self.lamb, self.tokens, self.template)


def recovering(new: Sequence[Tensor], old: Sequence[Tensor], ridge: float) -> Tensor:
    """T, float64 [width, width]: T c is the text that the new weights take where the old ones took c, as nearly as there is one.

    Args:
        new, old: W_l, W_0l, [rows, width] each.
    """
    joined = torch.cat([w.double() for w in new])
    gram = joined.T @ joined + ridge * torch.eye(joined.shape[1], dtype=torch.float64, device=joined.device)
    return torch.cholesky_solve(joined.T @ torch.cat([w.double() for w in old]), torch.linalg.cholesky(gram))


def rece(
    pipeline: Any,
    edit_concepts: Sequence[str],
    guide_concepts: Sequence[str],
    preserve_concepts: Sequence[str] = (),
    config: RECEConfig | None = None,
) -> dict[str, Tensor]:
    """Edits, in place, the layers of a pipeline's denoiser that read text alone; as `uce`, and what it leaves open after it.

    Args:
        pipeline, edit_concepts, guide_concepts, preserve_concepts: as `fastunlearn.methods.uce.uce`.
        config: settings.

    Returns:
        Name within the denoiser -> new weight.

    Raises:
        ValueError: as `uce`.
    """
    config = config or RECEConfig()

    def solve(old: list[Tensor], text: Moments) -> list[Tensor]:
        new = uce_weights(old, text, config.uce())
        for _ in range(config.epochs):
            T = recovering(new, old, config.ridge)
            new = uce_weights(new, Moments(T @ text.S @ T.T, text.S_star @ T.T, text.kept), config.uce())
        return new

    return edit_text(
        pipeline, edit_concepts, guide_concepts, preserve_concepts, solve, tokens=config.tokens, template=config.template
    )  # fmt: skip
