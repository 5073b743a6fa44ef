"""TIME: text-to-image model editing (Orgad et al. 2023, arXiv 2303.08084, eq. 3): UCE's closed form over all tokens, nothing preserved.

    W_new = (lamb W + sum v* c^T) (lamb I + sum c c^T)^-1,   v* = W c*

with the tokens c of the source prompt and c* of the destination that stand in their places; what holds on to everything else is
lamb alone. As with the authors a concept comes in a few prompts besides its name, at equal weight; which prompts is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastunlearn.methods.uce import UCEConfig, uce

AUGMENTED = ("{}", "a photo of {}", "an image of {}", "a picture of {}")


@dataclass
class TIMEConfig:
    """Settings of `time_edit`."""

    lamb: float = field(default=0.1, metadata={"help": "Weight of the old projection, above 0."})
    template: list[str] | None = field(
        default=None,
        metadata={"help": "Prompts with {} for a concept. None: its name, and a photo, an image, a picture of it."},
    )

    def __post_init__(self) -> None:
        if not 0 < self.lamb < float("inf"):
            raise ValueError(f"lamb: want a finite number above 0, got {self.lamb}")
        UCEConfig(template=self.template)


def time_edit(
    pipeline: Any, edit_concepts: Sequence[str], guide_concepts: Sequence[str], config: TIMEConfig | None = None
) -> dict[str, Tensor]:
    """Edits, in place, the layers of a pipeline's denoiser that read text alone, so that each concept is read as its guide.

    Args:
        pipeline, edit_concepts, guide_concepts: as `fastunlearn.methods.uce.uce`; source and destination in the paper's words.
        config: settings.

    Returns:
        Name within the denoiser -> new weight.

    Raises:
        ValueError: as `uce`.
    """
    config = config or TIMEConfig()
    settings = UCEConfig(lamb=config.lamb, tokens="all", template=config.template or list(AUGMENTED))
    return uce(pipeline, edit_concepts, guide_concepts, (), settings)
