"""One changed line: an optimiser takes the model that a training script has, and it becomes Bayesian in place."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.unwrap import unwrapped

SAME = {"rtol": 0, "atol": 0}
N = 40
METHODS = [bl.VOGN, bl.OGN, bl.KFAC, bl.NoisyKFAC, bl.BBB]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf"
    ),  # Dynamo looks at the draws
]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def lenet():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 5, padding=2), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 5), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 3)),
    )


def norms():
    """A network whose first buffers are those of its norms."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def compiled(model):
    return torch.compile(model, backend="eager")


MODELS = {
    "mlp": (mlp, (8, 6)),
    "lenet": (lenet, (8, 1, 16, 16)),
    "norms": (norms, (8, 1, 6, 6)),
    "distributed": (lambda: DistributedDataParallel(mlp()), (8, 6)),
    "parallel": (lambda: nn.DataParallel(mlp()), (8, 6)),
    "compiled": (lambda: compiled(mlp()), (8, 6)),
    "nested": (lambda: DistributedDataParallel(nn.DataParallel(mlp())), (8, 6)),
}
each_model = pytest.mark.parametrize("name", [name for name in MODELS if name != "compiled"])
each_wrapper = pytest.mark.parametrize("name", ["distributed", "parallel", "compiled", "nested"])


def made(name):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    return model, x, torch.arange(len(x)) % 3


def train(optimizer, model, x, y, steps=2):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        loss = optimizer.step(closure)
    return loss


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


