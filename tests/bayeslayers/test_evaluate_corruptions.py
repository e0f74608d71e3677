from __future__ import annotations

import json

import pytest
import torch
from support.ranks import WHAT_FORKS_SAY, run_ranks
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayeslayers as bl
from bayeslayers.corruptions import KINDS, SEVERITIES
from bayeslayers.metrics import classification_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = ["fog", "gaussian_noise"]
SEED = 5


def generator(seed=SEED):
    return torch.Generator().manual_seed(seed)


def network(outputs=3, likelihood=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), bl.BayesLinear(28 * 28, outputs, init_precision=400.0))
    net.likelihood = likelihood
    return net


def batches(n=26, size=10):
    x = torch.rand(n, 1, 28, 28, generator=generator(1)) * torch.linspace(0.2, 1, 28)
    return DataLoader(TensorDataset(x, torch.arange(n) % 3), size)


@pytest.mark.parametrize("method", ["sample", "mean"])
def test_the_metrics_are_those_of_a_loop_by_hand(method):
    net, data = network(), batches()
    options = {"num_samples": 3, "method": method}
    found = bl.evaluate(net, data, corruptions=SOME, generator=generator(), **options)
    own = generator()
    plain = bl.evaluate(net, data, generator=own, **options)
    assert found.corruptions.kinds == tuple(SOME)
    for row, kind in enumerate(SOME):
        for severity in SEVERITIES:
            total, count, probs, labels = {"accuracy": 0.0, "nll": 0.0}, 0, [], []
            for number, (x, y) in enumerate(data):
                seed = (SEED * 1_000_003 + KINDS.index(kind)) * 1_000_003 + number
                images = bl.corrupt(x, kind, severity, generator=torch.Generator().manual_seed(seed))
                prediction = bl.predict(net, images, generator=own, **options)
                metrics = classification_metrics(prediction, y)
                total = {key: value + len(y) * metrics[key] for key, value in total.items()}
                count += len(y)
                probs.append(prediction.probs.double())
                labels.append(y)
            for key, value in total.items():
                assert float(found.corruptions.values[key][row, severity - 1]) == pytest.approx(value / count)
            confidence, predicted = torch.cat(probs).max(1)
            hits, bins = (predicted == torch.cat(labels)).double(), (confidence * 15).long().clamp_max(14)
            gaps = [abs(float((hits - confidence)[bins == k].sum())) for k in range(15)]
            assert float(found.corruptions.values["ece"][row, severity - 1]) == pytest.approx(sum(gaps) / count)
    assert {key: found.metrics[key] for key in plain.metrics} == pytest.approx(plain.metrics, nan_ok=True)
    assert found.corruptions.clean == {key: plain.metrics[key] for key in ("accuracy", "nll", "ece")}
    assert set(found.metrics) - set(plain.metrics) == {"corrupted_accuracy", "corrupted_nll", "corrupted_ece"}


def test_all_kinds_are_measured_and_their_means_are_over_kinds():
    found = bl.evaluate(network(), batches(6), corruptions=True, num_samples=2, generator=generator())
    corruptions = found.corruptions
    assert corruptions.kinds == KINDS
    for key, value in corruptions.values.items():
        assert value.shape == (15, 5) and value.isfinite().all()
        assert_close(corruptions.by_severity()[key], value.sum(0) / 15)
        assert found.metrics[f"corrupted_{key}"] == pytest.approx(float(value.sum()) / 75)
    plain = json.loads(json.dumps(found.to_dict()))["corruptions"]
    assert plain["kinds"]["fog"]["nll"] == corruptions.values["nll"][KINDS.index("fog")].tolist()
    assert plain["mean"]["ece"] == corruptions.by_severity()["ece"].tolist() and plain["clean"] == corruptions.clean
    rows = [line.split() for line in str(corruptions).splitlines()]
    (row,) = (row for row in rows if row[1:2] == ["5"])
    assert row[3] == f"{corruptions.by_severity()['accuracy'][4]:.4f}"
    worst = int(corruptions.values["accuracy"][:, 4].argmin())
    assert row[-3:-1] == [f"{corruptions.values['accuracy'][worst, 4]:.4f}", KINDS[worst]]
    assert str(corruptions) in str(found) and "15 kinds" in str(found)


