from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.prediction.window import _spans


class Recorder(nn.Module):
    """A pointwise network that notes the sizes of what it sees."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = bl.BayesConv2d(3, 2, 1), []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return self.layer(x)


@pytest.fixture
def x():
    return torch.rand(2, 3, 20, 50, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("extent", [5, 8, 9, 12, 13, 40, 57])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_windows_cover_an_extent_and_overlap_by_at_least_that_share(extent, overlap):
    spans = _spans(extent, 8, overlap)
    assert spans[0].start == 0 and spans[-1].stop == extent
    for before, after in itertools.pairwise(spans):
        assert before.start < after.start <= before.stop - int(8 * overlap)
        assert after.stop - after.start == 8


def test_a_pointwise_network_gives_what_it_gives_for_the_whole(x):
    net = Recorder()
    whole = net(x)
    for overlap in (0.0, 0.3, 0.6):
        assert_close(bl.SlidingWindow(net, (8, 12), overlap, resize=False)(x), whole)


def test_memory_holds_one_window(x):
    net = Recorder()
    bl.SlidingWindow(net, (8, 12), resize=False)(x)
    assert set(net.seen) == {(2, 3, 8, 12)} and len(net.seen) == 3 * 6
    net.seen.clear()
    bl.SlidingWindow(net, (8, 12))(x)  # resized to 8 x 20
    assert set(net.seen) == {(2, 3, 8, 12)} and len(net.seen) == 2


def test_an_image_is_resized_to_cover_a_window_and_the_output_to_the_image(x):
    net = Recorder()
    output = bl.SlidingWindow(net, (40, 100))(x)
    assert net.seen == [(2, 3, 40, 100)] and output.shape == (2, 2, 20, 50)
    large = F.interpolate(x, (40, 100), mode="bilinear", antialias=True)
    assert_close(output, F.interpolate(net(large), (20, 50), mode="bilinear"))
    net.seen.clear()
    assert bl.SlidingWindow(net, (20, 50))(x).equal(net(x))


def test_a_small_image_that_is_not_resized_is_one_window(x):
    net = Recorder()
    assert bl.SlidingWindow(net, (99, 99), resize=False)(x).equal(net.layer(x))
    assert net.seen == [(2, 3, 20, 50)]


def test_outputs_weigh_less_at_the_edges_of_a_window():
    class Edges(nn.Module):  # 1 at the edges of what it sees
        def forward(self, x):
            inner = torch.zeros_like(x[..., 1:-1])
            return F.pad(inner, (1, 1), value=1.0)

    output = bl.SlidingWindow(Edges(), (1, 5), 0.5, resize=False)(torch.zeros(1, 1, 1, 8))[0, 0, 0]
    assert_close(output[[0, -1]], torch.ones(2))
    assert 0 < float(output[1:-1].max()) < 0.5


@pytest.mark.parametrize("method", ["sample", "mean"])
def test_a_sample_is_one_network_for_all_windows(x, method):
    net = Recorder()
    nn.init.normal_(net.layer.weight_precision.fill_(4.0), 4.0, 0.1)
    window, found = bl.SlidingWindow(net, (8, 12), resize=False), []
    for model in (window, net):
        found.append(bl.predict(model, x, 8, method=method, generator=torch.Generator().manual_seed(3)))
    for name in ("mean", "total", "epistemic"):
        assert_close(getattr(found[0], name), getattr(found[1], name), rtol=1e-4, atol=1e-5)
    if method == "sample":
        assert float(found[0].epistemic.max()) > 1e-3


def test_it_has_the_likelihood_of_its_network(x):
    net = Recorder()
    net.likelihood = bl.Categorical(255)
    assert bl.predict(bl.SlidingWindow(net, (8, 12)), x, method="mean").likelihood == bl.Categorical(255)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8,),), "window must be a height and a width"),
        (((0, 8),), "window must be an integer >= 1, got 0"),
        (((8, 8), 1.0), r"overlap must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_rule_that_is_broken_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bl.SlidingWindow(Recorder(), *arguments)
