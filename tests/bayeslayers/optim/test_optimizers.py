"""What every optimiser of the family must do in a real trainer, each by the same test."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bayeslayers as bl

pytestmark = pytest.mark.usefixtures("one_thread")
SAME = {"rtol": 0.0, "atol": 0.0}
N = 48


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


MAKERS = {
    "vogn": lambda net, **own: bl.VOGN(net, N, lr=0.1, precision_lr=0.1, generator=seeded(), **own),
    "ogn": lambda net, **own: bl.OGN(net, N, lr=0.1, precision_lr=0.1, **own),
    "ivon": lambda net, **own: bl.IVON(net, N, lr=0.1, hess_init=0.5, beta2=0.99, generator=seeded(), **own),
    "ivon gradsq": lambda net, **own: bl.IVON(
        net, N, lr=0.1, beta2=0.99, estimator="gradsq", generator=seeded(), **own
    ),
    "bbb": lambda net, **own: bl.BBB(net, N, lr=0.01, generator=seeded(), **own),
    "bbb local": lambda net, **own: bl.BBB(net, N, lr=0.01, estimator="local", generator=seeded(), **own),
    "bbb flipout": lambda net, **own: bl.BBB(net, N, lr=0.01, estimator="flipout", generator=seeded(), **own),
    "swag": lambda net, **own: bl.SWAG(net, N, start_step=2, **own),
    "kfac": lambda net, **own: bl.KFAC(net, N, lr=0.01, inverse_every=2, generator=seeded(), **own),
    "noisykfac": lambda net, **own: bl.NoisyKFAC(net, N, factor_lr=0.1, inverse_every=2, generator=seeded(), **own),
}
AT_THE_MEAN = ("ogn", "kfac", "swag")  # which draw no weights
each = pytest.mark.parametrize("name", MAKERS)


class Net(nn.Sequential):
    checkpointed = False

    def forward(self, x):
        body, head = nn.Sequential(*list(self)[:3]), nn.Sequential(*list(self)[3:])
        return head(checkpoint(body, x, use_reentrant=False) if self.checkpointed else body(x))


def make_net(dtype=torch.float32):
    torch.manual_seed(0)
    net = Net(
        bl.BayesConv2d(1, 3, 3, padding=1), bl.BayesGroupNorm(1, 3), nn.Tanh(), nn.Flatten(), bl.BayesLinear(48, 3)
    )
    return net.to(dtype)


def make_batch(seed=0, n=8, dtype=torch.float32):
    x = torch.randn(n, 1, 4, 4, generator=seeded(seed), dtype=dtype)
    return x, x.flatten(1)[:, :3].argmax(1)


def train(net, optimizer, steps, **options):
    """Take the steps by scopes: two draws each."""
    for step in steps:
        optimizer.zero_grad()
        for _ in range(2):
            scoped(net, optimizer, *make_batch(step, **options))
        optimizer.step()


def scoped(net, optimizer, x, y):
    with optimizer.sampled():
        F.cross_entropy(net(x), y).backward()


def state_of(net, optimizer=None):
    state = {name: value.clone() for name, value in net.state_dict().items()}
    return state if optimizer is None else (state, copy.deepcopy(optimizer.state_dict()["state"]))


@each
def test_it_learns_what_the_posterior_then_predicts(name):
    net = make_net()
    optimizer = MAKERS[name](net)
    before = F.cross_entropy(net(make_batch(99, 64)[0]), make_batch(99, 64)[1]).item()
    train(net, optimizer, range(150), n=16)
    optimizer.finalize()
    x, y = make_batch(99, 64)
    prediction = bl.predict(net, x, 16, generator=seeded())
    loss = -prediction.probs.gather(1, y[:, None]).log().mean().item()
    assert loss < 0.9 * before, (loss, before)


@each
def test_resume_is_exact(name):
    def start():
        net = make_net()
        optimizer = MAKERS[name](net)
        return net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    def run(parts, steps):
        net, optimizer, scheduler = parts
        for step in steps:
            train(net, optimizer, [step])
            scheduler.step()

    whole = start()
    run(whole, range(3))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)
    run(whole, range(3, 7))
    file.seek(0)
    resumed = start()
    run(resumed, [50])  # another state, which loading must replace
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(resumed, range(3, 7))
    assert_close(state_of(*resumed[:2]), state_of(*whole[:2]), **SAME)


CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_optimizers import MAKERS, make_net, train
torch.set_num_threads(1)
for name in MAKERS:
    net = make_net()
    optimizer = MAKERS[name](net)
    states = torch.load(f"{{name}}.pt", weights_only=True)
    net.load_state_dict(states[0]), optimizer.load_state_dict(states[1])
    train(net, optimizer, range(3, 5))
    torch.save(net.state_dict(), f"{{name}}.after.pt")
"""


