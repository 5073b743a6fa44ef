"""TOFU (Maini et al. 2024, arXiv 2401.06121): did a model forget some of 200 fictitious authors, and keep the rest?

Metrics, names and files are open-unlearning's. Four sets are asked: the forget set and a sample of the retain set with a paraphrased
answer and five wrong ones, real authors and world facts with three wrong ones; a holdout set of the same kind that no model has
seen, where there is one, serves the membership attacks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastunlearn.data.text import encode_rows, load_rows
from fastunlearn.evaluation import membership
from fastunlearn.evaluation import memorisation as memo
from fastunlearn.evaluation.journal import Journal, world
from fastunlearn.evaluation.logs import LogFolder, Logs, check_reference, column, metric, summary
from fastunlearn.evaluation.membership import ATTACKS
from fastunlearn.evaluation.runner import Runner, about, folder_of
from fastunlearn.evaluation.scoring import AnswerScore, Question
from fastunlearn.objectives.language import closest

HUB = "locuslab/TOFU"
#: a part -> the file it is read from; {split} is the forget split
FILES = {
    "forget": "{split}_perturbed", "retain": "retain_perturbed", "ra": "real_authors_perturbed", "wf": "world_facts_perturbed",
}  # fmt: skip
#: ground truth ratios of a variant: aggregate of the forget set, of what must stay
_AGGREGATE = {"ratio": ("closer_to_1_better", "true_better"), "probability": ("prob_mean", "prob_mean")}


@dataclass
class TofuSettings:
    """What is measured; everything here changes the numbers.

    Attributes:
        max_new_tokens: of an answer.
        truth_ratio: "ratio" or "probability".
        attacks: membership attacks, of `membership.ATTACKS`; need a holdout set ("reference" a model too).
        generate: ask for answers, not only for probabilities (without: no ROUGE, no model utility).
        system_prompt: of the chat template.
        autocast: "bfloat16", "float16" or None.
        limit: rows of each part at most, the first ones; 0: all.
    """

    max_new_tokens: int = 200
    truth_ratio: str = "ratio"
    attacks: tuple[str, ...] = ("loss", "zlib", "gradnorm", "min_k", "min_k_plus_plus")
    generate: bool = True
    system_prompt: str | None = None
    autocast: str | None = None
    limit: int = 0

    def __post_init__(self) -> None:
        self.attacks = tuple(self.attacks)
        if self.truth_ratio not in _AGGREGATE:
            raise ValueError(
                f"truth_ratio: {self.truth_ratio!r} is unknown; {closest(self.truth_ratio, list(_AGGREGATE))}"
            )
        for attack in self.attacks:
            if attack not in ATTACKS:
                raise ValueError(f"attacks: {attack!r} is unknown; {closest(attack, list(ATTACKS))}")
        if self.max_new_tokens < 1 or self.limit < 0:
            raise ValueError(f"max_new_tokens, limit: want >= 1 and >= 0, got {self.max_new_tokens}, {self.limit}")
        if self.autocast not in (None, "bfloat16", "float16"):
            raise ValueError(f"autocast: want bfloat16, float16 or None, got {self.autocast!r}")

    def dtype(self) -> torch.dtype | None:
        return None if self.autocast is None else getattr(torch, self.autocast)


@dataclass
class Part:
    """One set, encoded.

    Attributes:
        questions: prompt and answers, in the order right, paraphrased (where there is one), wrong.
        texts: the questions, the right answers.
        paraphrased: whether the second answer is a paraphrase of the first.
    """

    questions: list[Question]
    texts: list[str]
    answers: list[str]
    paraphrased: bool = False
    stops: list[int] = field(default_factory=list)


def load_parts(data: str | Path = HUB, split: str = "forget10", holdout: Any = None) -> dict[str, list[dict[str, Any]]]:
    """Rows of all parts.

    Args:
        data: a folder with `<split>_perturbed.json`, `retain_perturbed.json`, `real_authors_perturbed.json`,
            `world_facts_perturbed.json` (JSON lines or lists), or a name on the Hub.
        split: the forget split: forget01, forget05, forget10.
        holdout: rows, a file or a hub name (name:config) of a set that no model has seen; None: `holdout<nn>.json` in a folder
            that has it, no set otherwise.

    Raises:
        FileNotFoundError, ValueError, OSError: as `load_rows`.
    """
    folder = Path(str(data)).expanduser()

    def read(name: str) -> list[dict[str, Any]]:
        if not folder.is_dir():
            return load_rows(f"{data}:{name}")
        found = [folder / f"{name}{end}" for end in (".json", ".jsonl", ".parquet")]
        if not any(path.is_file() for path in found):
            raise FileNotFoundError(f"data: there is no {found[0]}")
        return load_rows(next(path for path in found if path.is_file()))

    parts = {part: read(name.format(split=split)) for part, name in FILES.items()}
    if holdout is not None:
        parts["holdout"] = load_rows(holdout)
    elif folder.is_dir() and any(folder.glob(f"{split.replace('forget', 'holdout')}.json*")):
        parts["holdout"] = read(split.replace("forget", "holdout"))
    return parts


def _answers(part: str, number: int, row: Mapping[str, Any], paraphrased: bool) -> list[Any]:
    """Right, paraphrased, wrong ones of a row; `encode_rows` says what is wrong with the right one."""
    if part == "holdout":
        return [row.get("answer")]
    wrong = row.get("perturbed_answer")
    wrong = wrong.tolist() if wrong is not None and hasattr(wrong, "tolist") else wrong
    if not isinstance(wrong, list) or not wrong or not all(isinstance(w, str) and w.strip() for w in wrong):
        raise ValueError(f"{part}: row {number} (counted from 1) has no perturbed_answer, a list of wrong answers")
    if paraphrased and not isinstance(row.get("paraphrased_answer"), str):
        raise ValueError(f"{part}: row {number} (counted from 1) has no paraphrased_answer")
    return [row.get("answer"), *([row["paraphrased_answer"]] if paraphrased else []), *wrong]


def encode_part(part: str, rows: Sequence[Mapping[str, Any]], tokenizer: Any, settings: TofuSettings) -> Part:
    """One set as token trees.

    Raises:
        ValueError: rows without question and answer, or without the perturbed (and, of TOFU's own authors, paraphrased) answers.
    """
    rows = rows[: settings.limit] if settings.limit else rows
    paraphrased = part in ("forget", "retain")
    listed = [_answers(part, number, row, paraphrased) for number, row in enumerate(rows, 1)]
    if len({len(answers) for answers in listed}) > 1:
        raise ValueError(f"{part}: rows have different numbers of perturbed answers")
    flat = [
        {"question": row.get("question"), "answer": a}
        for row, answers in zip(rows, listed, strict=True)
        for a in answers
    ]
    encoded = encode_rows(flat, tokenizer, what=f"{part} set", system=settings.system_prompt)
    questions, at = [], 0
    for answers in listed:
        items = [encoded[at + k] for k in range(len(answers))]
        split = items[0]["labels"].count(-100)
        questions.append(
            Question(
                items[0]["input_ids"][:split], [item["input_ids"][item["labels"].count(-100) :] for item in items], 1
            )
        )
        at += len(answers)
    texts, right = [str(row["question"]) for row in rows], [str(row["answer"]) for row in rows]
    return Part(questions, texts, right, paraphrased and part != "holdout", sorted({*encoded.end_ids, int(tokenizer.eos_token_id)}))  # fmt: skip


def _prob(scores: Sequence[AnswerScore]) -> list[dict[str, Any]]:
    losses = [score.avg_loss for score in scores]
    return [{"prob": float(p), "avg_loss": loss} for p, loss in zip(memo.probability(losses), losses, strict=True)]


def _probs(scores: Sequence[Sequence[AnswerScore]]) -> list[dict[str, Any]]:
    rows = [_prob(of_row) for of_row in scores]
    return [{key: [answer[key] for answer in row] for key in ("prob", "avg_loss")} for row in rows]


def probability_logs(part: str, encoded: Part, scores: list[list[AnswerScore]], variant: str) -> Logs:
    """Probability and truth ratio of one part."""
    first = 2 if encoded.paraphrased else 1
    out: Logs = {f"{part}_Q_A_Prob": metric(_prob([row[0] for row in scores]), "prob")}
    if encoded.paraphrased:
        out[f"{part}_Q_A_PARA_Prob"] = metric(_prob([row[1] for row in scores]), "prob")
    out[f"{part}_Q_A_PERT_Prob"] = metric(_probs([row[first:] for row in scores]), "prob")
    right = column(out[f"{part}_Q_A_{'PARA_' if encoded.paraphrased else ''}Prob"], "avg_loss")
    wrong = out[f"{part}_Q_A_PERT_Prob"]
    ratios = memo.truth_ratio(right, column(wrong, "avg_loss"), variant)  # type: ignore[arg-type]
    aggregate = _AGGREGATE[variant][part != "forget"]
    name = "forget_truth_ratio" if part == "forget" else f"{part}_Truth_Ratio"
    out[name] = metric([{"score": float(r)} for r in ratios], "score", memo.aggregate_truth_ratio(ratios, aggregate))
    if not encoded.paraphrased:
        probs = memo.normalised_probability(column(out[f"{part}_Q_A_Prob"], "prob"), column(wrong, "prob"))
        out[f"{part}_Q_A_Prob_normalised"] = metric([{"prob": float(p)} for p in probs], "prob")
    return out


def _memorised(encoded: Part, scores: list[list[AnswerScore]]) -> Logs:
    right = [row[0].right(question.answers[0]) for question, row in zip(encoded.questions, scores, strict=True)]
    return {
        "extraction_strength": metric([{"score": memo.extraction_strength(r)} for r in right], "score"),
        "exact_memorization": metric([{"score": memo.exact_memorisation(r)} for r in right], "score"),
    }


def compare_with_retain(logs: Logs, reference: Logs) -> Logs:
    """Forget quality and PrivLeak, from a model's logs and the retain model's."""
    out: Logs = {}
    if "forget_truth_ratio" in reference:
        values = [column(entry["forget_truth_ratio"], "score") for entry in (logs, reference)]
        out["forget_quality"] = {"agg_value": memo.forget_quality(*values)}
    if "mia_min_k" in logs and reference.get("mia_min_k", {}).get("agg_value") is not None:
        leak = membership.privleak(logs["mia_min_k"]["agg_value"], reference["mia_min_k"]["agg_value"])
        out["privleak"] = {"agg_value": leak}
    return out


def evaluate_tofu(
    model: Any,
    tokenizer: Any,
    parts: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    split: str = "forget10",
    name: str = "model",
    settings: TofuSettings | None = None,
    output: str | Path | None = None,
    retain_logs: str | Path | None = None,
    reference_model: Any = None,
    overwrite: bool = False,
    budget: int = 8192,
    batch_size: int = 128,
    progress: bool = True,
) -> dict[str, float]:
    """Evaluates a model; in a distributed run every process calls this.

    Args:
        model, tokenizer: causal language model of transformers and its tokenizer.
        parts: rows of "forget", "retain", "ra", "wf" and maybe "holdout", as `load_parts` gives them.
        split: name of the forget split. name: of the model, in messages and the logs.
        output: folder of the logs; an evaluation that was interrupted there goes on at the row. None: nothing is kept.
        retain_logs: TOFU_EVAL.json (or its folder) of the retain model, for forget quality and PrivLeak.
        reference_model: of the membership attack "reference".
        overwrite: replace logs and journals that are there.
        budget: tokens of a scoring pass. batch_size: rows that generate at once. Neither changes what is measured.

    Returns:
        Metric -> number, as TOFU_SUMMARY.json has them.

    Raises:
        ValueError: rows without what is needed, an unknown setting, logs or journals of another split, model or tokenizer.
    """
    settings = settings or TofuSettings()
    if "reference" in settings.attacks and reference_model is None:
        raise ValueError(
            "reference_model: the attack 'reference' compares with a model; give one, or leave the attack out"
        )
    encoded = {part: encode_part(part, rows, tokenizer, settings) for part, rows in parts.items()}
    absent = [part for part in FILES if part not in encoded]
    if absent:
        raise ValueError(f"parts: {absent[0]} is missing; want {', '.join(FILES)} and maybe holdout")
    meta = about(model, tokenizer, split, name, asdict(settings)) | {"rows": {p: len(e.questions) for p, e in encoded.items()}}  # fmt: skip
    reference = None if retain_logs is None else LogFolder.read("TOFU", retain_logs)
    if reference is not None:
        check_reference(reference, meta, encoded["forget"].texts, {"forget_truth_ratio": "forget quality"})
    folder = folder_of(output)
    stored = LogFolder.open("TOFU", folder, meta, overwrite=overwrite) if folder is not None else LogFolder("TOFU", Path(), {}, meta)  # fmt: skip
    if overwrite and folder is not None and world()[0] == 0:
        for path in folder.glob(".TOFU.*.jsonl"):
            path.unlink()
    journal = Journal(folder, "TOFU", {key: meta[key] for key in ("split", "model", "weights", "tokenizer", "settings", "rows")})  # fmt: skip
    if not stored.logs:
        stops = sorted({stop for part in encoded.values() for stop in part.stops} | _own_stops(model))
        runner = Runner(
            model, tokenizer, journal, stops=stops, budget=budget, batch_size=batch_size, autocast=settings.dtype(), progress=progress,
        )  # fmt: skip
        stored.logs = _measure(runner, encoded, settings, reference_model)
    for key in ("forget_quality", "privleak"):
        stored.logs.pop(key, None)
    if reference is not None:
        stored.logs |= compare_with_retain(stored.logs, reference.logs)
        stored.meta = {**stored.meta, "retain_logs": str(reference.path)}
    if folder is not None and world()[0] == 0:
        stored.write()
    journal.clear()
    return summary(stored.logs)


def _own_stops(model: Any) -> set[int]:
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {int(t) for t in (own if isinstance(own, list | tuple) else [own]) if t is not None}


def _measure(runner: Runner, encoded: Mapping[str, Part], settings: TofuSettings, reference_model: Any) -> Logs:
    logs: Logs = {}
    scores = {part: runner.score(f"{part} set", e.questions) for part, e in encoded.items()}
    for part in FILES:
        logs |= probability_logs(part, encoded[part], scores[part], settings.truth_ratio)
        if settings.generate:
            prompts = [question.prompt for question in encoded[part].questions]
            known = [(q.answers[0], row[0]) for q, row in zip(encoded[part].questions, scores[part], strict=True)]
            said = runner.answer(f"{part} set, answers", prompts, settings.max_new_tokens, known)
            wanted = [runner.text(question.answers[0]) for question in encoded[part].questions]
            logs[f"{part}_Q_A_ROUGE"] = metric(runner.rouge_rows(prompts, said, wanted), "rougeL_recall")
    logs |= _memorised(encoded["forget"], scores["forget"])
    if settings.generate:
        logs["model_utility"] = {"agg_value": memo.model_utility(summary(logs))}
    if "holdout" in encoded:
        sets = [(encoded[p].questions, [row[0] for row in scores[p]]) for p in ("forget", "holdout")]
        for attack in settings.attacks:
            logs[f"mia_{attack}"] = runner.attack(attack, sets[0], sets[1], reference_model)
    elif settings.attacks and world()[0] == 0:
        warnings.warn("no holdout set: membership attacks and PrivLeak are left out", stacklevel=3)
    return logs
