"""Runs of a tiny model in one process or several (gloo), for tests: `python -m tests.distributed.runs SETTINGS.json` under
torchrun, or `Processes`, which imports everything once and forks what it is asked for.

A run writes start.pt and, when it ends, weights.pt into its folder: dense, by the first process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
#: what `accelerate launch` sets for fsdp_version: 2
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def written(runs: dict[str, dict[str, Any]], folder: Path, processes: int) -> Path:
    """The settings of runs, one after the other, as a file.

    Args:
        runs: name -> settings; each has the folder of its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"settings-{processes}.json"
    path.write_text(json.dumps([{**run, "folder": str(folder / n), "processes": processes} for n, run in runs.items()]))
    return path


@contextmanager
def torchrun(runs: dict[str, dict[str, Any]], folder: Path, processes: int, limit: float = 240.0) -> Iterator[None]:
    """Takes the runs in so many processes, which shard (FSDP2) as accelerate's environment asks; they are done at the end."""
    path = written(runs, folder, processes)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", "-m"]
    with open(folder / "said.txt", "w") as said:
        made = subprocess.Popen(
            [*command, "tests.distributed.runs", str(path)],
            stdout=said,
            stderr=said,
            env=environment() | FSDP,
            cwd=ROOT,
        )
    try:
        yield
        code = made.wait(limit)
    finally:
        made.terminate()
        made.wait()
    assert code == 0, (folder / "said.txt").read_text()[-6000:]


class Processes:
    """A process that has imported what the runs need and forks as many as one asks for: an import takes longer than a run.

    Unlike torchrun it leaves the processes that are left alone when one has died.
    """

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.runs", "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment(), cwd=ROOT,
        )  # fmt: skip

    def ask(self, what: str, arguments: list[Any], folder: Path, processes: int, limit: float = 200.0) -> list[int]:
        """Exit status of every process, -9 for one that was killed. What it said is in folder/said-RANK.txt.

        Args:
            what: name of a function of this module. limit: seconds, after which all are killed; those that are stopped are when no other is left.
        """
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        folder.mkdir(parents=True, exist_ok=True)
        self.server.stdin.write(json.dumps([what, arguments, str(folder), processes, limit]) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, f"the process that starts others ended with {self.server.wait()}"
        return json.loads(answer)

    def codes(self, runs: dict[str, dict[str, Any]], folder: Path, processes: int) -> list[int]:
        """`ask` for runs."""
        return self.ask("main", [str(written(runs, folder, processes))], folder, processes)

    def run(self, runs: dict[str, dict[str, Any]], folder: Path, processes: int) -> None:
        """The same of runs that must succeed."""
        codes = self.codes(runs, folder, processes)
        texts = [(folder / f"said-{rank}.txt").read_text() for rank in range(processes)]
        assert not any(codes), f"{codes}: " + "\n".join(text[-3000:] for text in texts)

    def close(self) -> None:
        # At its leisure it would take a second.
        self.server.kill()
        self.server.wait()


def serve() -> None:
    """The process behind `Processes`: an order a line on standard input, an answer a line on standard output."""
    for name in (
        "accelerate.utils.fsdp_utils", "torch.distributed.checkpoint", "torch.distributed.fsdp", "fastunlearn.methods",
        "transformers.models.llama.modeling_llama", "fastunlearn.sharded_trainer", "tests.tiny_chat",
    ):  # fmt: skip
        importlib.import_module(name)
    for line in sys.stdin:
        what, arguments, folder, processes, limit = json.loads(line)
        print(json.dumps(_forked(globals()[what], arguments, Path(folder), processes, limit)), flush=True)


def _forked(function: Callable[..., None], arguments: list[Any], folder: Path, count: int, limit: float) -> list[int]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    left: dict[int, int] = {}
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            _become(rank, count, port, folder / f"said-{rank}.txt")
            code = 1
            try:
                function(*arguments)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        left[pid] = rank
    codes = [0] * count
    stopped: set[int] = set()
    end = time.monotonic() + limit
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                stopped.add(pid)
            elif done:
                codes[left.pop(pid)] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end or stopped.issuperset(left):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return codes


def _become(rank: int, count: int, port: int, said: Path) -> None:
    """A forked process as torchrun would have made it."""
    with open(os.devnull) as nothing, open(said, "w") as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if count > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **FSDP,
        }  # fmt: skip


