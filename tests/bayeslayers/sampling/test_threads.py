"""Threads that share a model: each gets what it would get alone, and copies and casts hold no draw."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bayeslayers as bl
from bayeslayers.layers.scope import OUTSIDE, Scope, current, opened, scope_for
from bayeslayers.prediction.predict import METHODS
from bayeslayers.sampling import sharing

pytestmark = pytest.mark.usefixtures("one_thread")
SAME = {"rtol": 0, "atol": 0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recurrent(nn.Module):
    """A network of ordinary modules, each of which reads its weights in its own way."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.lstm(x)[0]
        return self.head(self.attention(hidden, hidden, hidden, need_weights=False)[0].mean(1) * self.scale)


def make_mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(bl.BayesLinear(4, 8), nn.ReLU(), nn.Dropout(0.3), bl.BayesLinear(8, 3)).eval()


def make_recurrent() -> nn.Module:
    torch.manual_seed(0)
    net = Recurrent()
    bl.IVON(net, 20)
    return net.eval()


def run_together(*functions) -> None:
    """Run functions in threads, and raise what one of them raises."""
    errors: list[BaseException] = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


CASES = [(make_mlp, (5, 4), method) for method in METHODS] + [
    (make_recurrent, (5, 7, 4), method) for method in ("sample", "mean")
]


@pytest.mark.parametrize(
    ("make", "shape", "method"), CASES, ids=[f"{make.__name__.removeprefix('make_')}-{how}" for make, _, how in CASES]
)
def test_eight_threads_predict_what_each_predicts_alone(make, shape, method):
    net, x = make(), torch.randn(shape, generator=seeded())
    alone = [bl.predict(net, x, 16, method=method, generator=seeded(seed)) for seed in range(8)]
    plain = net(x).detach()

    def predict(seed):
        for _ in range(8):
            found = bl.predict(net, x, 16, method=method, generator=seeded(seed))
            assert_close((found.mean, found.epistemic), (alone[seed].mean, alone[seed].epistemic), **SAME)

    def call():
        for _ in range(100):
            assert_close(net(x).detach(), plain, **SAME)

    run_together(*[lambda seed=seed: predict(seed) for seed in range(8)], call)
    assert current() is OUTSIDE


def test_a_scope_belongs_to_the_thread_that_opened_it():
    net, x = make_mlp(), torch.randn(5, 4)
    plain, seen = net(x), []
    with bl.sampled(net):
        run_together(lambda: seen.append(net(x)))
        assert not torch.equal(net(x), plain)
    assert_close(seen, [plain], **SAME)


@pytest.mark.parametrize("make", [make_mlp, make_recurrent])
def test_predictions_beside_a_training_are_those_between_two_steps(make):
    net, x = make(), torch.randn(20, *((7, 4) if make is make_recurrent else (4,)), generator=seeded())
    y = torch.arange(20) % 3
    net.train()

    def train(net, boundaries):
        kind = bl.IVON if make is make_recurrent else bl.VOGN
        optimizer = kind(net, dataset_size=20, lr=0.05, generator=seeded())
        torch.manual_seed(0)  # dropout draws from the default generator, and only this thread does

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        for _ in range(30):
            boundaries.append(bl.predict(net, x, method="mean").probs)
            optimizer.step(closure)
        boundaries.append(bl.predict(net, x, method="mean").probs)

    copied, alone = copy.deepcopy(net), []
    train(copied, alone)
    beside, found, done = [], [], threading.Event()

    def predict():
        while not done.is_set():
            found.append(bl.predict(net, x, method="mean").probs)

    def train_and_tell():
        try:
            train(net, beside)
        finally:
            done.set()

    run_together(train_and_tell, predict, predict)
    assert_close(beside, alone, **SAME)
    assert_close(net.state_dict(), copied.state_dict(), **SAME)
    assert net.training and all(module.training for module in net.modules())
    assert found and all(any(torch.equal(probs, each) for each in alone) for probs in found)


def test_every_module_is_in_its_own_mode_after_overlapping_predictions():
    net, x = make_mlp().train(), torch.randn(5, 4)
    net[3].eval()
    run_together(*[lambda: [bl.predict(net, x, 4) for _ in range(30)]] * 4)
    assert [module.training for module in net.modules()] == [True, True, True, True, False]


def test_a_prediction_waits_for_a_step_of_minutes_and_then_says_so(monkeypatch):
    monkeypatch.setattr(sharing, "_PATIENCE", 0.05)
    net, x = make_mlp(), torch.randn(5, 4)
    optimizer, errors = bl.VOGN(net, 20), []

    def predict(model):
        try:
            bl.predict(model, x, 2)
        except RuntimeError as error:
            errors.append(str(error))

    with optimizer.sampled():
        run_together(lambda: predict(net), lambda: predict(copy.deepcopy(net)))
        bl.predict(net, x, 2)  # the thread of the scope itself need not wait
        F.cross_entropy(net(x), torch.zeros(5, dtype=torch.long)).backward()
    assert len(errors) == 1 and "training step of another thread" in errors[0]
    predict(net)
    assert len(errors) == 1


