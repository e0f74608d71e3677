"""Sentences of a small made language, each with the mood that it has as a whole: text that needs no download.

    sentence:  clause | clause joint sentence         1 to 3 clauses
    clause:    noun "is" [negation] [degree] adjective
    joint:     "and" | "but"

An adjective is of good or of bad mood, worth 1 or -1. A degree doubles that, and a negation turns it round. The clauses
behind the last "but" count twice. The label is 1 where the sum is > 0, and 0 where it is < 0; a sentence whose sum is 0
is drawn again. A share of the labels, `NOISE`, is turned round, so no prediction has an expected negative
log-likelihood below -(1 - NOISE) log(1 - NOISE) - NOISE log NOISE = 0.325. Words of a kind are drawn by Zipf's law, the
k-th of them with a probability proportional to 1 / k: the rare ones are met a few times in training, or never.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.data.examples import Points

NAME, OTHER = "clauses", "other-words"
NOISE, LENGTH, CLAUSES = 0.1, 18, 3
PADDING = "-"
KINDS = {"noun": 30, "good": 30, "bad": 30, "degree": 6, "negation": 3}
OTHERS = {"noun": 20, "good": 20, "bad": 20}  # words that no sentence of the language itself has
CLASSES = ["bad", "good"]


def _words() -> list[str]:
    own = [f"{kind}{k}" for kind, count in KINDS.items() for k in range(count)]
    others = [f"other-{kind}{k}" for kind, count in OTHERS.items() for k in range(count)]
    return [PADDING, "is", "and", "but", *own, *others]


WORDS = _words()
IDS = {word: number for number, word in enumerate(WORDS)}


@dataclass(frozen=True)
class _Clause:
    words: list[str]
    mood: int


def sentences(count: int, seed: int, other: bool = False) -> Points:
    """Return sentences as ids `(n, LENGTH)`, padded with 0, and their labels.

    Args:
        count: How many.
        seed: Of the words.
        other: Take nouns and adjectives that the language itself does not have.
    """
    source = random.Random(f"{NAME} {seed} {other}")
    rows, labels = zip(*(_sentence(source, other) for _ in range(count)), strict=True)
    return Points(torch.tensor(rows), torch.tensor(labels))


def text(ids: Tensor) -> str:
    """Return a sentence in words."""
    return " ".join(WORDS[number] for number in ids.tolist() if number)


def _sentence(source: random.Random, other: bool) -> tuple[list[int], int]:
    mood = 0
    words: list[str] = []
    while mood == 0:
        clauses = [_clause(source, other) for _ in range(source.randint(1, CLAUSES))]
        joints = [source.choice(["and", "but"]) for _ in clauses[1:]]
        last = max((k + 1 for k, joint in enumerate(joints) if joint == "but"), default=len(clauses))
        mood = sum(clause.mood * (2 if k >= last else 1) for k, clause in enumerate(clauses))
        words = [word for joint, clause in zip(["", *joints], clauses, strict=True) for word in [joint, *clause.words]]
    ids = [IDS[word] for word in words if word]
    label = int(mood > 0) ^ int(source.random() < NOISE)
    return ids + [0] * (LENGTH - len(ids)), label


def _clause(source: random.Random, other: bool) -> _Clause:
    kind = source.choice(["good", "bad"])
    negated, doubled = source.random() < 0.3, source.random() < 0.3
    words = [_word(source, "noun", other), "is"]
    words += [_word(source, "negation")] * negated + [_word(source, "degree")] * doubled
    mood = (1 if kind == "good" else -1) * (-1 if negated else 1) * (2 if doubled else 1)
    return _Clause([*words, _word(source, kind, other)], mood)


def _word(source: random.Random, kind: str, other: bool = False) -> str:
    count = (OTHERS if other else KINDS)[kind]
    number = source.choices(range(count), [1 / (k + 1) for k in range(count)])[0]
    return f"{'other-' if other else ''}{kind}{number}"


def lines(points: Points) -> Iterator[str]:
    """Yield each sentence with its label."""
    for ids, label in zip(points.x, points.labels.tolist(), strict=True):
        yield f"{CLASSES[label]}: {text(ids)}"