def weights(folder: Path, name: str = "weights") -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}.pt")


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
    from fastunlearn.objectives.states import known_reason
    from fastunlearn.parametrize.compressed_nm import compressed_layers, dense_state_dict
    from fastunlearn.trainer import UnlearnConfig, UnlearnTrainer
    from tests.tiny_chat import char_tokenizer, tiny_llama

    folder, processes = Path(settings["folder"]), settings["processes"]
    folder.mkdir(parents=True, exist_ok=True)
    replicas = settings.get("replicas", False)
    if replicas:
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    rank = int(os.environ.get("RANK", "0"))
    dtype = getattr(torch, settings.get("dtype", "float32"))
    model = tiny_llama()
    if settings.get("untied"):
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    masks = pruning = None
    if settings.get("pruned", True):
        masks, pruning = {}, {"pattern": settings.get("pattern", "2:4")}
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "layers" in name and p.dim() == 2:
                    masks[name] = ops.nm_mask(p.abs(), 2, 4)
                    p.mul_(masks[name].unpack())
    # "start": rounded to that type first.
    model = model.to(getattr(torch, settings.get("start", settings.get("dtype", "float32")))).to(dtype)
    if rank == 0:
        torch.save(model.state_dict(), folder / "start.pt")
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
    first = 1 if settings.get("spoil") == "rows" and rank else 0
    trainer = trainer_class(
        model, config_class(**options), rows(12, first), rows(24, 100), char_tokenizer(), masks=masks, pruning=pruning
    )
    assert trainer.args.world_size == processes, trainer.args.world_size
    if settings.get("kill_at") is not None:
        kill_at(trainer, settings["kill_at"], settings.get("kill_rank", 0), settings.get("kill_alone", False))
    if settings.get("nan_at") is not None:
        nan_at(trainer, settings["nan_at"], settings.get("nan_rank", 0), settings.get("nan_in", "loss"))
    found = apart(trainer, settings.get("raises")) if replicas else {}
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    if replicas:
        assert not trainer.sharded
        found |= {"masks": trainer.movable, "factors": trainer._factors, "weights": trainer.model.state_dict()}
        torch.save(
            {what: {n: getattr(v, "bits", v) for n, v in given.items()} for what, given in found.items()},
            folder / f"rank-{rank}.pt",
        )
    elif processes > 1:
        from torch.distributed.tensor import DTensor

        assert trainer.sharded
        # Frozen heads are whole while losses are made; a head that trains is not.
        trains = trainer.model.get_output_embeddings().weight.requires_grad
        assert (known_reason(trainer.model) is None) == (not trains)
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
        held = sum(p.to_local().numel() for p in trainer.model.parameters())
        assert held < sum(p.numel() for p in trainer.model.parameters()) * 1.1 / processes
    assert bool(compressed_layers(trainer.model)) == bool(options.get("compressed"))
    state = dense_state_dict(trainer.model)
    if settings.get("save"):
        trainer.save_model()
    if rank == 0:
        torch.save(state, folder / "weights.pt")


