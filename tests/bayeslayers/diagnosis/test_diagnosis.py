from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.diagnosis.findings import of_predictions
from recipes.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def problems(diagnosis):
    return [finding.problem for finding in diagnosis.findings]


def trained_net(precision=1e4, prior=0.1):
    """A net whose logit of class 1 is 20 (x1 - x0), with precisions that differ from entry to entry."""
    torch.manual_seed(0)
    layers = [bl.BayesLinear(*shape, prior_precision=prior) for shape in ((2, 16), (16, 2))]
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for site in bl.posterior(net):
            site.precision.copy_(precision * (0.5 + torch.rand_like(site.mean)))
        net[0].weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 1))
        net[1].weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 8) * 20 / 32)
        net[0].bias.fill_(0.1)
        net[1].bias.fill_(0.1)
    return net


def labelled(n=2000, certain=True, seed=0):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=source)
    margin = (x[:, 1] - x[:, 0]) * (20 if certain else 0.3)
    return x, (torch.rand(n, generator=source) < margin.sigmoid()).long()


def test_the_state_of_a_tensor_is_counted_entry_by_entry():
    net = bl.BayesLinear(2, 2, bias=False, prior_precision=4.0)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.2, 0.5], [2.0, -3.0]]))
        net.weight_precision.copy_(torch.tensor([[4.0, 7.9], [16.0, 400.0]]))  # deviations 1/2, .36, 1/4, 1/20
    (state,) = bl.diagnose(net).tensors
    assert (state.name, state.shape, state.size) == ("weight", (2, 2), 4)
    assert (state.undecided, state.untouched, state.at_prior) == (0.25, 0.5, 0.25)
    assert state.signal_to_noise == pytest.approx(0.5 * math.sqrt(7.9))  # torch's median is the lower one
    assert state.precision_over_prior == pytest.approx(7.9 / 4)
    assert state.precision_range == pytest.approx(100)
    variance = (1 / 4 + 1 / 7.9 + 1 / 16 + 1 / 400) / 4
    assert state.noise == pytest.approx(math.sqrt(variance / ((0.04 + 0.25 + 4 + 9) / 4)))
    assert math.isnan(state.effective_lr)


def test_the_padding_row_does_not_count():
    net = bl.BayesEmbedding(3, 2, padding_idx=1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[9.0, 9.0], [0.0, 0.0], [9.0, 9.0]]))
    assert bl.diagnose(net).tensors[0].undecided == 0


@pytest.mark.parametrize("kind", ["VOGN", "OGN", "IVON", "IVON plain"])
def test_the_effective_lr_is_how_far_a_gradient_moves_the_mean(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2))
    options = {"lr": 1e-3, "beta1": 0.0}
    if kind.startswith("IVON"):
        options |= {"weight_decay": 1e-9, "rescale_lr": kind == "IVON", "hess_init": 0.7}
    else:
        net = nn.Sequential(bl.BayesLinear(3, 2))
        options |= {"prior_precision": 1e-9}
    net.double()  # a step is small beside the mean
    optimizer = getattr(bl, kind.split()[0])(net, 50, **options)
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    before = net[0].weight.detach().clone()
    optimizer.step(closure)
    moved = (before - net[0].weight.detach()) / net[0].weight.grad
    assert_close(optimizer.effective_lr(net[0].weight), moved, rtol=1e-6, atol=0)
    state = bl.diagnose(net, optimizer=optimizer).tensors[0]
    assert state.effective_lr == pytest.approx(float(moved.median()), rel=1e-6)
    assert "effective lr" in str(bl.diagnose(net, optimizer=optimizer))
    with pytest.raises(ValueError, match="that the optimizer trains"):
        optimizer.effective_lr(nn.Parameter(torch.zeros(2)))


def test_a_good_posterior_has_no_finding():
    diagnosis = bl.diagnose(trained_net(300.0), labelled(), generator=torch.Generator().manual_seed(0))
    assert problems(diagnosis) == []
    assert problems(bl.diagnose(trained_net())) == []
    assert "Nothing stands out." in str(bl.diagnose(trained_net()))


def test_what_is_wrong_with_the_weights_is_found():
    net = trained_net()
    assert problems(bl.diagnose(nn.Sequential(bl.BayesLinear(3, 4)))) == ["never updated"]
    net[0].weight_precision[0, 0] = math.nan
    assert problems(bl.diagnose(net)) == ["not finite"]
    net = trained_net(precision=60.0, prior=50.0)
    assert problems(bl.diagnose(net)) == ["untouched"]
    for layer in (net[0], net[1]):  # as the posterior of an earlier task, it is no wonder
        for key in ("weight", "bias"):
            setattr(layer, f"{key}_prior_precision", torch.full_like(getattr(layer, key), 50.0))
    assert problems(bl.diagnose(net)) == []
    net = trained_net()
    net[1].weight.data.mul_(1e-4)
    (finding,) = bl.diagnose(net).findings
    assert finding.problem == "noisy layer" and "'1.weight'" in finding.text


