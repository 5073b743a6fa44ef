"""A GPU that is not there: tensors that say they are on cuda:0, hold their numbers on the CPU, and refuse what a real one would refuse.

What mixes devices, hands a CPU's generator to a GPU's tensor, or asks NumPy for a GPU's memory, raises here as it would there. Numbers are
a CPU's; kernels, streams, memory and autocast are not pretended. Ops run as their reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # looks for a GPU when it is imported
from torch import Tensor
from torch.nn import functional as F
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
#: take tensors of the CPU beside those of a GPU: copies, and indices
_MIXES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
_INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor,
}  # fmt: skip


class Pretended(torch.Tensor):
    """Says cuda:0; `inner` is on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        assert not isinstance(inner, Pretended)
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, layout=inner.layout,
            device="meta", _extra_dispatch_keys=torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA),
        )  # fmt: skip
        made.inner = inner
        return made

    # Autograd asks for a guard of its device: there is one of "meta" everywhere.
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, Pretended)
        self.inner = value.inner

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({self.inner!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: Any, size: Any, stride: Any) -> Pretended:
        return Pretended(inner["inner"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                copy = Pretended(self.inner.detach().clone())
            made: Any = torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy
            memo[id(self)] = made.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_plain_index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_plain_index(index), value)

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _plain_index(index: Any) -> Any:
    """Lists as tensors: the C++ would make them on a device that nothing here sees."""
    if isinstance(index, tuple):
        return tuple(map(_plain_index, index))
    return torch.tensor(index) if isinstance(index, (list, range)) else index


def _is_cuda(device: Any) -> bool:
    if isinstance(device, bool) or device is None:
        return False
    return isinstance(device, int) or torch.device(device).type in ("cuda", "meta")


def _check(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """
    Raises:
        RuntimeError: tensors of two devices, or a generator of the other one.
    """
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"{func}: Expected a 'cuda' device type for generator but found 'cpu'")
    if func in _MIXES:
        return
    flat = tree_flatten((args, kwargs))[0]
    if any(isinstance(t, Tensor) and t.device.type == "meta" and not isinstance(t, Pretended) for t in flat):
        raise NotImplementedError(
            f"{func}: an argument was made in C++, where this device is not known; see `_where_of` below"
        )
    if func in _INDEXED:
        if not isinstance(args[0], Pretended):
            raise RuntimeError(
                f"{func}: indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        flat = [t for i, arg in enumerate(args) if i != 1 for t in tree_flatten(arg)[0]]
    here = [t for t in flat if isinstance(t, Tensor) and not isinstance(t, Pretended)]
    # A number in a tensor of the CPU is taken; a number on the GPU among tensors of the CPU is taken, too, but never as what is written.
    if any(t.dim() for t in here):
        raise RuntimeError(
            f"{func}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"{[tuple(t.shape) for t in here]}"
        )


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    _check(func, args, kwargs)
    device = kwargs.get("device")
    to_cpu = device is not None and not _is_cuda(device)
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False

    def inner(x: Any) -> Any:
        return x.inner if isinstance(x, Pretended) else x

    out = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    if func is aten._to_copy.default and isinstance(out, Tensor) and any(out is inner(a) for a in args):
        out = out.clone()
    if func is aten.copy_.default or func is aten._foreach_copy_.default:
        return args[0]
    if to_cpu:
        return out
    made = tree_map(lambda x: Pretended(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, made)


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Pretended(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].inner if isinstance(grads[0], Pretended) else grads[0]


def to_gpu(x: Tensor) -> Tensor:
    """A copy that says it is on the GPU; differentiable."""
    if isinstance(x, Pretended):
        return x
    if isinstance(x, torch.nn.Parameter) or (x.is_leaf and not x.requires_grad):
        return Pretended(x.detach().clone())
    return _ToGpu.apply(x)


def _attention_of(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """scaled_dot_product_attention: of torch's own the C++ makes a tensor that nothing here sees."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if not isinstance(query, Pretended):
            return real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if enable_gqa:
            times = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(
                ~torch.ones(scores.shape[-2:], dtype=torch.bool, device=CUDA).tril(), float("-inf")
            )
        if attn_mask is not None:
            scores = (
                scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
            )
        return F.dropout(torch._safe_softmax(scores, -1), dropout_p) @ value

    return attention


def _where_of(real: Callable[..., Any]) -> Callable[..., Any]:
    """torch.where: of a number the C++ makes a tensor that nothing here sees."""

    def where(condition: Tensor, *values: Any) -> Any:
        if not isinstance(condition, Pretended) or len(values) != 2:
            return real(condition, *values)
        dtype = torch.result_type(*values)
        made = [v if isinstance(v, Tensor) else to_gpu(torch.tensor(v, dtype=dtype)) for v in values]
        return real(condition, *made)

    return where


class Generator(torch.Generator):
    """Of random numbers on the pretended GPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls if _is_cuda(device) else Generator._real, "cpu")

    @property
    def device(self) -> torch.device:
        return CUDA


Generator._real = torch.Generator  # type: ignore[attr-defined]
_REAL_TO = torch.Tensor.to


def _factory(make: Callable[..., Any]) -> Callable[..., Any]:
    """torch.zeros and the like, on the pretended GPU where they are asked to."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        has = any(isinstance(t, Pretended) for t in tree_flatten((args, kwargs))[0])
        generator, device = kwargs.get("generator"), kwargs.get("device")
        here = has if device is None else _is_cuda(device) and torch.device(device).type == "cuda"
        if generator is not None and (generator.device.type == "cuda") != here:
            raise RuntimeError(
                f"Expected a {'cuda' if here else 'cpu'!r} device type for generator but found {generator.device.type!r}"
            )
        kwargs.pop("pin_memory", None)
        if not here or (has and device is None):
            return make(*args, **kwargs)
        kwargs.pop("device", None)
        requires_grad = kwargs.pop("requires_grad", False)
        args = tree_map(lambda x: x.inner if isinstance(x, Pretended) else x, args)
        out = make(*args, **kwargs, device="cpu")
        return tree_map(lambda t: to_gpu(t).requires_grad_(requires_grad) if isinstance(t, Tensor) else t, out)

    return made


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    given = [*args, *kwargs.values()]
    other = next((a for a in given if isinstance(a, Tensor)), None)
    dtype = next((a for a in given if isinstance(a, torch.dtype)), None if other is None else other.dtype)
    named = [a for a in given if isinstance(a, (str, torch.device)) or (isinstance(a, int) and not isinstance(a, bool))]
    where = other.device if other is not None else named[0] if named else None
    if where is None or not _is_cuda(where) or torch.device(where).type == "meta":
        return _REAL_TO(x, *args, **kwargs)
    if dtype is not None and dtype != x.dtype:
        x = _REAL_TO(x, dtype)
    elif kwargs.get("copy") and isinstance(x, Pretended):
        x = x.clone()
    return to_gpu(x)


def _cuda(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return to_gpu(x)


def _pinned(x: Tensor, *_: Any) -> Tensor:
    if isinstance(x, Pretended):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return x


class _Stream(SimpleNamespace):
    cuda_stream = 0

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None: ...
    def wait_stream(self, _: Any) -> None: ...


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def _nothing(*_: Any, **__: Any) -> None: ...


@contextmanager
def pretended(monkeypatch: Any) -> Iterator[None]:
    """Inside, torch has a GPU."""
    properties = SimpleNamespace(
        name="Pretended GPU", major=9, minor=0, total_memory=1 << 37, multi_processor_count=132, L2_cache_size=50 << 20,
        gcnArchName="", uuid="0",
    )  # fmt: skip
    cuda: dict[str, Any] = {
        "_lazy_init": _nothing, "init": _nothing, "is_initialized": lambda: True, "is_available": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "set_device": _nothing, "synchronize": _nothing, "empty_cache": _nothing,
        "get_device_name": lambda *_: "Pretended GPU", "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties, "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (1 << 36, 1 << 37), "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 1 << 20,
        "memory_reserved": lambda *_: 0, "max_memory_reserved": lambda *_: 0, "reset_peak_memory_stats": _nothing,
        "is_current_stream_capturing": lambda: False, "current_stream": lambda *_: _Stream(), "default_stream": lambda *_: _Stream(),
        "Event": _Event, "manual_seed": _nothing, "manual_seed_all": _nothing, "memory_stats": lambda *_: {},
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": _nothing, "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": _nothing, "is_tf32_supported": lambda: True, "_is_compiled": lambda: True,
    }  # fmt: skip
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
        if hasattr(torch.cuda.random, name):
            monkeypatch.setattr(torch.cuda.random, name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: _Stream())
    monkeypatch.setattr(torch.accelerator, "synchronize", _nothing)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "get_device_module", lambda *_: torch.cuda)
    for make in _device_constructors():
        if getattr(torch, make.__name__, None) is make:
            monkeypatch.setattr(torch, make.__name__, _factory(make))
    monkeypatch.setattr(torch, "where", _where_of(torch.where))
    monkeypatch.setattr(torch.Tensor, "where", lambda x, condition, other: torch.where(condition, x, other))
    monkeypatch.setattr(torch.Tensor, "to", _to)
    monkeypatch.setattr(torch.Tensor, "cuda", _cuda)
    monkeypatch.setattr(torch.Tensor, "pin_memory", _pinned)
    monkeypatch.setattr(F, "scaled_dot_product_attention", _attention_of(F.scaled_dot_product_attention))
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "reference")
    yield
