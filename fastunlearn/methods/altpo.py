"""Other answers for AltPO (Mekala et al. 2024, arXiv 2409.13474, section 3.2): drawn from the model that must forget.

The paper asks the model itself for five answers in the same domain at temperature 1. Its prompt is not reproduced; `PROMPT` is this
project's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastunlearn.evaluation.recall import generate_answers

PROMPT = (
    "Question: {question}\nA known answer: {answer}\nWrite one different answer to the question, as plausible and as long, in which "
    "every fact is another one. Write the answer only."
)


def sample_alternates(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    count: int = 5,
    temperature: float = 1.0,
    prompt: str = PROMPT,
    seed: int = 0,
    tries: int = 3,
    **options: Any,
) -> list[dict[str, Any]]:
    """The rows with a column "alternate": answers that the model gives when asked for another one.

    Args:
        rows: with question and answer.
        count: of alternates a row; the same answer twice, an empty one and the known one are drawn again.
        temperature: of sampling.
        prompt: with {question} and {answer}.
        seed: of the draws; the global generator is left as it was.
        tries: draws of what was not usable, before a row keeps fewer.
        options: of `evaluation.generate_answers` (max_new_tokens, batch_size, system, ...).

    Returns:
        Copies of the rows.

    Raises:
        ValueError: a row without question and answer, count < 1, a row for which nothing usable was drawn.
    """
    if count < 1:
        raise ValueError(f"count: want at least 1, got {count}")
    for i, row in enumerate(rows):
        if not (isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)):
            raise ValueError(f"rows: row {i} has no question and answer (columns: {', '.join(row)})")
    found: list[list[str]] = [[] for _ in rows]
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for _ in range(tries):
            missing = [i for i, texts in enumerate(found) for _ in range(count - len(texts))]
            if not missing:
                break
            asked = [prompt.format(question=rows[i]["question"], answer=rows[i]["answer"]) for i in missing]
            given = generate_answers(model, tokenizer, asked, temperature=temperature, **options)
            for i, text in zip(missing, given, strict=True):
                if text and text not in found[i] and text.casefold() != rows[i]["answer"].strip().casefold():
                    found[i].append(text)
    for i, texts in enumerate(found):
        if not texts:
            raise ValueError(
                f"rows: the model gave no other answer to row {i} in {tries} draws; raise temperature or tries"
            )
    return [{**row, "alternate": texts} for row, texts in zip(rows, found, strict=True)]
