from __future__ import annotations

import numpy as np
import pytest
from support.tiny import quick, tiny

from recipes.tasks.classification import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("lr", "told"), [(1e-9, True), (0.1, False)])
def test_a_run_that_learned_nothing_says_so(tmp_path, capsys, monkeypatch, lr, told):
    quick(monkeypatch)
    for split, count in (("train", 9), ("test", 30)):
        labels = np.arange(count) % 3
        images = np.broadcast_to((labels * 120).astype(np.uint8)[:, None, None], (count, 4, 4))
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels, classes=["a", "b", "c"])
    assert train(tiny(tmp_path, tmp_path / "run", optimizer={"name": "adam", "lr": lr}, epochs=30)) is not None
    assert ("no better than guessing" in " ".join(capsys.readouterr().err.split())) == told