def state_of(model):
    """Return all that a conversion could change."""
    attributes = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]
    return [type(m) for m in model.modules()], attributes, copied(model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_moves_and_gets_a_precision_that_moves(name):
    model, x, y = made(name)
    optimizer = bl.VOGN(model, dataset_size=N)
    before = copied(unwrapped(model).state_dict().items())
    train(optimizer, model, x, y)
    after = unwrapped(model).state_dict()
    for key, _ in unwrapped(model).named_parameters():
        assert not torch.equal(after[key], before[key]), key
        assert not torch.equal(after[f"{key}_precision"], before[f"{key}_precision"]), key
        assert (after[f"{key}_precision"] > 0).all(), key
    assert optimizer.report.coverage == 1
    assert [entry.name for entry in optimizer.report.entries] == [k for k, _ in unwrapped(model).named_parameters()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["lenet", "distributed", "parallel"])
def test_every_method_takes_an_ordinary_model(name, method):
    model, x, y = made(name)
    expected = model(x)
    optimizer = method(model, dataset_size=N)
    assert_close(model(x), expected, **SAME)
    before = copied(unwrapped(model).state_dict().items())
    train(optimizer, model, x, y)
    for key, value in unwrapped(model).state_dict().items():
        assert torch.equal(value, before.get(key, torch.empty(0))) == ("_prior_" in key), key


@each_model
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_before_the_first_step_are_the_same_bit_for_bit(name, training):
    model, x, _ = made(name)
    model.train(training)
    expected = copy.deepcopy(unwrapped(model))(x)
    bl.VOGN(model, dataset_size=N)
    assert_close(model(x), expected, **SAME)


@each_model
def test_modules_and_parameters_are_the_same_objects(name):
    model, x, y = made(name)
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    ordinary = copied(model.state_dict().items())
    optimizer = bl.VOGN(model, dataset_size=N)
    assert optimizer.model is model
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert {key: id(p) for key, p in model.named_parameters()} == {key: id(p) for key, p in parameters.items()}
    state = model.state_dict()
    assert [key for key in state if key in ordinary] == list(ordinary)
    assert_close({key: state[key] for key in ordinary}, ordinary, **SAME)
    train(optimizer, model, x, y)
    assert {key: id(p) for key, p in model.named_parameters()} == {key: id(p) for key, p in parameters.items()}


@each_wrapper
def test_the_draws_are_seen_through_the_wrapper(name):
    model, x, _ = made(name)
    optimizer = bl.VOGN(model, dataset_size=N)
    outputs = []
    for _ in range(2):
        with optimizer.sampled():
            outputs.append(model(x))
    plain = model(x)
    assert all(not torch.allclose(*pair) for pair in [outputs, [outputs[0], plain], [outputs[1], plain]])


@each_model
def test_the_same_object_predicts_is_evaluated_and_saved(name, tmp_path):
    model, x, y = made(name)
    train(bl.VOGN(model, dataset_size=N), model, x, y)
    prediction = bl.predict(model, x, num_samples=4)
    assert (prediction.epistemic > 0).all()
    assert bl.evaluate(model, [(x, y)], num_samples=2).metrics["accuracy"] >= 0
    bl.save_posterior(model, tmp_path / "posterior")
    fresh, _ = bl.to_bayesian(unwrapped(MODELS[name][0]()))
    bl.load_posterior(tmp_path / "posterior", fresh)
    assert_close(fresh.eval()(x), unwrapped(model).eval()(x), **SAME)
    assert_close(dict(fresh.state_dict()), dict(unwrapped(model).state_dict()), **SAME)


@each_model
def test_the_deterministic_counterpart_is_the_ordinary_network(name):
    model, x, y = made(name)
    ordinary = unwrapped(model)
    kinds, keys = [type(m) for m in ordinary.modules()], list(ordinary.state_dict())
    train(bl.VOGN(model, dataset_size=N), model, x, y)
    counterpart = unwrapped(bl.to_deterministic(model))
    assert ([type(m) for m in counterpart.modules()], list(counterpart.state_dict())) == (kinds, keys)
    assert_close(counterpart.eval()(x), unwrapped(model).eval()(x), **SAME)


@each_model
def test_an_ordinary_checkpoint_still_loads(name):
    model, _, _ = made(name)
    checkpoint = {key: value + 1 for key, value in model.state_dict().items()}
    bl.VOGN(model, dataset_size=N)
    precision = {site.name: site.precision.clone() for site in bl.posterior(model)}
    assert not any(model.load_state_dict(checkpoint))
    assert_close({key: model.state_dict()[key] for key in checkpoint}, checkpoint, **SAME)
    assert_close({site.name: site.precision for site in bl.posterior(model)}, precision, **SAME)


@pytest.mark.parametrize("name", ["mlp", "lenet", "norms"])
def test_a_converted_model_is_copied_and_pickled(name):
    model, x, y = made(name)
    train(bl.VOGN(model, dataset_size=N), model, x, y)
    model.eval()
    for twice in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twice.modules()] == [type(m) for m in model.modules()]
        assert_close(dict(twice.state_dict()), dict(model.state_dict()), **SAME)
        assert_close(twice(x), model(x), **SAME)


def test_torchvisions_resnet18():
    torch.manual_seed(0)
    model, x, y = torchvision.models.resnet18(weights=None, num_classes=3), torch.randn(2, 3, 32, 32), torch.arange(2)
    expected, kinds, before = (
        copy.deepcopy(model)(x),
        [type(m) for m in model.modules()],
        dict(model.named_parameters()),
    )
    optimizer = bl.VOGN(model, dataset_size=N)
    assert optimizer.report.coverage == 1 and all(p is before[name] for name, p in model.named_parameters())
    before = copied(model.state_dict().items())
    assert_close(model(x), expected, **SAME)
    train(optimizer, model, x, y, 1)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == ("_prior_" in key), key
    assert [type(m) for m in bl.to_deterministic(model).modules()] == kinds


def test_the_first_training_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[3] / "README.md").read_text()
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "the changed line" in code]
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    net: Any = names["net"]
    assert type(net[0]) is bl.BayesLinear and names["prediction"].probs.shape == (300, 3)
    assert bl.load_posterior("my-posterior", copy.deepcopy(net)).name == "my-posterior"


