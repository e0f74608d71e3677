from __future__ import annotations

import torch
from support.sync import reads_of_device
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.curvature import LINEAR
from bayeslayers.curvature.op import EagerOp, Op, Plan


def test_both_functions_return_the_same():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((4, 3), (2, 3), (2,)))
    found = []
    for function in (Op, EagerOp):
        leaves = [torch.zeros(shape, requires_grad=True) for shape in ((2, 3), (2,))]
        tally = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        plan = Plan(LINEAR, 1, (), "squares", None, None, None)
        y = function.apply(plan, x, weight, bias, *leaves, tally)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, weight, bias, *leaves, tally])])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=0, atol=0)
    assert found[0][-1].tolist() == [4, 1, -1]


def test_the_layers_of_a_tracked_pass_are_counted_without_reading_a_tensor():
    net = torch.nn.Sequential(bl.BayesConv1d(1, 2, 3), torch.nn.Flatten(), bl.BayesLinear(4, 2))
    x = torch.randn(5, 1, 4)
    with bl.tracked(net) as tracker:
        net(x).sum().backward()  # finds where the examples are
        with reads_of_device() as reads:
            net(x).sum().backward()
    assert tracker.examples == 10
    assert reads == []
