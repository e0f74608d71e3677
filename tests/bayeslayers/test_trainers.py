"""The examples of docs/trainers.md run as they stand, and train."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
CHECKS = """
assert (prediction.labels == y).float().mean() > 0.85
assert (bl.predict(manual.net, x).labels == y).float().mean() > 0.85
"""
BERT = """
bert.eval()
assert torch.equal(bert(ids).logits, bert(ids).logits)
with bl.sampled(bert):
    assert not torch.equal(bert(ids).logits, logits)
assert prediction.probs.shape == (256, 2) and prediction.epistemic.max() > 0
assert {site.name for site in bl.posterior(bert)} == {name for name, _ in bert.named_parameters()}
"""


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("needs", "part", "checks"),
    [("lightning", slice(0, 2), CHECKS), ("transformers", slice(2, 3), BERT)],
    ids=["lightning", "hugging face"],
)
def test_examples_run(needs, part, checks, tmp_path):
    pytest.importorskip(needs)
    head = "import torch\nimport bayeslayers as bl\n" if part.start else ""
    (tmp_path / "example.py").write_text(head + "\n".join(blocks()[part]) + checks)
    words = [sys.executable, "-W", "ignore", "example.py"]
    environment = {"PYTHONPATH": str(PAGE.parent.parent), "OMP_NUM_THREADS": "1", "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_block_is_run():
    assert len(blocks()) == 3
