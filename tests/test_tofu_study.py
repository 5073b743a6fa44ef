"""The TOFU study on a tiny model: every method runs, a study that stopped goes on, the tables and the picture come of its rows."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import tables, tofu, tofu_evaluation, tofu_runs, tofu_tables
from benchmarks.tofu_methods import Method
from fastunlearn.checkpoint import save_checkpoint
from fastunlearn.data.text import encode_rows
from fastunlearn.evaluation import tofu as suite
from fastunlearn.localize import nm_violations
from fastunlearn.optim import MaskedAdamW
from tests.tiny_chat import char_tokenizer, tiny_llama


def tofu_rows(name: str, count: int) -> list[dict]:
    return [
        {
            "question": f"{name} {i}?", "answer": f"ab{i}", "paraphrased_answer": f"it is {i}",
            "perturbed_answer": [f"ac{i}", f"d{i}"],
        }
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A work folder over sixteen rows of retain authors, four held out, four to forget."""
    data = tmp_path / "data" / "tofu"
    data.mkdir(parents=True)
    retain, holdout, forget = tofu_rows("r", 16), tofu_rows("h", 4), tofu_rows("f", 12)
    files = {
        "full": retain + holdout + forget, "forget01_perturbed": forget, "forget10_perturbed": forget, "retain_perturbed": retain,
        "real_authors_perturbed": tofu_rows("ra", 4), "world_facts_perturbed": tofu_rows("wf", 4),
    }  # fmt: skip
    for name, rows in files.items():
        (data / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("FASTUNLEARN_DATA", str(tmp_path / "data"))
    save_checkpoint(tmp_path / "base", tiny_llama(), char_tokenizer())
    size = tofu_runs.Size(
        "forget01",
        16,
        4,
        4,
        4,
        {"epochs": 2, "learning_rate": 1e-3, "batch_size": 8},
        {"epochs": 1, "learning_rate": 1e-3, "batch_size": 8},
        epochs=1,
        batch_size=4,
        new_tokens=4,
    )
    tokens = torch.randint(1, 127, (4, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(tofu_runs, "calibration_tokens", lambda *a, **k: (tokens, None))
    return tofu_runs.Work(tmp_path / "work", size, str(tmp_path / "base"))


def test_data_is_disjoint(work):
    data = work.data()
    assert {part: len(rows) for part, rows in data.items()} == {
        "train forget": 12, "train retain": 16, "forget": 12, "retain": 16, "ra": 4, "wf": 4, "holdout": 4,
    }  # fmt: skip
    assert [row["question"] for row in data["holdout"]] == ["h 0?", "h 1?", "h 2?", "h 3?"]
    forget, retain = work.target(tuning=True)
    assert [row["question"] for row in forget] == ["r 12?", "r 13?", "r 14?", "r 15?"]
    assert len(retain) == 12
    asked = work.parts(tuning=True)
    assert asked["forget"] == data["retain"][-4:]
    assert not {r["question"] for r in asked["retain"]} & {r["question"] for r in asked["forget"]}


def test_every_method_has_as_many_trials():
    assert {len(method.trials) for method in tofu.METHODS.values()} == {4}
    from fastunlearn.objectives import OBJECTIVES

    tried = {method.options.get("objective") for method in tofu.METHODS.values()}
    assert set(OBJECTIVES) <= tried
    for name, method in tofu.METHODS.items():
        for trial in method.trials:
            args = method.config(output_dir="x", use_cpu=True, **{**method.options, **trial})
            assert args.learning_rate == trial["learning_rate"], name


@pytest.mark.slow
def test_a_study_from_end_to_end(work, tmp_path, monkeypatch, capsys):
    pytest.importorskip("scipy")
    for name in ("NPO", "SAU, NPO", "SAU x HAMU"):
        monkeypatch.setitem(tofu.METHODS, name, Method(
            tofu.METHODS[name].trials[:1], tofu.METHODS[name].options, tofu.METHODS[name].config, tofu.METHODS[name].trainer,
            tofu.METHODS[name].settings,
        ))  # fmt: skip
    results = tmp_path / "results" / "quality"
    methods = ["NPO", "SAU, NPO", "SAU x HAMU"]

    def study(stage, hours=None):
        return tofu.Study(work, "cpu", results / tofu.FILES[stage], hours)

    tofu.tune(study("tune", hours=-1.0), methods)
    assert not (results / tofu.FILES["tune"]).exists()
    tofu.tune(study("tune"), methods)
    tuning = json.loads((results / tofu.FILES["tune"]).read_text())
    # Two models before, NPO twice, the others pruned only.
    assert len(tuning["rows"]) == 2 + 2 + 1 + 1
    certified = next(row for row in tuning["rows"] if row["method"] == "SAU x HAMU")
    assert certified["certificates checked"] == -(-certified["steps"] // 3)
    assert tofu.chosen(tuning, "NPO", "dense") == tofu.METHODS["NPO"].trials[0]
    with pytest.raises(ValueError, match="0 of 1 trials of SAU, NPO, dense"):
        tofu.chosen(tuning, "SAU, NPO", "dense")
    first = study("run")
    tofu.run(first, ["NPO"], [0], tuning)
    again = study("run")
    monkeypatch.setattr(tofu, "one_run", None)
    tofu.run(again, ["NPO"], [0], tuning)
    assert again.rows == first.rows
    monkeypatch.undo()
    rows = {(row["method"], row["setting"]): row for row in first.rows}
    assert rows[("retain model", "dense")]["forget quality"] == 1
    assert rows[("NPO", "2:4")]["layers off the pattern"] == 0
    assert {"ES relearned", "ES 4-bit", "seconds", "PrivLeak"} <= rows[("NPO", "dense")].keys()
    with pytest.raises(ValueError, match="holds a study of size cpu, this one is gpu"):
        tofu.Study(work, "gpu", results / tofu.FILES["run"], None)
    text = tables.block("tofu", tmp_path / "results")
    assert "| dense | before | - |" in text
    assert "| dense | **NPO** | 1e-05 |" in text
    assert "<summary>Every trial of the tuning</summary>" in text
    assert "| 2:4 | SAU, NPO | 1e-05: **" in text
    assert tofu_tables.draw(results / "tofu.json", tmp_path / "plots").is_file()


def _trials() -> dict:
    """Trials of all that the evidence needs, each as good as the others."""
    tuning = {"rows": [{"method": f"full, {s}", "setting": s, "model utility": 0.5, "trial": 0} for s in tofu.SETTINGS]}
    for name in {tuned for tuned, *_ in tofu.EVIDENCE.values()}:
        for setting in tofu.METHODS[name].settings:
            tuning["rows"] += [
                {"method": name, "setting": setting, "trial": i, "options": trial, "ES": 0.5, "model utility": 0.5}
                for i, trial in enumerate(tofu.METHODS[name].trials)
            ]
    return tuning


def test_the_table_of_trials():
    rows = [
        {"method": "full, dense", "setting": "dense", "trial": 0, "ES": 0.9, "model utility": 0.4},
        {"method": "A", "setting": "dense", "trial": 0, "options": {"learning_rate": 1e-5}, "ES": 0.5, "model utility": 0.4},
        {"method": "A", "setting": "dense", "trial": 1, "options": {"learning_rate": 1e-4, "hamu_share": 0.8}, "ES": 0.2, "model utility": 0.6},
        {"method": "A", "setting": "dense", "trial": 2, "options": {"learning_rate": 1e-3}, "diverged": "NaN"},
    ]  # fmt: skip
    # 2 * 0.5 * 1 / 1.5; utility counts to that before: 2 * 0.8 * 1 / 1.8.
    assert tofu_tables.trials({"rows": rows})[2:] == [
        "| dense | A | 1e-05: 0.667 (0.500, 0.400) | 0.0001, share 0.8: **0.889 (0.200, 0.600)** | 0.001: diverged |"
    ]
    # Of a method that was tuned in part, "run" wants the rest; of equal scores the first is taken, as `chosen` does.
    rows[2] |= {"ES": 0.5, "model utility": 0.4}
    assert "1e-05: **0.667" in tofu_tables.trials({"rows": rows})[2]


@pytest.mark.slow
@pytest.mark.thorough
def test_evidence(work, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    tuning = _trials()
    study = tofu.Study(work, "cpu", tmp_path / "sau_evidence.json", None)
    tofu.evidence(study, [0], tuning)
    off = {row["method"]: row["layers off the pattern"] for row in study.rows}
    assert list(off) == list(tofu.EVIDENCE)
    assert off.pop("prune, then unlearn, no mask") > 0
    assert not any(off.values())


@pytest.mark.slow
def test_evidence_that_diverges_is_a_row_and_a_missing_twin_is_made(work, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    tuning = _trials()
    monkeypatch.setattr(
        tofu, "EVIDENCE", {n: tofu.EVIDENCE[n] for n in ("unlearn, then prune", "mask, redistribution obs")}
    )
    study = tofu.Study(work, "cpu", tmp_path / "sau_evidence.json", None)
    # The first line was measured elsewhere: its model is not here.
    study.rows.append({"method": "unlearn, then prune", "seed": 0})
    tofu.evidence(study, [0], tuning)
    assert (work.folder / "models" / "full-unlearned-0" / "config.json").is_file()
    assert {"ES", "commit", "machine"} <= study.rows[-1].keys()

    def diverges(*args, **options):
        raise ArithmeticError("the loss is NaN; no more")

    monkeypatch.setattr(work, "unlearn", diverges)
    tofu.evidence(study, [1], tuning)
    assert [row["diverged"] for row in study.rows[2:]] == ["the loss is NaN"] * 2
    lines = tofu_tables.table({"rows": study.rows[2:]})
    assert len(lines) == 4
    # Beside a row that says how many layers are off, one that does not.
    lines = tofu_tables.table({"rows": [{"method": "a", "layers off the pattern": 0, "ES": 0.1}, study.rows[2]]})
    assert lines[-1].endswith("| - |")


def test_weights_that_are_not_finite_are_a_diverged_run(work, monkeypatch):
    method = tofu.METHODS["NPO"]

    class Breaks(method.trainer):
        def train(self, *args, **options):
            out = super().train(*args, **options)
            next(self.model.parameters()).data.fill_(float("nan"))
            return out

    monkeypatch.setitem(tofu.METHODS, "NPO", Method(method.trials, method.options, method.config, Breaks))
    row = tofu.one_run(work, "NPO", "dense", method.trials[0], 0, tuning=False, robust=False)
    assert row.keys() == {"diverged"}
    assert "NaN or infinity" in row["diverged"]


def test_an_evaluation_that_gives_nan_is_a_diverged_run(work, tmp_path, monkeypatch):
    def nan(*args, **options):
        raise ArithmeticError("model: its log-probabilities are NaN; no more")

    monkeypatch.setattr(tofu, "_unlearned", lambda *args: (None, {}))
    monkeypatch.setattr(tofu, "_evidence_run", lambda *args: ({}, None))
    monkeypatch.setattr(work, "evaluate", nan)
    row = tofu.one_run(work, "NPO", "dense", {}, 0, tuning=False, robust=True)
    assert row == {"diverged": "model: its log-probabilities are NaN"}
    study = tofu.Study(work, "cpu", tmp_path / "sau_evidence.json", None)
    tofu.evidence(study, [0], 0)
    assert all(r["diverged"] == row["diverged"] for r in study.rows)


def test_a_model_that_lost_its_pattern_is_relearned_without_masks(work, monkeypatch):
    seen = []
    given = []

    def relearn(*_, masks, **options):
        seen.append(masks)
        given.append({name: options[name] for name in ("count", "epochs", "batch_size", "learning_rate")})
        return [0]

    monkeypatch.setattr(tofu_runs.robustness, "relearn_", relearn)
    checkpoint = work.load("full-2to4")
    work.robust(checkpoint, 0)
    name = next(iter(checkpoint.masks))
    with torch.no_grad():
        dict(checkpoint.model.named_parameters())[name].fill_(1.0)
    work.robust(checkpoint, 0)
    assert seen[0] is checkpoint.masks
    assert seen[1] is None
    # Of the committed numbers, whatever the defaults are.
    rate = work.size.finetune["learning_rate"] / 3
    assert given == [{"count": 10, "epochs": 5, "batch_size": 10, "learning_rate": rate}] * 2


def test_results_of_another_model_or_precision_are_refused(work, tmp_path):
    study = tofu.Study(work, "cpu", tmp_path / "tofu.json", None)
    study.add({"method": "a", "seed": 0})
    assert {"commit", "machine"} <= json.loads((tmp_path / "tofu.json").read_text())["rows"][0].keys()
    work.bf16 = True
    with pytest.raises(ValueError, match="holds a study of forward passes fp32, this one is bf16"):
        tofu.Study(work, "cpu", tmp_path / "tofu.json", None)
    work.bf16, work.base = False, "other"
    with pytest.raises(ValueError, match=r"holds a study of model .* this one is other fine-tuned 2 epochs"):
        tofu.Study(work, "cpu", tmp_path / "tofu.json", None)


def test_a_plan_is_made_part_by_part(work, capsys):
    names = [
        "fine-tuning",
        "unlearning",
        *(f"evaluation, {part}" for part in work.parts(False)),
        "pruning",
        "robustness",
    ]
    assert tofu.plan(work, ["NPO", "SAU, NPO"], [0, 1, 2], pieces=2) is None
    kept = json.loads((work.folder / "plan.json").read_text())
    assert list(kept["parts"]) == names[:2]
    assert capsys.readouterr().out.count("\n") == 2
    made = tofu.plan(work, ["NPO", "SAU, NPO"], [0, 1, 2])
    assert capsys.readouterr().out.count("\n") == len(names) - 2
    assert list(made["parts"]) == names
    assert made["parts"]["unlearning"] == kept["parts"]["unlearning"]
    assert all({"threads", "other load", "commit", "date"} <= part.keys() for part in made["parts"].values())
    assert made == json.loads((work.folder / "plan.json").read_text())
    assert made["sum"]["steps of a run"] == 3
    assert 0 < made["sum"]["hours, tune"] < made["sum"]["hours"]
    # Nothing is measured for another sum.
    dense = tofu.plan(work, ["NPO", "SAU, NPO"], [0], ["dense"])
    assert 0 < dense["sum"]["hours, run"] < made["sum"]["hours, run"] / 4
    assert not capsys.readouterr().out
    work.base = "other"
    with pytest.raises(ValueError, match=r"plan: .* is of .*; move it away"):
        tofu.plan(work, ["NPO"], [0])


def test_a_table_is_made_piece_by_piece(work, tmp_path, monkeypatch, capsys):
    def one_run(work, name, setting, options, seed, **_):
        return {"ES": 0.1, "model utility": 0.5, "forget quality": 0.5, "rate": options["learning_rate"]}

    monkeypatch.setattr(tofu, "one_run", one_run)
    evaluated, made = [], []
    monkeypatch.setattr(work, "evaluate", lambda checkpoint, key, **_: evaluated.append(key) or {"model_utility": 0.5})
    monkeypatch.setattr(work, "evaluated", lambda key: key in evaluated)
    monkeypatch.setattr(work, "robust", lambda checkpoint, seed: {})
    monkeypatch.setattr(work, "load", made.append)
    monkeypatch.setattr(work, "made", lambda name: name in made)
    out, said = tmp_path / "tofu.json", []
    for _ in range(10):
        study = tofu.Study(work, "cpu", out, None, pieces=1, trial=2)
        tofu.run(study, ["NPO", "SAU, NPO"], [0], 2, ["dense"])
        said.append(capsys.readouterr().out.split(" ...")[0])
    assert said == [
        "model full", "model retain", "evaluation of retain", "before, dense", "retain model, dense", "NPO, dense, seed 0",
        *[""] * 4,
    ]  # fmt: skip
    result = json.loads(out.read_text())
    assert result["meta"]["settings"].startswith("not tuned: number 2 of every")
    assert result["rows"][-1]["rate"] == tofu.METHODS["NPO"].trials[2]["learning_rate"]
    assert "settings: not tuned" in tables.runs_block(out, "tofu_tables", ("options",))
    with pytest.raises(ValueError, match="holds a study of settings not tuned"):
        tofu.Study(work, "cpu", out, None)


def test_fine_tuning_goes_on_at_the_epoch(work, tmp_path, monkeypatch):
    how = work.size.finetune | {"cast": work.cast, "what": "a model"}
    whole, cut = tiny_llama(), tiny_llama()
    rows = encode_rows(tofu_rows("r", 12), char_tokenizer(), what="set")
    losses = tofu_runs.finetune(whole, rows, **how)
    step, count = MaskedAdamW.step, []

    def stops(self, *args):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(MaskedAdamW, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        tofu_runs.finetune(cut, rows, **how, kept=tmp_path / "cut.part")
    again = tiny_llama(seed=1)
    assert tofu_runs.finetune(again, rows, **how, kept=tmp_path / "cut.part") == losses
    assert len(count) == 4 + 2
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_pruned_model_is_trained_again_and_keeps_its_pattern(work):
    alone = work.load("full")
    work.sparsegpt(alone)
    again = work.load("full-2to4")
    assert again.masks is not None
    assert not nm_violations(again.model, again.masks)
    assert all(torch.equal(again.masks[name].bits, mask.bits) for name, mask in alone.masks.items())
    after = dict(again.model.named_parameters())
    assert any(not torch.equal(p, after[name]) for name, p in alone.model.named_parameters())


def test_a_run_that_is_cut_off_goes_on_with_its_model(work, monkeypatch):
    pytest.importorskip("scipy")
    robust, trial = work.robust, tofu.METHODS["NPO"].trials[0]

    def cut(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "robust", cut)
    with pytest.raises(KeyboardInterrupt):
        tofu.one_run(work, "NPO", "dense", trial, 0, tuning=False, robust=True)
    monkeypatch.setattr(work, "robust", robust)
    monkeypatch.setattr(work, "unlearn", cut)
    row = tofu.one_run(work, "NPO", "dense", trial, 0, tuning=False, robust=True)
    assert {"ES", "ES relearned", "seconds", "processor seconds", "other load"} <= row.keys()
    with pytest.raises(KeyboardInterrupt):
        tofu.one_run(work, "NPO", "dense", trial, 0, tuning=False, robust=True)


def test_score_and_front():
    assert tofu.score({"ES": 0.5, "model utility": 0.25}, 0.5) == pytest.approx(0.5)
    assert tofu.score({"ES": 1.0, "model utility": 0.0}, 0.5) == 0
    assert tofu.score({"diverged": "x"}, 0.5) == 0
    assert tofu_tables.front([(1, 1), (2, 0.5), (0.5, 0.5), (2, 0.5)]) == [0, 1, 3]
    rows = [
        {"setting": "dense", "method": "a", "seed": s, "forget quality": q, "ES": 0.1 * s}
        for s, q in ((0, 1e-4), (1, 1e-2))
    ]
    # A method that diverged with one seed is no point of the front, however good the others are.
    both = [{"setting": "", "method": m, "forget quality": 0.5, "model utility": 0.5} for m in "ab"]
    means = tofu_tables.means({"rows": [*both, {"setting": "", "method": "b", "diverged": "x"}]})
    assert [row["method"] for row in tofu_tables.unlearned(means)] == ["a"]
    (mean,) = tofu_tables.means({"rows": rows})
    assert mean["forget quality"] == pytest.approx(1e-3)
    assert mean["ES"] == pytest.approx(0.05)


def test_the_slow_way_says_the_same(work):
    model, tokenizer = tiny_llama(3), char_tokenizer()
    settings = suite.TofuSettings(max_new_tokens=6, attacks=())
    encoded = {
        part: suite.encode_part(part, tofu_rows(part, 5), tokenizer, settings) for part in suite.FILES
    }  # fmt: skip
    ours = tofu_evaluation.our_way(model, tokenizer, encoded, settings)
    theirs = tofu_evaluation.slow_way(model, tokenizer, encoded, settings)
    assert ours.keys() == theirs.keys()
    assert max(tofu_evaluation.differences(ours, theirs).values()) < 1e-4