@pytest.mark.parametrize(
    ("precision", "certain", "scale", "expected"),
    [
        (3.0, True, 1.0, "too wide"),
        (1e12, True, 1.0, "no uncertainty"),
        (1e4, False, 1.0, "overconfident"),
        (1e4, True, 0.05, "underconfident"),
    ],
)
def test_what_is_wrong_with_predictions_is_found(precision, certain, scale, expected):
    net = trained_net(precision)
    net[1].weight.data.mul_(scale)
    diagnosis = bl.diagnose(net, labelled(certain=certain), num_samples=8, generator=torch.Generator().manual_seed(0))
    assert expected in problems(diagnosis)
    assert len(set(problems(diagnosis)) & {"overconfident", "underconfident"}) == (expected != "no uncertainty")
    text = next(finding.text for finding in diagnosis.findings if finding.problem == expected)
    assert f"{expected}: " in str(diagnosis) and text.endswith(".")
    plain = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert plain["samples"]["accuracy"] == diagnosis.samples.metrics["accuracy"] and len(plain["tensors"]) == 4


def test_a_network_that_guesses_has_that_finding_alone():
    net, (x, y) = trained_net(1e12), labelled()
    random_labels = torch.randint(2, y.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net[1].weight.mul_(1e-3)
    assert problems(bl.diagnose(net, (x, random_labels))) == ["nothing learned"]
    assert "with 2 classes" in bl.diagnose(net, (x, random_labels)).findings[0].text
    assert problems(bl.diagnose(net, (x, y))) == ["no uncertainty", "underconfident"]  # its labels are right


def test_samples_that_agree_are_not_called_too_wide():
    net = trained_net(1e12)
    means, samples = (bl.evaluate(net, labelled(), method=method, num_samples=2) for method in ("mean", "sample"))
    worse = replace(samples, metrics=samples.metrics | {"accuracy": 0.5, "nll": 9.0})
    found = [finding.problem for finding in of_predictions(means, worse)]
    assert "no uncertainty" in found and "too wide" not in found


def test_regression_compares_errors():
    torch.manual_seed(0)
    net = bl.BayesLinear(1, 1, bias=False, prior_precision=0.01)
    net.likelihood = bl.Gaussian(0.01)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.weight_precision.fill_(0.5)
    x = torch.linspace(-1, 1, 50).unsqueeze(1)
    diagnosis = bl.diagnose(net, (x, x + 0.1 * torch.randn(50, 1)), num_samples=2)
    assert "too wide" in problems(diagnosis) and "rmse" in str(diagnosis)


def test_wrong_input_is_named():
    net = trained_net()
    with pytest.raises(TypeError, match="read twice, got an iterator"):
        bl.diagnose(net, iter([labelled()]))
    with pytest.raises(TypeError, match="must be VOGN, OGN or IVON, got Adam"):
        bl.diagnose(net, optimizer=torch.optim.Adam(net.parameters()))
    with pytest.raises(ValueError, match="must have Bayesian layers"):
        bl.diagnose(nn.Linear(2, 2))


@pytest.mark.parametrize("name", zoo.list_posteriors())
def test_bundled_posteriors_have_no_finding(name):
    assert problems(bl.diagnose(zoo.load(name))) == []


def test_the_command_prints_writes_and_compares(capsys, data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    words = ["diagnose", "mlp-mnist", "--data-root", str(data_root), "--limit", "50", "--num-samples", "2"]
    assert main([*words, "--data", "card", "--plot", str(tmp_path / "snr.png")]) == 0
    out = capsys.readouterr().out
    assert "hidden1.weight" in out and "means -> 2 samples: accuracy" in out and (tmp_path / "snr.png").is_file()
    assert main([*words, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert len(plain["tensors"]) == 6 and plain["findings"] == [] and "samples" not in plain


def test_many_tensors_are_shown_by_their_noise():
    net = nn.Sequential(*(bl.BayesLinear(1, 2, bias=False) for _ in range(50)))
    with torch.no_grad():
        for i, layer in enumerate(net):
            layer.weight.fill_(1.0 if i < 45 else 1e-3)
            layer.weight_precision[0, 0] = 2e3
    shown = str(bl.diagnose(net))
    assert "The 40 noisiest of 50 tensors." in shown and "49.weight" in shown
