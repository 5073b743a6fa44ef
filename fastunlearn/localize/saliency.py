"""Saliency of a whole model from the backward pass itself: every gradient is added to its scores and freed as it comes.

A hook on every parameter runs right after its gradient is complete. So the fp32 scores and the gradient of one parameter are
all that lives at once, where the usual loop (backward, then read every p.grad) holds a second copy of the model. The kinds
of scores and their sources: `fastunlearn.ops.saliency_accumulate_`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastunlearn.localize.granularity import Granularity, check_granularity, structured_masks
from fastunlearn.ops.mask import BitMask
from fastunlearn.ops.saliency import DTYPES, KINDS, Kind, local, saliency_accumulate_
from fastunlearn.ops.topk import Key, Scope, topk_mask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CAME_BACK = (
    "SaliencyCollector: a gradient is back after it was counted: an active DistributedDataParallel writes gradients again "
    "at the end of the backward pass; run the forward passes on its .module inside `with ddp.no_sync():`, then call collector.all_reduce()"
)

Patterns = str | Sequence[str] | None


def matches(name: str, patterns: Patterns) -> bool:
    """Whether a parameter's name, or a module it is in, fits one of the shell patterns ("model.layers.*.mlp", "*.bias")."""
    listed = [patterns] if isinstance(patterns, str) else list(patterns or ())
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in listed)


