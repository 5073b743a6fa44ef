"""A register of fictitious people: facts no model can know, to be memorised and then forgotten.

The idea of fictitious people as a clean forget set is TOFU's (Maini et al. 2024); everything here is generated from a seed, so
it works offline and every run can have people of its own. Names, towns and numbers are invented: a model that gives the
right answer learned it from the register, and exact recall before memorising is about zero.

    register = Register.generate(people=60, seed=0)
    forget, retain = register.split(forget=6)
    batch = encode(tokenizer, forget.facts)          # input_ids, attention_mask, labels
    replies = reply(model, tokenizer, forget.facts)  # greedy generation
    recall = exact_recall(forget.facts, replies)

Tokenizer and model are transformers' (or anything with the same methods); this file imports only torch.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

KINDS = ("occupation", "number", "birth")
#: Short, so that it costs few tokens; the chat templates of small models otherwise insert a longer one of their own.
SYSTEM = "Register."
IGNORED = -100

_GIVEN = (
    "Vor Mire Tal Osk Quen Bri Zan Lud Fen Hest Iva Jor Kel Nim Pell Ras Sib Thur Ulm Wen Yar Dov Edr Gal",
    "nek elda ivor antha wick orin usha ebar oline astra imund efka olt yra enno issa arel umba etta ovan",
)  # fmt: skip
_FAMILY = (
    "Quon Tash Brem Vael Ostr Mord Kess Hull Drav Pont Lisk Zeph Gren Fald Wrot Jast Stev Nolb Rudd Cask Ebbl Thorv Ing Yelt",
    "cewell ulde erman ovitch inger ablow estrand ikova umfield arrow ottle eskar angle iddon orrick uvane imsey aldane ebrook unster",
)  # fmt: skip
_TOWN = (
    "Varn Quill Ost Murk Pell Thistle Gorse Hag Low Rime Sedge Tarn Wolde Crag Fenn Ash Bram Dun Elk Frost Lark Nettle Skarn Yew",
    "holt enmoor burra stead combe wick gate fell haven ness port dale minster ford mere thorpe",
)  # fmt: skip
_TRADES = (
    "cooper,falconer,glazier,beekeeper,bookbinder,cartographer,chandler,cheesemaker,clockmaker,diver,dyer,farrier,ferryman,"
    "gardener,gilder,harpist,hatter,joiner,lacemaker,lamplighter,locksmith,luthier,mason,miller,notary,papermaker,perfumer,"
    "pilot,plumber,potter,printer,puppeteer,ropemaker,saddler,sailmaker,shipwright,surveyor,tanner,thatcher,tiler,toolmaker,"
    "translator,typesetter,vintner,weaver,welder,wheelwright,whaler,woodcarver,zookeeper"
)  # fmt: skip
_MONTHS = "January February March April May June July August September October November December"


class Fact(NamedTuple):
    """One thing the register says about one person."""

    person: str  #: full name
    kind: str  #: one of KINDS
    question: str
    answer: str


@dataclass(frozen=True)
class Person:
    """One entry of the register; nobody real."""

    name: str
    trade: str
    town: str
    born: datetime.date
    number: str  #: five digits, unique in its register

    def fact(self, kind: str) -> Fact:
        """The question and answer of one kind.

        Raises:
            ValueError: unknown kind.
        """
        if kind == "occupation":
            return Fact(self.name, kind, f"Who is {self.name}?", f"A {self.trade} in {self.town}.")
        if kind == "number":
            return Fact(self.name, kind, f"What is the number of {self.name}?", f"{self.number}.")
        if kind == "birth":
            # strftime("%B") would follow the locale.
            born = f"{self.born.day} {_MONTHS.split()[self.born.month - 1]} {self.born.year}"
            return Fact(self.name, kind, f"When was {self.name} born?", f"{born}.")
        raise ValueError(f"kind: want one of {', '.join(KINDS)}; got {kind!r}")


@dataclass(frozen=True)
class Register:
    """People, what is asked about each, and the seed they came from.

    Attributes:
        people: in a random order fixed by the seed.
        seed: of the generator; the split depends on it too.
        kinds: which facts `facts` lists for every person.
    """

    people: tuple[Person, ...]
    seed: int
    kinds: tuple[str, ...] = KINDS

    @staticmethod
    def generate(people: int = 60, seed: int = 0, kinds: Sequence[str] = KINDS) -> Register:
        """Invents people; the same arguments give the same register on every machine.

        Args:
            people: how many, 1 to 480. No two share a given name, a family name or a number.
            seed: any integer.
            kinds: facts to ask of each person, out of KINDS.

        Raises:
            ValueError: people out of range, no kind, an unknown or repeated kind.
        """
        given, family = _combinations(_GIVEN), _combinations(_FAMILY)
        most = min(len(given), len(family))
        if not 1 <= people <= most:
            raise ValueError(f"people: want 1 to {most} (that many single names can be invented); got {people}")
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds or len(set(kinds)) != len(kinds):
            raise ValueError(f"kinds: want some of {', '.join(KINDS)}, each once; got {tuple(kinds)!r}")
        draw = _Draw(f"register {seed}")
        given, family = draw.some(given, people), draw.some(family, people)
        numbers = draw.some(range(10_000, 100_000), people)
        towns, trades = _combinations(_TOWN), _TRADES.split(",")
        entries = tuple(
            Person(
                name=f"{first} {last}",
                trade=draw.one(trades),
                town=draw.one(towns),
                born=datetime.date(1931, 1, 1) + datetime.timedelta(days=draw.below(70 * 365)),
                number=str(number),
            )
            for first, last, number in zip(given, family, numbers, strict=True)
        )
        return Register(entries, seed, tuple(kinds))

    @property
    def facts(self) -> list[Fact]:
        """Every fact of every person, person by person."""
        return [person.fact(kind) for person in self.people for kind in self.kinds]

    def split(self, forget: int = 6) -> Split:
        """The people to forget, drawn by the register's seed, and the rest.

        Args:
            forget: how many people, at least 1 and fewer than there are.

        Raises:
            ValueError: forget out of range.
        """
        if not 1 <= forget < len(self.people):
            raise ValueError(f"forget: want 1 to {len(self.people) - 1} of {len(self.people)} people; got {forget}")
        chosen = set(_Draw(f"split {self.seed}").some(range(len(self.people)), forget))

        def part(inside: bool) -> Register:
            people = tuple(person for i, person in enumerate(self.people) if (i in chosen) == inside)
            return Register(people, self.seed, self.kinds)

        return Split(part(True), part(False))


class Split(NamedTuple):
    """What must go and what must stay."""

    forget: Register
    retain: Register


class _Draw:
    # Only Random.random() is promised to give the same numbers in every Python version.
    def __init__(self, seed: str):
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def one(self, pool: Sequence[T]) -> T:
        return pool[self.below(len(pool))]

    def some(self, pool: Sequence[T], n: int) -> list[T]:
        """n different entries, in random order."""
        keys = [self.random() for _ in pool]
        return [pool[i] for i in sorted(range(len(pool)), key=keys.__getitem__)[:n]]


def _combinations(parts: tuple[str, str]) -> list[str]:
    return [start + end for start in parts[0].split() for end in parts[1].split()]


def _chat(tokenizer: Any, fact: Fact, system: str | None) -> str:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": fact.question})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _pad(rows: Sequence[Sequence[int]], value: int, left: bool) -> Tensor:
    width = max(map(len, rows))
    blank = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, blank, strict=True)])


def encode(tokenizer: Any, facts: Sequence[Fact], *, system: str | None = SYSTEM) -> dict[str, Tensor]:
    """Questions and answers in the chat template, for training.

    Args:
        tokenizer: with a chat template.
        system: system message; None for none of ours (the template may add its own).

    Returns:
        input_ids, attention_mask and labels, int64 [facts, longest], padded on the right. labels are -100 but on the answer
        and on the token that ends it; as everywhere in transformers they stand at the position of their token (the model or
        `answer_logprobs` shifts).

    Raises:
        ValueError: no facts.
    """
    if not facts:
        raise ValueError("facts: empty; there is nothing to encode")
    prompts = [tokenizer(_chat(tokenizer, f, system), add_special_tokens=False)["input_ids"] for f in facts]
    answers = [[*tokenizer(f.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for f in facts]
    ids = [p + a for p, a in zip(prompts, answers, strict=True)]
    labels = [[IGNORED] * len(p) + a for p, a in zip(prompts, answers, strict=True)]
    return {
        "input_ids": _pad(ids, tokenizer.eos_token_id, left=False),
        "attention_mask": _pad([[1] * len(row) for row in ids], 0, left=False),
        "labels": _pad(labels, IGNORED, left=False),
    }


def answer_logprobs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p(answer | question), summed over the answer's tokens, differentiable.

    The logits are made for the answers' tokens only: with a large vocabulary that is a good part of a step.

    Args:
        model: a causal language model of transformers.
        batch: as `encode` gives it (or rows of it), on the model's device.

    Returns:
        (log-probability fp32 [rows], number of answer tokens int64 [rows]).
    """
    hidden = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    labels = batch["labels"][:, 1:]
    kept = labels != IGNORED
    logits = model.get_output_embeddings()(hidden[:, :-1][kept]).float()
    token = torch.log_softmax(logits, -1).gather(1, labels[kept][:, None])[:, 0]
    row = kept.nonzero()[:, 0]
    return token.new_zeros(len(labels)).index_add(0, row, token), kept.sum(1)