class TestWhatWasMadeBefore:
    """Optimisers, schedulers, hooks and averages that hold the model's modules and parameters."""

    def test_another_optimizer_and_its_scheduler(self):
        model, x, y = made("mlp")
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(sgd, 1, 0.1)
        bl.VOGN(model, dataset_size=N)
        expected = {}
        F.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            expected[name] = p.detach() - 0.5 * p.grad
        sgd.step()
        scheduler.step()
        assert_close(dict(model.named_parameters()), expected)
        assert sgd.param_groups[0]["lr"] == pytest.approx(0.05)

    def test_a_scheduler_of_the_optimizer_itself(self):
        model, x, y = made("mlp")
        optimizer = bl.VOGN(model, dataset_size=N)
        first, scheduler = optimizer.param_groups[0]["lr"], torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
        train(optimizer, model, x, y, 1)
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(first / 10)

    def test_hooks_on_modules_and_parameters(self):
        model, x, y = made("mlp")
        calls = []
        model[0].register_forward_hook(lambda module, args, output: calls.append(module))
        model[0].weight.register_hook(lambda grad: calls.append("gradient"))
        layer = model[0]
        train(bl.VOGN(model, dataset_size=N), model, x, y, 1)
        assert layer is model[0] and calls[-2:] == [layer, "gradient"]

    def test_an_average_by_hand(self):
        model, x, y = made("norms")
        mine = [p.detach().clone() for p in model.parameters()]
        held = list(model.parameters())
        train(bl.VOGN(model, dataset_size=N), model, x, y, 1)
        torch._foreach_lerp_(mine, [p.detach() for p in held], 1.0)
        assert_close(mine, [p.detach() for p in model.parameters()], **SAME)

    def test_an_averaged_model_that_is_converted_too(self):
        model, x, y = made("norms")
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        parameters = [id(p) for p in average.parameters()]
        optimizer = bl.VOGN(model, dataset_size=N)
        bl.to_bayesian(average, inplace=True)  # torch pairs the buffers of the two by their place
        means = []
        for _ in range(2):
            train(optimizer, model, x, y, 1)
            average.update_parameters(model)
            means.append(model[4].weight.detach().clone())
        assert [id(p) for p in average.parameters()] == parameters
        assert_close(average.module[4].weight, (means[0] + means[1]) / 2)
        assert_close(dict(average.module.named_buffers()), dict(model.named_buffers()), **SAME)
        assert (bl.predict(average, x, 4).epistemic > 0).all()

    @pytest.mark.parametrize("how", ["around", "whole", "layer"])
    def test_a_graph_that_is_compiled_already_is_not_used_again(self, how):
        torch._dynamo.reset()
        network, x, y = made("lenet")
        model = compiled(network) if how == "around" else network
        if how != "around":
            (network if how == "whole" else network[0]).compile(backend="eager")
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            expected = model(x)
        optimizer = bl.VOGN(model, dataset_size=N)
        with torch.no_grad():
            assert_close(model(x), expected, **SAME)
            with bl.sampled(network):
                assert not torch.allclose(model(x), expected)
        before = copied(network.state_dict().items())
        train(optimizer, model, x, y)
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[key]) == ("_prior_" in key), key


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        hidden = self.embed(x)[:, None] * self.scale
        return self.head(self.norm(self.attention(hidden, hidden, hidden, need_weights=False)[0][:, 0]))


ATTENTION = [f"attention.{key}" for key in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]


class TestSeveralDevices:
    """`DistributedDataParallel` averages gradients alone, and `DataParallel` runs copies of the layers in threads."""

    @pytest.fixture
    def distributed(self, monkeypatch):
        model = DistributedDataParallel(mlp())
        monkeypatch.setattr(model, "process_group", SimpleNamespace(size=lambda: 2))
        return model

    @pytest.mark.parametrize("method", METHODS)
    def test_curvature_is_averaged_over_the_ranks_of_a_distributed_model(self, method, distributed):
        assert method(distributed, dataset_size=N).sync
        assert method(nn.DataParallel(distributed), dataset_size=N).sync

    @pytest.mark.parametrize("method", METHODS)
    def test_one_rank_averages_nothing(self, method):
        assert not method(DistributedDataParallel(mlp()), dataset_size=N).sync

    def test_ivon_draws_the_same_weights_on_all_ranks(self, distributed):
        assert bl.IVON(distributed, dataset_size=N).sync

    @pytest.mark.parametrize("method", [*METHODS, bl.IVON])
    def test_replicas_do_not_see_samples(self, method):
        model = nn.DataParallel(mlp())
        model.device_ids = [0, 1]
        with pytest.raises(ValueError, match="must be on one device, got DataParallel over 2 devices"):
            method(model, dataset_size=N)
        assert type(model.module[0]) is nn.Linear


