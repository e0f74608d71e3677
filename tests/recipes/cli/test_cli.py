from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import bayeslayers as bl
import zoo
from bayeslayers.prediction.predict import METHODS as predict_methods
from bayeslayers.storage.posterior import read_card
from recipes.cli import main, parser
from recipes.cli.options import METHODS
from recipes.cli.parser import COMMANDS
from recipes.cli.train import CONFIGS
from recipes.reports.demo import ASSETS

TINY = """
name: tiny
model: {name: mlp, widths: [8]}
data: mnist
optimizer: {name: vogn, lr: 0.1}
batch_size: 32
epochs: 1
evaluation: {num_samples: 2, epoch_samples: 2}
"""


@pytest.fixture
def images(tmp_path):
    """Files of digit 7 as grey and RGB, and of digit 1 black on white."""
    digits = load_file(ASSETS)["digits"].numpy()
    seven = Image.fromarray(digits[7])
    seven.save(tmp_path / "grey.png")
    seven.convert("RGB").resize((90, 70)).save(tmp_path / "rgb[bold].jpg")
    Image.fromarray(255 - digits[1]).save(tmp_path / "black.png")
    return [str(tmp_path / name) for name in ("grey.png", "rgb[bold].jpg", "black.png")]


def failure(capsys, *words):
    """The one line on stderr of a command that fails."""
    assert main(words) == 1
    out, error = capsys.readouterr()
    assert error.startswith("bayeslayers: ") and error.count("\n") == 1 and not out
    return error


