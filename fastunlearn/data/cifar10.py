"""CIFAR-10 (Krizhevsky 2009) as tensors, from a folder with the hub's parquet files or from the Hugging Face hub itself."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_HUB, _FILES = (
    "uoft-cs/cifar10",
    {"train": "plain_text/train-00000-of-00001.parquet", "test": "plain_text/test-00000-of-00001.parquet"},
)


def _parquet(split: str, folder: str | os.PathLike[str] | None) -> Path:
    source = Path(folder) if folder is not None else None
    if source is None and os.environ.get("FASTUNLEARN_DATA"):
        source = Path(os.environ["FASTUNLEARN_DATA"]) / "cifar10"
    if source is not None:
        path = source / f"{split}.parquet"
        if not path.is_file():
            raise FileNotFoundError(f"folder: there is no {path} (columns img, label, as {_HUB} has them)")
        return path
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ImportError(
            f"CIFAR-10 comes from the hub ({_HUB}): pip install huggingface_hub, or set FASTUNLEARN_DATA"
        ) from None
    return Path(hf_hub_download(_HUB, _FILES[split], repo_type="dataset"))


def load_cifar10(
    split: str = "train",
    *,
    folder: str | os.PathLike[str] | None = None,
    classes: Sequence[int] | None = None,
    size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Images and labels.

    Args:
        split: "train" (50,000) or "test" (10,000).
        folder: with train.parquet and test.parquet; None: cifar10/ of the environment variable FASTUNLEARN_DATA, else the hub.
        classes: labels to keep, which become 0, 1, ...; None: all ten.
        size: of the images' sides; below 32 they are averaged down.

    Returns:
        (uint8 [n, 3, size, size], int64 [n]).

    Raises:
        ValueError: unknown split, label or size. FileNotFoundError: no such file. ImportError: pandas, pyarrow or pillow is missing.
    """
    if split not in _FILES:
        raise ValueError(f"split: want train or test, got {split!r}")
    if not 1 <= size <= 32:
        raise ValueError(f"size: want 1 to 32, got {size}")
    kept = list(range(len(CLASSES))) if classes is None else list(classes)
    if any(label not in range(len(CLASSES)) for label in kept) or len(set(kept)) != len(kept):
        raise ValueError(f"classes: want different labels of 0 to {len(CLASSES) - 1}, got {kept}")
    import pandas  # type: ignore[import-untyped]
    from PIL import Image

    table = pandas.read_parquet(_parquet(split, folder))
    table = table[table["label"].isin(kept)]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in table["img"]])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    if size < 32:
        images = F.interpolate(images.float(), (size, size), mode="area").round().to(torch.uint8)
    labels = torch.tensor([kept.index(label) for label in table["label"]], dtype=torch.int64)
    return images, labels
