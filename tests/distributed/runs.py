"""Runs of a tiny model in one process or several (torchrun, gloo), for tests: `python -m tests.distributed.runs SETTINGS.json`.

A run writes weights.pt (dense, by the first process) into its folder when it ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def launch(
    runs: dict[str, dict[str, Any]], folder: Path, processes: int, limit: float = 240.0, **environment: str
) -> subprocess.CompletedProcess:
    """Runs, one after the other, in so many processes; above one they shard (FSDP2) as accelerate's environment asks.

    Args:
        runs: name -> settings; each has the folder of its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"settings-{processes}.json"
    listed = [{**run, "folder": str(folder / name), "processes": processes} for name, run in runs.items()]
    path.write_text(json.dumps(listed))
    command = [sys.executable, "-m", "tests.distributed.runs", str(path)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if processes > 1:
        variables |= {
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_RESHARD_AFTER_FORWARD": "true",
        }  # fmt: skip
        command[1:2] = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", "-m"]
    return subprocess.run(command, capture_output=True, text=True, env=variables | environment, cwd=ROOT, timeout=limit)


def separately(runs: dict[str, dict[str, Any]], folder: Path, processes: int) -> list[subprocess.Popen]:
    """The same without torchrun, which would end the other processes itself when one has died."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    path.write_text(
        json.dumps([{**run, "folder": str(folder / name), "processes": processes} for name, run in runs.items()])
    )
    out = []
    for rank in range(processes):
        variables = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.distributed.runs", str(path)]
        out.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables, cwd=ROOT))
    return out


def ended(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt")


def rows(count: int, offset: int) -> list[dict[str, str]]:
    """Questions with answers of one length: means over batches are then means over rows."""
    return [
        {"question": f"What is number {i:03d}?", "answer": f"{(i * 7919) % 100000:05d}"}
        for i in range(offset, offset + count)
    ]


def main(path: str) -> None:
    """One process of all the runs."""
    torch.set_num_threads(1)
    for settings in json.loads(Path(path).read_text()):
        if not settings.get("fails"):
            one(settings)
            continue
        try:
            one(settings)
        except (ValueError, ArithmeticError) as error:
            text = f"{type(error).__name__}: {error}"
            Path(settings["folder"], f"error-{os.environ.get('RANK', '0')}.txt").write_text(text)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def one(settings: dict[str, Any]) -> None:
    """One process of one run."""
    from fastunlearn import ops
    from fastunlearn.methods import HAMUConfig, HAMUTrainer, SAUConfig, SAUTrainer
    from fastunlearn.parametrize.compressed_nm import compressed_layers, dense_state_dict
    from fastunlearn.trainer import UnlearnConfig, UnlearnTrainer
    from tests.tiny_chat import char_tokenizer, tiny_llama

    folder, processes = Path(settings["folder"]), settings["processes"]
    folder.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", "0"))
    dtype = getattr(torch, settings.get("dtype", "float32"))
    model = tiny_llama()
    masks = pruning = None
    if settings.get("pruned", True):
        masks, pruning = {}, {"pattern": "2:4"}
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "layers" in name and p.dim() == 2:
                    masks[name] = ops.nm_mask(p.abs(), 2, 4)
                    p.mul_(masks[name].unpack())
    # "start": rounded to that type first.
    model = model.to(getattr(torch, settings.get("start", settings.get("dtype", "float32")))).to(dtype)
    spoil(settings.get("spoil"), rank, model, masks)
    kinds = {
        "sau": (SAUConfig, SAUTrainer),
        "hamu": (HAMUConfig, HAMUTrainer),
        "unlearn": (UnlearnConfig, UnlearnTrainer),
    }
    config_class, trainer_class = kinds[settings.get("method", "sau")]
    rows_of_step = settings.get("rows", 4)
    options = {
        "output_dir": str(folder / "out"), "learning_rate": 1e-3, "max_steps": 10, "warmup_epochs": 0, "save_strategy": "no",
        "per_device_train_batch_size": rows_of_step // processes, "gradient_accumulation_steps": 1, "disable_tqdm": True,
        "use_cpu": True, "dataloader_pin_memory": False, "reference_cache_dir": str(folder / "cache"), "objective": "GradDiff",
        "report_to": [], "ddp_timeout": 120, **settings.get("options", {}),
    }  # fmt: skip
    trainer = trainer_class(
        model, config_class(**options), rows(12, 0), rows(24, 100), char_tokenizer(), masks=masks, pruning=pruning
    )
    assert trainer.args.world_size == processes, trainer.args.world_size
    if settings.get("kill_at") is not None:
        kill_at(trainer, settings["kill_at"], settings.get("kill_rank", 0), settings.get("kill_alone", False))
    if settings.get("nan_at") is not None:
        nan_at(trainer, settings["nan_at"], settings.get("nan_rank", 0))
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    if processes > 1:
        from torch.distributed.tensor import DTensor

        assert trainer.sharded
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
        held = sum(p.to_local().numel() for p in trainer.model.parameters())
        assert held < sum(p.numel() for p in trainer.model.parameters()) * 1.1 / processes
    assert bool(compressed_layers(trainer.model)) == bool(options.get("compressed"))
    state = dense_state_dict(trainer.model)
    if settings.get("save"):
        trainer.save_model()
    if rank == 0:
        torch.save(state, folder / "weights.pt")


def spoil(how: str | None, rank: int, model: Any, masks: Any) -> None:
    """Bad input in the last process."""
    if how is None or rank + 1 != int(os.environ.get("WORLD_SIZE", "1")):
        return
    name = next(iter(masks))
    if how == "density":
        from fastunlearn import BitMask

        masks[name] = BitMask.pack(masks[name].unpack() & (torch.rand(masks[name].shape) < 0.5))
        with torch.no_grad():
            model.get_parameter(name).mul_(masks[name].unpack())
    elif how == "zeros":
        with torch.no_grad():
            model.get_parameter(name).add_(1)


def kill_at(trainer: Any, step: int, rank: int, alone: bool) -> None:
    """SIGKILL in the step of that number; of every process, or of one."""
    inner = trainer.training_step

    def training_step(*args: Any, **options: Any) -> Any:
        if trainer.state.global_step + 1 == step and (not alone or trainer.args.process_index == rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **options)

    trainer.training_step = training_step


def nan_at(trainer: Any, step: int, rank: int) -> None:
    """A forget loss that is NaN in one process."""
    inner = trainer.forget_term

    def forget_term(*args: Any, **options: Any) -> Any:
        loss = inner(*args, **options)
        return (
            loss * float("nan")
            if trainer.state.global_step + 1 == step and trainer.args.process_index == rank
            else loss
        )

    trainer.forget_term = forget_term


if __name__ == "__main__":
    main(sys.argv[1])
