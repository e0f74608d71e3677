"""Layers whose input does not depend on the batch, as position tables: exact by examples, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.per_example import EXACT, F64, bayesian, potential, squares_by_autograd, tracked_squares
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bayeslayers as bl

pytestmark = pytest.mark.usefixtures("one_thread")
N, WIDTH = 4, 6


class Positions(nn.Module):
    """Adds a table of positions to tokens, as its class says: plainly, or after it was turned and processed."""

    def __init__(self, form: str):
        super().__init__()
        self.form = form
        self.tokens, self.places, self.out = nn.Embedding(9, WIDTH), nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 3)
        self.bend, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.register_buffer("scale", torch.rand(WIDTH, **F64))

    def forward(self, ids):
        tokens, steps = self.tokens(ids), ids.shape[1]
        places = self.places(torch.arange(steps))
        if self.form == "row":
            tokens = tokens + self.places(torch.arange(steps)[None])
        elif self.form == "expanded":
            tokens = tokens * places.expand(len(ids), -1, -1)
        elif self.form == "processed":  # by layers, views and a buffer
            places = self.norm(self.bend(places.view(steps, 1, WIDTH)).tanh() * self.scale)
            tokens += places.permute(1, 0, 2).contiguous()[:, :steps]
        elif self.form == "used twice":
            tokens = (tokens + places).tanh() * self.places(torch.arange(steps).flip(0))
        elif self.form == "windows":
            folded = tokens[:, None].expand(-1, 2, -1, -1).reshape(2 * len(ids), steps, WIDTH)
            tokens = (folded + places).unflatten(0, (-1, 2)).mean(1)
        elif self.form == "attention":
            bias = (places @ places.T)[None, None]
            tokens = F.scaled_dot_product_attention(tokens[:, None], tokens[:, None], tokens[:, None], attn_mask=bias)
        return self.out(tokens.tanh().reshape(len(ids), steps, WIDTH)).mean(1)


FORMS = ["row", "expanded", "processed", "used twice", "windows", "attention"]


def loss(net, x):
    return potential(net(x))


def make_ids(steps, n=N):
    return torch.randint(9, (n, steps), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("steps", [N, 5])  # as many positions as examples, and others
@pytest.mark.parametrize("form", FORMS)
def test_a_table_of_positions_is_exact(form, steps):
    net, ids = bayesian(Positions(form)), make_ids(steps)
    expected = {k: v for k, v in squares_by_autograd_used(net, ids).items()}
    found = tracked_squares(net, loss, ids)
    assert_close({name: found[name] for name in expected}, expected, **EXACT)
    assert expected["places.weight"].abs().sum() > 0


def squares_by_autograd_used(net, ids):
    """Return the oracle's sums for the layers that the form uses."""
    unused = () if net.form == "processed" else ("bend", "norm")
    for name in unused:
        getattr(net, name).requires_grad_(False)
    return squares_by_autograd(net, loss, ids)


def test_parts_and_other_sizes_follow_the_first_look():
    net = bayesian(Positions("row"))
    tracker = bl.sampling.Tracker(bl.sampling.tracker.layers_of(net), model=net)
    for name in ("bend", "norm"):
        getattr(net, name).requires_grad_(False)
    for sizes in ((N, 5), (3, 7), (1, 5)):
        ids = make_ids(sizes[1], sizes[0])
        with tracker.track():
            loss(net, ids).backward()
        expected = squares_by_autograd(net, loss, ids)
        assert_close({name: tracker.leaves[name].grad for name in expected}, expected, **EXACT)


class Reads(Positions):
    def forward(self, ids):
        return self.out(torch.cdist(self.tokens(ids), self.places(torch.arange(WIDTH)))).mean(1)


def test_an_op_that_mixes_rows_is_refused():
    net = bayesian(Reads("cdist"))
    with bl.tracked(net), pytest.raises(RuntimeError, match=r"output of layer 'places'.* in 'cdist'"):
        loss(net, make_ids(5)).backward()


def test_a_table_under_checkpointing_is_refused():
    class Checkpointed(Positions):
        def forward(self, ids):
            return checkpoint(super().forward, ids, use_reentrant=False)

    net = bayesian(Checkpointed("row"))
    with bl.tracked(net), pytest.raises(RuntimeError, match="must run outside of activation checkpointing"):
        loss(net, make_ids(5)).backward()


SMALL = {"vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


@pytest.mark.parametrize("name", ["Bert", "DistilBert", "GPT2", "T5"])
def test_transformers_are_exact(name):
    transformers = pytest.importorskip("transformers")
    configs = {
        "Bert": {**SMALL, "max_position_embeddings": 9, "attention_probs_dropout_prob": 0.0, "num_labels": 2},
        "DistilBert": {"vocab_size": 60, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12, "num_labels": 2},
        "GPT2": {"vocab_size": 60, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 9},
        "T5": {"vocab_size": 60, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2},
    }
    config = getattr(transformers, f"{name}Config")(**configs[name])
    if name in ("T5", "GPT2"):
        plain, inputs = (transformers.T5EncoderModel if name == "T5" else transformers.GPT2Model)(config), {}
    else:
        plain = getattr(transformers, f"{name}ForSequenceClassification")(config)
        inputs = {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).repeat(2, 1)}
    torch.manual_seed(0)
    net, ids = bl.to_bayesian(plain.double().eval())[0], make_ids(5) + 2

    def loss(net, ids, mask=None):
        output = net(input_ids=ids, **({} if mask is None else {"attention_mask": mask}))
        return potential(output[0])

    rows = [ids, *inputs.values()]
    assert_close(net(input_ids=ids)[0], plain(input_ids=ids)[0], rtol=0, atol=0)
    assert_close(bl.to_deterministic(net)(input_ids=ids)[0], plain(input_ids=ids)[0], rtol=0, atol=0)
    uncertain = {site.mean for site in bl.posterior(net)}
    for parameter in net.parameters():
        parameter.requires_grad_(parameter in uncertain)
    used = {n for n, p in net.named_parameters() if p.requires_grad}
    with bl.tracked(net) as tracker:
        loss(net, *rows).backward()
    expected = squares_by_autograd(net, loss, *rows)
    assert_close({n: tracker.leaves[n].grad for n in used}, expected, **EXACT)
    assert len(used) > 5
