"""A run whose model is cut over processes: FSDP2 (`fully_shard`) as accelerate's configuration asks for it, and what goes wrong silently.

`accelerate launch` (fsdp_version: 2) or ACCELERATE_USE_FSDP=true FSDP_VERSION=2 under torchrun: rows of every parameter are cut
over the processes; bits of compressed weights are parameters and are cut with them. accelerate's own `fsdp2_prepare_model` does it, also on a CPU (gloo), where
accelerate by itself would take DDP without a word. The model is sharded before the optimiser is made, which then takes DTensors:
accelerate's way, an optimiser whose parameters are swapped by their addresses, would lose masks, and mixes up empty shards.

Checkpoints are torch.distributed.checkpoint's: of any number of processes, read by any other. Optimiser state is saved expanded
to its parameter's shape, tensor by tensor.

What one process finds is told to all (`agreed`, `anywhere`), so that none waits for a process that has stopped; one that has died
is missed within a minute (`Watch`).
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastunlearn._stored import read_index, read_pickled
from fastunlearn.ops.mask import BitMask
from fastunlearn.optim.masks import local_mask

FOLDER = "sharded"
#: in that folder: numbers of steps and settings of groups, of which every process has the same
OTHERS = "optimizer_settings.pt"


# ---- processes ---------------------------------------------------------------------------------------------------------------


def several() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter is cut over processes."""
    return any(hasattr(p, "to_local") for p in model.parameters())


def _gathered(value: Any) -> list[Any]:
    """The value of every process, by rank."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


@contextmanager
def agreed() -> Iterator[None]:
    """What raises ValueError, OSError or ArithmeticError in one process raises in all; every process must come here.

    The process where it happened raises its own error, the others one that names that process.
    """
    if not several():
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except (ValueError, OSError, ArithmeticError) as error:
        mine = error
    said = _gathered(None if mine is None else str(mine))
    if mine is not None:
        raise mine
    for rank, text in enumerate(said):
        if text is not None:
            raise ValueError(f"process {rank} of {len(said)}: {text}")


def combined(digest: str) -> str:
    """One digest of all processes' digests, in their order."""
    return hashlib.sha256(" ".join(_gathered(digest)).encode()).hexdigest() if several() else digest


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether it is so in any process; one small all-reduce."""
    if not several():
        return flag
    told = torch.tensor(int(flag), dtype=torch.int32, device=device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


def summed(value: Tensor, device: torch.device) -> Tensor:
    """The sum over processes, in float64."""
    if not several():
        return value
    total = value.detach().double().to(device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.to(value.device)


def check_same_masks(masks: Mapping[str, BitMask] | None) -> None:
    """Compares the masks of all processes; every one must come here.

    Raises:
        ValueError: they differ; names the first that does, with the density in every process. In all of them.
    """
    if not several():
        return
    own = {
        name: (hashlib.sha256(mask.bits.cpu().contiguous().numpy().tobytes()).hexdigest(), tuple(mask.shape))
        for name, mask in (masks or {}).items()
    }
    said = _gathered(own)
    if all(other == said[0] for other in said):
        return
    names = sorted({name for other in said for name in other})
    name = next(name for name in names if len({other.get(name) for other in said}) > 1)
    shown = _gathered(f"{masks[name].density:.4f}" if masks and name in masks else "no mask")
    raise ValueError(
        f"masks: they differ between processes; the first that does is {name}, of density {', '.join(shown)} in process 0 to "
        f"{len(shown) - 1}. Every process must load the same checkpoint"
    )


class Watch:
    """A thread that ends this process when another one has died: with a message, within a minute.

    Every process tells a store that it lives; one that has not for `limit` seconds, or a store that is gone, is told on standard
    error, and this process exits with status 1. Collectives would wait for it as long as their time limit says.
    """

    def __init__(self, limit: float = 40.0, every: float = 5.0):
        self.limit, self.every = limit, every
        self._end = threading.Event()
        #: after an error of its own a process is missed like one that has died: the others may not know of it
        self._clean = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        if not several():
            return self
        rank, world = dist.get_rank(), dist.get_world_size()
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        wait = timedelta(seconds=self.limit)
        store: Any = None
        port = [0]
        if rank == 0:
            store = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False, timeout=wait)
            port = [store.port]
        dist.broadcast_object_list(port, src=0)
        if rank:
            store = dist.TCPStore(host, port[0], world, is_master=False, wait_for_workers=False, timeout=wait)
        store.set(f"alive/{rank}", "0")
        dist.barrier()
        self._thread = threading.Thread(
            target=self._run, args=(store, rank, world), daemon=True, name="fastunlearn-watch"
        )
        self._thread.start()
        return self

    def _run(self, store: Any, rank: int, world: int) -> None:
        seen = {other: (b"", time.monotonic()) for other in range(world) if other != rank}
        beats = 0
        while not self._end.wait(self.every):
            beats += 1
            try:
                store.set(f"alive/{rank}", str(beats))
                now = {other: store.get(f"alive/{other}") for other in seen}
            except Exception as error:
                # Process 0 may be ending as this one is about to, with an error of its own.
                if self._end.wait(self.every):
                    return
                self._die(f"process 0 does not answer any more ({str(error).splitlines()[0][:200]})")
                return
            for other, said in now.items():
                if said == b"end":
                    continue
                if said != seen[other][0]:
                    seen[other] = (said, time.monotonic())
                elif time.monotonic() - seen[other][1] > self.limit:
                    self._die(f"process {other} of {world} has given no sign of life for {self.limit:.0f} s")
        if rank and self._clean:
            try:
                store.set(f"alive/{rank}", "end")
            except Exception:
                return

    def _die(self, why: str) -> None:
        print(
            f"fastunlearn: {why}; this process stops. Go on from the last checkpoint with resume_from_checkpoint=true",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)

    def __exit__(self, *_: Any) -> None:
        if self._thread is None:
            return
        error = _[1]
        # No process takes the store away while another asks it; after an error nobody waits.
        if error is None:
            dist.barrier()
            self._clean = True
        elif isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("peer", "gloo", "NCCL", "onnection")
        ):
            print(
                "fastunlearn: another process has stopped in the middle of a step, and this one stops too. Go on from the last "
                "checkpoint with resume_from_checkpoint=true", file=sys.stderr, flush=True,
            )  # fmt: skip
        self._end.set()
        self._thread.join(self.every + 1)


# ---- sharding ----------------------------------------------------------------------------------------------------------------


def requested() -> bool:
    """Whether accelerate's configuration asks for FSDP, and there are processes to shard over."""
    return (
        os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and int(os.environ.get("WORLD_SIZE", "1")) > 1
    )


