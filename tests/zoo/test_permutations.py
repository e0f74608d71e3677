from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

import zoo

FIRST, LAST, DIGEST = [55, 273, 481, 378, 109, 293], [489, 500, 122], "774593491cf50453"


def test_permutations_are_the_same_forever():
    assert zoo.permutation(0)[:6].tolist() == FIRST and zoo.permutation(9)[-3:].tolist() == LAST
    whole = torch.stack([zoo.permutation(task) for task in range(10)])
    assert hashlib.sha256(",".join(map(str, whole.flatten().tolist())).encode()).hexdigest()[:16] == DIGEST


def test_each_is_a_permutation_of_its_own():
    whole = torch.stack([zoo.permutation(task) for task in range(10)])
    assert whole.dtype == torch.long and whole.shape == (10, 784)
    assert (whole.sort(1).values == torch.arange(784)).all()
    assert len({tuple(row.tolist()) for row in whole}) == 10
    zoo.permutation(2).zero_()  # a copy for each caller
    assert (zoo.permutation(2) == whole[2]).all()


@pytest.mark.parametrize("task", [-1, 10, 0.5])
def test_there_are_ten(task):
    with pytest.raises(ValueError, match="task must be from 0 to 9"):
        zoo.permutation(task)


def test_heads_of_a_network_answer_for_their_own_classes_alone():
    torch.manual_seed(0)
    net = zoo.create("multi_head_mlp", num_classes=4, heads=2, input_size=[5], widths=[8])
    x = torch.cat([torch.rand(6, 4), torch.tensor([[0.0], [1.0]]).repeat(3, 1)], 1)
    probs = net(x).softmax(1)
    assert (probs[::2, 2:] == 0).all() and (probs[1::2, :2] == 0).all()
    torch.testing.assert_close(net(x)[::2, :2], nn.Sequential(*net.children())(x[::2, :4])[:, :2], rtol=0, atol=0)
    net(x)[::2].log_softmax(1)[:, 0].sum().backward()
    assert (net.output.weight.grad[2:] == 0).all() and (net.output.weight.grad[:2] != 0).any()
    with pytest.raises(ValueError, match="input_size must be one number > 1"):
        zoo.create("multi_head_mlp", input_size=[1, 28, 28])
    with pytest.raises(ValueError, match="heads must share the 10 outputs equally, got 3"):
        zoo.create("multi_head_mlp", heads=3)
