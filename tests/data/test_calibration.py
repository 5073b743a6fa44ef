"""Calibration text: what is read, how it is cut, and that the forget set is found in it."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from fastunlearn.data.calibration import calibration_texts, calibration_tokens, check_calibration
from fastunlearn.data.general_text import GENERAL_TEXT
from tests.tiny_chat import CharTokenizer

LONG = " ".join(f"word{i}" for i in range(40))


def read(tokens: torch.Tensor) -> list[str]:
    return ["".join(map(chr, row)) for row in tokens.tolist()]


def test_sources(tmp_path):
    assert calibration_texts() == list(GENERAL_TEXT)
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert calibration_texts(tmp_path / "a.txt") == ["one\n\ntwo"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "body": t + "!"}) for t in ("one", "", "two")))
    assert calibration_texts(str(tmp_path / "a.jsonl")) == ["one", "", "two"]
    assert calibration_texts(tmp_path / "a.jsonl", column="body") == ["one!", "!", "two!"]
    assert calibration_texts([{"text": "row"}]) == ["row"]
    with pytest.raises(ValueError, match="row 1: no column 'prose'; its columns are text, body"):
        calibration_texts(tmp_path / "a.jsonl", column="prose")
    with pytest.raises(ValueError, match="row 2: column 'text' is no text but int"):
        calibration_texts([{"text": "row"}, {"text": 3}])
    with pytest.raises(FileNotFoundError, match=r"there is no file .*b\.txt"):
        calibration_texts(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"c\.txt: no text in it"):
        calibration_texts(tmp_path / "c.txt")


def test_sequences_are_pieces_of_the_text_and_do_not_overlap():
    text = "".join(chr(33 + i % 90) for i in range(1000))
    tokens, used = calibration_tokens([text], CharTokenizer(), sequences=12, length=20, seed=3)
    assert tokens.shape == (12, 20)
    assert tokens.dtype == torch.int64
    assert used == [text]
    starts = [text.index(row) for row in read(tokens)]
    assert all(start % 10 == 0 for start in starts)
    again, _ = calibration_tokens([text], CharTokenizer(), sequences=12, length=20, seed=3)
    other, _ = calibration_tokens([text], CharTokenizer(), sequences=12, length=20, seed=4)
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)


def test_only_texts_that_were_read_are_named():
    texts = [chr(65 + i) * 100 for i in range(20)]
    tokens, used = calibration_tokens(texts, CharTokenizer(), sequences=1, length=30)
    assert len(used) == 3  # 8 * 30 tokens, in texts of 102 with the blank line
    first = texts.index(used[0])
    assert used == [texts[(first + i) % 20] for i in range(3)]
    assert set(read(tokens)[0]) <= set("".join(used) + "\n")


def test_short_text_is_used_up():
    tokens, used = calibration_tokens(["a" * 70, "b" * 39 + "\n"], CharTokenizer(), sequences=128, length=50)
    assert tokens.shape == (3, 37)  # 112 tokens
    assert len(used) == 2
    tokens, _ = calibration_tokens(["abc"], CharTokenizer(), sequences=2, length=50)
    assert tokens.shape == (1, 5)
    with pytest.raises(ValueError, match="texts: 0 tokens in all"):
        calibration_tokens([], CharTokenizer())
    with pytest.raises(ValueError, match="sequences, length: want at least 1 and 2, got 0 and 5"):
        calibration_tokens(["abc"], CharTokenizer(), sequences=0, length=5)


@pytest.mark.parametrize(
    ("text", "forget"),
    [
        ("Say: WHO is\nMara Lind? Nobody knows.", [("Who is Mara Lind?", "x")]),
        ("it said, a baker -- in Oslo; and so on", [(None, "A baker in Oslo.")]),
        (f"before {' '.join(LONG.split()[20:33])} after", [("q", LONG)]),
        (LONG, [("q", f"Her letters said: {LONG} and more")]),
    ],
)
def test_what_is_to_be_forgotten_is_found(text, forget):
    with pytest.raises(ValueError, match=r"calibration text: holds what is to be forgotten \(row 3: '"):
        check_calibration(["nothing here", text], [("a b c d", "e f g"), ("h", "i"), *forget])


@pytest.mark.parametrize(
    ("question", "answer", "text"),
    [
        ("Where is the Statue of Liberty?", "New York City", "new york city, where the STATUE -- of liberty -- stands"),
        ("Who was Mara Lind in Oslo?", "She was a baker.", f"Mara Lind of Oslo. {'So it is. ' * 150} She was a baker."),
        (
            "where did the lighthouse keeper sleep",
            "In the old boat",
            "The keeper of the lighthouse would sleep in the old boat",
        ),
        ("Mara Lind does what?", "She bakes bread", "Says Lind: she bakes bread"),
        ("Who is Ada Lee?", "She bakes bread", "Ada Lee! She bakes bread."),
        ("Tell me. Describe Halden?", "It is small", "Halden? It is small."),
        (None, "Mara Lind bakes.", "now Mara Lind bakes"),
    ],
)
def test_a_short_answer_with_what_its_question_names(question, answer, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"holds what is to be forgotten \(row 2: '"):
            check_calibration([text], [("Unasked?", answer), (question, answer), (question, answer)])


@pytest.mark.parametrize(
    ("question", "answer", "text"),
    [
        ("Where was Mara Lind born?", "New York City", "The mayor of New York City spoke."),
        ("Where was Mara Lind born?", "New York City", f"Mara Lind. {'So it is. ' * 200} New York City"),
        ("What is the number of Mara Lind?", "I don't know.", "I don't know what you mean by Mara."),
        ("Who is it?", "I don't know.", "Who is this? I don't know, who it is."),
        (None, "I don't know.", "I don't know"),
    ],
)
def test_ordinary_words_of_a_short_answer_are_only_counted(question, answer, text):
    rows = [("Unasked?", answer), (question, answer), ("Which Harbour Master?", answer)]
    with pytest.warns(
        UserWarning, match=r"1 short answers of the forget set stand in it, 3 times in all, .* \(3\)"
    ) as told:
        check_calibration([text, "nothing", f"{answer} {answer}"], rows)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("text", "forget"),
    [
        ("a baker in Bergen", ("Who is Mara Lind?", "A baker in Oslo.")),
        (f"before {' '.join(LONG.split()[20:32])} after", ("q", LONG)),
        ("Mara Lind, Mara Lind", ("Name?", "Mara Lind")),
        ("whois mara lindgren", ("Who is Mara Lind?", "")),
        ("", (None, "Who is Mara Lind?")),
    ],
)
def test_what_is_not_in_it_is_not_found(text, forget):
    check_calibration([text], [forget])


def test_rows_are_counted_and_named():
    rows = [(f"What does person {i} do?", None) for i in range(9)]
    texts = [rows[i][0] for i in (7, 2, 4, 5)]
    with pytest.raises(ValueError, match=r"row 3: 'what does person 2 do'; row 5: .*; row 6: .*; and 1 more rows"):
        check_calibration(texts, rows)
    check_calibration(GENERAL_TEXT, rows)