def plugin_of(accelerator: Any) -> Any:
    """accelerate's settings of FSDP: those it holds, or (on a CPU, where it takes none) those of its environment variables.

    Raises:
        ValueError: not version 2, or settings that cannot be honoured.
    """
    from accelerate import FullyShardedDataParallelPlugin

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
    if plugin.fsdp_version != 2:
        raise ValueError(
            "fsdp_version: want 2 (accelerate config: fsdp_version: 2, or FSDP_VERSION=2); FSDP1 keeps no DTensors"
        )
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: want false: with it all processes but the first hold weights that mean nothing, and "
            "masks could not be checked against them"
        )
    return plugin


def shard_model(model: Any, accelerator: Any) -> Any:
    """The model with `fully_shard` on every block, as accelerate's settings say; in place.

    Gradients are summed up in fp32 where the settings name no mixed precision.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = plugin_of(accelerator)
    plugin.cpu_ram_efficient_loading = False
    if plugin.mixed_precision_policy is None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    if plugin.activation_checkpointing:
        # transformers' own, which renames no parameter.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    state = SimpleNamespace(fsdp_plugin=plugin)
    like = SimpleNamespace(
        state=state, torch_device_mesh=getattr(accelerator, "torch_device_mesh", None), mixed_precision=accelerator.mixed_precision,
        parallelism_config=getattr(accelerator, "parallelism_config", None), is_main_process=accelerator.is_main_process,
        device=accelerator.device,
    )  # fmt: skip
    model = fsdp2_prepare_model(like, model)
    whole = [name for name, p in model.named_parameters() if not hasattr(p, "to_local")]
    if whole:
        raise ValueError(f"fsdp: {len(whole)} parameters were not sharded, the first is {whole[0]}")
    return model


def like_param(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros placed as a parameter is."""
    return torch.zeros_like(param.detach(), dtype=dtype)


def local_rows(values: Tensor, param: Tensor) -> Tensor:
    """The rows of a tensor of the parameter's full shape that belong to the shard held here."""
    if not hasattr(param, "to_local"):
        return values
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = param
    shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    return values[offset[0] : offset[0] + shape[0]] if shape else values


def check_shards(model: nn.Module, masks: Mapping[str, BitMask]) -> None:
    """`checkpoint.check_masks` of the rows held here; what is compressed holds nothing off its mask.

    Raises:
        ValueError: a weight outside its mask is not zero.
    """
    for name, parameter in model.named_parameters():
        mask = masks.get(name)
        if mask is not None and tuple(mask.shape) == tuple(parameter.shape):
            here: Any = parameter.detach()
            stray = int(((here.to_local() != 0) & ~local_mask(mask, parameter).to(here.device).unpack()).sum())
            if stray:
                raise ValueError(f"masks: not zero outside the mask: {name}: {stray:,} weights of this process's rows")


