"""Recurrent layers and cells: torch's own outputs at the mean, draws, and exact curvature of every tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from support.per_example import EXACT, F64, bayesian, potential, squares_by_autograd, tracked_squares
from support.steps import assert_every_tensor_moves
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bayeslayers as bl

pytestmark = pytest.mark.usefixtures("one_thread")
SAME = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
LENGTHS = torch.tensor([5, 3, 5, 1])


def case_id(value: object) -> str:
    return getattr(value, "__name__", str(value))


class Sequences(nn.Module):
    """A recurrent layer that runs `uses` times, from outputs and last states of which everything depends."""

    def __init__(self, kind, uses=1, packed=False, batch_first=True, first_state=False, **options):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=batch_first, **options)
        size = (1 + self.rnn.bidirectional) * (self.rnn.proj_size or 4)
        self.norm, self.head = nn.BatchNorm1d(size).eval(), nn.Linear(size, 2)
        self.uses, self.packed, self.first_state = uses, packed, first_state

    def forward(self, x, lengths):
        state, total = None, 0
        for use in range(self.uses):
            z = x * (use + 1)
            if self.packed:
                z = pack_padded_sequence(z, lengths, batch_first=True, enforce_sorted=False)
            elif not self.rnn.batch_first:
                z = z.transpose(0, 1)
            output, state = self.rnn(z, state if self.first_state else None)
            if self.packed:
                output = pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0]
            elif not self.rnn.batch_first:
                output = output.transpose(0, 1)
            states = state if isinstance(state, tuple) else (state,)
            total = (
                total + self.head(self.norm(output.sum(1))) + sum(each.sin().sum((0, 2))[:, None] for each in states)
            )
        return total


CASES = [
    (nn.LSTM, {}),
    (nn.LSTM, {"bidirectional": True, "packed": True}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "packed": True, "uses": 2}),
    (nn.LSTM, {"num_layers": 2, "proj_size": 2, "bias": False, "uses": 3, "first_state": True}),
    (nn.LSTM, {"num_layers": 2, "batch_first": False, "uses": 7}),
    (nn.GRU, {"num_layers": 2, "packed": True}),
    (nn.GRU, {"bidirectional": True, "uses": 2, "first_state": True}),
    (nn.RNN, {"bidirectional": True, "packed": True}),
    (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "uses": 2}),
]
per_case = pytest.mark.parametrize(("kind", "options"), CASES, ids=case_id)


def loss(net, x, lengths):
    return potential(net(x, lengths))


def make_net(kind=nn.LSTM, **options) -> nn.Module:
    return bayesian(Sequences(kind, **options))


def make_input() -> torch.Tensor:
    return torch.randn(len(LENGTHS), 5, 3, **F64)


@per_case
def test_outputs_and_gradients_are_those_of_torch(kind, options):
    net, x = make_net(kind, **options), make_input()
    ordinary = bl.to_deterministic(net)
    assert type(ordinary.rnn) is kind
    expected = ordinary(x, LENGTHS)
    assert_close(net(x, LENGTHS), expected, **SAME)
    grads = torch.autograd.grad(potential(expected), list(ordinary.parameters()))
    with bl.tracked(net):
        output = net(x, LENGTHS)
        assert_close(output, expected, **CLOSE)
        tracked = torch.autograd.grad(potential(output), list(net.parameters()))
    assert_close(tracked, grads, **EXACT)


@per_case
def test_squares_are_those_of_autograd(kind, options):
    net, x = make_net(kind, **options), make_input()
    assert_close(tracked_squares(net, loss, x, LENGTHS), squares_by_autograd(net, loss, x, LENGTHS), **EXACT)


def test_squares_add_up_over_parts_of_a_batch_and_under_checkpointing():
    net, x = make_net(num_layers=2, bidirectional=True), make_input()
    expected = squares_by_autograd(net, loss, x, LENGTHS)
    assert_close(tracked_squares(net, loss, x, LENGTHS, parts=2), expected, **EXACT)

    def checkpointed(net, x, lengths):
        return potential(checkpoint(net, x, lengths, use_reentrant=False))

    assert_close(tracked_squares(net, checkpointed, x, LENGTHS), expected, **EXACT)


def test_a_part_of_the_batch_stands_for_all_of_it():
    net, x = make_net(uses=2), make_input()
    tracker = bl.sampling.Tracker(bl.sampling.layers_with_curvature(bl.posterior(net)), model=net)
    with tracker.track(fraction=0.5, generator=torch.Generator().manual_seed(0)):
        loss(net, x, LENGTHS).backward()
    start = int(4 * float(torch.rand((), generator=torch.Generator().manual_seed(0))))
    rows = [start % 4, (start + 1) % 4]
    expected = squares_by_autograd(net, loss, x[rows], LENGTHS[rows])
    for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0"):
        assert_close(tracker.leaves[name].grad, 2 * expected[name], **EXACT)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=case_id)
def test_samples_are_used_by_torchs_kernel_and_under_vmap(kind):
    net, x = make_net(kind, num_layers=2).float(), make_input().float()
    noise = {site.name: torch.randn_like(site.mean) for site in bl.posterior(net)}
    drawn = {site.name: (site.mean + noise[site.name] * site.deviation).detach() for site in bl.posterior(net)}
    with bl.sampled(net, noise=noise):
        output = net(x, LENGTHS)
    assert_close(output, functional_call(bl.to_deterministic(net), drawn, (x, LENGTHS)))
    assert not torch.equal(output, net(x, LENGTHS))
    batch = bl.Inputs(x, LENGTHS)
    one, several = (
        bl.predict(net, batch, 4, generator=torch.Generator().manual_seed(0), sample_chunk=chunk) for chunk in (1, 4)
    )
    assert (one.epistemic > 0).all()
    assert_close(several.probs, one.probs)


def test_a_single_example_may_come_without_its_dimension():
    layer, x = bl.BayesLSTM(3, 4, bidirectional=True).double(), torch.randn(5, 3, **F64)
    state = torch.randn(2, 4, **F64), torch.randn(2, 4, **F64)
    with bl.tracked(layer):
        found = layer(x, state)
    assert_close(found, layer(x, state), **CLOSE)


def test_a_packed_sequence_keeps_its_order():
    layer, x = bl.BayesGRU(3, 4).double(), torch.randn(5, 4, 3, **F64)
    for lengths, ordered in ((LENGTHS, False), (LENGTHS.sort(descending=True)[0], True)):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=ordered)
        with bl.tracked(layer):
            found = layer(packed)
        assert isinstance(found[0], PackedSequence)
        assert_close(found, layer(packed), **CLOSE)


def test_a_network_may_take_packed_sequences():
    class OfPacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4, bidirectional=True), nn.Linear(8, 2)

        def forward(self, packed):
            return self.head(self.rnn(packed)[1].transpose(0, 1).flatten(1))

    net, x = bayesian(OfPacked()), make_input()

    def of_rows(net, x, lengths):
        return potential(net(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)))

    expected = squares_by_autograd(net, of_rows, x, LENGTHS)
    assert_close(tracked_squares(net, of_rows, x, LENGTHS), expected, **EXACT)


def test_dropout_between_layers_is_drawn_while_training():
    layer, x = bl.BayesLSTM(3, 8, num_layers=2, dropout=0.5), torch.randn(5, 2, 3)
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        with bl.tracked(layer):
            outputs.append(layer(x)[0])
    assert_close(*outputs, **SAME)
    assert not torch.equal(outputs[0], layer.eval()(x)[0])
    with bl.tracked(layer):
        assert_close(layer(x)[0], bl.to_deterministic(layer)(x)[0])


def test_a_wrong_state_is_refused_as_by_torch():
    layer, x = bl.BayesLSTM(3, 4), torch.randn(5, 2, 3)
    with bl.tracked(layer), pytest.raises(RuntimeError, match="Expected hidden size"):
        layer(x, (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))


class Steps(nn.Module):
    """A cell that runs once for each step, as decoders do."""

    def __init__(self, kind, **options):
        super().__init__()
        self.cell, self.head = kind(3, 4, **options), nn.Linear(4, 2)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


CELLS = [(nn.LSTMCell, {}), (nn.GRUCell, {"bias": False}), (nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu"})]


@pytest.mark.parametrize(("kind", "options"), CELLS, ids=case_id)
def test_cells_are_those_of_torch_with_exact_squares(kind, options):
    net, x = bayesian(Steps(kind, **options)), make_input()
    ordinary = bl.to_deterministic(net)
    assert type(ordinary.cell) is kind
    assert_close(net(x), ordinary(x), **SAME)
    with bl.tracked(net):
        assert_close(net(x), ordinary(x), **CLOSE)
        assert_close(net(x[:1]), ordinary(x[:1]), **CLOSE)
        row = net.cell(x[0, 0])
    assert_close(row, ordinary.cell(x[0, 0]), **CLOSE)

    def of_steps(net, x):
        return potential(net(x))

    assert_close(tracked_squares(net, of_steps, x), squares_by_autograd(net, of_steps, x), **EXACT)


class TestTraining:
    def make(self) -> tuple[nn.Module, bl.Inputs, torch.Tensor]:
        torch.manual_seed(0)
        return (
            Sequences(nn.LSTM, num_layers=2, bidirectional=True, packed=True),
            bl.Inputs(torch.randn(4, 5, 3), LENGTHS),
            torch.tensor([0, 1, 1, 0]),
        )

    @pytest.mark.parametrize(
        ("method", "options"),
        [(bl.VOGN, {"num_samples": 2}), (bl.IVON, {}), (bl.KFAC, {}), (bl.NoisyKFAC, {}), (bl.BBB, {})],
        ids=case_id,
    )
    def test_every_tensor_and_its_precision_move(self, method, options):
        assert_every_tensor_moves(*self.make(), method, **options)

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=case_id)
    def test_samples_at_once_are_those_one_after_the_other(self, kind):
        states = []
        for vectorise in (False, True):
            torch.manual_seed(0)
            net = nn.Sequential(kind(3, 4, num_layers=2, batch_first=True), _First(), nn.Linear(4, 2)).double()
            x, generator = torch.randn(4, 5, 3, **F64), torch.Generator().manual_seed(0)
            optimizer = bl.VOGN(net, dataset_size=20, num_samples=3, vectorise=vectorise, generator=generator)

            def closure(net=net, x=x, optimizer=optimizer, vectorise=vectorise):
                optimizer.zero_grad()
                loss = net(x).square().mean()
                if not vectorise:
                    loss.backward()
                return loss

            optimizer.step(closure)
            states.append(net.state_dict())
        assert_close(*states, rtol=1e-10, atol=1e-12)

    def test_a_posterior_is_saved_and_loaded_and_ordinary_weights_load(self, tmp_path):
        net, batch, _ = self.make()
        ordinary = copy.deepcopy(net)
        optimizer = bl.VOGN(net, dataset_size=20)
        with optimizer.sampled():
            net(*batch.args).square().mean().backward()
        optimizer.step()
        bl.save_posterior(net, tmp_path)
        other = bl.to_bayesian(self.make()[0])[0]
        bl.load_posterior(tmp_path, other)
        assert_close(other.state_dict(), net.state_dict(), **SAME)
        other.load_state_dict(ordinary.state_dict())
        assert_close(other.eval()(*batch.args), ordinary.eval()(*batch.args), **SAME)
        layer = bl.BayesLSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        layer.load_state_dict(ordinary.rnn.state_dict())
        assert_close(layer.weight_hh_l1_reverse, ordinary.rnn.weight_hh_l1_reverse, **SAME)

    def test_methods_of_prediction_work_or_refuse(self):
        net, _, _ = self.make()
        net = bl.to_bayesian(net.rnn)[0]
        head = nn.Sequential(net, _First(), nn.Linear(8, 2)).eval()
        x = torch.randn(3, 5, 3)
        linearised = bl.predict(head, x, 4, method="linearised")
        assert (linearised.epistemic > 0).all()
        with pytest.raises(ValueError, match=r"no moment rule for BayesLSTM \(layer '0'\).*Use method 'sample'"):
            bl.predict(head, x, 4, method="moments")

    def test_kfac_takes_the_diagonal_and_the_report_says_so(self):
        net, report = bl.to_bayesian(self.make()[0])
        assert net.rnn.factor_sizes() is None
        reasons = {entry.name: entry.reason for entry in report.entries}
        assert reasons["rnn.weight_hh_l1"] == "diagonal under K-FAC" and reasons["head.weight"] == ""


class _First(nn.Module):
    def forward(self, outputs):
        return outputs[0].mean(1)


def test_a_subclass_with_a_forward_of_its_own_stays_with_the_reason():
    class Reversed(nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(input.flip(0), hx)

    _, report = bl.to_bayesian(nn.Sequential(nn.Linear(3, 3), Reversed(3, 3)))
    assert report.entries[2].reason == "the forward of Reversed is its own, for which there is no curvature rule"


def test_half_precision_is_tracked():
    net, x = make_net(num_layers=2).to(torch.bfloat16), make_input().bfloat16()
    with bl.tracked(net) as tracker:
        potential(net(x, LENGTHS).float()).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in tracker.leaves.values())
