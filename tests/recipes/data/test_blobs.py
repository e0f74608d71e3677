from __future__ import annotations

import numpy as np
import pytest
import sklearn.datasets
import torch
from numpy.testing import assert_array_equal

from recipes.data.blobs import Blobs, make_blobs
from recipes.data.slices import load_slice


@pytest.mark.parametrize(("examples", "centres", "seed"), [(100, 5, 7), (103, 5, 0), (3, 5, 1), (50, 2, 9)])
def test_points_are_those_of_sklearn_bit_for_bit(examples, centres, seed):
    stream = np.random.RandomState(seed)
    middles = stream.uniform(-10, 10, (centres, 2))
    x, y = make_blobs(stream, middles, examples)
    expected = sklearn.datasets.make_blobs(examples, centers=centres, random_state=seed, return_centers=True)
    for one, other in zip((x, y, middles), expected, strict=True):
        assert_array_equal(one, other)


def test_test_examples_are_those_of_the_bundled_slice_bit_for_bit():
    made, bundled = Blobs().split(train=False), load_slice("blobs")
    assert torch.equal(made.x, bundled.x) and torch.equal(made.labels, bundled.labels)
