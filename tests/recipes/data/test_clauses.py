from __future__ import annotations

import math

import torch

from recipes.data import clauses


def mood_of(sentence: str) -> int:
    """The mood of a sentence, read off its words."""
    parts, count = [[]], []
    for word in sentence.split():
        if word in ("and", "but"):
            count.append(word)
            parts.append([])
        else:
            parts[-1].append(word)
    last = max((k + 1 for k, joint in enumerate(count) if joint == "but"), default=len(parts))
    total = 0
    for number, words in enumerate(parts):
        value = 1 if words[-1].removeprefix("other-").startswith("good") else -1
        value *= -1 if any(word.startswith("negation") for word in words) else 1
        value *= 2 if any(word.startswith("degree") for word in words) else 1
        total += value * (2 if number >= last else 1)
    return total


def test_labels_are_the_mood_but_for_the_noise():
    points = clauses.sentences(4000, 0)
    moods = [mood_of(clauses.text(ids)) for ids in points.x]
    assert 0 not in moods
    wrong = sum((mood > 0) != bool(label) for mood, label in zip(moods, points.labels, strict=True))
    assert abs(wrong - 4000 * clauses.NOISE) < 5 * math.sqrt(4000 * clauses.NOISE * (1 - clauses.NOISE))
    assert abs(float(points.labels.float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(4000)


def test_sentences_are_ids_that_depend_on_the_seed_alone():
    points, again, other = (clauses.sentences(50, seed) for seed in (0, 0, 1))
    assert points.x.shape == (50, clauses.LENGTH) and points.x.dtype == torch.long
    assert torch.equal(points.x, again.x) and torch.equal(points.labels, again.labels)
    assert not torch.equal(points.x, other.x)
    assert 0 <= int(points.x.min()) and int(points.x.max()) < len(clauses.WORDS) == len(set(clauses.WORDS))
    assert next(clauses.lines(points)).split(": ")[0] in clauses.CLASSES


def test_other_sentences_have_words_of_their_own():
    known, other = clauses.sentences(300, 0), clauses.sentences(300, 0, other=True)
    shared = {clauses.WORDS[k] for k in set(known.x.unique().tolist()) & set(other.x.unique().tolist())}
    assert all(word in ("-", "is", "and", "but") or word.startswith(("degree", "negation")) for word in shared)
    assert any("other-" in clauses.text(ids) for ids in other.x)
