"""Classifiers of sentences: every tensor is Bayesian and moves, padding does not matter, and posteriors are kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import bayeslayers as bl
import zoo

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"text_transformer": {"width": 8, "depth": 1, "heads": 2}, "text_lstm": {"width": 6, "hidden": 5}}
IDS = torch.randint(1, 20, (4, 9), generator=torch.Generator().manual_seed(0))
each_network = pytest.mark.parametrize("name", SMALL)


def make(name, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return zoo.create(name, vocabulary=20, num_classes=3, **SMALL[name], **options)


@each_network
def test_a_step_of_vogn_moves_every_tensor(name):
    net = make(name)
    sites = list(bl.posterior(net))
    assert {site.name for site in sites} == {key for key, _ in net.named_parameters()}
    before = [site.mean.detach().clone() for site in sites]
    optimizer = bl.VOGN(net, 10, lr=1.0, precision_lr=1.0, prior_precision=1e-12, init_precision=1e8)
    with optimizer.sampled():
        F.cross_entropy(net(IDS), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert [site.name for site, mean in zip(sites, before, strict=True) if torch.equal(site.mean, mean)] == []
    assert [site.name for site in sites if not (site.precision > site.prior_precision).any()] == []


@each_network
def test_the_padding_behind_a_sentence_changes_nothing_but_in_an_lstm_its_other_direction(name):
    net = make(name).eval()
    short = net(IDS[:, :6])
    padded = net(F.pad(IDS[:, :6], (0, 3)))
    assert padded.isfinite().all() and short.shape == (4, 3)
    if name == "text_transformer":
        assert_close(padded, short)
        assert not torch.allclose(net(IDS[:, :6].flip(1)), short)  # it knows the places
    assert net(torch.zeros(2, 4, dtype=torch.long)).isfinite().all()


@each_network
def test_a_posterior_is_saved_loaded_and_predicts(name, tmp_path):
    net = make(name)
    card = bl.save_posterior(net, tmp_path / "posterior")
    assert (card.builder, card.input_size) == (name, [18])
    loaded = zoo.load(tmp_path / "posterior")
    assert_close(dict(loaded.state_dict()), dict(net.state_dict()), rtol=0, atol=0)
    assert (bl.predict(loaded, IDS, 4).epistemic > 0).all()


@each_network
def test_what_is_no_sentence_is_refused(name):
    net = make(name)
    for bad in (torch.rand(4, 9), IDS[0], torch.ones(2, 19, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"x must be ids of words, whole numbers of shape \(n, t\) with t <= 18"):
            net(bad)
    with pytest.raises(ValueError, match=r"input_size must be the number of words, as \[18\]"):
        make(name, input_size=[3, 4])
    with pytest.raises(ValueError, match="width must be an integer >= 1, got 0"):
        zoo.create(name, width=0)


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 8 and 3"):
        zoo.create("text_transformer", width=8, heads=3)
