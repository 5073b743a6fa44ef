"""A register of fictitious people: facts no model can know, to be memorised and then forgotten.

The idea of fictitious people as a clean forget set is TOFU's (Maini et al. 2024); everything here is generated from a seed, so
it works offline and every run can have people of its own. Names, towns and numbers are invented: a model that gives the
right answer learned it from the register, and exact recall before memorising is about zero.

    register = Register.generate(people=60, seed=0)   # or Register.read("people.csv")
    forget, retain = register.split(forget=6)
    rows = encode_rows(forget.rows(), tokenizer, system=SYSTEM)
"""

from __future__ import annotations

import csv
import datetime
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

KINDS = ("occupation", "number", "birth")
#: the question of kind "occupation", asked in other words: the model never saw them while it memorised
PARAPHRASES = (
    "What does {name} do, and where?",
    "Where does {name} work, and as what?",
    "Tell me who {name} is.",
    "What is {name}'s occupation and town?",
    "Do you know {name}? Who is that?",
)
_COLUMNS = ("name", "occupation", "city")
#: Short, so that it costs few tokens; the chat templates of small models otherwise insert a longer one of their own.
SYSTEM = "Register."

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
    born: datetime.date | None = None
    number: str = ""  #: five digits, unique in its register

    def fact(self, kind: str) -> Fact:
        """The question and answer of one kind.

        Raises:
            ValueError: unknown kind.
        """
        if kind == "occupation":
            return Fact(self.name, kind, f"Who is {self.name}?", self._occupation())
        if kind == "number" and self.number:
            return Fact(self.name, kind, f"What is the number of {self.name}?", f"{self.number}.")
        if kind == "birth" and self.born is not None:
            # strftime("%B") would follow the locale.
            born = f"{self.born.day} {_MONTHS.split()[self.born.month - 1]} {self.born.year}"
            return Fact(self.name, kind, f"When was {self.name} born?", f"{born}.")
        if kind in KINDS:
            raise ValueError(f"kind: nothing is known of the {kind} of {self.name}")
        raise ValueError(f"kind: want one of {', '.join(KINDS)}; got {kind!r}")

    def _occupation(self) -> str:
        return f"{'An' if self.trade[:1].lower() in 'aeiou' else 'A'} {self.trade} in {self.town}."

    def paraphrased(self) -> list[Fact]:
        """The occupation, asked in other words."""
        return [Fact(self.name, "occupation", q.format(name=self.name), self._occupation()) for q in PARAPHRASES]


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

    @staticmethod
    def read(path: str | os.PathLike[str], seed: int = 0) -> Register:
        """A register of your own: a CSV file with the columns name, occupation and city; facts are of kind "occupation".

        Raises:
            ValueError: a column is missing, a cell is empty, a name comes twice, or there is nobody.
        """
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"register: {path} has no column {', '.join(missing)}; want {', '.join(_COLUMNS)}, found "
                    f"{', '.join(reader.fieldnames or ()) or 'none'}"
                )
            people, seen = [], set[str]()
            for row in reader:
                cells = [(row[name] or "").strip() for name in _COLUMNS]
                if not all(cells):
                    raise ValueError(f"register: {path}, line {reader.line_num}: an empty cell")
                if cells[0] in seen:
                    raise ValueError(f"register: {path}, line {reader.line_num}: {cells[0]} comes twice")
                seen.add(cells[0])
                people.append(Person(name=cells[0], trade=cells[1], town=cells[2]))
        if not people:
            raise ValueError(f"register: {path} names nobody")
        return Register(tuple(people), seed, ("occupation",))

    def rows(self) -> list[dict[str, str]]:
        """The facts as rows with question and answer."""
        return [{"question": fact.question, "answer": fact.answer} for fact in self.facts]

    def paraphrased(self) -> list[dict[str, str]]:
        """The occupations asked in other words, as rows with question and answer."""
        facts = [fact for person in self.people for fact in person.paraphrased()]
        return [{"question": fact.question, "answer": fact.answer} for fact in facts]

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