@pytest.mark.parametrize("make", [make_mlp, make_recurrent])
def test_neither_a_copy_nor_a_pickle_holds_a_draw(make):
    net, x = make(), torch.randn(5, *((7, 4) if make is make_recurrent else (4,)))
    plain = net(x)
    with bl.sampled(net):
        duplicate, file = copy.deepcopy(net), io.BytesIO()
        torch.save(net, file)
        assert not torch.equal(net(x), plain)
    file.seek(0)
    for other in (duplicate, torch.load(file, weights_only=False)):
        assert [type(module) for module in other.modules()] == [type(module) for module in net.modules()]
        assert_close(other(x), plain, **SAME)
        assert_close(other.state_dict(), net.state_dict(), **SAME)
        with bl.sampled(other, seeded(1)), torch.no_grad():
            drawn = other(x)
        with bl.sampled(net, seeded(1)), torch.no_grad():
            assert_close(net(x), drawn, **SAME)


def test_ordinary_modules_have_their_own_class_outside_scopes():
    net, x = make_recurrent(), torch.randn(2, 7, 4)
    kinds = [type(module) for module in net.modules()]
    with bl.sampled(net), bl.sampled(net):
        assert type(net.lstm) is not nn.LSTM and isinstance(net.lstm, nn.LSTM)
        net(x)
    assert [type(module) for module in net.modules()] == kinds
    assert net.lstm._flat_weights == [getattr(net.lstm, name) for name in net.lstm._flat_weights_names]


def test_checkpointed_layers_compute_with_the_draw_again_in_autograds_own_thread(monkeypatch):
    """As on a GPU, where the backward pass, and with it the recomputation, runs in a thread without a scope."""
    net, x = make_mlp(), torch.randn(5, 4)
    seen = []
    with bl.sampled(net), torch.no_grad():
        drawn = net(x)

        def recompute():
            with torch.no_grad():
                seen.append(net(x))

        run_together(recompute)  # no backward pass: a call like any other
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 7)
        run_together(recompute)
    assert_close(seen[1], drawn, **SAME)
    assert not torch.equal(seen[0], drawn)


def test_a_recomputation_refuses_to_choose_between_scopes(monkeypatch):
    layer = bl.BayesLinear(2, 2)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 7)
    first, second = (Scope(drawn={layer: {"weight": torch.zeros(2, 2)}}) for _ in range(2))
    with opened(first), opened(second), opened(OUTSIDE), pytest.raises(RuntimeError, match="got 2 that are open"):
        scope_for(layer)


def test_checkpointing_gives_the_gradients_of_an_ordinary_pass():
    net, x = make_mlp(), torch.randn(5, 4)
    grads = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        net.zero_grad()
        with bl.sampled(net, seeded()):
            run(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in net.parameters()])
    assert_close(grads[1], grads[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch.compile's own
def test_a_compiled_network_follows_the_scope_without_a_graph_break():
    net, x = make_mlp(), torch.randn(5, 4)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert_close(compiled(x), net(x), **SAME)
    for seed in range(3):
        with bl.sampled(net, seeded(seed)):
            assert_close(compiled(x), net(x), **SAME)
            assert not torch.equal(compiled(x), bl.to_deterministic(net)(x))
    assert_close(compiled(x), bl.to_deterministic(net)(x), **SAME)


# Half precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", [lambda net, dtype: net.to(dtype), lambda net, dtype: net.type(dtype)])
def test_precisions_stay_in_float32_when_the_network_is_cast(dtype, cast):
    net, x = nn.Sequential(bl.BayesLinear(4, 3, init_precision=1e5)), 100 * torch.randn(6, 4)
    with torch.no_grad():
        net[0].weight.zero_()
    expected = bl.predict(net, x, 512, generator=seeded()).epistemic.mean()
    half = cast(copy.deepcopy(net), dtype)
    assert (half[0].weight.dtype, half[0].weight_precision.dtype) == (dtype, torch.float32)
    assert_close(half[0].weight_precision, net[0].weight_precision, **SAME)
    found = bl.predict(half, x.to(dtype), 512, generator=seeded()).epistemic.mean()
    assert_close(found, expected, rtol=0.1, atol=0)
    assert half.float()[0].weight_precision.dtype == torch.float32
    assert half.double()[0].weight_precision.dtype == torch.float64


def test_a_layer_made_in_half_precision_has_precisions_in_float32():
    layer = bl.BayesLinear(4, 3, dtype=torch.float16, init_precision=1e5)
    assert_close(layer.weight_precision, torch.full((3, 4), 1e5), **SAME)
    assert torch.isfinite(bl.predict(layer, torch.randn(2, 4).half(), 8).mean).all()


def test_ordinary_modules_refuse_precisions_in_half_precision():
    net = nn.Linear(4, 3)
    bl.IVON(net, 20)
    with pytest.raises(TypeError, match=r"the precision of 'weight' must be in float32 or wider, got torch\.float16"):
        bl.predict(net.half(), torch.randn(2, 4).half(), 8)


# Padding.


def test_the_padding_row_of_any_embedding_is_deterministic():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.bag = bl.BayesEmbedding(5, 3, padding_idx=1), nn.EmbeddingBag(5, 3, padding_idx=2)

        def forward(self, ids):
            return self.table(ids).sum(1) + self.bag(ids)

    net = Bag()
    bl.IVON(net, 20)
    noise = {site.name: torch.full_like(site.mean, 9.0) for site in bl.posterior(net)}
    for given in (None, noise):
        with bl.sampled(net, noise=given):
            drawn = {site.name: site.value.detach() for site in bl.posterior(net)}
        for name, row in (("table.weight", 1), ("bag.weight", 2)):
            moved = (drawn[name] != net.get_parameter(name)).any(1)
            assert moved.tolist() == [index != row for index in range(5)]
    assert_close(noise["table.weight"], torch.full((5, 3), 9.0), **SAME)  # what was given is not changed
