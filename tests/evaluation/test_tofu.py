"""The TOFU suite on a tiny model: its numbers against the slow way, its files, interruptions, processes, bad input."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastunlearn.data.text import encode_rows
from fastunlearn.evaluation import tofu
from fastunlearn.evaluation.rouge import rouge
from tests.tiny_chat import char_tokenizer, tiny_llama

SETTINGS = tofu.TofuSettings(max_new_tokens=12)


def rows(part: str, count: int = 5) -> list[dict]:
    out = []
    for i in range(count):
        row = {
            "question": f"{part} q{i}?",
            "answer": f"ab {i} " + "c" * (i % 3),
            "perturbed_answer": [f"ab x{i}", f"d {i}"],
        }
        if part in ("forget", "retain"):
            row["paraphrased_answer"] = f"it is {i}"
        out.append(row)
    return out


def parts(**more) -> dict:
    return {part: rows(part) for part in tofu.FILES} | {"holdout": rows("holdout", 4)} | more


def nll(model, prompt, answer):
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    return -logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(answer)), answer]


def ids_of(tokenizer, question, answer):
    row = encode_rows([{"question": question, "answer": answer}], tokenizer)[0]
    cut = row["labels"].count(-100)
    return row["input_ids"][:cut], row["input_ids"][cut:]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tofu")
    model, tokenizer = tiny_llama(2), char_tokenizer()
    summary = tofu.evaluate_tofu(model, tokenizer, parts(), output=folder, settings=SETTINGS, progress=False)
    return model, tokenizer, folder, summary


def test_numbers_are_those_of_the_slow_way(evaluated):
    model, tokenizer, folder, summary = evaluated
    logs = json.loads((folder / "TOFU_EVAL.json").read_text())
    with torch.no_grad():
        for part in tofu.FILES:
            probs, ratios, recalls = [], [], []
            for i, row in enumerate(rows(part)):
                prompt, right = ids_of(tokenizer, row["question"], row["answer"])
                loss = float(nll(model, prompt, right).mean())
                entry = logs[f"{part}_Q_A_Prob"]["value_by_index"][str(i)]
                assert entry["avg_loss"] == pytest.approx(loss, abs=1e-4)
                assert entry["prob"] == pytest.approx(math.exp(-loss), abs=1e-4)
                wrong = [
                    float(nll(model, *ids_of(tokenizer, row["question"], w)).mean()) for w in row["perturbed_answer"]
                ]
                assert logs[f"{part}_Q_A_PERT_Prob"]["value_by_index"][str(i)]["avg_loss"] == pytest.approx(
                    wrong, abs=1e-4
                )
                base = row.get("paraphrased_answer", row["answer"])
                true = float(nll(model, *ids_of(tokenizer, row["question"], base)).mean())
                ratios.append(math.exp(-sum(wrong) / 2) / (math.exp(-true) + 1e-10))
                probs.append(math.exp(-loss))
                out = model.generate(
                    input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    max_new_tokens=12, do_sample=False,
                )[0, len(prompt) :]  # fmt: skip
                said = tokenizer.decode(out, skip_special_tokens=True).strip()
                entry = logs[f"{part}_Q_A_ROUGE"]["value_by_index"][str(i)]
                assert entry["generation"] == said
                assert entry["ground_truth"] == row["answer"].strip()
                assert row["question"] in entry["input"]
                recalls.append(rouge(said, row["answer"]).rougeL_recall)
            name = "forget_truth_ratio" if part == "forget" else f"{part}_Truth_Ratio"
            fair = [min(r, 1 / (r + 1e-10)) for r in ratios] if part == "forget" else [max(0, 1 - r) for r in ratios]
            assert summary[name] == pytest.approx(sum(fair) / 5, abs=1e-4)
            assert summary[f"{part}_Q_A_Prob"] == pytest.approx(sum(probs) / 5, abs=1e-4)
            assert summary[f"{part}_Q_A_ROUGE"] == pytest.approx(sum(recalls) / 5)


def test_attacks_are_those_of_the_slow_way(evaluated):
    model, tokenizer, folder, summary = evaluated
    logs = json.loads((folder / "TOFU_EVAL.json").read_text())
    for part in ("forget", "holdout"):
        for i, row in enumerate(rows(part, 5 if part == "forget" else 4)):
            prompt, right = ids_of(tokenizer, row["question"], row["answer"])
            token = nll(model, prompt, right)
            lowest = sorted((-token[:-1]).tolist())[: max(1, int(0.4 * (len(right) - 1)))]
            assert logs["mia_min_k"][part]["value_by_index"][str(i)]["score"] == pytest.approx(
                -sum(lowest) / len(lowest), abs=1e-4
            )
            assert logs["mia_loss"][part]["value_by_index"][str(i)]["score"] == pytest.approx(
                float(token.mean()), abs=1e-4
            )
            gradients = torch.autograd.grad(token[:-1].mean(), list(model.parameters()))
            norm = sum(float(g.norm()) for g in gradients) / len(gradients)
            assert logs["mia_gradnorm"][part]["value_by_index"][str(i)]["score"] == pytest.approx(norm, rel=1e-3)
    assert 0 <= summary["mia_min_k_plus_plus"] <= 1
    assert "mia_reference" not in summary


def test_files_are_open_unlearnings(evaluated):
    _, _, folder, summary = evaluated
    logs = json.loads((folder / "TOFU_EVAL.json").read_text())
    assert json.loads((folder / "TOFU_SUMMARY.json").read_text()) == summary
    assert {name: entry["agg_value"] for name, entry in logs.items()} == summary
    assert set(logs["forget_Q_A_ROUGE"]["value_by_index"]["0"]) == {
        "rouge1_recall", "rougeL_f1", "rougeL_recall", "input", "ground_truth", "generation",
    }  # fmt: skip
    assert set(logs["mia_min_k"]) == {"forget", "holdout", "auc", "agg_value"}
    assert "model_utility" in summary
    assert not list(folder.glob(".TOFU*"))


def test_again_is_free_and_retain_logs_are_compared(evaluated, tmp_path, monkeypatch):
    model, tokenizer, folder, summary = evaluated
    pytest.importorskip("scipy")
    retain = tiny_llama(5)
    theirs = tofu.evaluate_tofu(retain, tokenizer, parts(), output=tmp_path, settings=SETTINGS, progress=False)
    monkeypatch.setattr(tofu, "_measure", None)
    more = tofu.evaluate_tofu(model, tokenizer, parts(), output=folder, settings=SETTINGS, retain_logs=tmp_path)
    auc = [s["mia_min_k"] for s in (summary, theirs)]
    if auc[1] < 1:
        assert more["privleak"] == pytest.approx(100 * (auc[1] - auc[0]) / (1 - auc[1]))
    assert 0 < more["forget_quality"] <= 1
    itself = tofu.evaluate_tofu(retain, tokenizer, parts(), output=tmp_path, settings=SETTINGS, retain_logs=tmp_path)
    assert itself["forget_quality"] == 1
    assert itself["privleak"] == 0
    # Logs of open-unlearning say nothing of themselves.
    bare = tmp_path / "bare.json"
    bare.write_text((tmp_path / "TOFU_EVAL.json").read_text())
    assert tofu.evaluate_tofu(model, tokenizer, parts(), output=folder, settings=SETTINGS, retain_logs=bare) == more
    # Truth ratios of the other variant are made anew from the losses.
    other = json.loads(bare.read_text())
    for row in other["forget_truth_ratio"]["value_by_index"].values():
        row["score"] = 1 / (1 + row["score"])
    bare.write_text(json.dumps(other))
    assert tofu.evaluate_tofu(model, tokenizer, parts(), output=folder, settings=SETTINGS, retain_logs=bare) == more


def test_other_logs_are_refused(evaluated, tmp_path):
    model, tokenizer, folder, _ = evaluated

    def run(**options):
        given = {"settings": SETTINGS, "progress": False} | options
        return tofu.evaluate_tofu(
            given.pop("model", model), given.pop("tokenizer", tokenizer), given.pop("parts", parts()), **given
        )

    with pytest.raises(ValueError, match=r"holds the logs of model model \(weights .*, this is model other \(weights"):
        run(model=tiny_llama(9), name="other", output=folder)
    with pytest.raises(ValueError, match="holds the logs of split forget10, this is split forget01"):
        run(split="forget01", output=folder)
    with pytest.raises(
        ValueError,
        match=r"retain_logs: .* are of the split forget10 \(model\), this evaluation is of the split forget05",
    ):
        run(split="forget05", retain_logs=folder)
    with pytest.raises(
        ValueError, match=r"retain_logs: .* are of the tokenizer \w+ \(model\), this evaluation is of the tokenizer"
    ):
        run(tokenizer=char_tokenizer(bos=True), retain_logs=folder)
    wide = tiny_llama(9)
    wide.config.num_hidden_layers = 3
    with pytest.raises(
        ValueError, match=r"of the model llama hidden_layers 2.* this evaluation is of the model llama hidden_layers 3"
    ):
        run(model=wide, retain_logs=folder)
    # Without TOFU_META.json the logs' own rows tell.
    bare = tmp_path / "TOFU_EVAL.json"
    bare.write_text((folder / "TOFU_EVAL.json").read_text())
    with pytest.raises(ValueError, match="are of 5 rows, the split forget10 has 3: another split"):
        run(parts=parts(forget=rows("forget", 3)), retain_logs=bare)
    with pytest.raises(ValueError, match=r"row 0 of .* asks .*forget q0.* this split's row asks 'other q0"):
        run(
            parts=parts(forget=[{**r, "question": r["question"].replace("forget", "other")} for r in rows("forget")]),
            retain_logs=bare,
        )
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no metrics"):
        run(retain_logs=tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="there is no"):
        run(retain_logs=tmp_path / "nothing.json")


def test_bad_rows_and_settings(tmp_path):
    model, tokenizer = tiny_llama(), char_tokenizer()
    bad = rows("forget")
    del bad[3]["perturbed_answer"]
    with pytest.raises(ValueError, match=r"forget: row 4 \(counted from 1\) has no perturbed_answer"):
        tofu.evaluate_tofu(model, tokenizer, parts(forget=bad))
    bad = rows("retain")
    bad[0]["perturbed_answer"] = bad[0]["perturbed_answer"][:1]
    with pytest.raises(ValueError, match="different numbers of perturbed answers"):
        tofu.evaluate_tofu(model, tokenizer, parts(retain=bad))
    with pytest.raises(ValueError, match="parts: ra is missing"):
        tofu.evaluate_tofu(model, tokenizer, {p: r for p, r in parts().items() if p != "ra"})
    with pytest.raises(ValueError, match="attacks: 'mink' is unknown; did you mean min_k"):
        tofu.TofuSettings(attacks=("mink",))
    with pytest.raises(ValueError, match="reference_model"):
        tofu.evaluate_tofu(model, tokenizer, parts(), settings=tofu.TofuSettings(attacks=("reference",)))
    with pytest.raises(FileNotFoundError, match="forget01_perturbed"):
        tofu.load_parts(tmp_path, "forget01")
    few = {p: r for p, r in parts().items() if p != "holdout"}
    with pytest.warns(UserWarning, match="no holdout set"):
        out = tofu.evaluate_tofu(model, tokenizer, few, settings=tofu.TofuSettings(generate=False), progress=False)
    assert not any(name.startswith("mia") or "ROUGE" in name for name in out)


def test_reference_attack_and_newer_truth_ratio(tmp_path):
    model, tokenizer = tiny_llama(2), char_tokenizer()
    settings = tofu.TofuSettings(attacks=("reference",), truth_ratio="probability", generate=False)
    out = tofu.evaluate_tofu(
        model, tokenizer, parts(), settings=settings, reference_model=model, output=tmp_path, progress=False
    )
    scores = json.loads((tmp_path / "TOFU_EVAL.json").read_text())["mia_reference"]["forget"]["value_by_index"]
    assert [row["score"] for row in scores.values()] == pytest.approx([0] * 5, abs=1e-5)
    assert 0 < out["forget_truth_ratio"] < 1


def test_parts_are_read_from_a_folder(tmp_path):
    for part, name in tofu.FILES.items():
        (tmp_path / f"{name.format(split='forget01')}.json").write_text("\n".join(json.dumps(r) for r in rows(part)))
    (tmp_path / "holdout01.json").write_text(json.dumps(rows("holdout")))
    found = tofu.load_parts(tmp_path, "forget01")
    assert {part: len(r) for part, r in found.items()} == dict.fromkeys([*tofu.FILES, "holdout"], 5)


# Interruption and several processes, with real ones.

SCRIPT = """
import sys, time
import torch
from fastunlearn.evaluation import scoring, runner, tofu
from tests.evaluation.test_tofu import SETTINGS, parts
from tests.tiny_chat import char_tokenizer, tiny_llama
folder, pause = sys.argv[1], float(sys.argv[2])
if pause:
    plain = runner.score_batch
    def slow(*args):
        time.sleep(pause)
        return plain(*args)
    runner.score_batch = slow
