from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import zoo
from recipes.data import task_sequence
from recipes.data.slices import load_slice, sliced
from recipes.data.split import Split
from recipes.data.task_sequence import Joined, load_sequence, number_of_tasks, sequence

EXACT = {"rtol": 0, "atol": 0}


def digits(n=20):
    images = torch.randint(256, (n, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Split(images, torch.arange(n) % 10, [str(k) for k in range(10)])


def test_permuted_tasks_have_the_same_images_with_their_pixels_in_other_orders():
    split = digits()
    tasks = sequence("permuted-mnist", split, 784)
    assert len(tasks) == number_of_tasks("permuted-mnist") == 10
    flat = split.inputs(slice(None)).flatten(1)
    for number, task in enumerate(tasks):
        assert_close(task.inputs(slice(3, 7)), flat[3:7][:, zoo.permutation(number)], **EXACT)
        assert_close(task.targets, split.labels, **EXACT)


@pytest.mark.parametrize("features", [784, 785])
def test_split_tasks_have_two_digits_each(features):
    tasks = sequence("split-mnist", digits(40), features)
    assert len(tasks) == number_of_tasks("split-mnist") == 5
    for number, task in enumerate(tasks):
        assert task.targets.unique().tolist() == [2 * number, 2 * number + 1] and len(task) == 8
        x = task.inputs(torch.tensor([2, 0]))
        assert x.shape == (2, features)
        if features == 785:
            assert (x[:, -1] == number).all()


def test_joined_tasks_are_read_by_any_index():
    parts = sequence("split-mnist", digits(40), 784)
    joined, whole = Joined(parts), torch.cat([part.inputs(slice(None)) for part in parts])
    assert len(joined) == 40 and joined.task.tolist() == [k for k in range(5) for _ in range(8)]
    for index in (slice(None), slice(5, 19), torch.tensor([39, 0, 17, 0, 8]), slice(0, 0)):
        assert_close(joined.inputs(index), whole[index], **EXACT)
    assert_close(joined.targets, torch.cat([part.targets for part in parts]), **EXACT)


def test_limits_and_held_out_examples_are_those_of_each_task(monkeypatch):
    monkeypatch.setattr(task_sequence, "load_split", lambda name, root, train: digits(60))
    tasks = load_sequence("permuted-fashion-mnist", None, train=True, features=784, limit=30)
    assert [len(task) for task in tasks] == [30] * 10
    rest, held = tasks[4].held_out(6)
    assert (len(rest), len(held)) == (24, 6) and rest.order is tasks[4].order
    together = torch.cat([rest.inputs(slice(None)), held.inputs(slice(None))])
    assert_close(together.sort(0).values, tasks[4].inputs(slice(None)).sort(0).values, **EXACT)


@pytest.mark.parametrize(
    ("name", "features", "message"),
    [
        ("permutd-mnist", 784, r"unknown sequence of tasks 'permutd-mnist'. Did you mean 'permuted-mnist'"),
        ("permuted-mnist", 0, r"model.input_size must be \[784\], or \[785\] with a head a task, got \[0\]"),
        ("permuted-mnist", 785, "model must have one head for permuted-mnist"),
    ],
)
def test_what_does_not_fit_is_rejected(name, features, message):
    with pytest.raises(ValueError, match=message):
        sequence(name, digits(), features)


def test_a_sequence_has_the_bundled_slice_of_its_data():
    assert {"permuted-mnist", "split-mnist", "permuted-fashion-mnist"} <= set(sliced())
    images = load_slice("mnist").inputs(slice(None)).flatten(1)
    found = load_slice("permuted-mnist", [784])
    assert len(found) == 300 and found.task.bincount().tolist() == [30] * 10
    restored = found.inputs(slice(60, 90))[:, zoo.permutation(2).argsort()]
    assert all((images == image).all(1).any() for image in restored)
    assert load_slice("split-mnist", [785]).inputs(slice(None)).shape[1] == 785
