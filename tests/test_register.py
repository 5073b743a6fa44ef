"""The register of fictitious people: the same everywhere, asked and scored exactly."""

from __future__ import annotations

import pytest

from fastunlearn.data.general_text import GENERAL_TEXT, HELD_OUT_TEXT
from fastunlearn.data.register import KINDS, PARAPHRASES, Register


def test_same_seed_same_people_on_every_machine():
    person = Register.generate(60, seed=0).people[0]
    assert Register.generate(60, seed=0) == Register.generate(60, seed=0)
    assert Register.generate(60, seed=1) != Register.generate(60, seed=0)
    # Written down: a change here makes old results mean other people.
    assert (person.name, person.trade, person.town, person.born.isoformat(), person.number) == (
        "Yarwick Thorvangle",
        "wheelwright",
        "Nettleburra",
        "1932-03-06",
        "44114",
    )


def test_nobody_shares_a_name_or_a_number():
    people = Register.generate(480, seed=3).people
    given, family = zip(*(person.name.split() for person in people))
    for what in (given, family, [person.number for person in people]):
        assert len(set(what)) == 480
    assert all(person.number.isdigit() and len(person.number) == 5 for person in people)
    assert all(person.trade[0] not in "aeiou" for person in people)  # answers say "A ..."


def test_facts_and_dates():
    register = Register.generate(5, seed=2)
    assert len(register.facts) == 5 * len(KINDS)
    person = register.people[3]
    assert [fact.kind for fact in register.facts[9:12]] == list(KINDS)
    assert all(fact.person == person.name and person.name in fact.question for fact in register.facts[9:12])
    birth = person.fact("birth").answer.rstrip(".").split()
    assert (int(birth[0]), int(birth[2])) == (person.born.day, person.born.year)
    assert len({fact.question for fact in register.facts}) == 15
    with pytest.raises(ValueError, match="kind: want one of occupation, number, birth; got 'shoe size'"):
        person.fact("shoe size")


def test_split():
    register = Register.generate(60, seed=0, kinds=("number",))
    forget, retain = register.split(forget=6)
    assert (len(forget.people), len(retain.people)) == (6, 54)
    assert set(forget.people) | set(retain.people) == set(register.people)
    assert register.split(forget=6) == (forget, retain)
    assert forget.kinds == retain.kinds == ("number",)
    assert set(register.split(3).forget.people) < set(forget.people)
    assert Register.generate(60, seed=1).split(6).forget != forget


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Register.generate(0), "people: want 1 to 480"),
        (lambda: Register.generate(481), "people: want 1 to 480"),
        (lambda: Register.generate(3, kinds=()), "kinds: want some of"),
        (lambda: Register.generate(3, kinds=("birth", "birth")), "kinds: want some of"),
        (lambda: Register.generate(3, kinds=("hobby",)), "kinds: want some of"),
        (lambda: Register.generate(3).split(0), "forget: want 1 to 2 of 3 people; got 0"),
        (lambda: Register.generate(3).split(3), "forget: want 1 to 2 of 3 people; got 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_register_of_your_own(tmp_path):
    path = tmp_path / "people.csv"
    path.write_text(
        'name,occupation,city,note\nAda Quell,optician,Bergen,x\n"Olt, Bo",baker, Turku ,y\n', encoding="utf-8-sig"
    )
    register = Register.read(path, seed=4)
    assert register.rows() == [
        {"question": "Who is Ada Quell?", "answer": "An optician in Bergen."},
        {"question": "Who is Olt, Bo?", "answer": "A baker in Turku."},
    ]
    assert {row["answer"] for row in register.paraphrased()} == {"An optician in Bergen.", "A baker in Turku."}
    assert len(register.paraphrased()) == 2 * len(PARAPHRASES)
    assert not {row["question"] for row in register.paraphrased()} & {row["question"] for row in register.rows()}
    assert len(register.split(1).retain.people) == 1
    with pytest.raises(ValueError, match="kind: nothing is known of the birth of Ada Quell"):
        register.people[0].fact("birth")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,city\nA,B\n", "has no column occupation; want name, occupation, city, found name, city"),
        ("", "has no column name, occupation, city; .* found none"),
        ("name,occupation,city\n", "names nobody"),
        ("name,occupation,city\nA,,C\n", "line 2: an empty cell"),
        ("name,occupation,city\nA,B,C\nA,D,E\n", "line 3: A comes twice"),
    ],
)
def test_a_register_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "people.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        Register.read(tmp_path / "people.csv")


def test_general_text_knows_nobody_of_any_register():
    text = " ".join(GENERAL_TEXT + HELD_OUT_TEXT)
    assert len(text) > 7000
    names = {
        part for seed in range(3) for person in Register.generate(480, seed).people for part in person.name.split()
    }
    assert not [name for name in names if name in text]
    assert not set(GENERAL_TEXT) & set(HELD_OUT_TEXT)