def commands(lines: list[list[str]], folder: str) -> None:
    """One process of commands, one after the other; writes their exit status."""
    from fastunlearn.cli import main as run

    torch.set_num_threads(1)
    codes = [run(line) for line in lines]
    Path(folder, f"codes-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(codes))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def spoil(how: str | None, rank: int, model: Any, masks: Any) -> None:
    """Bad input in the last process."""
    if how is None or rank + 1 != int(os.environ.get("WORLD_SIZE", "1")):
        return
    name = next(iter(masks or dict(model.named_parameters())))
    if how == "density":
        from fastunlearn import BitMask

        masks[name] = BitMask.pack(masks[name].unpack() & (torch.rand(masks[name].shape) < 0.5))
        with torch.no_grad():
            model.get_parameter(name).mul_(masks[name].unpack())
    elif how in ("zeros", "weights"):
        with torch.no_grad():
            model.get_parameter(name).add_(1)


def apart(trainer: Any, raises: str | None) -> dict[str, Any]:
    """Lets every process choose weights and factors by rows of its own -> what it finds, once it has.

    Args:
        raises: what fails in the last process: "saliency" or "factors".
    """
    from fastunlearn import masked_trainer

    own: dict[str, Any] = {}
    rank, count = trainer.args.process_index, trainer.args.world_size
    choose, redistribute = masked_trainer.saliency_masks, trainer._redistribute
    loss, batches = trainer.saliency_loss, trainer._batches

    def fails(what: str) -> None:
        if raises == what and rank + 1 == count:
            raise ValueError(f"{what} of this process alone")

    def saliency_masks(*given: Any, **options: Any) -> Any:
        own["own masks"] = choose(*given, **options)
        return own["own masks"]

    def redistributed(dense: Any) -> Any:
        fails("factors")
        own["own factors"] = redistribute(dense)
        return own["own factors"]

    def saliency_loss(rows: range) -> Any:
        fails("saliency")
        return loss(range(rank, rank + 2))

    masked_trainer.saliency_masks, trainer.saliency_loss = saliency_masks, saliency_loss
    trainer._redistribute = redistributed
    trainer._batches = lambda rows: batches([rows[i] for i in range(rank, len(rows), count)])
    return own


def spare_replicas(folder: str) -> None:
    """One of several processes that each choose an adapter's masks by a row of its own."""
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    from fastunlearn import SPAREConfig, SPARETrainer
    from fastunlearn.parametrize.masked_lora import masked_layers
    from tests.test_diffusion_trainer import FORGET, QUICK, RETAIN
    from tests.tiny_diffusion import tiny_pipeline

    torch.set_num_threads(1)
    options = {**QUICK, "max_steps": 2, "sparsity_inclusiveness": 0.2, "save_strategy": "no"}
    trainer = SPARETrainer(tiny_pipeline(), SPAREConfig(str(Path(folder, "out")), **options), FORGET, RETAIN)
    rank, loss, choose = trainer.args.process_index, trainer.saliency_loss, trainer._choose
    own: dict[str, Any] = {}

    def chosen() -> Any:
        names, masks = choose()
        own.update(masks)
        return names, masks

    trainer.saliency_loss = lambda rows: loss(range(rank, rank + 1))
    trainer._choose = chosen
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = {
        "masks": {name: layer.mask("default").bits for name, layer in masked_layers(model)},
        "own masks": {name: mask.bits for name, mask in own.items()},
        "weights": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
    }
    torch.save(found, Path(folder, f"rank-{rank}.pt"))
    torch.distributed.destroy_process_group()


def kill_at(trainer: Any, step: int, rank: int, alone: bool) -> None:
    """SIGKILL in the step of that number; of every process, or of one."""
    inner = trainer.training_step

    def training_step(*args: Any, **options: Any) -> Any:
        if trainer.state.global_step + 1 == step and (not alone or trainer.args.process_index == rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **options)

    trainer.training_step = training_step


def nan_at(trainer: Any, step: int, rank: int, where: str) -> None:
    """A forget loss that is NaN in one process, or one whose gradient is."""
    inner = trainer.forget_term

    def forget_term(*args: Any, **options: Any) -> Any:
        loss = inner(*args, **options)
        if trainer.state.global_step + 1 != step or trainer.args.process_index != rank:
            return loss
        return loss * float("nan") if where == "loss" else loss + (loss * 0).sqrt()

    trainer.forget_term = forget_term


def watched(dies: int, how: str) -> None:
    """One of two processes that only wait; one of them gets a signal or an error, the other is told on standard error."""
    import torch.distributed as dist

    from fastunlearn.processes import Watch, agreed, anywhere

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    assert anywhere(rank == 1, torch.device("cpu"))
    assert not anywhere(False, torch.device("cpu"))
    try:
        with agreed():
            if rank == 0:
                raise OSError("nothing there")
    except (OSError, ValueError) as error:
        print(type(error).__name__, error, flush=True)
    with Watch(limit=1.5, every=0.1):
        time.sleep(0.3)
    with Watch(limit=1.5, every=0.1):
        time.sleep(0.3)
        if rank == dies and how == "raise":
            raise KeyError("of this process alone")
        if rank == dies:
            os.kill(os.getpid(), getattr(signal, how))
        time.sleep(60)


if __name__ == "__main__":
    serve() if sys.argv[1] == "--serve" else main(sys.argv[1])