def test_help_costs_no_import_of_torch():
    code = "import sys\nfrom recipes.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nFalse\n")
    for command in ("demo", "list", "info", "predict", "train", "benchmark"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "words", [[], ["nonsense"], ["list", "extra"], ["benchmark", "leap"], ["predict", "lenet5-mnist"]]
)
def test_wrong_words_exit_with_2(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_list_names_models_and_posteriors(capsys):
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["models"] == zoo.list_models() and listed["posteriors"] == zoo.list_posteriors()
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "lenet5-mnist" in out and "ECE" in out


def test_list_names_the_configurations_that_train_takes(capsys):
    assert main(["list", "--configurations"]) == 0
    names = capsys.readouterr().out.split()
    assert "mnist/lenet5_vogn" in names and "toy2d" in names and all((CONFIGS / f"{n}.yaml").is_file() for n in names)
    assert len(names) == len(list(CONFIGS.rglob("*.yaml")))
    assert main(["list", "--configurations", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"configurations": names}


def test_info_shows_the_card(capsys):
    assert main(["info", "lenet5-mnist", "--json"]) == 0
    shown, config = json.loads(capsys.readouterr().out), zoo.resolve("lenet5-mnist") / "config.json"
    assert shown | json.loads(config.read_text()) == shown
    assert main(["info", "lenet5-mnist"]) == 0
    out = capsys.readouterr().out
    assert "lenet5-mnist" in out and "accuracy" in out and "library_name" not in out


def test_predict_reads_grey_and_rgb_files_of_any_size(capsys, images):
    assert main(["predict", "lenet5-mnist", *images[:2], "--num-samples", "8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in rows] == ["7", "7"] and [row["image"] for row in rows] == images[:2]
    for row in rows:
        assert row["confidence"] == max(row["probs"].values()) > 0.8
        assert sum(row["probs"].values()) == pytest.approx(1, abs=1e-4)
        assert row["total"] == pytest.approx(row["aleatoric"] + row["epistemic"], abs=1e-4)


def test_predict_gives_the_numbers_of_the_library(capsys, tmp_path):
    article = load_file(ASSETS)["articles"][:1]  # of which the draws disagree
    Image.fromarray(article[0].numpy()).save(tmp_path / "article.png")
    assert (
        main(["predict", "lenet5-mnist", str(tmp_path / "article.png"), "--num-samples", "5", "--seed", "3", "--json"])
        == 0
    )
    (row,) = json.loads(capsys.readouterr().out)
    generator = torch.Generator().manual_seed(3)
    expected = bl.predict(
        zoo.load("lenet5-mnist"), article[:, None].float() / 255, 5, method="sample", generator=generator
    )
    assert list(row["probs"].values()) == pytest.approx(expected.probs[0].tolist(), abs=1e-6)
    assert row["epistemic"] == pytest.approx(float(expected.epistemic[0]), abs=1e-6)


def test_predict_inverts_and_prints_a_table(capsys, monkeypatch, images):
    monkeypatch.setenv("COLUMNS", "500")
    assert main(["predict", "lenet5-mnist", images[2], "--invert", "--num-samples", "8", "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)[0]["label"] == "1" and not error
    assert main(["predict", "lenet5-mnist", images[2], "--num-samples", "2", "--json"]) == 0
    assert "--invert swaps black and white" in capsys.readouterr().err
    assert main(["predict", "lenet5-mnist", images[1], "--num-samples", "2"]) == 0
    out = capsys.readouterr().out
    assert "epistemic" in out and "[bold]" in out  # a name, not markup


def test_predict_turns_photographs_upright(capsys, tmp_path):
    digit = Image.fromarray(load_file(ASSETS)["digits"].numpy()[4])
    exif = digit.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    digit.rotate(90).save(tmp_path / "turned.png", exif=exif)
    assert main(["predict", "lenet5-mnist", str(tmp_path / "turned.png"), "--num-samples", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["label"] == "4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such.png"], "image must be a file, got no/such.png"),
        (["{tmp}/empty"], "folder must hold images, got .*empty without any"),
        (["{tmp}/text.png"], "a picture that Pillow reads, got .*text.png: cannot identify"),
        (["{tmp}/half.png"], "a picture that Pillow reads, got .*half.png: image file is truncated"),
        (["{tmp}/float.tiff"], "got .*float.tiff: image must hold values from 0 to 1, got 510 to 510"),
        (["{tmp}/grey.png", "--num-samples", "0"], "num_samples must be an integer >= 1, got 0"),
    ],
)
def test_predict_refuses_bad_images_in_one_line(capsys, tmp_path, images, words, message):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (99, 99), dtype=np.uint8)).save(tmp_path / "noise.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "noise.png").read_bytes()[:4000])
    Image.fromarray(np.full((5, 5), 510, np.float32)).save(tmp_path / "float.tiff")
    words = [word.replace("{tmp}", str(tmp_path)) for word in words]
    assert_matches(message, failure(capsys, "predict", "lenet5-mnist", *words))


def assert_matches(pattern, text):
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_predict_refuses_bad_posteriors_in_one_line(capsys, tmp_path, tmp_path_factory, images):
    model = zoo.create("mlp", widths=[2])
    bl.save_posterior(model, tmp_path / "unnamed", class_names=["a", "b"])
    bl.save_posterior(model, tmp_path / "real", likelihood="gaussian")
    bl.save_posterior(bl.BayesLinear(2, 2), tmp_path / "mine")
    for name, message in {
        "unnamed": "must name all 10 classes, got 2 names",
        "real": "posterior must be one of classes, got a gaussian one",
        "mine": "must name its network's builder, got none",
    }.items():
        assert message in failure(capsys, "predict", str(tmp_path / name), images[0])
    assert "Did you mean 'lenet5-mnist'" in failure(capsys, "predict", "lenet-mnist", images[0])
    assert "got no config.json" in failure(capsys, "info", str(tmp_path_factory.mktemp("empty")))
    assert f"must be its own folder, got {tmp_path}. Did you mean {tmp_path}/" in failure(capsys, "info", str(tmp_path))
    (tmp_path / "mine/config.json").write_text("{")
    assert "must be JSON" in failure(capsys, "info", str(tmp_path / "mine"))


@pytest.fixture
def tiny(tmp_path, data_root):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return [str(tmp_path / "tiny.yaml"), "--data-root", str(data_root), "--output", str(tmp_path / "run")]


def test_train_takes_options_before_and_after_the_configuration(capsys, tmp_path, tiny):
    config, *places = tiny
    assert main(["train", *places, config, "--optimizer.lr=0.2", "--evaluation.num-samples", "1"]) == 0
    out, error = capsys.readouterr()
    assert "accuracy" in out and "epoch 1/1" in error and "Traceback" not in error
    card = read_card(tmp_path / "run/posterior")
    assert card.optimizer["lr"] == 0.2 and card.metrics["num_samples"] == 1
    assert card.recipe == "bayeslayers train tiny.yaml --optimizer.lr=0.2 --evaluation.num-samples 1"
    assert "--resume" in failure(capsys, "train", *tiny, "--optimizer.lr=0.2")
    assert main(["train", *tiny, "--resume", "--optimizer.lr=0.2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "run/metrics.json").read_text())
    assert read_card(tmp_path / "run/posterior").recipe == "bayeslayers train tiny.yaml --optimizer.lr=0.2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "epochs must be an integer >= 1, got 0"),
        (["--epochs", "many"], "epochs.*many"),
        (["--checkpoint_minutes", "0"], "checkpoint_minutes must be a finite number > 0, got 0"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--optimizer.name", "sdg"], "optimizer must be one of vogn, .*got 'sdg'. Did you mean 'sgd'"),
        (["--optimizer.lr", "-1"], "lr must be a finite number >= 0, got -1"),
        (["--data_root", "no/such"], "data root must hold MNIST .* got no/such"),
        (["--baseline", "no/such"], "baseline must be a finished run, got no/such"),
        (["--resume"], "checkpoint.safetensors must be a training checkpoint, got no such file"),
    ],
)
def test_train_refuses_bad_options_in_one_line(capsys, tmp_path, tiny, words, message):
    assert_matches(message, failure(capsys, "train", *tiny, *words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["name: [", "a string", "name: x\ncolour: red\n", "{}", "\0"])
def test_train_refuses_bad_configurations_in_one_line(capsys, tmp_path, content):
    (tmp_path / "bad.yaml").write_text(content)
    failure(capsys, "train", str(tmp_path / "bad.yaml"))


def test_train_says_which_configurations_there_are(capsys):
    found = failure(capsys, "train", "mnist/lenet6_vogn")
    assert (
        "got 'mnist/lenet6_vogn'. Did you mean 'mnist/lenet5_vogn'" in found
        and "`bayeslayers list --configurations` has them all" in found
    )
    assert "Give a CONFIG, as mnist/lenet5_vogn" in failure(capsys, "train")
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0 and "--data_root" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((CONFIGS / "mnist").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_bundled_configuration_for_mnist_trains(tmp_path, data_root, path):
    short = ["--limit", "256", "--epochs", "1", "--evaluation.num_samples", "2", "--evaluation.epoch_samples", "1"]
    places = ["--data-root", str(data_root), "--output", str(tmp_path / "run")]
    if path.stem.endswith("swag"):
        short += ["--optimizer.start_step", "1", "--optimizer.average_every", "1"]
    assert main(["train", f"mnist/{path.stem}", *short, *places]) == 0  # two steps
    assert (tmp_path / "run/log.csv").read_text().count("\n") == 2
    points = ("adam", "sgd", "kfac", "mcdropout")  # which leave no posterior
    assert (tmp_path / "run/posterior/config.json").exists() == (path.stem.rpartition("_")[2] not in points)
    if path.stem.endswith("laplace"):
        assert json.loads((tmp_path / "run/metrics.json").read_text())["num_samples"] > 1


def test_demo_prints_a_table_and_draws_a_picture(capsys, tmp_path):
    assert main(["demo", "--num-samples", "4", "--output", str(tmp_path / "new/demo.png")]) == 0
    out = capsys.readouterr().out
    for word in ("lenet5-mnist", "mlp-mnist", "confidence", "aleatoric", "epistemic", "rotated", "sneaker"):
        assert word in out
    assert (tmp_path / "new/demo.png").stat().st_size > 20_000
    with Image.open(tmp_path / "new/demo.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_demo_refuses_what_it_could_not_write_before_it_works(capsys, tmp_path):
    assert "output must be a .png file" in failure(capsys, "demo", "--output", str(tmp_path / "demo.xyz"))
    assert "num_samples must be an integer >= 1" in failure(capsys, "demo", "--num-samples", "0")
    (tmp_path / "file").write_text("x")
    failure(capsys, "demo", "--output", str(tmp_path / "file/demo.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("demo --num-samples 0", "num_samples must be an integer >= 1, got 0."),
        ("demo --output demo.xyz", "output must be a .png file, got demo.xyz."),
        ("demo --output folder.png", "output must be a .png file, got folder.png, which is a folder."),
        (
            "demo --output file/a/demo.png",
            "output must be in a folder that can be made, got file/a/demo.png: Not a dir",
        ),
        ("predict lenet5-mnist none.png", "image must be a file, got none.png, which is not there."),
        ("predict lenet5-mnist file --num-samples -1", "num_samples must be an integer >= 1, got -1."),
        ("predict lenet5-mnist file --seed 99999999999999999999", "seed must be an integer between -2**63 and 2**63"),
        ("evaluate lenet5-mnist --limit 0", "limit must be an integer >= 1, got 0."),
        ("benchmark step --rounds 0", "rounds must be an integer >= 1, got 0."),
        ("search x y", "unrecognized arguments: y. See bayeslayers search --help."),
        ("--tag\x1b[31m search x", "unrecognized arguments: '--tag\\x1b[31m'. See bayeslayers search --help."),
    ],
)
def test_what_cannot_work_is_said_before_anything_heavy_is_imported(tmp_path, words, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    code = "import sys\nfrom recipes.cli import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=tmp_path)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not {"torch", "numpy", "PIL", "huggingface_hub", "rich"} & set(done.stdout.split())


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_demo_refuses_a_folder_that_may_not_be_written(capsys, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "that you may write" in failure(capsys, "demo", "--output", str(tmp_path / "locked/demo.png"))


def test_each_command_is_one_file_and_each_file_one_command():
    files = {path.stem for path in Path(parser.__file__).parent.glob("*.py")}
    assert files - {"__init__", "__main__", "allocator", "parser", "options"} == set(COMMANDS)
    for name, command in COMMANDS.items():
        assert command.__name__ == f"recipes.cli.{name}" and (command.run.__doc__ or "").count("\n") == 0


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"bayeslayers {bl.__version__}\n"


def test_predict_takes_folders_and_leaves_out_what_is_hidden(capsys, tmp_path, images):
    for name in ("b/2.png", "b/a/1.PNG", "b/.hidden/3.png", "b/._4.png", "b/__MACOSX/5.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "grey.png").read_bytes())
    words = ["predict", "lenet5-mnist", "--num-samples", "2", str(tmp_path / "b"), images[0], images[0]]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in rows] == [*(str(tmp_path / name) for name in ("b/2.png", "b/a/1.PNG")), images[0]]
    assert {row["label"] for row in rows} == {"7"}


def test_predict_obeys_method_and_card_and_device(capsys, tmp_path, images):
    words = [images[2], "--num-samples", "3", "--json"]  # black on white, of which it is uncertain

    def row(*words):
        assert main(["predict", *words]) == 0
        return json.loads(capsys.readouterr().out)[0]

    assert row("lenet5-mnist", *words, "--method", "mean")["epistemic"] == 0 < row("lenet5-mnist", *words)["epistemic"]
    bl.save_posterior(zoo.load("lenet5-mnist"), tmp_path / "means", method="mean")
    assert row(str(tmp_path / "means"), *words)["epistemic"] == 0
    assert row("lenet5-mnist", *words, "--device", "cpu") == row("lenet5-mnist", *words)
    assert "device must be one that torch reaches, got 'cuda:99'" in failure(
        capsys, "predict", "lenet5-mnist", *words, "--device", "cuda:99"
    )
    assert "device must be" in failure(capsys, "evaluate", "lenet5-mnist", "--device", "meta")
    assert "device must be" in failure(capsys, "demo", "--device", "nonsense", "--output", str(tmp_path / "x.png"))


def test_the_methods_of_the_command_line_are_those_of_the_library():
    assert METHODS == tuple(predict_methods)


def test_home_folders_are_found_in_every_command(capsys, tmp_path, monkeypatch, images):
    monkeypatch.setenv("HOME", str(tmp_path))
    bl.save_posterior(zoo.load("mlp-mnist"), tmp_path / "mine")
    assert main(["info", "~/mine"]) == 0
    assert main(["predict", "~/mine", "~/grey.png", "--num-samples", "2"]) == 0
    assert main(["download", "~/mine", "--output", "~/copy"]) == 0 and (tmp_path / "copy/config.json").is_file()
    capsys.readouterr()
    for words in (["compare", "~/run"], ["evaluate", "mlp-mnist", "--data", "npz:~/x.npz"], ["verify", "~/none"]):
        assert str(tmp_path) in failure(capsys, *words)


@pytest.mark.parametrize("words", [["list"], ["predict", "lenet5-mnist"], ["compare"]])
def test_tables_fit_60_columns_and_cut_nothing(capsys, tmp_path, monkeypatch, words, images):
    monkeypatch.setenv("COLUMNS", "60")
    if words == ["compare"]:
        (tmp_path / "a-run-with-a-name-of-quite-some-length-vogn").mkdir()
        (tmp_path / "a-run-with-a-name-of-quite-some-length-vogn/log.csv").write_text(
            "epoch,seconds,train_accuracy,test_accuracy,test_nll,test_ece\n1,1.5,0.98765,0.91234,0.51234,0.01234\n"
        )
        monkeypatch.setattr("rich.console.Console.is_terminal", True)  # elsewhere a table is as wide as it must be
        monkeypatch.setenv("NO_COLOR", "1")
        wanted = ["a-run-with-a-name-of-quite-some-length-vogn", "98.77 %", "91.23 %", "0.5123", "0.0123", "1.5"]
        words = [*words, str(tmp_path / wanted[0])]
    elif words == ["list"]:
        wanted = [*zoo.list_posteriors(), "cifar10 (50000 train, 8000 test)", "accuracy", "0.6625"]
    else:
        words = [*words, *images, "--num-samples", "2"]
        wanted = ["grey.png", "rgb[bold].jpg", "confidence", "total", "aleatoric", "epistemic"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60 and "…" not in out
    assert [text for text in wanted if text not in out] == []


def test_benchmark_measures_vogn_beside_adam(capsys):
    assert main(["benchmark", "step", "--rounds", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["model"], row["optimizer"]) for row in rows} >= {
        (model, optimizer) for model in ("mlp", "lenet5") for optimizer in ("adam", "vogn")
    }
    for row in rows:
        assert set(row) >= {"model", "batch", "optimizer", "median_ms", "ratio_to_adam"}
        assert row["median_ms"] > 0 and row["ratio_to_adam"] > 0
        assert row["optimizer"] != "adam" or row["ratio_to_adam"] == 1
    assert "rounds must be an integer >= 1, got 0" in failure(capsys, "benchmark", "step", "--rounds", "0")


def test_a_traceback_is_there_for_who_asks(monkeypatch):
    monkeypatch.setenv("BAYESLAYERS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown posterior"):
        main(["info", "nonsense"])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [(KeyboardInterrupt(), 130, ""), (RuntimeError("two\n  lines"), 1, "bayeslayers: two lines\n")],
)
def test_interruption_and_inner_errors_end_without_a_traceback(capsys, monkeypatch, error, status, line):
    monkeypatch.setattr(zoo, "list_models", lambda: (_ for _ in ()).throw(error))
    assert main(["list", "--json"]) == status
    assert capsys.readouterr().err == line


def test_a_reader_that_has_gone_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "recipes.cli", "list", "--json"]
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(words, stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")