def test_resume_in_a_new_process_is_exact(tmp_path):
    expected = {}
    for name, make in MAKERS.items():
        net = make_net()
        optimizer = make(net)
        train(net, optimizer, range(3))
        torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / f"{name}.pt")
        train(net, optimizer, range(3, 5))
        expected[name] = state_of(net)
    here = Path(__file__).parent
    words = [sys.executable, "-c", CHILD.format(tests=str(here))]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(Path(__file__).parents[3])}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in MAKERS:
        assert_close(torch.load(tmp_path / f"{name}.after.pt", weights_only=True), expected[name], **SAME)


@each
def test_saved_posterior_predicts_the_same(name, tmp_path):
    net = make_net()
    optimizer = MAKERS[name](net)
    train(net, optimizer, range(4))
    optimizer.finalize()
    bl.save_posterior(net, tmp_path / "posterior")
    loaded = make_net()
    bl.load_posterior(tmp_path / "posterior", loaded)
    x, _ = make_batch(9)
    found, expected = (bl.predict(model, x, 8, generator=seeded()) for model in (loaded, net))
    assert_close(found.mean, expected.mean, **SAME)
    assert expected.epistemic.max() > 0


@each
def test_a_grad_scaler_leaves_the_step_as_it_is(name):
    states = []
    for enabled, clips in ((False, False), (True, False), (True, True)):
        net = make_net(torch.float64)
        optimizer = MAKERS[name](net)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)
        for step in range(3):
            x, y = make_batch(step, dtype=torch.float64)
            optimizer.zero_grad()
            with optimizer.sampled():
                scaler.scale(F.cross_entropy(net(x), y)).backward()
            if clips:
                optimizer.unscale_(scaler)
                nn.utils.clip_grad_norm_(net.parameters(), 1e6)
            scaler.step(optimizer)
            scaler.update()
        states.append(state_of(net))
    assert_close(states[1], states[0], rtol=1e-8, atol=1e-10)
    assert_close(states[2], states[0], rtol=1e-8, atol=1e-10)


@each
def test_autocast_trains_full_precision_posteriors(name):
    net = make_net()
    optimizer = MAKERS[name](net)
    before = net[4].weight.detach().clone()
    for step in range(3):
        x, y = make_batch(step)
        optimizer.zero_grad()
        with optimizer.sampled(), torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(net(x), y).backward()
        optimizer.step()
    for value in net.state_dict().values():
        assert value.dtype == torch.float32
        assert value.isfinite().all()
    assert not torch.equal(net[4].weight, before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at the draws
@each
def test_a_compiled_model_takes_the_same_step(name):
    torch._dynamo.reset()
    states = []
    for wrap in (lambda net: net, lambda net: torch.compile(net, backend="aot_eager")):
        net = make_net(torch.float64)
        optimizer = MAKERS[name](net)
        compiled = wrap(net)
        train(compiled, optimizer, range(2), dtype=torch.float64)
        states.append(state_of(net))
    assert_close(states[1], states[0], rtol=1e-9, atol=1e-11)


@each
def test_checkpointed_activations_give_the_same_step(name):
    if name in ("bbb local", "bbb flipout"):
        pytest.skip("noise of the activations is drawn again when they are recomputed")
    states = []
    for checkpointed in (False, True):
        net = make_net(torch.float64)
        optimizer = MAKERS[name](net)
        net.checkpointed = checkpointed
        train(net, optimizer, range(2), dtype=torch.float64)
        states.append(state_of(net))
    assert_close(states[1], states[0], rtol=1e-9, atol=1e-11)


@each
def test_clipping_between_scope_and_step_counts(name):
    moved = []
    for bound in (1e6, 1e-8):
        net = make_net(torch.float64)
        optimizer = MAKERS[name](net, groups=None)
        train(net, optimizer, range(1), dtype=torch.float64)
        before = state_of(net)["4.weight"]
        optimizer.zero_grad()
        scoped(net, optimizer, *make_batch(1, dtype=torch.float64))
        nn.utils.clip_grad_norm_(net.parameters(), bound)
        grads = torch.cat([p.grad.flatten() for p in net.parameters()])
        assert grads.norm() <= bound * (1 + 1e-6)
        optimizer.step()
        moved.append(float((net[4].weight.detach() - before).norm()))
    assert moved[1] != moved[0]


@each
def test_a_frozen_tensor_keeps_its_posterior_and_can_be_freed(name):
    net = make_net()
    optimizer = MAKERS[name](net)
    train(net, optimizer, range(2))
    for frozen in (True, False):
        for parameter in net[4].parameters():
            parameter.requires_grad_(not frozen)
        before = state_of(net)
        train(net, optimizer, range(2, 4))
        for key in ("4.weight", "4.bias"):
            assert torch.equal(net.state_dict()[key], before[key]) == frozen, key
        assert torch.equal(net[4].weight_precision, before["4.weight_precision"]) or not frozen
        assert not torch.equal(net[0].weight, before["0.weight"])


@each
def test_a_group_is_added_for_a_new_layer(name):
    net = make_net()
    optimizer = MAKERS[name](net)
    train(net, optimizer, range(2))
    net.append(bl.BayesLinear(3, 3))
    optimizer.add_param_group({"params": net[5].parameters(), "lr": 0.05})
    before = state_of(net)
    train(net, optimizer, range(2, 4))
    for key in ("4.weight", "5.weight", "5.bias"):
        assert not torch.equal(net.state_dict()[key], before[key])
    assert optimizer.param_groups[-1]["lr"] == 0.05


@each
def test_learning_rate_schedules_reach_it(name):
    net = make_net()
    optimizer = MAKERS[name](net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    train(net, optimizer, [0])
    scheduler.step()
    before = state_of(net)
    train(net, optimizer, [1])
    for key in ("0.weight", "1.weight", "4.weight"):
        assert torch.equal(net.state_dict()[key], before[key])


@each
def test_a_closure_that_raises_loses_nothing(name):
    net = make_net()
    optimizer = MAKERS[name](net, num_samples=2) if name not in AT_THE_MEAN else MAKERS[name](net)
    train(net, optimizer, range(2))
    before, x = state_of(net, optimizer), make_batch(5)[0]
    output = net(x)
    calls = iter([0, 1])

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), make_batch(5)[1])
        loss.backward()
        if next(calls) == (1 if name not in AT_THE_MEAN else 0):
            raise KeyError("boom")
        return loss

    with pytest.raises(KeyError, match="boom"):
        optimizer.step(closure)
    assert_close(state_of(net, optimizer), before, **SAME)
    assert_close(net(x), output, **SAME)