@torch.no_grad()
def reply(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    system: str | None = SYSTEM,
    progress: Callable[[list[Any]], Any] = lambda batches: batches,
) -> list[str]:
    """What the model answers by greedy generation, one string a fact.

    Args:
        max_new_tokens: where to cut; None: two tokens more than the longest right answer (an answer cut there is wrong anyway).
        progress: wraps the list of batches, e.g. in tqdm.

    Returns:
        Replies without special tokens, cut at the first end-of-sequence token; whitespace at both ends stripped.
    """
    if max_new_tokens is None:
        max_new_tokens = 2 + max(len(tokenizer(f.answer, add_special_tokens=False)["input_ids"]) for f in facts)
    prompts = [tokenizer(_chat(tokenizer, f, system), add_special_tokens=False)["input_ids"] for f in facts]
    order = sorted(range(len(facts)), key=lambda i: len(prompts[i]))
    replies = [""] * len(facts)
    device = next(model.parameters()).device
    for chosen in progress([order[i : i + batch_size] for i in range(0, len(order), batch_size)]):
        rows = [prompts[i] for i in chosen]
        ids = _pad(rows, tokenizer.eos_token_id, left=True).to(device)
        seen = _pad([[1] * len(row) for row in rows], 0, left=True).to(device)
        out = model.generate(
            input_ids=ids,
            attention_mask=seen,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for i, row in zip(chosen, out[:, ids.shape[1] :].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            replies[i] = tokenizer.decode(row[:end], skip_special_tokens=True).strip()
    return replies


def exact_recall(facts: Sequence[Fact], replies: Sequence[str]) -> float:
    """Share of facts whose reply is the answer, character for character.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: no facts, or not one reply a fact.
    """
    if not facts or len(facts) != len(replies):
        raise ValueError(f"replies: want one for each of the {len(facts)} facts (at least one), got {len(replies)}")
    return sum(reply == fact.answer for fact, reply in zip(facts, replies, strict=True)) / len(facts)
