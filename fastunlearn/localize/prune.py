"""Pruning a whole model layer by layer: the linear layers inside its blocks, each block on what the pruned ones before it give.

The driver is that of Wanda's and SparseGPT's code: the dense model runs once for what enters the first block; then, block by
block, statistics of every linear layer's input with the block still dense, the choice of weights, and the block again with what
is left. One block's statistics live at a time. The masks name the weights that are left: stored beside a checkpoint and handed
to a masked optimiser, they keep the pattern through any training; they are never read off the zeros.

The calibration text must not hold what is to be forgotten: the choice of weights would then remember it (`fastunlearn prune`
refuses such text; `fastunlearn.data.calibration.check_calibration` is the check).
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastunlearn._modes import evaluating
from fastunlearn.localize.magnitude import magnitude_scores
from fastunlearn.localize.patterns import Pattern, parse_pattern, select
from fastunlearn.localize.sparsegpt import NotPositiveDefinite, input_hessians, sparsegpt_sweep
from fastunlearn.localize.wanda import input_norms, wanda_scores
from fastunlearn.ops.mask import BitMask

Method = Literal["magnitude", "wanda", "sparsegpt"]
Scope = Literal["row", "tensor"]
METHODS: tuple[Method, ...] = ("magnitude", "wanda", "sparsegpt")
#: how often a layer whose Hessian is not positive definite is tried again, each time with ten times the damping
RETRIES = 2
#: tried next where the damping was 0
LEAST_DAMPING = 1e-3
Calibration = Tensor | Iterable[Any] | Callable[[], Any]
#: hidden states before a block, one tensor a batch; the block's other arguments, batch by batch
_Call = tuple[tuple[Any, ...], dict[str, Any]]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a transformers model: its one list of `num_hidden_layers` modules.

    Raises:
        ValueError: there is no such list, or more than one (an encoder and a decoder): give `blocks`.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    depth = getattr(config, "num_hidden_layers", None)
    if depth is None:
        raise ValueError(
            f"blocks: {type(model).__name__} has no config with num_hidden_layers to find them by; give the list of blocks in "
            "the order they run"
        )
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside:
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"blocks: want one list of {depth} modules in {type(model).__name__}, found {sorted(found) or 'none'}; give the "
            "list of blocks in the order they run"
        )
    return list(next(iter(found.values())))


def linear_layers(model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[list[dict[str, nn.Linear]], list[str]]:
    """For every block: full name -> `nn.Linear` inside it; the names of the other weights (matrices) of the blocks.

    Raises:
        TypeError: weights that are not plain floating ones (quantised). ValueError: a block is no part of the model or holds no
            linear layer; a weight has NaN or infinity, is on the meta device, or is shared with another layer.
    """
    name_of = {id(module): name for name, module in model.named_modules()}
    strangers = [type(block).__name__ for block in blocks if id(block) not in name_of]
    if strangers or not blocks:
        raise ValueError(f"blocks: want at least one, all part of the model; got {len(blocks)}, not in it: {strangers}")
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    result, seen, left_out = [], set[int](), list[str]()
    for block in blocks:
        prefix = name_of[id(block)]
        layers = {
            ".".join(part for part in (prefix, name) if part): layer
            for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear)
        }
        if not layers:
            raise ValueError(
                f"blocks: {prefix or type(block).__name__} holds no torch.nn.Linear; other layers (a Conv1D that keeps its "
                "weight transposed, fused experts) cannot be pruned here"
            )
        for name, layer in layers.items():
            weight = layer.weight
            if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                raise TypeError(
                    f"model: {name}.weight is {weight.dtype}; want plain floating weights, not quantised ones"
                )
            if weight.device.type == "meta":
                raise ValueError(f"model: {name}.weight is on the meta device; load the weights first")
            if uses[id(weight)] != 1 or id(weight) in seen:
                raise ValueError(f"model: {name}.weight is shared with another layer; pruning it would change both")
            if not bool(weight.detach().isfinite().all()):
                raise ValueError(f"model: {name}.weight holds NaN or infinity")
            seen.add(id(weight))
        left_out += [f"{prefix}.{name}" for name, p in block.named_parameters() if p.dim() >= 2 and id(p) not in seen]
        result.append(layers)
    return result, left_out


def _some(names: Sequence[str], at_most: int = 4) -> str:
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


def _batches(model: nn.Module, calibration: Calibration, batch_size: int) -> Iterator[Callable[[], Any]]:
    """One function a batch that runs the model on it."""
    if callable(calibration) and not isinstance(calibration, Tensor):
        yield calibration
        return
    # A transformers model: without the output layer, whose logits nobody reads.
    base = getattr(model, "base_model", None) if hasattr(model, "config") else None
    core = cast(Callable[..., Any], base if isinstance(base, nn.Module) else model)
    device = next(model.parameters()).device

    def on(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    pieces: Iterable[Any] = calibration
    if isinstance(calibration, Tensor):
        tokens = calibration.dim() == 2 and calibration.numel() and calibration.dtype in (torch.int64, torch.int32)
        if base is not None and not tokens:
            raise ValueError(
                f"calibration: want int64 tokens [rows, length], got {calibration.dtype} {tuple(calibration.shape)}"
            )
        pieces = calibration.split(batch_size)
    for batch in pieces:
        if base is None:
            if isinstance(batch, Mapping):
                yield partial(core, **{key: on(value) for key, value in batch.items()})
            else:
                arguments = batch if isinstance(batch, tuple | list) else (batch,)
                yield partial(core, *map(on, arguments))
            continue
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        if not isinstance(batch, Mapping):
            raise TypeError(f"calibration: want tokens or mappings with input_ids, got {type(batch).__name__}")
        inputs = {key: on(value) for key, value in batch.items() if key not in ("labels", "index")}
        padding = inputs.pop("attention_mask", None)
        if padding is not None and not bool(padding.all()):
            raise ValueError("calibration: a batch holds padding, which would count as text; give rows without any")
        yield partial(core, **{"use_cache": False, **inputs})


def _first_pass(
    blocks: Sequence[nn.Module], runs: Iterable[Callable[[], Any]]
) -> tuple[list[Tensor], list[list[_Call]]]:
    """Runs the dense model: the hidden states before block 0, one tensor a batch, and, block by block, its other arguments.

    The first batch goes through the dense blocks. Where each of them gave one tensor and the next took that very tensor, it goes
    through the model once more with blocks that hand on what they get. If every recorded argument (masks, positions) is the
    same bit for bit, none depends on what the blocks compute, and the blocks are left out of later batches; else, as for
    a scale that one block gives the next, every batch goes through the dense blocks.
    """
    hidden: list[Tensor] = []
    others: list[list[_Call]] = [[] for _ in blocks]
    ahead: list[Any] = []
    chained = True

    def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal chained
        if not args or not isinstance(args[0], Tensor):
            raise TypeError("blocks: want modules that take the hidden states as their first positional argument")
        cache = [k for k in ("past_key_values", "past_key_value", "layer_past") if kwargs.get(k) is not None]
        if cache:
            raise ValueError(f"calibration: runs the model with a cache ({cache[0]}); call it with use_cache=False")
        if index == 0:
            hidden.append(args[0].detach())
        else:
            chained &= bool(ahead) and ahead[-1] is args[0]
        others[index].append((args[1:], kwargs))

    def remember(out: Any) -> None:
        ahead[:] = [out]

    def unchanged(run: Callable[[], Any]) -> bool:
        """Whether the first batch, run again, records what it did; leaves no record of its own."""
        logs: list[list[Any]] = [hidden, *others]
        counts = [len(log) for log in logs]
        try:
            run()
            return all(_same(log[:n], log[n:]) for log, n in zip(logs, counts, strict=True))
        # Whatever a model does that cannot run without its blocks: it runs with them then.
        except Exception:
            return False
        finally:
            for log, n in zip(logs, counts, strict=True):
                del log[n:]

    with ExitStack() as hooks:
        for i, block in enumerate(blocks):
            pre = block.register_forward_pre_hook(lambda _, a, k, i=i: record(i, a, k), with_kwargs=True)
            hooks.callback(pre.remove)
        with ExitStack() as first:
            for block in blocks:
                first.callback(block.register_forward_hook(lambda _, a, out: remember(out)).remove)
            again: Callable[[], Any] | None = None
            for number, run in enumerate(runs):
                if number == 1:
                    first.close()
                    if chained and isinstance(ahead[-1] if ahead else None, Tensor):
                        with ExitStack() as without:
                            for block in blocks:
                                without.enter_context(_replaced(block, "forward", lambda hidden, *_, **__: hidden))
                            if unchanged(cast(Callable[[], Any], again)):
                                hooks.push(without.pop_all())
                    again = None
                run()
                if number == 0:
                    again = run
    if not hidden or any(len(calls) != len(hidden) for calls in others):
        raise ValueError(
            f"calibration: want it to run every block once a batch; calls of the blocks: {[len(calls) for calls in others]}"
        )
    return hidden, others


def _same(one: Any, other: Any) -> bool:
    """Equal in kind and value, tensors bit for bit; objects that cannot be compared are different."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or bool(one == other)


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance, and what it was afterwards."""
    before = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


@torch.no_grad()
def prune(
    model: nn.Module,
    *,
    method: Method = "wanda",
    pattern: Pattern | str | float | tuple[int, int] = "2:4",
    calibration: Calibration | None = None,
    blocks: Sequence[nn.Module] | None = None,
    scope: Scope = "row",
    damping: float = 0.01,
    block_size: int = 128,
    batch_size: int = 4,
    skip_indivisible: bool = False,
    progress: bool = True,
) -> dict[str, BitMask]:
    """Prunes every `nn.Linear` inside the blocks of a model, in place.

    Weights may be in any floating dtype and on any device; scores and Hessians are fp32. With "magnitude" and "wanda" what is
    kept stays as it was, bit for bit; "sparsegpt" corrects it. Runs under autocast when called under it.

    Args:
        model: the whole model; its parameter names become the names of the masks. A PEFT adapter must be merged first.
        method: "magnitude" (|weight|; needs no calibration), "wanda" (|weight| times its input's norm) or "sparsegpt" (what
            removing a weight costs once the others have made up for it).
        pattern: "2:4" or any n:m with n < m; or the share to remove of every output row: "50%", "0.5", 0.5 (`parse_pattern`).
        calibration: text that stands for what the model is to stay good at, never from the forget set: int64 tokens [rows,
            length] without padding; or an iterable of batches (tokens, or mappings with input_ids; for a module that is no
            transformers model whatever it takes: a tensor, a tuple of arguments, a mapping of them); or a function that runs
            the model, without a cache, on one or more batches. The activations of all of it are kept at once.
        blocks: the decoder blocks in the order they run; None: found (`find_blocks`). Each takes the hidden states as first
            positional argument and returns them (or a tuple that starts with them); its other arguments are recorded from
            the dense model.
        scope: what unstructured magnitude pruning compares: "row", or "tensor" as the baseline of the pruning papers does.
        damping, block_size: of SparseGPT (`sparsegpt_sweep`). A layer whose Hessian is not positive definite with this damping
            is tried again with ten times as much (0: with 0.001), at most twice, with a warning that names it.
        batch_size: rows of tokens a forward pass.
        skip_indivisible: layers whose input columns are no multiple of m stay dense, with a warning that names them; else
            they are an error before anything is changed.
        progress: bars, where standard error is a terminal.

    Returns:
        Parameter name -> BitMask of the weights left; all others of these parameters are zero now.

    Raises:
        TypeError, ValueError: an unknown method, pattern or scope; no calibration; blocks or calibration do not do what is said
            above; quantised, shared or non-finite weights; columns that m does not divide. Nothing is changed then
            (`check_prunable` finds most of it by itself). Later: a linear layer that saw no input, activations that are not
            finite, or a Hessian that is not positive definite with a hundred times the damping. The error names the layer;
            the blocks before it are pruned then, its own and those after it are as they were: load the model again.

    Example:
        >>> masks = prune(model, method="sparsegpt", pattern="2:4", calibration=tokens)
        >>> fastunlearn.save_masks(masks, "masks.safetensors")
    """
    wanted = check_options(method, pattern, scope, damping=damping, block_size=block_size, batch_size=batch_size)
    chosen, layers, notes = _plan(model, wanted, blocks, skip_indivisible)
    for note in notes:
        # Past this function and no_grad's wrapper.
        warnings.warn(f"prune: {note}", UserWarning, stacklevel=3)
    if method == "magnitude":
        masks = {
            f"{name}.weight": _mask_out(layer, select(magnitude_scores(layer.weight), wanted, scope))
            for block in _bar(layers, "pruning", "block", progress)
            for name, layer in block.items()
        }
        torch.clear_autocast_cache()
        return masks
    if calibration is None:
        raise ValueError(f"calibration: {method} needs text, got None; int64 tokens [rows, length] will do")
    with evaluating(model):
        batches = _batches(model, calibration, batch_size)
        total = -(-len(calibration) // batch_size) if isinstance(calibration, Tensor) else None
        hidden, others = _first_pass(chosen, _bar(batches, "dense pass", "batch", progress, total))
        return _block_by_block(chosen, layers, hidden, others, method, wanted, damping, block_size, progress)


def check_options(
    method: str,
    pattern: Pattern | str | float | tuple[int, int],
    scope: str = "row",
    *,
    damping: float = 0.01,
    block_size: int = 128,
    batch_size: int = 4,
) -> Pattern:
    """Checks what can be checked of `prune`'s arguments without a model; the pattern as read.

    Raises:
        ValueError: an unknown method, pattern or scope, or numbers out of range.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method: want one of {', '.join(METHODS)}, got {method!r}{hint}")
    wanted = parse_pattern(pattern)
    if scope not in ("row", "tensor"):
        raise ValueError(f"scope: want 'row' or 'tensor', got {scope!r}")
    if scope == "tensor" and (method != "magnitude" or wanted.structured):
        raise ValueError(
            f"scope: 'tensor' is for unstructured magnitude pruning; {method} at {wanted} compares inside rows"
        )
    if not 0 <= damping < math.inf or block_size < 1 or batch_size < 1:
        raise ValueError(
            f"damping, block_size, batch_size: want >= 0, >= 1, >= 1; got {damping}, {block_size}, {batch_size}"
        )
    return wanted