@each
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_bad_loss_or_gradient_is_refused(name, factor):
    net = make_net()
    optimizer = MAKERS[name](net)
    train(net, optimizer, range(2))
    before = state_of(net)
    x, y = make_batch(5)
    with pytest.raises(FloatingPointError, match=r"must be finite, got .* the posterior is unchanged"):
        with optimizer.sampled():
            (F.cross_entropy(net(x), y) * factor).backward()
        optimizer.step()
    assert_close(state_of(net), before, **SAME)
    train(net, optimizer, [6])


@each
def test_lightnings_idle_closure_stands_for_none(name):
    nets = [make_net(), make_net()]
    for net, closure in zip(nets, (None, lambda: None), strict=True):
        optimizer = MAKERS[name](net)
        scoped(net, optimizer, *make_batch())
        optimizer.step() if closure is None else optimizer.step(closure)
    assert_close(state_of(nets[1]), state_of(nets[0]), **SAME)
    optimizer = MAKERS[name](make_net())
    with pytest.raises(RuntimeError, match=r"step\(\) must follow a backward pass"):
        optimizer.step(lambda: None)

    def forgets():
        F.cross_entropy(optimizer.model(make_batch()[0]), make_batch()[1]).backward()

    with pytest.raises(TypeError, match="closure must return the loss"):
        optimizer.step(forgets)


@each
def test_several_devices_are_refused(name):
    net = make_net()
    net[4].to("meta")
    with pytest.raises(ValueError, match="model must be on one device, got parameters on cpu and meta"):
        MAKERS[name](net)


def test_a_generator_on_another_device_is_refused():
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="generator must be on the model's device cpu, got cuda"):
        bl.VOGN(make_net(), N, generator=Elsewhere())


@each
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_size": 0}, "dataset_size must be a finite number > 0, got 0"),
        ({"lr": -0.1}, "lr must be a finite number >= 0, got -0.1"),
        ({"lr": math.nan}, "lr must be a finite number >= 0, got nan"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
    ],
)
def test_bad_hyperparameters_are_one_sentence(name, options, message):
    kind = type(MAKERS[name](make_net()))
    net = make_net()
    before = state_of(net)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        kind(net, **{"dataset_size": N, **options})
    assert "\n" not in str(caught.value)
    assert_close(state_of(net), before, **SAME)