class SaliencyCollector:
    """Collects saliency scores over the backward passes inside a `with` block.

    Inside the block every gradient of the parameters is freed as soon as it has been counted: `p.grad` is None after
    `loss.backward()`, and an optimiser that steps there moves nothing (a `RuntimeWarning` says so, once). One backward pass
    is one batch: with kind "abs" four passes over micro-batches count |g1| + |g2| + |g3| + |g4|, not |g1 + g2 + g3 + g4|.
    A parameter shared by several modules is one parameter under its first name, and counts the sum of its gradients. A
    frozen one (requires_grad=False) has no scores. Gradients count as they come: leave out loss scaling (GradScaler).

    The block may be entered again: scores go on from where they were, until `reset()`.

    Replicas (DistributedDataParallel): collect on the bare module on every rank, each with its own batches, then add up the
    ranks. The forward passes go through the bare module too, or through the wrapper inside its `no_sync()`; otherwise the
    wrapper writes gradients again after they were counted, which is refused.

        >>> with ddp.no_sync(), SaliencyCollector(ddp.module) as collector:
        ...     for batch in my_part_of_the_forget_set:
        ...         ddp.module(**batch).loss.backward()
        >>> collector.all_reduce()
        >>> masks = collector.masks(density=0.1)

    Shards (FSDP2): wrap, collect, and give `masks` the process group; there the gradients are already of all ranks.

    Args:
        model: the module; or name -> parameter, or (name, parameter) pairs. Of a module the gradients of the parameters that
            are not selected are freed as well.
        kind: "abs", "square", "signed" or "weight_grad".
        include: names or shell patterns of parameters or modules to take ("*" crosses dots); None: all that are trained.
        exclude: names or shell patterns to leave out of those.
        scores_device: where the scores live; None: beside their parameters. On another device every gradient is copied
            there as it comes.

    Attributes:
        kind: as given.
        counts: name -> backward passes that brought a gradient; 0 for a parameter that no loss reached.

    Raises:
        ValueError: unknown kind, nothing selected, a pattern that fits nothing; on entering: gradients are there already.
        TypeError: model is none of these or a DistributedDataParallel, a parameter that is not floating.
        RuntimeError: gradients that were counted come back (an active DistributedDataParallel).

    Example:
        >>> with SaliencyCollector(model, kind="abs", include="model.layers.*.mlp") as collector:
        ...     for batch in forget_set:
        ...         model(**batch).loss.backward()
        >>> masks = collector.masks(density=0.1)
        >>> trained = [(n, p) for n, p in model.named_parameters() if n in masks]
        >>> optimizer = fastunlearn.optim.MaskedAdamW(trained, masks, lr=1e-5)
    """

    def __init__(
        self,
        model: Module | Mapping[str, Parameter] | Iterable[tuple[str, Parameter]],
        kind: Kind = "abs",
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        scores_device: torch.device | str | None = None,
    ):
        if kind not in KINDS:
            raise ValueError(f"kind: want one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        if isinstance(model, Module):
            if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
                raise TypeError(
                    "model: a DistributedDataParallel writes gradients again after they were counted; collect on model.module "
                    "inside `with model.no_sync():`, then add up the ranks by collector.all_reduce()"
                )
            named: list[tuple[str, Any]] = list(model.named_parameters())
        elif isinstance(model, Mapping):
            named = list(model.items())
        elif isinstance(model, Iterable) and not isinstance(model, Tensor):
            named = list(model)
        else:
            raise TypeError(f"model: want a module or named parameters, got {type(model).__name__}")
        for entry in named:
            if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Tensor)):
                raise TypeError(
                    f"model: want (name, parameter) pairs, got {type(entry).__name__} (model.named_parameters())"
                )
        for what, patterns in (("include", include), ("exclude", exclude)):
            for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
                if not any(matches(name, pattern) for name, _ in named):
                    raise ValueError(f"{what}: {pattern!r} fits no parameter and no module of the model")

        self.kind: Kind = kind
        self._parameters: dict[str, Tensor] = {}
        self._others: list[Tensor] = []
        seen: set[int] = set()
        for name, parameter in named:
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            if (include is None or matches(name, include)) and not matches(name, exclude):
                if not parameter.is_floating_point():
                    raise TypeError(f"model: {name} is {parameter.dtype}; scores need a floating parameter")
                self._parameters[name] = parameter
            elif isinstance(model, Module):
                self._others.append(parameter)
        if not self._parameters:
            raise ValueError("model: no parameter left to score: all are frozen (requires_grad=False) or filtered out")
        self._scores = {
            name: torch.zeros(local(p).shape, dtype=torch.float32, device=scores_device or p.device)
            for name, p in self._parameters.items()
        }
        self.counts = dict.fromkeys(self._parameters, 0)
        self._handles: list[Any] = []
        self._warned = False
        self._reduced = False
        self._last: Tensor | None = None

    @property
    def scores(self) -> dict[str, Tensor]:
        """Name -> fp32 scores of the parameter's shape (of a DTensor: of this process's part); the tensors added to."""
        return dict(self._scores)

    def reset(self) -> None:
        """Starts again from zero, in the same memory."""
        for name, score in self._scores.items():
            score.zero_()
            self.counts[name] = 0
        self._reduced = False

    def __enter__(self) -> SaliencyCollector:
        if self._handles:
            raise RuntimeError("SaliencyCollector: already collecting; leave the block before entering it again")
        if self._reduced:
            raise RuntimeError(
                "SaliencyCollector: the scores are of all ranks already; call reset() before collecting again"
            )
        held = [name for name, p in self._parameters.items() if p.grad is not None]
        held += ["a parameter that is not selected"] * any(p.grad is not None for p in self._others)
        if held:
            raise ValueError(
                f"model: {held[0]} holds a gradient from before (of {len(held)}); it would be counted or lost: "
                "call model.zero_grad() first"
            )
        for name, parameter in self._parameters.items():
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._counting(name)))
        for parameter in self._others:
            self._handles.append(parameter.register_post_accumulate_grad_hook(_free))
        self._handles.append(register_optimizer_step_pre_hook(self._optimiser_steps))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        last, self._last = self._last, None
        if last is not None and last.grad is not None and not any(exception):
            raise RuntimeError(_CAME_BACK)

    def _counting(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            grad = parameter.grad
            if grad is None:
                raise RuntimeError(
                    f"SaliencyCollector: the gradient of {name} was freed before it could be counted; is another collector "
                    "or an optimiser in the backward pass active?"
                )
            parameter.grad = None
            if self._last is not None and self._last.grad is not None:
                raise RuntimeError(_CAME_BACK)
            self._last = parameter
            self._add(name, local(parameter.detach()), local(grad))
            self.counts[name] += 1

        return hook

    def _add(self, name: str, weight: Tensor, grad: Tensor) -> None:
        score = self._scores[name]
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        weighted = self.kind == "weight_grad"
        if grad.dtype not in DTYPES:
            grad = grad.float()
        if weighted and weight.dtype not in DTYPES:
            weight = weight.float()
        if self._beside(score, grad):
            saliency_accumulate_([score], [grad], [weight] if weighted else None, self.kind)
        elif weighted:
            # The product is made where both are, so that one tensor travels and not two.
            term = torch.zeros(score.shape, dtype=torch.float32, device=grad.device)
            saliency_accumulate_([term], [grad], [weight], self.kind)
            score.add_(term.to(score.device))
        else:
            saliency_accumulate_([score], [grad.to(score.device)], kind=self.kind)

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Adds up scores and counts over ranks that each hold the whole model (replicas); all ranks call it, after the block.

        Scores are then those of one process that ran the backward passes of all ranks one after the other: with "abs" the
        sum over all micro-batches of |g| (SPARE's sum), with "square" of g^2, with "weight_grad" of |w * g|; with "signed"
        the sum of g itself, so that what one rank pushes up and another down cancels. Gradients are not averaged first. Every
        rank holds the same bits, so `masks()` without a process group gives every rank the same masks.

        Args:
            group: the ranks to add up; None: all.

        Raises:
            RuntimeError: inside the block; twice without `reset()`; torch.distributed is not initialised. ValueError: a
            parameter is sharded (a DTensor) and no group was given: name the ranks that hold the same shards, or, where
            every rank holds other shards, leave this out and give `masks` the group.
        """
        if self._handles:
            raise RuntimeError("all_reduce: still collecting; call it after the block")
        if self._reduced:
            raise RuntimeError("all_reduce: the scores are of all ranks already; call reset() first")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("all_reduce: torch.distributed has no process group; call init_process_group first")
        sharded = [name for name, p in self._parameters.items() if local(p) is not p]
        if sharded and group is None:
            raise ValueError(
                f"group: {sharded[0]} is a DTensor: its ranks hold shards, which are not added up; pass the group of those "
                "that hold the same shards, or leave all_reduce out and call masks(process_group=...)"
            )
        for score in self._scores.values():
            dist.all_reduce(score, group=group)
        counts = torch.tensor(list(self.counts.values()), device=next(iter(self._scores.values())).device)
        dist.all_reduce(counts, group=group)
        self.counts = dict(zip(self.counts, counts.tolist(), strict=True))
        self._reduced = True

    @staticmethod
    def _beside(score: Tensor, grad: Tensor) -> bool:
        return score.device == grad.device

    def _optimiser_steps(self, optimiser: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._warned:
            return
        ours = {id(p) for p in self._parameters.values()}
        if any(id(p) in ours for group in optimiser.param_groups for p in group["params"]):
            self._warned = True
            warnings.warn(
                f"{type(optimiser).__name__}.step() inside a SaliencyCollector moves nothing: gradients are freed as soon as "
                "they are counted; step outside the block",
                RuntimeWarning,
                stacklevel=4,
            )

    @overload
    def masks(
        self,
        density: float | None = None,
        k: int | None = None,
        *,
        scope: Scope = "global",
        process_group: ProcessGroup | None = None,
        granularity: Granularity = "weight",
        block: int = 128,
    ) -> dict[str, BitMask]: ...

    @overload
    def masks(
        self,
        density: list[float] | tuple[float, ...],
        k: None = None,
        *,
        scope: Scope = "global",
        process_group: ProcessGroup | None = None,
        granularity: Granularity = "weight",
        block: int = 128,
    ) -> list[dict[str, BitMask]]: ...

    def masks(
        self,
        density: float | list[float] | tuple[float, ...] | None = None,
        k: int | None = None,
        *,
        scope: Scope = "global",
        process_group: ProcessGroup | None = None,
        granularity: Granularity = "weight",
        block: int = 128,
    ) -> dict[str, BitMask] | list[dict[str, BitMask]]:
        """The masks of the highest scores; of kind "signed", of the highest |sum of g|.

        Args:
            density, k, scope: as `fastunlearn.ops.topk_mask`.
            process_group: the ranks that hold the shards of one model, rank r the r-th rows of every parameter (FSDP2). Not
                for replicas: after `all_reduce()` every rank has all scores and takes None.
            granularity, block: what stays or goes as a whole, by its summed saliency: single weights, tiles of `block` x `block`,
                rows, or whole tensors (`fastunlearn.localize.structured_masks`); density and k then count these.

        Returns:
            name -> BitMask; for a list of densities a list of such dicts. There is a mask for every parameter that is scored:
            the selected ones that require grad.

        Raises:
            ValueError: nothing has been counted; a process group after `all_reduce()`; or as topk_mask.
        """
        if self._reduced and process_group is not None:
            raise ValueError("process_group: after all_reduce() every rank holds the whole scores; leave it out")
        if not any(self.counts.values()):
            raise ValueError("masks: no backward pass has been counted; every score is 0")
        check_granularity(granularity, block)
        scores = list(self._scores.values())
        key: Key = "abs" if self.kind == "signed" else "value"
        if granularity != "weight":
            if process_group is not None:
                raise ValueError(
                    f"process_group: with shards granularity={granularity!r} would cut units in two; choose single weights"
                )
            return cast(
                "dict[str, BitMask] | list[dict[str, BitMask]]",
                structured_masks(self._scores, density, k, granularity=granularity, block=block, scope=scope, key=key),
            )
        select: Any = topk_mask
        chosen = select(scores, density, k, scope=scope, key=key, process_group=process_group)
        if isinstance(density, list | tuple):
            return [dict(zip(self._scores, masks, strict=True)) for masks in chosen]
        return dict(zip(self._scores, chosen, strict=True))

    def __repr__(self) -> str:
        entries = sum(math.prod(s.shape) for s in self._scores.values())
        return f"SaliencyCollector(kind={self.kind!r}, {len(self._scores)} parameters, {entries} entries)"


def _free(parameter: Tensor) -> None:
    parameter.grad = None