def check_prunable(
    model: nn.Module,
    method: str,
    pattern: Pattern | str | float | tuple[int, int],
    scope: str = "row",
    *,
    blocks: Sequence[nn.Module] | None = None,
    skip_indivisible: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    batch_size: int = 4,
) -> None:
    """Checks that `prune` with these arguments can start: all that it refuses before the calibration text runs.

    Nothing is run or changed; every weight of the blocks is read once.

    Args:
        model, and the others: as `prune`.

    Raises:
        TypeError, ValueError: as `prune` before it changes anything, the calibration text's own faults aside.
    """
    wanted = check_options(method, pattern, scope, damping=damping, block_size=block_size, batch_size=batch_size)
    _plan(model, wanted, blocks, skip_indivisible)


def _plan(
    model: nn.Module, pattern: Pattern, blocks: Sequence[nn.Module] | None, skip_indivisible: bool
) -> tuple[list[nn.Module], list[dict[str, nn.Linear]], list[str]]:
    """The blocks, their layers to prune, and what is to be warned of."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            "model: carries a PEFT adapter, whose own layers would be pruned too; call merge_and_unload() first"
        )
    chosen = list(blocks) if blocks is not None else find_blocks(model)
    layers, left_out = linear_layers(model, chosen)
    notes = []
    if left_out:
        notes.append(
            f"{len(left_out)} weights of the blocks belong to no torch.nn.Linear and stay dense: {_some(left_out)}"
        )
    if pattern.m is not None:
        notes += _divide(layers, pattern.m, skip_indivisible)
    return chosen, layers, notes


def _divide(layers: list[dict[str, nn.Linear]], m: int, skip: bool) -> list[str]:
    """Layers whose columns m does not divide: an error, or out of the list with a note."""
    odd = {name: layer for block in layers for name, layer in block.items() if layer.weight.shape[1] % m}
    if not odd:
        return []
    told = _some([f"{name} ({layer.weight.shape[1]} columns)" for name, layer in odd.items()])
    if not skip or len(odd) == sum(map(len, layers)):
        raise ValueError(
            f"pattern: m = {m} does not divide the input columns of {len(odd)} layers: {told}; choose another m, an "
            "unstructured pattern, or skip_indivisible=True to leave some layers dense"
        )
    for block in layers:
        for name in odd.keys() & block.keys():
            del block[name]
    return [f"{len(odd)} layers stay dense, m = {m} does not divide them: {told}"]


def _block_by_block(
    blocks: Sequence[nn.Module],
    layers: Sequence[Mapping[str, nn.Linear]],
    hidden: list[Tensor],
    others: Sequence[list[_Call]],
    method: Method,
    pattern: Pattern,
    damping: float,
    block_size: int,
    progress: bool,
) -> dict[str, BitMask]:
    masks: dict[str, BitMask] = {}
    collect = input_norms if method == "wanda" else input_hessians
    for index in _bar(range(len(blocks)), "pruning", "block", progress):
        block, calls = blocks[index], others[index]
        with collect(layers[index]) as statistics:
            for x, (args, kwargs) in zip(hidden, calls, strict=True):
                block(x, *args, **kwargs)
        for name in layers[index]:
            statistic = statistics.get(name)
            if statistic is None:
                raise ValueError(f"calibration: {name} saw no input, so it has no scores; use more or other text")
            if not bool(statistic.sum().isfinite()):
                raise ValueError(f"calibration: {name} met inputs that are NaN or infinite")
        # All of the block is computed before any of it is written: an error leaves the block whole.
        corrected: dict[str, Tensor] = {}
        for name, layer in layers[index].items():
            statistic = statistics.pop(name)
            if method == "wanda":
                masks[f"{name}.weight"] = select(wanda_scores(layer.weight, statistic), pattern)
            else:
                corrected[name], masks[f"{name}.weight"] = _sweep_damped(
                    name, layer.weight, statistic, pattern, damping, block_size
                )
        for name, layer in layers[index].items():
            if method == "wanda":
                _mask_out(layer, masks[f"{name}.weight"])
            else:
                layer.weight.copy_(corrected.pop(name))
        # Autocast keeps low-precision copies of parameters; these are of the weights before pruning.
        torch.clear_autocast_cache()
        for i, (args, kwargs) in enumerate(calls if index + 1 < len(blocks) else ()):
            out = block(hidden[i], *args, **kwargs)
            hidden[i] = out[0] if isinstance(out, tuple) else out
        calls.clear()
    return masks


def _sweep_damped(
    name: str, weight: Tensor, hessian: Tensor, pattern: Pattern, damping: float, block_size: int
) -> tuple[Tensor, BitMask]:
    """`sparsegpt_sweep`; where its Hessian has no factor, again with ten times the damping, with a warning."""
    tried = [damping]
    while True:
        try:
            return sparsegpt_sweep(weight, hessian, pattern, damping=tried[-1], block_size=block_size)
        except NotPositiveDefinite:
            told = f"the Hessian of {name} is not positive definite with damping {', '.join(f'{d:g}' for d in tried)}"
            if len(tried) > RETRIES:
                raise ValueError(
                    f"calibration: {told}; give a larger damping or more calibration text. The blocks before this one are "
                    "pruned already, it and those after it are not: load the model again"
                ) from None
            tried.append(10 * tried[-1] or LEAST_DAMPING)
            warnings.warn(f"prune: {told}; trying {tried[-1]:g}", UserWarning, stacklevel=5)


def _mask_out(layer: nn.Linear, mask: BitMask) -> BitMask:
    layer.weight.masked_fill_(~mask.unpack(), 0)
    return mask


def _bar(items: Any, what: str, unit: str, progress: bool, total: int | None = None) -> Any:
    # disable=None: no bar where standard error is a file.
    return tqdm(items, desc=what, unit=unit, total=total, leave=False, disable=None if progress else True)
