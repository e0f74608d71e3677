from __future__ import annotations

import pytest

from recipes.data.names import by_short_name, short_name, shortest_ends, without_folders


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("cifar10", "cifar10"),
        ("npz:cifar_{split}.npz", "cifar"),
        ("npz:/data/cifar/{split}.npz", "cifar"),
        ("npz:/data/my.pets.npz", "my.pets"),
        ("imagefolder:../pets/", "pets"),
        ("npz:.npz", "npz:.npz"),
    ],
)
def test_a_data_set_has_a_name_without_its_place(name, short):
    assert short_name(name) == short


def test_data_sets_of_one_name_are_told_apart_by_their_folders_or_refused():
    names = ["npz:/a/old/pets.npz", "npz:/b/old/pets.npz", "npz:pets.npz"]
    assert by_short_name([*names, *names]) == dict(zip(["a/old/pets", "b/old/pets", "pets"], names, strict=True))
    for other in ("npz:svhn.npz", "npz:svhn_{split}.npz", "imagefolder:svhn"):
        with pytest.raises(ValueError, match="names of their own, got two of the name 'svhn'"):
            by_short_name(["svhn", other])


def test_paths_are_told_apart_by_their_ends():
    assert shortest_ends([("a", "b", "c"), ("b", "c"), ("d",)]) == ["a/b/c", "b/c", "d"]


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/Users/alice/run.yaml", "run.yaml"),
        ("../../alice/run.yaml", "run.yaml"),
        ("configs/run.yaml", "configs/run.yaml"),
        ("--config=/Users/alice/run.yaml", "--config=run.yaml"),
        ("--data=npz:/Users/alice/x_{split}.npz", "--data=npz:x_{split}.npz"),
        ("npz:/Users/o'brien/x, y.npz", "npz:x, y.npz"),
        ("imagefolder:/Users/alice/pets/", "imagefolder:pets"),
        ('["npz:/a/x.npz","svhn","imagefolder:/b/y/"]', '["npz:x.npz","svhn","imagefolder:y"]'),
        ("--optimizer.lr=0.2", "--optimizer.lr=0.2"),
        ("svhn", "svhn"),
    ],
)
def test_a_command_says_nothing_of_the_machine(word, shown):
    assert without_folders(word) == shown
