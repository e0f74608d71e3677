from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
import bayeslayers.export
import zoo
from bayeslayers.export import OUTPUTS, FixedDraws

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SEED, DRAWS = 3, 2


def generator():
    return torch.Generator().manual_seed(SEED)


def uncertain(net):
    """The net with wide posteriors, so that draws differ."""
    for site in bl.posterior(net):
        site.precision.fill_(30.0)
    return net.eval()


def with_batchnorm():
    net = uncertain(zoo.create("lenet5_bn"))
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator())
            module.running_var.uniform_(0.5, 2, generator=generator())
    return net


def mlp(outputs, **likelihood):
    net = nn.Sequential(bl.BayesLinear(4, 8), nn.Tanh(), bl.BayesLinear(8, outputs))
    return uncertain(net), (4,), likelihood


class NamedLikeOutputs(nn.Module):
    """Calls its layers and values what the program calls its input and outputs."""

    def __init__(self):
        super().__init__()
        self.mean, self.total, self.x = bl.BayesLinear(4, 4), bl.BayesLinear(4, 4), bl.BayesLinear(4, 3)
        self.register_buffer("aleatoric", torch.rand(4))

    def forward(self, epistemic):
        mean = self.mean(epistemic)
        total = self.total(mean).mean(1, keepdim=True)
        x = mean.sum(1, keepdim=True) + total * self.aleatoric
        return self.x(mean + x)


class Embedded(nn.Module):
    """Words whose padding has a mean that is not 0 and a wide posterior."""

    def __init__(self, bag=False):
        super().__init__()
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.words, self.head, self.bag = kind(6, 4, padding_idx=0), nn.Linear(4, 2), bag

    def forward(self, x):
        vectors = self.words(x.long())
        return self.head(vectors if self.bag else vectors.sum(1))


def embedded():
    net, _ = bl.to_bayesian(Embedded())
    with torch.no_grad():
        net.words.weight[0] = 0.5
    return uncertain(net), (5,), {}


def with_attached_embedding(bag=False):
    net = Embedded(bag)
    bl.attach_posterior(net.words, 50.0, 30.0)
    bl.attach_posterior(net.head, 50.0, 30.0)
    with torch.no_grad():
        net.words.weight[0] = 0.5
    return net.eval(), (5,), {}


CASES = {
    "resnet20": lambda: (uncertain(zoo.create("resnet20")), (3, 32, 32), {}),
    "names": lambda: (uncertain(NamedLikeOutputs()), (4,), {}),
    "embedding": embedded,
    "embedding by attach_posterior": with_attached_embedding,
    "lenet5": lambda: (uncertain(zoo.create("lenet5", mean=[0.1307], std=[0.3081])), (1, 28, 28), {}),
    "lenet5_bn": lambda: (with_batchnorm(), (1, 28, 28), {}),
    "bernoulli": lambda: mlp(1, likelihood=bl.Bernoulli()),
    "gaussian": lambda: mlp(3, likelihood=bl.Gaussian(variance=0.2)),
    "gaussian, variance an output": lambda: mlp(4, likelihood=bl.Gaussian()),
}


