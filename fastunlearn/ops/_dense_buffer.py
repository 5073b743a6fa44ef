"""Memory that one layer's dense weight lives in at a time: made once, as large as the largest layer, and used by the next one.

One buffer a GPU and stream, whose order keeps its users apart; one a thread on a CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

_local = threading.local()
_lock = threading.Lock()
_cuda: dict[tuple[int, int], Tensor] = {}


def _grown(buffers: dict, key: object, nbytes: int, device: torch.device) -> Tensor:
    held = buffers.get(key)
    if held is None or held.numel() < nbytes:
        # The smaller one goes first: the two never exist together.
        buffers.pop(key, None)
        del held
        with torch.inference_mode(False):
            held = buffers[key] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return held


@contextmanager
def dense_buffer(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, compiled: bool = False
) -> Iterator[Tensor]:
    """Row-major memory of that shape, holding anything; inside the block it is the caller's alone.

    On a GPU "inside" means queued inside: work of the same stream that is queued later may write it. While a CUDA graph is
    captured it is fresh memory of the graph, which replays when it likes; and fresh in every call of what torch.compile made
    (`compiled`), which runs once in its graphs' memory before it captures them, and refuses what is kept of that.
    """
    nbytes = prod(shape) * dtype.itemsize
    if device.type == "cpu":
        # Taken out while it is in use: a user inside this block (a hook) gets one of its own.
        buffers = _local.__dict__
        buffer = _grown(buffers, "buffer", nbytes, device)
        buffers.pop("buffer")
        try:
            yield buffer[:nbytes].view(dtype).view(*shape)
        finally:
            buffers["buffer"] = buffer
    elif compiled or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        yield torch.empty(*shape, dtype=dtype, device=device)
    else:
        index = torch.cuda.current_device() if device.index is None else device.index
        with _lock:
            buffer = _grown(_cuda, (index, torch.cuda.current_stream(index).cuda_stream), nbytes, device)
            yield buffer[:nbytes].view(dtype).view(*shape)


def release_buffers() -> None:
    """Gives back the memory that `nm_linear` expands weights into: all of the GPUs', and this thread's on a CPU.

    The next call makes it anew. Call it when the last training step is done, or before a model of smaller layers.
    """
    with _lock:
        _cuda.clear()
    _local.__dict__.clear()