def test_images_depend_on_the_seed_alone_and_severities_share_their_noise():
    first, second = network(), network()
    nn.init.normal_(second[1].weight, std=2.0)
    seen: list[list[torch.Tensor]] = [[], []]
    data = list(batches())  # a loader draws from torch's own generator
    state = torch.get_rng_state()
    for images, net in zip(seen, (first, second), strict=True):
        net.register_forward_pre_hook(lambda _, args, images=images: images.append(args[0]))
        own = generator()
        torch.randn(7 + len(seen[0]), generator=own)  # whatever has been drawn before
        bl.evaluate(net, data, corruptions=["gaussian_noise"], generator=own, method="mean")
    assert len(seen[0]) == 3 * 6
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    weak, strong = seen[0][3] - seen[0][0], seen[0][15] - seen[0][0]
    inside = (seen[0][15] > 0) & (seen[0][15] < 1) & (seen[0][3] > 0) & (seen[0][3] < 1)
    assert_close((strong / weak)[inside & (weak.abs() > 0.01)].median(), torch.tensor(0.15 / 0.04), rtol=1e-3, atol=0)
    other: list[torch.Tensor] = []
    second.register_forward_pre_hook(lambda _, args: other.append(args[0]))
    bl.evaluate(second, data, corruptions=["gaussian_noise"], generator=generator(6), method="mean")
    assert torch.equal(other[0], seen[0][0]) and not torch.equal(other[3], seen[0][3])
    assert torch.equal(torch.get_rng_state(), state)


def test_what_has_no_corruption_is_refused_before_it_is_predicted():
    net, (x, y) = network(), next(iter(batches()))
    net.register_forward_pre_hook(lambda *_: pytest.fail("it was called"))
    for data, corruptions, error, message in (
        ((x, y), ["fgo"], ValueError, "corruptions must be kinds of corruption, got 'fgo'. Did you mean 'fog'"),
        ((x, y), [], ValueError, "must name at least one"),
        ((x, y), "fog", TypeError, "corruptions must be a list of names, got 'fog'"),
        (iter([(x, y)]), True, TypeError, "data must be read once for each corruption, got an iterator"),
        ((2 * x, y), True, ValueError, r"images must have values in \[0, 1\], got .* to (1.99|2)"),
        ((x[..., :20], y), True, ValueError, "h, w >= 28"),
        ((bl.Inputs(x), y), True, TypeError, "got Inputs"),
    ):
        with pytest.raises(error, match=message):
            bl.evaluate(net, data, corruptions=corruptions)
    with pytest.raises(ValueError, match="corruptions must be left out for real targets, got 15"):
        bl.evaluate(network(likelihood=bl.Gaussian(variance=1.0)), (x, torch.zeros(len(x), 3)), corruptions=True)
    assert bl.evaluate(network(), (x, y), num_samples=1).corruptions is None


@pytest.mark.filterwarnings(WHAT_FORKS_SAY)
def test_ranks_find_what_one_process_finds(tmp_path):
    def work(world, folder):
        own = list(batches())[world.rank :: world.size]
        found = bl.evaluate(network(), own, corruptions=SOME, num_samples=2, generator=generator(), sync=True)
        return found.to_dict()["corruptions"]

    expected = bl.evaluate(network(), batches(), corruptions=SOME, num_samples=2, generator=generator())
    expected = expected.to_dict()["corruptions"]
    for found in run_ranks(work, tmp_path):
        assert found["clean"] == pytest.approx(expected["clean"])
        for kind in SOME:
            for key, values in expected["kinds"][kind].items():
                assert found["kinds"][kind][key] == pytest.approx(values), (kind, key)