@pytest.mark.parametrize("case", CASES)
def test_an_exported_posterior_predicts_as_the_posterior_does(case, tmp_path):
    torch.manual_seed(0)
    net, size, likelihood = CASES[case]()
    example = torch.rand(1, *size)
    exported = bl.to_exported(net, example, DRAWS, generator=generator(), **likelihood).module()
    path = bl.to_onnx(net, tmp_path / "new" / "net.onnx", example, DRAWS, generator=generator(), **likelihood)
    assert [file.name for file in path.parent.iterdir()] == ["net.onnx"]
    session = ort.InferenceSession(path)
    assert [i.name for i in session.get_inputs()] == ["x"]
    assert tuple(output.name for output in session.get_outputs()) == OUTPUTS
    for n in (1, 2, 5):
        x = torch.rand(n, *size)
        x = torch.cat([x[:, :2] * 6 // 1, 0 * x[:, 2:]], 1) if "embedding" in case else x  # words, then padding
        expected = bl.predict(net, x, DRAWS, method="sample", generator=generator(), **likelihood)
        outputs = {"exported": exported(x), "onnx": [torch.from_numpy(a) for a in session.run(None, {"x": x.numpy()})]}
        assert float(expected.epistemic.mean()) > 1e-4
        for kind, found in outputs.items():
            for name, value in zip(OUTPUTS, found, strict=True):
                assert_close(value, getattr(expected, name), rtol=1e-4, atol=1e-5, msg=lambda m, k=kind: f"{k}: {m}")


def test_padding_is_the_same_in_every_fixed_draw():
    for make in (embedded, lambda: with_attached_embedding(bag=True), with_attached_embedding):
        net = make()[0]
        rows = torch.stack([network.words.weight for network in FixedDraws(net, 3, generator=generator()).networks])
        assert bool((rows[:, 0] == 0.5).all()) and float(rows[:, 1:].std(0).min()) > 1e-3


def test_a_file_that_no_runtime_loads_is_removed_and_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(bayeslayers.export, "_name_apart", lambda program: None)
    net = uncertain(NamedLikeOutputs())
    with pytest.raises(RuntimeError, match=r"the ONNX file must be one that a runtime loads, got: .*mean") as caught:
        bl.to_onnx(net, tmp_path / "net.onnx", torch.rand(2, 4), 2)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_posterior_that_predicts_by_another_method_is_exported_with_a_warning():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data, x = [(torch.randn(30, 4), torch.arange(30) % 3)], torch.rand(2, 4)
    whole = bl.laplace(plain, data)
    with pytest.warns(
        UserWarning, match=r"method='sample' does, but the model's card says 'linearised'.*bl\.last_layer"
    ):
        FixedDraws(whole, 2)
    with pytest.warns(UserWarning, match="the exported program gives other numbers"):
        bl.to_exported(whole, x, 2)
    last = bl.laplace(plain, data, layers=bl.last_layer)  # which is linear in what is drawn: no warning
    expected = bl.predict(last, data[0][0], 4000, generator=generator())
    found = FixedDraws(last, 4000, generator=generator())(data[0][0])[0]
    assert float(((found - expected.mean) / expected.standard_error).abs().max()) < 5 * 2**0.5


def test_draws_share_what_has_no_posterior():
    backbone = nn.Sequential(nn.Linear(4, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 2))
    net, _ = bl.to_bayesian(backbone, include=bl.last_layer)
    draws = FixedDraws(net, 5, generator=generator())
    assert len({network[0].weight.data_ptr() for network in draws.networks}) == 1
    assert len({network[1].running_mean.data_ptr() for network in draws.networks}) == 1
    assert len({network[3].weight.data_ptr() for network in draws.networks}) == 5
    assert sum(p.numel() for p in draws.parameters()) == 4 * 50 + 3 * 50 + 5 * (50 * 2 + 2)
    assert not any(p.requires_grad for p in draws.parameters())


def test_exporting_leaves_the_model_as_it_was():
    net = uncertain(nn.Sequential(bl.BayesLinear(4, 3))).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = torch.rand(2, 4)
    plain = net(x)
    bl.to_exported(net, x, 2)
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())
    assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert_close(net(x), plain, rtol=0, atol=0)


def test_an_exported_program_survives_its_file(tmp_path):
    net = uncertain(nn.Sequential(bl.BayesLinear(4, 3)))
    program = bl.to_exported(net, torch.rand(2, 4), 2, generator=generator())
    torch.export.save(program, tmp_path / "net.pt2")
    x = torch.rand(5, 4)
    expected = program.module()(x)
    assert_close(torch.export.load(tmp_path / "net.pt2").module()(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: bl.to_exported(net, torch.rand(2, 4), 0), "num_samples must be an integer >= 1, got 0"),
        (lambda net: bl.to_exported(net, torch.zeros(0, 4)), r"a batch of one input or more, got \(0, 4\)"),
        (lambda net: bl.to_exported(net, [[0.0] * 4]), "a batch of one input or more, got list"),
        (lambda net: bl.to_exported(nn.Linear(4, 2), torch.rand(2, 4)), "must have Bayesian layers, got none"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(nn.Sequential(bl.BayesLinear(4, 2)))


def test_onnx_is_imported_only_to_export():
    code = """
import sys, bayeslayers as bl, torch
assert not {"onnx", "onnxscript", "onnxruntime"} & {name.split(".")[0] for name in sys.modules}
sys.modules["onnx"] = None  # as if not installed
try: bl.to_onnx(bl.BayesLinear(2, 2), "net.onnx", torch.rand(1, 2))
except ImportError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'bayeslayers[onnx]'" in done.stdout, done.stderr