class Own(nn.GRU):
    """A layer without a curvature rule."""

    def forward(self, x):
        return super().forward(2 * x)[0]


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.own, self.head = nn.Linear(6, 4), Own(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.own(self.embed(x)[:, None].expand(-1, 2, -1))[:, -1])


OWN = {f"own.{key}_l0" for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}


class TestWhatHasNoRule:
    def test_one_warning_names_it_with_reason_and_remedy(self):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            optimizer = bl.VOGN(Partly(), dataset_size=N)
        (warning,) = found
        message = str(warning.message)
        assert "'own.bias_hh_l0' (the forward of Own is its own" in message and "'embed.weight'" not in message
        assert "IVON" in message and "to_bayesian" in message
        assert warning.filename == __file__
        status = {entry.name: entry.status for entry in optimizer.report.entries}
        assert {name for name, kind in status.items() if kind == "deterministic"} == OWN
        assert "the forward of Own is its own" in " ".join(str(optimizer.report).split())

    def test_it_is_trained_and_the_rest_gets_its_posterior(self):
        torch.manual_seed(0)
        model, x, y = Partly(), torch.randn(8, 6), torch.arange(8) % 3
        with pytest.warns(UserWarning, match="trained deterministically, by Adam"):
            optimizer = bl.VOGN(model, dataset_size=N)
        before = copied(model.named_parameters())
        train(optimizer, model, x, y)
        assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert {site.name.partition(".")[0] for site in bl.posterior(model)} == {"embed", "head"}

    def test_many_tensors_make_a_short_warning(self):
        net = nn.Sequential(*(Own(2, 2) for _ in range(5)), nn.Linear(2, 2))
        with pytest.warns(UserWarning, match=r"'2\.weight_hh_l0' and 10 more \(the forward of Own is its own"):
            bl.VOGN(net, dataset_size=N)

    def test_frozen_parameters_are_not_named_for_they_are_not_trained(self):
        model = Attention()
        model.attention.requires_grad_(False)
        model.scale.requires_grad_(False)
        optimizer = bl.VOGN(model, dataset_size=N)
        assert {entry.name for entry in optimizer.report.entries if entry.frozen} == {"scale", *ATTENTION}

    def test_frozen_layers_keep_their_means(self):
        model, x, y = made("mlp")
        model[0].requires_grad_(False)
        before = copied(model.state_dict().items())
        optimizer = bl.VOGN(model, dataset_size=N)
        train(optimizer, model, x, y)
        moved = {key for key, value in before.items() if not torch.equal(value, model.state_dict()[key])}
        assert moved == {"2.weight", "2.bias", "4.weight", "4.bias"}
        assert optimizer.report.entries[0].reason == "frozen"

    def test_tied_weights_stay_tied_and_have_one_posterior(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        net[2].weight = net[0].weight
        optimizer = bl.VOGN(net, dataset_size=N)
        assert net[2].weight is net[0].weight
        assert optimizer.report.coverage == 1
        assert [site.name for site in bl.posterior(net)] == ["0.weight", "0.bias", "2.bias", "4.weight", "4.bias"]

    @pytest.mark.parametrize("method", METHODS)
    def test_a_model_without_any_layer_with_a_rule_raises(self, method):
        net = Own(3, 3)
        with pytest.raises(
            ValueError, match=r"must have a layer that can become Bayesian, got none\. .*IVON makes any"
        ):
            method(net, dataset_size=N)
        assert not dict(net.named_buffers())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("freeze", [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(1, 6))])
