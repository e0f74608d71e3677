"""Several writers of one posterior's folder, and readers beside them."""

from __future__ import annotations

import threading

import pytest
import torch

import bayeslayers as bl

WRITERS, ROUNDS = 4, 15


def net_of(value: float) -> torch.nn.Module:
    net = bl.BayesLinear(3, 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
        for precision in (net.weight_precision, net.bias_precision):
            precision.fill_(1 + value)
    return net


def test_the_folder_of_many_writers_is_whole_and_one_of_theirs(tmp_path):
    folder, failures, stop = tmp_path / "runs" / "posterior", [], threading.Event()
    bl.save_posterior(net_of(0.0), folder, name="writer-0")

    def write(k: int) -> None:
        try:
            for _ in range(ROUNDS):
                bl.save_posterior(net_of(float(k)), folder, name=f"writer-{k}")
        except Exception as error:
            failures.append(error)

    def read() -> None:
        net = net_of(-0.5)
        while not stop.is_set():
            try:
                name = bl.load_posterior(folder, net).name
            except Exception as error:
                failures.append(error)
                return
            k = float(name.removeprefix("writer-"))
            if not all((p == k).all() for p in net.parameters()) or not (net.weight_precision == 1 + k).all():
                failures.append(AssertionError(f"{name} has the weights of another writer"))

    writers = [threading.Thread(target=write, args=(k,)) for k in range(WRITERS)]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert failures == []
    net = net_of(-0.5)
    k = float(bl.load_posterior(folder, net).name.removeprefix("writer-"))
    assert (net.weight == k).all() and (net.bias_precision == 1 + k).all()
    assert [path.name for path in folder.parent.iterdir()] == ["posterior"]


def test_a_file_that_goes_while_it_is_read_is_a_missing_file(tmp_path, monkeypatch):
    bl.save_posterior(net_of(1.0), tmp_path / "posterior")
    monkeypatch.setattr("bayeslayers.storage.weight_file.member", lambda folder, name: folder / "gone.json")
    with pytest.raises(bl.PosteriorError, match=r"must hold a posterior, got no gone\.json"):
        bl.load_posterior(tmp_path / "posterior", net_of(0.0))


def test_what_a_writer_finds_at_the_end_is_not_replaced_unless_it_is_a_posterior(tmp_path, monkeypatch):
    folder = tmp_path / "posterior"

    def write_and_let_another_in(path, content):
        path.write_bytes(content)
        folder.mkdir(exist_ok=True)
        (folder / "thesis.tex").touch()

    monkeypatch.setattr("bayeslayers.storage.posterior.write_atomically", write_and_let_another_in)
    with pytest.raises(FileExistsError, match="holds something else"):
        bl.save_posterior(net_of(1.0), folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["posterior", "thesis.tex"]
