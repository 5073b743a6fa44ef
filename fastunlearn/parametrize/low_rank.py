"""Changes of weights as products of low rank: what an adapter without a mask is, and the nearest such product to any other change.

The best matrix of rank r is what is left of the singular value decomposition of the change D (Eckart and Young). How far it is off is
measured on the factors as they will be stored: ||D - s B A|| / ||D||, Frobenius, of each layer and of all together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastunlearn.ops.mask import rows_cols
from fastunlearn.reference.masked_lora import wide


class LowRank(NamedTuple):
    """One layer's change, scaling * B A.

    Attributes:
        A: [rank, in], of a convolution in = channels * height * width of its kernel. B: [out, rank].
        scaling: what the product is multiplied by.
        shape: of the weight: [out, in] or [out, channels, height, width].
    """

    A: Tensor
    B: Tensor
    scaling: float
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.A)

    def shaped(self, *, folded: bool = False) -> tuple[Tensor, Tensor]:
        """(A, B) as loaders want them: a convolution's are convolutions, [rank, channels, h, w] and [out, rank, 1, 1].

        Args:
            folded: the scaling is multiplied into B.
        """
        A, B = self.A, self.B * self.scaling if folded else self.B
        if len(self.shape) == 4:
            A, B = A.reshape(-1, *self.shape[1:]), B[:, :, None, None]
        return A, B

    def to(self, dtype: torch.dtype) -> LowRank:
        return self._replace(A=self.A.to(dtype), B=self.B.to(dtype))


def check_rank(rank: int) -> None:
    """Raises ValueError for what is no rank."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: want at least 1, got {rank!r}")


def best_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) of the best approximation of a matrix by a rank, singular values shared by both."""
    if min(delta.shape) <= 4 * rank or delta.numel() <= 1 << 18:
        U, s, Vh = torch.linalg.svd(delta, full_matrices=False)
        U, s, Vh = U[:, :rank], s[:rank], Vh[:rank]
    else:
        U, s, V = torch.svd_lowrank(delta, q=min(rank + 16, *delta.shape), niter=6)
        U, s, Vh = U[:, :rank], s[:rank], V[:, :rank].T
    root = s.sqrt()
    return root[:, None] * Vh, U * root


@dataclass
class Change:
    """What a run changed, layer by layer.

    Attributes:
        layers: module name -> its change.
        lost: module name -> share of its change that is lost, of the layers that are approximated.
    """

    layers: dict[str, LowRank] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    _missed: float = 0.0
    _whole: float = 0.0

    def add(self, name: str, delta: Tensor, rank: int, dtype: torch.dtype) -> None:
        """The best approximation of one layer's change, in the type that is stored.

        Raises:
            ValueError: a rank below 1.
        """
        check_rank(rank)
        matrix = delta.reshape(rows_cols(delta.shape)).to(wide(delta.dtype))
        A, B = best_factors(matrix, min(rank, *matrix.shape))
        self.layers[name] = LowRank(A.to(dtype), B.to(dtype), 1.0, tuple(delta.shape))
        kept = self.layers[name].B.to(matrix.dtype) @ self.layers[name].A.to(matrix.dtype)
        off, size = float((matrix - kept).norm()) ** 2, float(matrix.norm()) ** 2
        self._missed, self._whole = self._missed + off, self._whole + size
        self.lost[name] = (off / size) ** 0.5 if size else 0.0

    @property
    def total(self) -> float:
        """Share of the whole approximated change that is lost."""
        return (self._missed / self._whole) ** 0.5 if self._whole else 0.0

    def said(self, what: str) -> str:
        """A line for a terminal: how far the approximated layers are off.

        Args:
            what: in front, e.g. "rank 4 of 24 masked layers".
        """
        worst = max(self.lost, key=lambda name: self.lost[name])
        return f"{what}: {self.total:.2%} of the change is lost (most in {worst}: {self.lost[worst]:.2%})"


def _moved(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(module, its changed parameters by name) wherever something changed."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, after in new.items():
        before = old[name]
        if before.dtype != after.dtype:
            before = before.to(after.dtype)
        if not torch.equal(before, after):
            module, _, leaf = name.rpartition(".")
            modules.setdefault(module, {})[leaf] = after
    yield from modules.items()


@torch.no_grad()
def change_between(
    network: nn.Module, new: Mapping[str, Tensor], *, rank: int, dtype: torch.dtype | None = None
) -> tuple[Change, dict[str, dict[str, Tensor]]]:
    """The difference of new weights from a network's, as products of low rank where a layer's weight alone changed.

    Args:
        network: as it was. new: parameter name -> new value; those that are equal (in the new one's type) count for nothing.

    Returns:
        (the change of linear layers and convolutions, module -> its new parameters of all other modules that changed).

    Raises:
        ValueError: names or shapes that the network does not have; nothing changed.
    """
    old = dict(network.named_parameters())
    wrong = [name for name, weight in new.items() if name not in old or old[name].shape != weight.shape]
    if wrong:
        raise ValueError(f"model: the run is of another one: {wrong[0]} is not in it, or of another shape")
    change, whole = Change(), {}
    for module, leaves in tqdm(list(_moved(old, new)), desc="factors", unit="layer", disable=None, leave=False):
        layer = network.get_submodule(module)
        if (
            set(leaves) != {"weight"}
            or not isinstance(layer, nn.Linear | nn.Conv2d)
            or getattr(layer, "groups", 1) != 1
        ):
            whole[module] = {n: leaves.get(n, p.detach()) for n, p in layer.named_parameters(recurse=False)}
            continue
        weight = leaves["weight"]
        delta = weight.double() - layer.weight.double() if weight.numel() <= 1 << 22 else weight.float() - layer.weight.float()  # fmt: skip
        change.add(module, delta, rank, weight.dtype if dtype is None else dtype)
    if not change.layers and not whole:
        raise ValueError("run: its weights are those of the model it was made from: there is nothing to export")
    return change, whole
