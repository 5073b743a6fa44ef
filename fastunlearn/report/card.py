"""The model card of an unlearned model: what was done, what was measured, and what that does not show.

Counts of what was forgotten, never its texts: a card is published, what had to be forgotten must not be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

#: names of models that are no names on the Hub
_HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
LABELS = {
    "exact_recall": "exact recall (answer, character for character)",
    "answer_probability": "probability of an answer's token (geometric mean)",
    "perplexity": "perplexity on other text",
}
LIMITS = """\
* Recall is measured with the questions of the forget set as they stand. What a model no longer says when asked this way may still
  come out for other words, another language, longer context, sampling, or after some steps of training on related text.
* Lower recall shows that the model does not say it, not that no trace is left in the weights. It is no proof in the sense
  of a law, nor of differential privacy, and no substitute for training without the data where that is required.
* Quantising or pruning an unlearned model can bring back part of what it forgot: measure again after any such step.
* What was kept is measured on a sample of the retain set{other}; other abilities may have changed."""


def hub_name(source: str) -> str | None:
    """A model's name on the Hub, None for a folder or a file."""
    source = _HUB_NAMES.get(source, source)
    return source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith((".", "/")) else None


def _number(value: Any, key: str) -> str:
    if value is None:
        return "not measured"
    return f"{value:.1%}" if key == "exact_recall" else f"{value:.4g}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def metrics_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Markdown table of measurements before and after.

    Args:
        before, after: part ("forget", "retain", "text") -> metric -> number; a part may be missing.
    """
    lines = ["| | | before | after |", "|---|---|---:|---:|"]
    for part in dict.fromkeys((*before, *after)):
        metrics = dict.fromkeys((*before.get(part, {}), *after.get(part, {})))
        for key in (key for key in LABELS if key in metrics):
            old, new = before.get(part, {}).get(key), after.get(part, {}).get(key)
            lines.append(f"| {part} | {LABELS[key]} | {_number(old, key)} | {_number(new, key)} |")
    return "\n".join(lines)


def model_card(
    *,
    base_model: str,
    method: str,
    objective: str,
    forget_rows: int,
    retain_rows: int,
    settings: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    pruning: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    command: str | None = None,
    steps: int | None = None,
) -> str:
    """A README.md as the Hugging Face Hub reads it.

    Args:
        base_model: what was unlearned: a name on the Hub, or a folder (named in the text only).
        method: e.g. "SAU".
        objective: e.g. "NPO".
        forget_rows, retain_rows: how many rows each set has.
        settings: hyper-parameters by name, in the order to be shown.
        before, after: see `metrics_table`; `rows` of a part says how many rows were asked.
        pruning: as pruning.json has it; None for a dense model.
        versions: package -> version.
        command: that made the model.
        steps: of the optimiser.

    Returns:
        Text with YAML front matter.
    """
    front: dict[str, Any] = {}
    name = hub_name(base_model)
    if name is not None:
        front["base_model"] = name
    front |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["machine-unlearning", "fastunlearn"],
    }
    if pruning is not None:
        front["tags"].append("sparse")
    asked = {part: metrics.get("rows") for part, metrics in after.items()}
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# {name or 'A model'} after unlearning" if name is None else f"# {name}, unlearned", ""]
    lines += [
        f"{f'[{name}](https://huggingface.co/{name})' if name else f'`{base_model}`'} after {method} with the objective {objective}"
        f"{f', {steps} steps' if steps is not None else ''}: it was made to forget {forget_rows:,} rows and to keep "
        f"{f'{retain_rows:,} others' if retain_rows else 'nothing in particular (no retain set)'}. "
        "The texts are not part of this card.",
        "",
        "## Measured",
        "",
        metrics_table(before, after),
        "",
    ]
    counts = [f"{count:,} of {total:,} rows of the {part} set" for part, total in (("forget", forget_rows), ("retain", retain_rows)) if (count := asked.get(part))]  # fmt: skip
    if counts:
        lines += [f"Asked: {', '.join(counts)}; greedy answers.", ""]
    if pruning is not None:
        pattern = pruning.get("pattern", "unknown")
        lines += ["## Sparsity", "", f"Pattern: {pattern}."]
        if "method" in pruning:
            lines[-1] += f" Pruned by {pruning['method']}."
        if isinstance(pruning.get("density"), int | float):
            lines[-1] += f" {pruning['density']:.1%} of the pruned layers' weights are left."
        lines += [
            "`masks.safetensors` says which weights are left (`fastunlearn.load_masks`); all others are exactly zero, which was "
            "checked when this was saved. The weights are stored dense, zeros included.",
            "",
        ]
    lines += ["## How", "", "| | |", "|---|---|"]
    lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in settings.items()]
    lines += [""]
    if command:
        lines += ["```", command.strip(), "```", ""]
    if versions:
        lines += [", ".join(f"{package} {version}" for package, version in versions.items()), ""]
    other = " and on the text whose perplexity stands above" if "text" in after else ""
    lines += ["## What this does not show", "", LIMITS.format(other=other), ""]
    return "\n".join(lines)
