from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from support.tiny import quick, tiny

from recipes.tasks import toy2d
from recipes.tasks.classification import train
from recipes.training.loop import Training
from recipes.training.run_lock import LOCK, locked, refuse_many_processes

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="holds the lock in a fork of this process")


def refusal(act):
    with pytest.raises(BlockingIOError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_held_by_one_scope_at_a_time(tmp_path):
    folder = tmp_path / "a/b"
    with locked(folder):
        held = refusal(lambda: locked(folder).__enter__())
        assert f"no other training uses, got {folder}, which process {os.getpid()} on " in held
        assert [path.name for path in folder.iterdir()] == [LOCK]
        with locked(tmp_path / "a/c"):
            pass
    assert list(tmp_path.iterdir()) == []  # as it was
    with pytest.raises(KeyError), locked(folder):
        (folder / "log.csv").write_text("x")
        raise KeyError
    assert [path.name for path in folder.iterdir()] == ["log.csv"]


def test_a_holder_that_is_not_one_is_not_repeated(tmp_path):
    with locked(tmp_path):
        (tmp_path / LOCK).write_text("process 1\x1b[2J on mars")
        assert "which another process holds" in refusal(lambda: locked(tmp_path).__enter__())


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_lock_of_a_killed_process_is_free_and_that_of_a_living_one_is_not(tmp_path):
    if (child := os.fork()) == 0:
        with locked(tmp_path):
            (tmp_path / "ready").touch()
            time.sleep(600)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    try:
        assert f"which process {child} on " in refusal(lambda: locked(tmp_path).__enter__())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_threads_that_want_one_folder_get_it_one_after_another(tmp_path):
    held, seen = [], []

    def work():
        for _ in range(50):
            try:
                with locked(tmp_path / "run"):
                    held.append(1)
                    seen.append(len(held))
                    held.pop()
            except BlockingIOError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {1}


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_into_a_folder_is_refused_and_the_first_one_ends(tmp_path, monkeypatch, resume):
    quick(monkeypatch)
    step, refused = Training._step, []
    config = tiny(tmp_path, tmp_path / "run", epochs=1)

    def files():
        return {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}

    def second():
        before = files()
        refused.append(refusal(lambda: train(config, resume=resume)))
        assert files() == before

    def meanwhile(self, x, y):
        step(self, x, y)
        if self.step == 1:
            second()
        if self.step == 2:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    monkeypatch.setattr(Training, "_step", meanwhile)
    assert train(config) and len(refused) == 2
    assert all(f"got {tmp_path}/run, which process {os.getpid()} on " in text for text in refused)
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_second_toy_into_a_folder_is_refused(tmp_path):
    with locked(tmp_path):
        assert str(tmp_path) in refusal(lambda: toy2d.train(toy2d.Config(output=str(tmp_path))))


def test_trainings_run_in_threads_of_one_process_in_folders_of_their_own(tmp_path, monkeypatch):
    quick(monkeypatch)
    tiny(tmp_path, tmp_path)  # writes the data
    done = []

    def work(name):
        done.append(train(tiny(tmp_path, tmp_path / name, epochs=1)))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
        thread.join()  # one after the other: outside the main thread, which alone gets signals
    assert len(done) == 2 and done[0] == done[1] is not None


@pytest.mark.parametrize(
    "name", ["WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"]
)
@pytest.mark.filterwarnings("ignore:\\s*suspicious MPI execution environment:RuntimeWarning")
def test_one_of_several_processes_is_refused_before_anything_is_written(name, tmp_path, monkeypatch):
    config, toy = tiny(tmp_path, tmp_path / "run"), toy2d.Config(output=str(tmp_path / "toy"))
    monkeypatch.setenv(name, "2")
    message = "^mpirun and mpi4py must be of one MPI, got 2 processes"
    if name in ("WORLD_SIZE", "SLURM_NTASKS"):  # and no rank, by which ranks could meet
        message = f"^training must be one process, got {name}=2: .* or set {name} to 1"
    for act in (lambda: toy2d.train(toy), lambda: train(config), lambda: train(config, resume=True)):
        with pytest.raises(ValueError, match=message):
            act()
    assert {path.name for path in tmp_path.iterdir()} == {"train.npz", "test.npz"}
    for value in ("1", "", "many", "-2"):
        refuse_many_processes({name: value})


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_that_outlives_a_killed_training_does_not_hold_its_lock(tmp_path):
    told, tell = os.pipe()
    if (training := os.fork()) == 0:
        with locked(tmp_path):
            if (worker := os.fork()) == 0:
                time.sleep(30)
                os._exit(0)
            os.write(tell, worker.to_bytes(8, "big"))
            time.sleep(30)
        os._exit(0)
    worker = int.from_bytes(os.read(told, 8), "big")
    os.kill(training, signal.SIGKILL)
    os.waitpid(training, 0)
    try:
        with locked(tmp_path):
            assert (tmp_path / LOCK).exists()
    finally:
        os.kill(worker, signal.SIGKILL)
