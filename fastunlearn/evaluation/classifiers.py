"""Two small convolutional networks that say which style and which object a picture of the canvas shows.

They play the part of UnlearnCanvas' two vision transformers (Zhang et al. 2024, arXiv 2402.11846): accuracy under an unlearned model
is measured with them, and the Fréchet distance is taken between the features before their last layer.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fastunlearn._stored import read_tensors
from fastunlearn.data import canvas

__all__ = ["Classifier", "load_classifiers"]

FILE = Path(__file__).parents[1] / "assets" / "canvas_classifiers.safetensors"
LABELS = {"style": canvas.THEMES, "object": canvas.OBJECTS}


class _Block(nn.Module):
    """Two convolutions beside an identity, the first of them halving the picture."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.norm1(self.first(x)))
        return F.silu(x + self.norm2(self.second(x)))


class Classifier(nn.Module):
    """Which of its labels a picture shows.

    Args:
        labels: their names, in the order of the logits.
        width: channels of the first block; the later ones have 2, 4 and 6 times as many.
    """

    def __init__(self, labels: tuple[str, ...], width: int = 24) -> None:
        super().__init__()
        self.labels = tuple(labels)
        widths = (width, 2 * width, 4 * width, 6 * width)
        self.blocks = nn.Sequential(*(_Block(i, o) for i, o in zip((3, *widths), widths, strict=False)))
        self.head = nn.Linear(widths[-1], len(labels))

    def features(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """What the last layer sees.

        Args:
            images: uint8 or floats in [0, 1], [N, 3, H, W] or [N, H, W, 3].

        Returns:
            fp32 [N, 6 * width].

        Raises:
            ValueError: images of another rank or with other than three channels.
        """
        x = torch.as_tensor(images, device=self.head.weight.device)
        if x.ndim != 4 or 3 not in (x.shape[1], x.shape[-1]):
            raise ValueError(f"images: shape {tuple(x.shape)}; want [N, 3, H, W] or [N, H, W, 3]")
        if x.shape[1] != 3:
            x = x.permute(0, 3, 1, 2)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        # Its pictures are 64 x 64: others are brought to that size.
        if x.shape[-2:] != (canvas.SIZE, canvas.SIZE):
            x = F.interpolate(x, (canvas.SIZE, canvas.SIZE), mode="bilinear", antialias=True, align_corners=False)
        return self.blocks(x * 2 - 1).mean((2, 3))

    def forward(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Logits fp32 [N, len(labels)]; images as in `features`."""
        return self.head(self.features(images))


def load_classifiers(
    path: str | os.PathLike[str] | None = None, *, device: torch.device | str = "cpu"
) -> dict[str, Classifier]:
    """The two classifiers of the canvas, "style" (25 labels, the plain style first) and "object" (20).

    Args:
        path: a file of theirs; None: the one in this package.

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, or of other networks.
    """
    file = Path(path) if path is not None else FILE
    if not file.is_file():
        raise FileNotFoundError(f"no classifiers at {file}; train them: python -m benchmarks.train_canvas")
    tensors, _ = read_tensors(file)
    found: dict[str, Classifier] = {}
    for name, labels in LABELS.items():
        model = Classifier(labels)
        own = {k.removeprefix(f"{name}."): v.float() for k, v in tensors.items() if k.startswith(f"{name}.")}
        try:
            model.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"{file} does not fit: {' '.join(str(error).split())[:300]}") from None
        found[name] = model.eval().requires_grad_(False).to(device)
    return found