def gathered_masks(local: Mapping[str, BitMask]) -> dict[str, BitMask]:
    """Masks of shards (rows, rank after rank) as masks of whole parameters, in every process, on the CPU."""
    parts = _gathered({name: mask.unpack().cpu() for name, mask in local.items()})
    return {name: BitMask.pack(torch.cat([part[name] for part in parts])) for name in local}


# ---- checkpoints ----------------------------------------------------------------------------------------------------------------


def _flat_optimizer(model: nn.Module, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by "name/what", what is no tensor)."""
    saved = optimizer.state_dict()
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for index, state in saved["state"].items():
        for what, value in state.items():
            (tensors if isinstance(value, Tensor) and value.dim() else others)[f"{order[index]}/{what}"] = value
    groups = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in saved["param_groups"]]
    members = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    return tensors, {"state": others, "groups": groups, "members": members}


def save(folder: Path, model: nn.Module, optimizer: Any, update: Mapping[str, Any]) -> None:
    """Writes model, optimiser state and what the update keeps; every process must come here.

    Args:
        optimizer: None saves none. update: name -> tensor, of its `state_dict`.
    """
    import torch.distributed.checkpoint as dcp

    content: dict[str, Any] = {"model": dict(model.state_dict())}
    if optimizer is not None:
        content["optimizer"], others = _flat_optimizer(model, optimizer)
        if not several() or dist.get_rank() == 0:
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            torch.save(others, folder / FOLDER / OTHERS)
    if update:
        content["update"] = dict(update)
    with _quiet():
        dcp.save(content, checkpoint_id=folder / FOLDER, no_dist=not several())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hint that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _templates(keys: Mapping[str, Any], prefix: str, place: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Empty tensors for what a checkpoint holds under `prefix`, placed like the parameter they belong to."""
    out = {}
    for key, about in keys.items():
        if not key.startswith(prefix) or not hasattr(about, "size"):
            continue
        name = key.removeprefix(prefix)
        param = place(name)
        dtype = about.properties.dtype
        fits = param is not None and tuple(param.shape) == tuple(about.size)
        out[name] = like_param(param, dtype) if fits else torch.zeros(about.size, dtype=dtype)  # type: ignore[arg-type]
    return out


def _read(folder: Path, content: dict[str, Any]) -> None:
    import torch.distributed.checkpoint as dcp

    _metadata(folder)
    with _quiet():
        dcp.load(content, checkpoint_id=folder / FOLDER, no_dist=not several())


def _metadata(folder: Path) -> Mapping[str, Any]:
    """What a checkpoint holds; read before torch reads it, which would run what a pickle says."""
    try:
        return read_index(folder / FOLDER / ".metadata")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {folder / FOLDER} cannot be read ({error}); take an earlier checkpoint"
        ) from error


def check_model(folder: Path, model: nn.Module) -> None:
    """
    Raises:
        ValueError: the checkpoint cannot be read, or is of another model.
    """
    known = _metadata(folder)
    for name, tensor in model.state_dict().items():
        about = known.get(f"model.{name}")
        if about is None or tuple(about.size) != tuple(tensor.shape):
            raise ValueError(
                f"resume_from_checkpoint: {folder} holds {name} {'of shape ' + str(tuple(about.size)) if about else 'not at all'}, this "
                f"run wants {tuple(tensor.shape)}; it is of another model, or of a run with another setting of compressed"
            )


def load_model(folder: Path, model: nn.Module) -> None:
    """Reads a model that `save` wrote, whatever the number of processes then and now."""
    content = {"model": dict(model.state_dict())}
    _read(folder, content)
    model.load_state_dict(content["model"])


def load_optimizer(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Reads an optimiser's state that `save` wrote."""
    params = dict(model.named_parameters())
    keys = _metadata(folder)
    tensors = _templates(keys, "optimizer.", lambda name: params.get(name.rpartition("/")[0]))
    content = {"optimizer": tensors}
    if tensors:
        _read(folder, content)
    others = read_pickled(folder / FOLDER / OTHERS)
    state: dict[str, dict[str, Any]] = {}
    for key, value in (*content["optimizer"].items(), *others["state"].items()):
        name, _, what = key.rpartition("/")
        state.setdefault(name, {})[what] = value
    saved = optimizer.state_dict()
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    if others["members"] != [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]:
        raise ValueError("resume_from_checkpoint: the optimiser's parameters are not those of this run")
    groups = [{**group, **kept} for group, kept in zip(saved["param_groups"], others["groups"])]
    optimizer.load_state_dict(
        {**saved, "state": {i: state[name] for i, name in enumerate(order) if name in state}, "param_groups": groups}
    )


def load_update(folder: Path, params: list[Tensor]) -> dict[str, Tensor]:
    """What an update kept: number of the parameter -> tensor, placed like it; {} where it kept nothing."""
    found = _templates(_metadata(folder), "update.", lambda name: params[int(name)] if name.isdigit() else None)
    if found:
        _read(folder, {"update": found})
    return found