def test_a_scripted_model_raises_the_sentence(freeze):
    with pytest.raises(ValueError, match="must have a layer that can become Bayesian, got none"):
        bl.VOGN(freeze(mlp()), dataset_size=N)


class TestReport:
    def test_of_a_model_that_was_bayesian_in_part(self):
        net, _ = bl.to_bayesian(mlp(), include=bl.last_layer)
        entries = {entry.name: entry for entry in bl.VOGN(net, dataset_size=N).report.entries}
        assert [name for name, entry in entries.items() if entry.status == "converted"] == ["4.weight", "4.bias"]
        assert entries["0.weight"].reason == "has no posterior in the model as it was given"
        assert type(net[0]) is nn.Linear

    def test_of_ivon_is_of_every_parameter(self):
        model = Attention()
        model.norm.requires_grad_(False)
        optimizer = bl.IVON(model, dataset_size=N)
        assert {e.name for e in optimizer.report.entries if e.status != "converted"} == {"norm.weight", "norm.bias"}
        assert type(model.embed) is nn.Linear
        assert optimizer.report.coverage == pytest.approx(1 - 8 / sum(p.numel() for p in model.parameters()))

    def test_names_are_those_of_the_network_inside(self):
        assert bl.IVON(nn.DataParallel(mlp()), dataset_size=N).report.entries[0].name == "0.weight"


BAD = {
    "dataset_size": ({"dataset_size": -1}, ValueError, "dataset_size must be"),
    "lr": ({"lr": -1.0}, ValueError, "lr must be"),
    "init": ({"init_precision": 0.0}, ValueError, "init_precision must be"),
    "prior": ({"prior_precision": -1.0}, ValueError, "prior_precision must be"),
    "samples": ({"num_samples": 0}, ValueError, "num_samples must be"),
    "sync": ({"sync": True}, RuntimeError, "sync must be off without a process group"),
    "key": ({"groups": [{"params": [], "rate": 1}]}, ValueError, "parameter group must have keys"),
    "other": ({"groups": [{"params": [nn.Parameter(torch.ones(2))]}]}, ValueError, "must be parameters of the model"),
    "elements": ({"elements_per_example": 0}, ValueError, "elements_per_example must be"),
}


@pytest.mark.parametrize("name", ["lenet", "distributed"])
@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("method", [bl.VOGN, bl.NoisyKFAC])
def test_a_construction_that_raises_leaves_the_model_untouched(name, method, options, error, message, monkeypatch):
    model, _, _ = made(name)
    kinds, attributes, tensors = state_of(model)
    if "sync" in options:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(error, match=message):
        method(model, **{"dataset_size": N, **options})
    after = state_of(model)
    assert after[:2] == (kinds, attributes)
    assert_close(after[2], tensors, **SAME)


def test_a_warning_that_is_an_error_leaves_the_model_untouched():
    model = Partly()
    kinds, attributes, tensors = state_of(model)
    with pytest.raises(UserWarning, match=r"'own\.bias_hh_l0'"):
        bl.VOGN(model, dataset_size=N)
    after = state_of(model)
    assert after[:2] == (kinds, attributes)
    assert_close(after[2], tensors, **SAME)


def test_a_failed_ivon_leaves_no_posterior_behind():
    model, _, _ = made("mlp")
    with pytest.raises(ValueError, match="parameter group must have keys"):
        bl.IVON(model, dataset_size=N, groups=[{"params": list(model[0].parameters()), "rate": 1}])
    assert not dict(model.named_buffers())


def test_a_second_optimizer_goes_on_with_the_posterior():
    model, x, y = made("mlp")
    train(bl.VOGN(model, dataset_size=N), model, x, y)
    before = copied(model.state_dict().items())
    optimizer = bl.VOGN(model, dataset_size=N)
    assert_close(dict(model.state_dict()), before, **SAME)
    assert optimizer.report.coverage == 1
