"""log p(answer) under the reference model, computed once before training and kept on disk.

The reference of NPO and IdkDPO is the model before unlearning. Its log-probabilities of the forget set are a few numbers: they
are computed once, so that no second model stays in memory, and kept under a hash of the model's weights, the rows and the
tokenizer, so that the next run with the same three reads them. With a LoRA adapter the reference is the model with the adapter off.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from fastunlearn._modes import evaluating
from fastunlearn.data.text import TokenRow, collate
from fastunlearn.objectives.logprobs import answer_logprobs


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """`folder`, else $FASTUNLEARN_CACHE, else $XDG_CACHE_HOME/fastunlearn, else ~/.cache/fastunlearn."""
    if folder is not None:
        return Path(folder)
    if "FASTUNLEARN_CACHE" in os.environ:
        return Path(os.environ["FASTUNLEARN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastunlearn"


def adapter_off(model: Any) -> AbstractContextManager[Any]:
    """A context in which a PEFT model is its base model; for any other model it does nothing."""
    while not hasattr(model, "disable_adapter") and hasattr(model, "module"):
        model = model.module
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of names, types, shapes and bytes of all parameters and buffers; of a PEFT model without its adapters."""
    digest = hashlib.sha256()
    adapters = hasattr(model, "disable_adapter")
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor) or (adapters and "lora_" in name):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # One tensor at a time: a model on a GPU never has a second copy as a whole.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rows_digest(rows: Sequence[TokenRow], tokenizer: Any) -> str:
    """SHA-256 of token ids and labels of all rows and of the tokenizer they were made with."""
    digest = hashlib.sha256()
    digest.update(f"{type(tokenizer).__name__} {getattr(tokenizer, 'chat_template', None)!r}\n".encode())
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    digest.update(json.dumps(sorted(vocabulary.items())).encode())
    for row in rows:
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()


@torch.no_grad()
def logprobs_of_rows(
    model: nn.Module,
    rows: Sequence[TokenRow],
    pad_id: int,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    description: str = "reference log-probs",
    progress: bool | None = None,
) -> Tensor:
    """log p(answer) summed over answer tokens, of every row, longest rows first; dropout off.

    Args:
        rows: token rows (`fastunlearn.data.text`).
        autocast: makes the context of a forward pass.
        progress: a bar; None: where standard error is a terminal.

    Returns:
        fp32 [rows] on the CPU, in the order of `rows`.
    """
    device = next(model.parameters()).device if device is None else device
    out = torch.empty(len(rows), dtype=torch.float32)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    bar = tqdm(batches, desc=description, unit="batch", leave=False, disable=None if progress is None else not progress)
    with evaluating(model):
        for chosen in bar:
            batch = {name: t.to(device) for name, t in collate([rows[i] for i in chosen], pad_id).items()}
            with autocast():
                total = answer_logprobs(model, batch).total
            out[chosen] = total.float().cpu()
    return out


def reference_logprobs(
    model: nn.Module,
    rows: Sequence[TokenRow],
    tokenizer: Any,
    pad_id: int,
    *,
    folder: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    **options: Any,
) -> Tensor:
    """`logprobs_of_rows` of the reference model (adapter off), read from the cache where they were computed before.

    Args:
        folder: of the cache, see `cache_folder`.
        precision: of the forward passes, part of the key.
        options: of `logprobs_of_rows`.

    Returns:
        fp32 [rows] on the CPU.
    """
    with adapter_off(model):
        key = hashlib.sha256(
            f"1 {weights_digest(model)} {rows_digest(rows, tokenizer)} {precision}".encode()
        ).hexdigest()
        path = cache_folder(folder) / "reference" / f"{key[:32]}.safetensors"
        if path.exists():
            try:
                values = load_file(path)["logprobs"]
            except (SafetensorError, KeyError, OSError):
                values = torch.empty(0)  # damaged: computed again
            if values.shape == (len(rows),):
                return values
        values = logprobs_of_rows(model, rows, pad_id, **options)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logprobs": values}, temporary)
        temporary.replace(path)
    except OSError:
        # A cache that cannot be written (read-only home, full disk) must not stop the run.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return values