runner.start_processes()
tofu.evaluate_tofu(tiny_llama(2), char_tokenizer(), parts(), output=folder, settings=SETTINGS, budget=60, progress=False)
"""


def _start(folder: Path, pause: float = 0.0, **env: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()} | env
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(pause)], env=environment)


@pytest.mark.slow
@pytest.mark.serial
def test_killed_and_several_processes_give_the_same_files(tmp_path):
    assert _start(tmp_path / "whole").wait(120) == 0
    whole = json.loads((tmp_path / "whole" / "TOFU_EVAL.json").read_text())
    # Killed after some batches; a second run goes on.
    killed = _start(tmp_path / "killed", 0.3)
    deadline = time.time() + 120
    journal = tmp_path / "killed" / ".TOFU.0.jsonl"
    while time.time() < deadline and not (journal.exists() and journal.read_text().count("\n") > 3):
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "TOFU_EVAL.json").exists()
    done = journal.read_text().count('"stage": "forget set"')
    assert done >= 2
    # What another model left half done is refused.
    with pytest.raises(ValueError, match="holds an interrupted evaluation with weights ="):
        tofu.evaluate_tofu(tiny_llama(7), char_tokenizer(), parts(), output=tmp_path / "killed", settings=SETTINGS)
    with open(journal, "a") as file:
        file.write('{"stage": "forget set", "rows": {"0": [[')
    assert _start(tmp_path / "killed").wait(120) == 0
    assert json.loads((tmp_path / "killed" / "TOFU_EVAL.json").read_text()) == whole
    two = [
        _start(
            tmp_path / "two",
            RANK=str(r),
            LOCAL_RANK=str(r),
            WORLD_SIZE="2",
            MASTER_ADDR="localhost",
            MASTER_PORT="29613",
        )
        for r in range(2)
    ]
    assert [process.wait(120) for process in two] == [0, 0]
    assert json.loads((tmp_path / "two" / "TOFU_EVAL.json").read_text()) == whole
    assert not list((tmp_path / "two").glob(".TOFU*"))
