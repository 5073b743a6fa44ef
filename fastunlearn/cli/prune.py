"""`fastunlearn prune`: a checkpoint to n:m or unstructured sparsity by magnitude, Wanda or SparseGPT.

    fastunlearn prune --model smollm2 --output smollm2-2-4 --method sparsegpt --pattern 2:4 \\
        --calibration_dataset Salesforce/wikitext:wikitext-2-raw-v1 --forget forget.jsonl

The output is a checkpoint of save_pretrained with masks.safetensors (which weights are left) and pruning.json (how they were
chosen) beside it: what `fastunlearn sau` and `fastunlearn.checkpoint.load_checkpoint` read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field
from importlib import metadata
from typing import Any, Literal

from fastunlearn._version import __version__
from fastunlearn.cli import _arguments
from fastunlearn.cli._run import check_device, guarded, shown_command

PROG = "fastunlearn prune"


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help}) if default is not MISSING else field(metadata={"help": help})


@dataclass
class PruneArguments:
    model_name_or_path: str = _field(
        MISSING, 'dense checkpoint: a folder, a name on the Hugging Face Hub, a .gguf file, or "smollm2"'
    )
    output_dir: str = _field(MISSING, "where the pruned checkpoint goes")
    method: Literal["magnitude", "wanda", "sparsegpt"] = _field("wanda", "how weights are scored")
    pattern: str = _field("2:4", "n:m, keeping n of m consecutive input columns; or the share to remove, as 50%")
    scope: Literal["row", "tensor"] = _field(
        "row", "what unstructured magnitude pruning compares; the pruning papers' magnitude baseline is tensor"
    )
    calibration_dataset: str | None = _field(
        None,
        "text to calibrate on: .txt, .jsonl, .json, .csv, .parquet, or a name on the Hub (name:config); never the forget set; "
        "without one a small packaged text of general prose",
    )
    calibration_split: str = _field("train", "split of a hub data set")
    text_column: str = _field("text", "column that holds the text, of calibration and perplexity data")
    num_calibration_sequences: int = _field(128, "how many sequences")
    sequence_length: int = _field(512, "tokens of a sequence, of calibration and perplexity")
    forget_dataset: str | None = _field(
        None,
        "what will be forgotten later: calibration text that holds a question of it, 13 words of an answer in a row, or a shorter answer near the names in its question is refused",
    )
    forget_split: str = _field("train", "split of a hub data set")
    perplexity_dataset: str | None = _field(None, "text whose perplexity is printed before and after")
    perplexity_split: str = _field("test", "split of a hub data set")
    num_perplexity_sequences: int = _field(64, "how many sequences of it, the first ones")
    damping: float = _field(
        0.01,
        "SparseGPT: share of the Hessian's mean diagonal added to its diagonal; ten times as much, with a warning, where it has to be",
    )
    block_size: int = _field(128, "SparseGPT: columns of a lazy update")
    batch_size: int = _field(4, "sequences a forward pass")
    skip_indivisible: bool = _field(False, "leave layers dense whose columns m does not divide, instead of stopping")
    seed: int = _field(0, "of the choice of calibration sequences")
    device: str | None = _field(None, "cpu, cuda, ...; default: cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _field(
        "auto", "of the weights, loaded and saved; auto is the checkpoint's own; scores are fp32 in any case"
    )
    overwrite: bool = _field(False, "replace a checkpoint in the output folder")

    def __post_init__(self) -> None:
        check_device(self.device)


def main(argv: Sequence[str]) -> int:
    """Prunes; 0 when the checkpoint was written, 2 (one line on standard error) for what cannot work."""

    def work() -> int:
        (args,) = _arguments.parse((PruneArguments,), argv, PROG, description=(__doc__ or "").split("\n\n")[0])
        _run(args, shown_command(PROG, argv))
        return 0

    return guarded(PROG, work)


def _check(args: PruneArguments) -> None:
    for name in ("num_calibration_sequences", "num_perplexity_sequences", "batch_size", "block_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: want at least 1, got {getattr(args, name)}")
    if args.sequence_length < 2:
        raise ValueError(f"sequence_length: want at least 2 tokens, got {args.sequence_length}")


def _run(args: PruneArguments, command: str) -> None:
    import torch

    import fastunlearn
    from fastunlearn.checkpoint import load_checkpoint, save_checkpoint
    from fastunlearn.data.calibration import calibration_texts, calibration_tokens, check_calibration
    from fastunlearn.data.text import encode_rows, load_rows
    from fastunlearn.evaluation.perplexity import chunk_tokens, perplexity
    from fastunlearn.localize import check_options, check_prunable, prune
    from fastunlearn.output_folder import claim_output

    _check(args)
    numbers = {name: getattr(args, name) for name in ("damping", "block_size", "batch_size")}
    pattern = check_options(args.method, args.pattern, args.scope, **numbers)
    needs_text = args.method != "magnitude"
    with claim_output(args.output_dir, overwrite=args.overwrite, resumable=False) as output:
        texts = calibration_texts(args.calibration_dataset, split=args.calibration_split, column=args.text_column)
        forget_rows = load_rows(args.forget_dataset, split=args.forget_split) if args.forget_dataset else []
        measured = (
            calibration_texts(args.perplexity_dataset, split=args.perplexity_split, column=args.text_column)
            if args.perplexity_dataset
            else None
        )
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        print(f"loading {args.model_name_or_path} ...", flush=True)
        checkpoint = load_checkpoint(args.model_name_or_path, dtype=dtype, device=device)
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        if checkpoint.masks is not None:
            raise ValueError(f"model_name_or_path: {args.model_name_or_path} is pruned already; prune the dense model")
        _fits(model, args.sequence_length)
        try:
            check_prunable(model, args.method, pattern, args.scope, skip_indivisible=args.skip_indivisible, **numbers)
        except TypeError as error:
            # Quantised weights: bad input here, no mistake in a program.
            raise ValueError(str(error)) from error

        calibration: dict[str, Any] | None = None
        tokens = None
        if needs_text:
            tokens, used = calibration_tokens(
                texts,
                tokenizer,
                sequences=args.num_calibration_sequences,
                length=args.sequence_length,
                seed=args.seed,
            )
            if args.forget_dataset:
                forget = encode_rows(forget_rows, tokenizer, what="forget set")
                check_calibration(used, zip(forget.questions, forget.answers, strict=True))
            source = args.calibration_dataset or "fastunlearn.data.general_text"
            calibration = {"source": source, "sequences": len(tokens), "length": tokens.shape[1], "seed": args.seed}
            _tell_calibration(args, tokens)
        rows = None
        if measured is not None:
            text = "\n\n".join(measured)
            rows = chunk_tokens(tokenizer, text, args.sequence_length, args.num_perplexity_sequences)

        values: dict[str, float] = {}
        if rows is not None:
            values["dense"] = perplexity(model, rows, batch_size=args.batch_size)
            print(f"perplexity of the dense model: {values['dense']:.2f} ({_sequences(rows)})", flush=True)
        start = time.perf_counter()
        masks = prune(
            model,
            method=args.method,
            pattern=pattern,
            calibration=tokens,
            scope=args.scope,
            skip_indivisible=args.skip_indivisible,
            **numbers,
        )
        seconds = time.perf_counter() - start
        weights, left = sum(mask.numel() for mask in masks.values()), sum(int(mask.count()) for mask in masks.values())
        print(
            f"{args.method} to {pattern}: {weights - left:,} of {weights:,} weights in {len(masks)} layers are zero "
            f"({seconds:.0f} s)",
            flush=True,
        )
        if rows is not None:
            values["pruned"] = perplexity(model, rows, batch_size=args.batch_size)
            print(f"perplexity of the pruned model: {values['pruned']:.2f}", flush=True)
        pruning = {
            "method": args.method,
            "pattern": pattern.kind,
            "density": left / weights,
            "scope": args.scope,
            "calibration": calibration,
            "settings": asdict(args),
            "seconds": seconds,
            "command": command,
            "versions": {"fastunlearn": __version__}
            | {name: metadata.version(name) for name in ("torch", "transformers")},
        }
        if rows is not None:
            shape = {"source": args.perplexity_dataset, "sequences": len(rows), "length": rows.shape[1]}
            pruning["perplexity"] = values | shape
        save_checkpoint(output.path, model, tokenizer, masks=masks, pruning=pruning, overwrite=args.overwrite)
    print(f"saved to {args.output_dir}")
    print("served by: " + ", ".join(f"{row.op}={row.last}" for row in fastunlearn.explain() if row.last))


def _fits(model: Any, length: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(f"sequence_length: the model takes at most {most} tokens, got {length}")


def _sequences(tokens: Any) -> str:
    return f"{len(tokens)} sequence{'s' if len(tokens) > 1 else ''} of {tokens.shape[1]} tokens"


def _tell_calibration(args: PruneArguments, tokens: Any) -> None:
    what = args.calibration_dataset or "the packaged general text (give --calibration_dataset for a model that matters)"
    print(f"calibrating on {_sequences(tokens)} of {what}")
    if len(tokens) < args.num_calibration_sequences:
        print(
            f"only {_sequences(tokens)}: the text is shorter than {args.num_calibration_sequences} of {args.sequence_length}",
            file=sys.stderr,
        )
    if not args.forget_dataset:
        print("no forget_dataset given: whether the calibration text holds what is to be forgotten is not checked")
