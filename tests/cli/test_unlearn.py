"""`fastunlearn sau` and `unlearn`: a whole run on a tiny model that knows its rows, and bad input refused before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastunlearn import arguments
from fastunlearn.checkpoint import load_checkpoint, save_checkpoint
from fastunlearn.cli import _run, main
from fastunlearn.data.register import Register
from fastunlearn.data.text import collate, encode_rows
from fastunlearn.evaluation import answer_logprobs, exact_recall, generate_answers
from fastunlearn.localize import nm_violations, prune
from fastunlearn.optim import MaskedAdamW
from fastunlearn.output_folder import claim_output
from fastunlearn.report.page import render
from fastunlearn.report.run_folder import load_run
from tests.tiny_chat import char_tokenizer, tiny_llama

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PRUNING = {"method": "wanda", "pattern": "2:4", "density": 0.5}
REGISTER = Register.generate(12, 0, kinds=("occupation",))


def rows_of(register: Register) -> list[dict[str, str]]:
    return [{"question": fact.question, "answer": fact.answer} for fact in register.facts]


FORGET, RETAIN = (rows_of(part) for part in REGISTER.split(2))


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A sparse and a dense model that know the register by heart, and the two sets as files."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = char_tokenizer()
    rows = encode_rows(rows_of(REGISTER), tokenizer)
    batch = collate([rows[i] for i in range(len(rows))], 0)
    for name in ("sparse", "dense"):
        torch.manual_seed(0)
        model = tiny_llama()
        masks = None
        if name == "sparse":
            masks = prune(model, method="magnitude", pattern="2:4", progress=False)
        movable = [(n, p) for n, p in model.named_parameters() if "layers" in n and "norm" not in n]
        optimizer = MaskedAdamW(movable, masks, lr=5e-3, weight_decay=0.0)
        for _ in range(400):
            logp, count = answer_logprobs(model, batch)
            loss = -logp.sum() / count.sum()
            loss.backward()
            optimizer.step()
            model.zero_grad()
            if loss < 0.01:
                break
        assert exact_recall(generate_answers(model, tokenizer, rows), rows.answers) == 1.0
        save_checkpoint(folder / name, model, tokenizer, masks=masks, pruning=PRUNING if masks else None)
    write(folder / "forget.jsonl", FORGET)
    write(folder / "retain.jsonl", RETAIN)
    (folder / "text.txt").write_text("The tide comes in, the tide goes out. " * 20)
    (folder / "c.yaml").write_text(
        "learning_rate: 1e-3\nweight_decay: 0\nwarmup_epochs: 0\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 1\n"
        "retain_per_forget: 5\nmax_steps: 25\nsave_strategy: steps\nsave_steps: 10\nuse_cpu: true\nreport_to: none\ndisable_tqdm: true\n"
    )
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def words(world: Path, output: Path, *more: str, model: str = "sparse") -> list[str]:
    return [
        "--model", str(world / model), "--forget", str(world / "forget.jsonl"), "--retain", str(world / "retain.jsonl"),
        f"output={output}", "--config", str(world / "c.yaml"), f"reference_cache_dir={output.parent / 'cache'}", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(("command", "model"), [("sau", "sparse"), ("unlearn", "dense"), ("unlearn", "sparse")])
def test_a_run_forgets_keeps_and_reports(world, tmp_path, capsys, command, model):
    out = tmp_path / "out"
    assert main([command, *words(world, out, f"eval_text={world / 'text.txt'}", model=model)]) == 0
    printed = capsys.readouterr().out
    assert {"config.json", "model.safetensors", "metrics.json", "README.md", "curves.png"} <= set(os.listdir(out))
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["seconds"] > 0
    assert metrics["storage_mib"] > 0.1
    assert ("left by pruning" in metrics["mask_density"]) == (model == "sparse")
    # What its report shows: the answers, in a folder that is not pushed to the Hub.
    run = load_run(out)
    assert [s.part for s in run.samples] == ["forget"] * 2 + ["retain"] * 3
    assert all(s.before == s.wanted for s in run.samples)
    assert all(s.after != s.wanted for s in run.samples if s.part == "forget")
    assert {s.prompt for s in run.samples[:2]} == {row["question"] for row in FORGET}
    assert "What was forgotten and kept" in render([run])
    assert metrics["before"]["forget"]["exact_recall"] == metrics["before"]["retain"]["exact_recall"] == 1.0
    assert metrics["after"]["forget"]["exact_recall"] == 0.0
    assert metrics["after"]["retain"]["exact_recall"] >= 0.9
    assert metrics["after"]["forget"]["answer_probability"] < metrics["after"]["retain"]["answer_probability"]
    assert metrics["before"]["text"]["perplexity"] > 1
    assert metrics["steps"] == 25
    assert metrics["settings"]["date_string"] == "10 Apr 2025"
    assert {"forget_loss", "retain_loss", "learning_rate", "step"} <= metrics["history"][0].keys()
    assert ("capacity" in metrics["history"][0]) == (command == "sau")
    # Numbers are those of the model in the folder.
    back = load_checkpoint(out)
    rows = encode_rows(FORGET, back.tokenizer)
    assert exact_recall(generate_answers(back.model, back.tokenizer, rows), rows.answers) == 0.0
    if model == "sparse":
        assert back.pruning == PRUNING
        assert back.masks is not None
        assert nm_violations(back.model, back.masks, 2, 4) == []
        before = load_checkpoint(world / "sparse").masks
        assert before is not None
        assert all(mask.equal(before[name]) for name, mask in back.masks.items())
        assert "sparsity pattern 2:4: holds" in printed
    else:
        assert back.masks is None
    for line in (
        "forget, 2 rows",
        "retain, 10 rows",
        "exact recall",
        "100.0%",
        "[forget] Who is",
        "    before: 'A ",
        "    after: ",
    ):
        assert line in printed
    for name in ("metrics.json", "README.md"):
        text = (out / name).read_text()
        assert not [row for row in FORGET if row["answer"] in text or row["question"] in text], name
    assert "SAU with the objective NPO" in (out / "README.md").read_text() or command == "unlearn"


def test_hamu_reports_its_certificates(world, tmp_path, capsys):
    out = tmp_path / "out"
    more = ("learning_rate=0.1", "hamu_share=0.5", "certificate_every=5", "samples=0")
    assert main(["hamu", *words(world, out, *more, model="dense")]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    lines = [json.loads(line) for line in (out / "certificates.jsonl").read_text().splitlines()]
    assert len(lines) == metrics["certificates"]["steps"] == 25
    assert metrics["certificates"]["checked"] == 5
    assert metrics["certificates"]["held"] == sum(line.get("holds", False) for line in lines)
    assert {"hamu_s", "hamu_hardness", "forget_loss"} <= metrics["history"][0].keys()
    assert metrics["after"]["forget"]["answer_probability"] < metrics["before"]["forget"]["answer_probability"], metrics
    assert metrics["after"]["retain"]["exact_recall"] >= 0.9
    assert "hamu_share" in (out / "README.md").read_text()
    capsys.readouterr()
    assert main(["hamu", *words(world, tmp_path / "more", "hamu_ratio=100", model="dense")]) == 2
    assert "largest feasible Q" in capsys.readouterr().err


def test_a_killed_run_goes_on_to_the_same_weights(world, tmp_path):
    """SIGKILL after the second checkpoint; the resumed run is the run without the kill, bit for bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    base = ["samples=0", "eval_rows=0"]
    assert main(["sau", *words(world, whole, *base)]) == 0
    code = (
        "import os, signal, sys\n"
        "from transformers import TrainerCallback\n"
        "from fastunlearn.methods import sau\n"
        "class Kill(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **_):\n"
        "        if state.global_step == 13: os.kill(os.getpid(), signal.SIGKILL)\n"
        "start = sau.SAUTrainer.__init__\n"
        "def init(self, *a, **k):\n"
        "    start(self, *a, **k); self.add_callback(Kill())\n"
        "sau.SAUTrainer.__init__ = init\n"
        "from fastunlearn.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "sau", *words(world, killed, *base)], capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr[-2000:]
    assert (killed / "checkpoint-10").is_dir()
    assert not (killed / "model.safetensors").exists()
    # Without being told, the folder is refused and nothing is lost.
    assert main(["sau", *words(world, killed, *base)]) == 2
    assert (killed / "checkpoint-10").is_dir()
    assert main(["sau", *words(world, killed, *base, "resume_from_checkpoint=true")]) == 0
    a, b = (load_checkpoint(folder).model.state_dict() for folder in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


BAD = {
    "an unknown argument": (["lerning_rate=1"], "unknown argument 'lerning_rate'; did you mean learning_rate"),
    "an unknown objective": (["objective=NP0"], "NPO"),
    "a wrong type": (["max_steps=many"], "max_steps: want an integer, got 'many'"),
    "no model": (["model={tmp}/absent"], "source: there is no "),
    "no forget file": (["forget={tmp}/absent.jsonl"], "there is no file "),
    "an empty forget set": (["forget={tmp}/empty.jsonl"], "empty.jsonl is empty; there is nothing in it"),
    "an empty retain set": (["retain={tmp}/empty.jsonl"], "empty.jsonl is empty; there is nothing in it"),
    "overlapping sets": (["retain={tmp}/both.jsonl"], "1 of 2 rows to forget are also to be kept: row 2 = 1"),
    "a missing column": (["forget={tmp}/columns.jsonl"], "forget set: columns found: q; want one of: messages; question + answer"),
    "an empty answer": (["forget={tmp}/answer.jsonl"], "forget set: row 1 (counted from 1): the answer is empty"),
    "bad json": (["forget={tmp}/bad.jsonl"], "bad.jsonl, line 2: no JSON"),
    "no retain set": (["retain=null"], "--retain: NPO has a retain term"),
    "a folder that holds something": (["output={tmp}/full"], "holds something already (thesis.tex)"),
    "a dense model for sau": (["model={world}/dense"], "has no masks.safetensors; masks are never inferred"),
    "masks of another model": (["model={tmp}/other"], "masks"),
    "a rate that is no number": (["learning_rate=nan"], "learning_rate: want a finite number >= 0, got nan"),
    "no batch": (["per_device_train_batch_size=0"], "per_device_train_batch_size: want at least 1, got 0"),
    "no accumulation": (["gradient_accumulation_steps=0"], "gradient_accumulation_steps: want at least 1, got 0"),
    "a seed below 0": (["seed=-1"], "seed: want a number from 0"),
    "nothing to train": (["max_steps=-1", "num_train_epochs=0"], "num_train_epochs: want a number > 0, or max_steps, got 0"),
    "a tracker that is not installed": (["report_to=wandb"], "report_to: wandb is not installed"),
    "an unknown tracker": (["report_to=wandbb"], "wandbb is not supported"),
    "nothing to go on from": (["resume_from_checkpoint=true"], "holds no complete checkpoint; run without it"),
    "no such checkpoint": (["resume_from_checkpoint={tmp}/absent"], "absent is no complete checkpoint"),
    "a folder within a file": (["output={tmp}/empty.jsonl/out"], "empty.jsonl is a file; want a folder"),
    "a model without its tokenizer": (["model={tmp}/bare"], "bare holds no tokenizer that can be loaded ("),
    "a text file that is not there": (["eval_text={tmp}/absent.txt"], "eval_text: there is no file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(world, tmp_path, capfd, monkeypatch, case):
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "both.jsonl", [FORGET[1], *RETAIN])
    write(tmp_path / "columns.jsonl", [{"q": "a"}])
    write(tmp_path / "answer.jsonl", [{"question": "a", "answer": " "}])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", list)
    if "bare" in BAD[case][0][0]:
        save_checkpoint(tmp_path / "bare", tiny_llama(), char_tokenizer())
        for file in (tmp_path / "bare").glob("tokenizer*"):
            file.unlink()
    if "other" in BAD[case][0][0]:
        model = tiny_llama(7)
        save_checkpoint(tmp_path / "other", model, char_tokenizer())
        (tmp_path / "other" / "masks.safetensors").write_bytes((world / "sparse" / "masks.safetensors").read_bytes())
    monkeypatch.setattr(_run, "_train", lambda *_: pytest.fail("it went to work"))
    before = sorted(os.listdir(tmp_path))
    more = [word.format(tmp=tmp_path, world=world) for word in BAD[case][0]]
    try:
        status = main(["sau", *words(world, tmp_path / "out", *more)])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    err = capfd.readouterr().err
    assert BAD[case][1] in err
    assert "Traceback" not in err
    assert err.startswith("fastunlearn sau: ")
    assert len(err.strip().splitlines()) <= 2
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]


def test_two_runs_in_one_folder(world, tmp_path, capsys):
    out = tmp_path / "out"
    code = f"import time\nfrom fastunlearn.output_folder import claim_output\nwith claim_output({str(out)!r}):\n    print('in', flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        for more in ([], ["overwrite_output_dir=true"], ["resume_from_checkpoint=true"]):
            assert main(["sau", *words(world, out, *more)]) == 2
            assert f"another run writes to {out} (pid {process.pid}" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    assert os.listdir(out) == [".lock"]


def test_overwriting_is_asked_for(world, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    quick = ["max_steps=1", "eval_rows=0", "save_strategy=no"]
    assert main(["sau", *words(world, out, *quick)]) == 2
    assert main(["sau", *words(world, out, *quick, "--overwrite_output_dir")]) == 0
    assert (out / "thesis.tex").read_text() == "years"
    assert main(["sau", *words(world, out, *quick, "--overwrite_output_dir")]) == 0
    assert load_checkpoint(out).masks is not None


def test_a_full_disk_at_the_end(world, tmp_path, monkeypatch, capsys):
    import fastunlearn.checkpoint as checkpoint

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    out = tmp_path / "out"
    assert main(["sau", *words(world, out, "eval_rows=0", "max_steps=10")]) == 2
    err = capsys.readouterr().err
    assert "no room for the checkpoint: " in err
    assert "Traceback" not in err
    # What training saved is still there, and the lock is not.
    assert os.listdir(out) == ["checkpoint-10"]
    monkeypatch.undo()
    with claim_output(out, resume=True):
        pass


def failing_after(monkeypatch, error):
    """`measure` that works before the run and raises after it."""
    asked = []

    def measure(*args, real=_run.measure, **options):
        asked.append(1)
        if len(asked) == 2:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(_run, "measure", measure)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. " * 40), RuntimeError("no kernel")])
def test_a_model_that_cannot_be_asked_after_is_saved(world, tmp_path, monkeypatch, capsys, error):
    failing_after(monkeypatch, error)
    out = tmp_path / "out"
    with pytest.warns(
        UserWarning, match=rf"was not asked after \({str(error)[:9]}.*; it is saved in .*eval_batch_size"
    ):
        assert main(["unlearn", *words(world, out, "max_steps=2", model="dense")]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["before"]["forget"]["exact_recall"] == 1.0
    assert metrics["after"] == {}
    assert metrics["steps"] == 2
    assert len(metrics["not_asked_after"]) < 170
    assert "| 100.0% | not measured |" in (out / "README.md").read_text()
    run = load_run(out)
    assert run.notes == [f"the model was not asked after the run: {metrics['not_asked_after']}"]
    assert "was not asked after the run" in render([run])
    assert f"saved to {out}" in capsys.readouterr().out
    assert load_checkpoint(out).masks is None


def test_what_stops_the_last_questions_loses_no_model(world, tmp_path, monkeypatch, capsys):
    failing_after(monkeypatch, KeyboardInterrupt())
    out = tmp_path / "out"
    assert main(["sau", *words(world, out, "max_steps=2")]) == 130
    assert f"saved the model to {out}; asking after" in capsys.readouterr().out
    assert load_checkpoint(out).masks is not None


def test_no_memory_for_a_step(world, tmp_path, monkeypatch, capsys):
    from fastunlearn.methods.sau import SAUTrainer

    step, steps = SAUTrainer.training_step, []

    def full(*args, **options):
        steps.append(1)
        if len(steps) == 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. " + "GPU 0 has " * 40)
        return step(*args, **options)

    monkeypatch.setattr(SAUTrainer, "training_step", full)
    out = tmp_path / "out"
    assert main(["sau", *words(world, out, "eval_rows=0")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastunlearn sau: ")]
    assert line.startswith(
        "fastunlearn sau: out of memory after 11 steps (CUDA out of memory. Tried to allocate 2.00 GiB. "
    )
    assert "lower per_device_train_batch_size" in line
    assert line.endswith(f"The last good checkpoint is {out / 'checkpoint-10'}.")


def test_tracebacks_on_demand(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTUNLEARN_TRACEBACK", "1")
    assert main(["sau", *words(world, tmp_path / "o", f"model={tmp_path / 'absent'}")]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_errors_by_kind(capsys):
    def raises(error):
        def run():
            raise error

        return run

    assert _run.guarded("p", lambda: 0) == 0
    assert _run.guarded("p", raises(OSError(13, "Permission denied", "/x"))) == 2
    assert capsys.readouterr().err == "p: /x: Permission denied\n"
    assert _run.guarded("p", raises(ArithmeticError("the loss is\nnan"))) == 1
    assert capsys.readouterr().err == "p: the loss is nan\n"
    assert _run.guarded("p", raises(KeyboardInterrupt())) == 130
    capsys.readouterr()
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("alloc: can't allocate memory"),
    ):
        assert _run.guarded("p", raises(error)) == 1
        assert capsys.readouterr().err.startswith(f"p: out of memory ({str(error) or 'MemoryError'}); lower how much")
    with pytest.raises(RuntimeError, match="a bug"):
        _run.guarded("p", raises(RuntimeError("a bug")))
    with pytest.raises(KeyError):
        _run.guarded("p", raises(KeyError("a bug")))


def test_sample():
    rows = encode_rows([{"text": f"t{i}"} for i in range(20)], char_tokenizer())
    some = _run.sample(rows, 5)
    assert len(some) == 5
    assert some.answers == sorted(some.answers, key=lambda t: int(t[1:]))
    assert _run.sample(rows, 5).answers == some.answers
    assert _run.sample(rows, 5, seed=1).answers != some.answers
    assert _run.sample(rows, 20) is rows


@pytest.mark.parametrize("command", ["sau", "unlearn"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: fastunlearn {command} --model TEXT --forget TEXT --output TEXT" in out
    assert "--objective TEXT" in out
    assert "--learning_rate X" in out
    assert ("--redistribution TEXT" in out) == (command == "sau")
    assert out.index("ScriptArguments:") < out.index("UnlearnConfig:") < out.index("TrainingArguments of transformers:")


def test_a_published_command_holds_no_token():
    from fastunlearn.cli._run import shown_command

    argv = ["--hub_token", "hf_1", "push_to_hub=true", "hub_token=hf_2", "--hub-token=hf_3", "--model", "m"]
    shown = shown_command("fastunlearn sau", argv)
    assert "hf_" not in shown
    assert shown.startswith("fastunlearn sau --hub_token '***' push_to_hub=true")
    assert shown.endswith("--model m")
    plain = ["tokens=all", "--max_new_tokens", "32"]
    assert shown_command("fastunlearn uce", plain) == "fastunlearn uce tokens=all --max_new_tokens 32"
