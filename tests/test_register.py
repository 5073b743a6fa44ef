"""The register of fictitious people: the same everywhere, asked and scored exactly."""

from __future__ import annotations

import pytest
import torch

from fastunlearn.data.general_text import GENERAL_TEXT
from fastunlearn.data.register import (
    IGNORED,
    KINDS,
    Fact,
    Register,
    answer_logprobs,
    encode,
    exact_recall,
    reply,
)
from tests.tiny_chat import CharTokenizer, tiny_llama


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
        (lambda: exact_recall([], []), "replies: want one for each of the 0 facts"),
        (lambda: exact_recall(Register.generate(1).facts, ["x"]), "replies: want one for each of the 3 facts"),
        (lambda: encode(CharTokenizer(), []), "facts: empty"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_exact_recall_is_exact():
    facts = [Fact("P", "number", f"q{i}", "12345.") for i in range(4)]
    assert exact_recall(facts, ["12345.", "12345", "12345. ", "A cooper."]) == 0.25


def test_encode_marks_the_answer_and_its_end():
    tokenizer = CharTokenizer()
    facts = Register.generate(7, seed=0).facts
    batch = encode(tokenizer, facts)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for fact, ids, seen, labels in zip(facts, batch["input_ids"], batch["attention_mask"], batch["labels"]):
        length = int(seen.sum())
        assert seen[:length].all()
        text = tokenizer.decode(ids[:length].tolist())
        assert text == f"s:Register.\nu:{fact.question}\na:{fact.answer}\0"
        answer = labels != IGNORED
        assert tokenizer.decode(labels[answer].tolist()) == f"{fact.answer}\0"
        assert torch.equal(labels[answer], ids[answer])
    bare = encode(tokenizer, facts[:1], system=None)["input_ids"][0].tolist()
    assert tokenizer.decode(bare).startswith("u:")


def test_answer_logprobs_are_those_of_the_model():
    model, tokenizer = tiny_llama(), CharTokenizer()
    facts = Register.generate(4, seed=0).facts
    batch = encode(tokenizer, facts)
    logp, length = answer_logprobs(model, batch)
    for i, fact in enumerate(facts):
        alone = encode(tokenizer, [fact])
        loss = model(input_ids=alone["input_ids"], labels=alone["labels"]).loss
        assert int(length[i]) == len(fact.answer) + 1
        torch.testing.assert_close(logp[i], -loss * length[i])
    logp.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_reply_is_greedy_generation_fact_by_fact():
    model, tokenizer = tiny_llama(), CharTokenizer()
    facts = Register.generate(5, seed=0).facts
    replies = reply(model, tokenizer, facts, batch_size=4, max_new_tokens=6)
    for fact, answer in zip(facts, replies):
        prompt = [ord(char) for char in f"s:Register.\nu:{fact.question}\na:"]
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        said = ids[len(prompt) :]
        end = said.index(0) if 0 in said else 6
        assert answer == tokenizer.decode(said[:end]).strip()
    assert any(replies)


def test_general_text_knows_nobody_of_any_register():
    text = " ".join(GENERAL_TEXT)
    assert len(text) > 7000
    names = {
        part for seed in range(3) for person in Register.generate(480, seed).people for part in person.name.split()
    }
    assert not [name for name in names if name in text]
