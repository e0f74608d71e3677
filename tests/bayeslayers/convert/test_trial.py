"""`to_bayesian(example_inputs=)`: all refusals of a step at once, and none where a step passes."""

import pytest
import torch
from torch import nn

import bayeslayers as bl
from bayeslayers.curvature.refusal import CurvatureRefusal


class Mixed(nn.Module):
    """Its layers `b` and `c` get rows that are not the examples; its parameters are sorted and added to such rows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.position, self.token = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.rand(4) + 1)
        self.drop = nn.Dropout()

    def forward(self, x):
        rows = self.b(self.a(self.drop(x)).reshape(4, -1).T) + self.position
        return self.c(rows * self.token.sort()[0])


def step(net, x):
    optimizer = bl.VOGN(net, dataset_size=100)
    with optimizer.sampled():
        net(x).square().sum(1).mean().backward()
    optimizer.step()


@pytest.fixture
def x():
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def test_a_trial_reports_every_refusal_at_once(x):
    net, report = bl.to_bayesian(Mixed(), example_inputs=x)
    assert report.refusals is not None and sorted(report.exclude) == ["b", "c", "position", "token"]
    reasons = {refusal.name: refusal.reason for refusal in report.refusals}
    assert "must run over the examples" in reasons["b"] and "'mul'" in reasons["token"]
    assert f"exclude={report.exclude}" in str(report) and "'position': parameter 'position'" in str(report)
    with pytest.raises(CurvatureRefusal, match=r"example_inputs=batch\) reports all such layers at once"):
        step(net, x)


def test_without_its_refusals_a_network_takes_a_step(x):
    _, report = bl.to_bayesian(Mixed(), example_inputs=x)
    net, again = bl.to_bayesian(Mixed(), exclude=report.exclude, example_inputs=x)
    assert again.refusals == () and "exact curvature of every Bayesian layer" in str(again)
    step(net, x)


def test_a_refused_op_of_a_layer_is_reported_by_the_name_of_the_layer():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            rows = x.transpose(0, 1).reshape(4, 3, 4)  # as many rows as examples, of several examples each
            return self.head(x.mean(1)) + self.attention(rows, rows, rows)[0].sum()

    _, report = bl.to_bayesian(Folded(), example_inputs=torch.randn(4, 3, 4))
    assert report.exclude == ["attention"]
    _, again = bl.to_bayesian(Folded(), exclude=report.exclude, example_inputs=torch.randn(4, 3, 4))
    assert again.refusals == ()


def test_a_trial_leaves_network_gradients_and_random_numbers_alone(x):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).eval()
    before, state = {key: value.clone() for key, value in net.state_dict().items()}, torch.get_rng_state()
    _, report = bl.to_bayesian(net, inplace=True, example_inputs=(x,))
    assert report.refusals == () and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is None for p in net.parameters()) and not any(m.training for m in net.modules())


def test_there_is_no_trial_unless_asked_for():
    _, report = bl.to_bayesian(nn.Linear(3, 2))
    assert report.refusals is None and report.exclude == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(1, 3), "two examples or more, got 1"),
        (torch.tensor(1.0), "two examples or more, got 0"),
        ("words", "two examples or more, got str"),
    ],
)
def test_a_trial_needs_a_batch(inputs, message):
    net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=f"example_inputs must be a batch of {message}"):
        bl.to_bayesian(net, inplace=True, example_inputs=inputs)
    assert type(net) is nn.Linear


def test_a_trial_needs_outputs_with_gradients():
    class Detached(nn.Linear):
        def forward(self, input):
            return super().forward(input).detach()

    with pytest.raises(ValueError, match="must return tensors that a gradient goes through for a trial, got Tensor"):
        bl.to_bayesian(nn.Sequential(Detached(3, 2)), example_inputs=torch.randn(2, 3))
