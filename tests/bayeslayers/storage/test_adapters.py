"""LoRA adapters of peft, trained by VOGN and IVON, saved alone and loaded onto the base model; and the docs page."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
PAGE = Path(__file__).parents[3] / "docs" / "adapters.md"
IDS = torch.randint(5, 40, (6, 8), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 2


def base_model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config)


def with_adapters(seed: int = 1) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(base_model(), config).eval()


def trained(method: str) -> nn.Module:
    net = with_adapters()
    if method == "vogn":
        bl.to_bayesian(net, include=["*lora_*", "*modules_to_save*"], inplace=True)
        optimizer = bl.VOGN(net, dataset_size=100, lr=0.5, generator=torch.Generator().manual_seed(2))
    else:
        optimizer = bl.IVON(net, dataset_size=100, lr=0.5, hess_init=0.1, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        optimizer.zero_grad()
        with optimizer.sampled():
            F.cross_entropy(net(input_ids=IDS).logits, LABELS).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("method", ["vogn", "ivon"])
def test_only_adapters_are_bayesian_and_move(method):
    before, net = dict(with_adapters().named_parameters()), trained(method)
    uncertain = {site.name for site in bl.posterior(net)}
    assert uncertain == {name for name, p in net.named_parameters() if p.requires_grad}
    assert {kind for name in uncertain for kind in ("lora_A", "lora_B", "modules_to_save") if kind in name} == {
        "lora_A",
        "lora_B",
        "modules_to_save",
    }
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in uncertain), name


@pytest.mark.parametrize("method", ["vogn", "ivon"])
@pytest.mark.parametrize("bayesian", [False, True])
def test_adapters_are_saved_alone_and_loaded_onto_the_base_model(method, bayesian, tmp_path):
    net = trained(method)
    card = bl.save_adapters(net, tmp_path / "adapters", base_model="owner/tiny-bert", dataset="six sentences")
    assert (card.base_model, bl.load_posterior.__name__) == ("owner/tiny-bert", "load_posterior")
    assert "base_model: owner/tiny-bert" in (tmp_path / "adapters/README.md").read_text()
    assert (tmp_path / "adapters/model.safetensors").stat().st_size < 20_000
    other = with_adapters(seed=5)
    if bayesian:
        bl.to_bayesian(other, include=["*lora_*", "*modules_to_save*"], inplace=True)
    assert bl.load_adapters(tmp_path / "adapters", other).base_model == "owner/tiny-bert"
    one, two = (
        bl.predict(n, {"input_ids": IDS}, 4, generator=torch.Generator().manual_seed(0)).probs for n in (net, other)
    )
    assert_close(two, one, rtol=0, atol=1e-6)
    assert other.card.base_model == "owner/tiny-bert"


def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path):
    peft = pytest.importorskip("peft")
    bl.save_adapters(trained("ivon"), tmp_path / "adapters", base_model="owner/tiny-bert")
    smaller = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    other = peft.get_peft_model(base_model(), smaller)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(bl.PosteriorError, match=r"must be torch\.float32 of shape"):
        bl.load_adapters(tmp_path / "adapters", other)
    more = peft.get_peft_model(base_model(), peft.LoraConfig(r=4, target_modules=["query", "key", "value"]))
    with pytest.raises(bl.PosteriorError, match=r"must hold every trained parameter of the model, got no .*key"):
        bl.load_adapters(tmp_path / "adapters", more)
    assert_close(dict(other.state_dict()), dict(before), rtol=0, atol=0)
    with pytest.raises(ValueError, match="model must have frozen parameters beside its adapters, got none"):
        bl.save_adapters(bl.BayesLinear(2, 2), tmp_path / "other", base_model="none")


def test_the_page_runs(tmp_path):
    pytest.importorskip("peft")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text("\n".join(blocks) + "\nassert torch.allclose(again.probs, prediction.probs)\n")
    environment = {"PYTHONPATH": str(PAGE.parents[1]), "OMP_NUM_THREADS": "1", "PATH": "", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-W", "ignore", "example.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
