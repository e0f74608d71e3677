from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from recipes.data.examples import num_batches
from recipes.data.split import NAMES, Split, batches, load_split

RNG = np.random.default_rng(0)
GREY, COLOUR = (np.uint8(RNG.integers(0, 256, shape)) for shape in ((6, 5, 4), (6, 5, 4, 3)))
LABELS = np.array([0, 1, 2, 2, 1, 0])


def write_npz(path, **arrays):
    np.savez(path, **({"images": GREY, "labels": LABELS} | arrays))
    return f"npz:{path}"


def write_folder(root, images):
    """Pictures `images` of classes bee, ant in turn, as PNG, and what torchvision's order makes of them."""
    for number, image in enumerate(images):
        path = root / ("bee", "ant")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return [*images[1::2], *images[::2]]


def channels_first(images):
    return torch.from_numpy(images)[:, None] if images.ndim == 3 else torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_an_npz_file_gives_its_arrays(tmp_path, images):
    name = write_npz(tmp_path / "data.npz", images=images, classes=np.array(["a", "b", "c"]))
    split = load_split(name, None, train=False)
    assert_close(split.images, channels_first(images), rtol=0, atol=0)
    assert split.labels.tolist() == LABELS.tolist() and split.classes == ["a", "b", "c"]
    assert_close(split.inputs(slice(2)), channels_first(images)[:2] / 255)
    unnamed = load_split(write_npz(tmp_path / "data.npz", labels=LABELS.astype(np.uint8)), None, train=True)
    assert unnamed.classes == ["0", "1", "2"] and unnamed.labels.dtype == torch.int64


def test_a_pattern_names_the_file_of_each_split(tmp_path):
    write_npz(tmp_path / "a_train.npz")
    write_npz(tmp_path / "a_test.npz", images=255 - GREY)
    name = f"npz:{tmp_path}/a_{{split}}.npz"
    assert_close(load_split(name, None, train=True).images, channels_first(GREY))
    assert_close(load_split(name, None, train=False).images, channels_first(255 - GREY))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GREY.astype(float)}, r"images of .* must be bytes of shape .*, got float64 \(6, 5, 4\)"),
        ({"images": GREY[0]}, "must be bytes of shape"),
        ({"images": np.zeros((6, 5, 4, 2), np.uint8)}, "must be bytes of shape"),
        ({"images": GREY[:0], "labels": LABELS[:0]}, r"data must hold at least one image, got .* shape \(0, 5, 4\)"),
        ({"images": GREY[:, :0]}, r"data must hold at least one image, got .* shape \(6, 0, 4\)"),
        ({"labels": LABELS[:0]}, r"class index for each of the 6 images, got int64 \(0,\)"),
        ({"labels": LABELS[:5]}, "class index for each of the 6 images"),
        ({"labels": LABELS - 1}, "class index for each .* from -1"),
        ({"labels": LABELS * 0.5}, "class index for each .* float64"),
        ({"classes": np.array(["a", "b"])}, "classes of .* must name label 2, got 2 names"),
        ({"classes": np.array(["a", "b", None], object)}, "plain arrays, got .*: Object arrays cannot be loaded"),
    ],
)
def test_bad_arrays_are_refused_in_one_sentence(tmp_path, arrays, message):
    name = write_npz(tmp_path / "data.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_split(name, None, train=False)
    assert "\n" not in str(caught.value)


def test_damaged_npz_files_are_refused_in_one_sentence(tmp_path):
    write_npz(tmp_path / "good.npz")
    good = (tmp_path / "good.npz").read_bytes()
    for content in (b"", b"text", good[:200], good[:-30], good[:150] + b"\xff" * 60 + good[210:]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"data must be an .npz file of plain arrays, got .*bad.npz") as caught:
            load_split(f"npz:{tmp_path}/bad.npz", None, train=False)
        assert "pickle" not in str(caught.value) and str(caught.value).endswith("with the arrays images and labels.")
    np.save(tmp_path / "one.npy", GREY)
    with pytest.raises(ValueError, match=r"data must be an .npz file of plain arrays, got .*: File is not a zip file"):
        load_split(f"npz:{tmp_path}/one.npy", None, train=False)
    with zipfile.ZipFile(tmp_path / "empty.npz", "w") as file:
        file.writestr("notes.txt", "x")
    with pytest.raises(ValueError, match="must hold the array 'images', got none that is known"):
        load_split(f"npz:{tmp_path}/empty.npz", None, train=False)
    with pytest.raises(FileNotFoundError, match=r"data must be an .npz file, got no/such_test.npz"):
        load_split("npz:no/such_{split}.npz", None, train=False)


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_a_folder_of_pictures_is_read_in_the_order_of_its_classes(tmp_path, images):
    write_folder(tmp_path / "train", images)
    expected = channels_first(np.stack(write_folder(tmp_path / "val", 255 - images)))
    split = load_split(f"imagefolder:{tmp_path}", None, train=False)
    assert split.classes == ["ant", "bee"] and split.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(split) == 6
    assert_close(split.inputs(slice(None)), expected / 255)
    index = torch.tensor([4, 0])
    assert_close(split.images[index], expected[index], rtol=0, atol=0)
    few = split.limited(2)
    assert few.labels.tolist() == [0, 1] and split.limited(6) is split and len(split.images[:0]) == 0
    assert all(any(torch.equal(image, other) for other in expected) for image in few.images[:])
    ((x, y),) = batches(split, 6, seed=0, epoch=0)
    assert x.shape == expected.shape and y.sum() == 3
    flat = load_split(f"imagefolder:{tmp_path}/train", None, train=True)
    assert_close(flat.inputs(slice(None)), 1 - expected / 255)


def test_pictures_of_any_size_are_cropped_to_the_middle_and_resized(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200  # a square of one colour between black ones
    write_folder(tmp_path / "val", [wide, np.full((30, 30, 3), 100, np.uint8)])
    inputs = load_split(f"imagefolder:{tmp_path}", None, train=False, size=(3, 8, 8)).inputs(slice(None))
    assert_close(inputs, torch.stack([torch.full((3, 8, 8), 100.0), torch.full((3, 8, 8), 200.0)]) / 255)


def test_transparent_pictures_are_laid_over_white_and_photographs_turned_upright(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a/clear.png")
    picture = Image.fromarray(COLOUR[0])
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a/turned.png", exif=exif)
    split = load_split(f"imagefolder:{tmp_path}", None, train=False, size=(3, 5, 4))
    assert_close(split.images[:], torch.stack([torch.full((3, 5, 4), 255), channels_first(COLOUR)[0]]).to(torch.uint8))


def test_other_sizes_are_resized_and_other_colours_refused(tmp_path, data_root):
    split = load_split("mnist", data_root, train=False, size=(1, 14, 14))
    assert split.inputs(slice(3)).shape == (3, 1, 14, 14) and split.limited(3).inputs(slice(None)).shape[2:] == (14, 14)
    plain = load_split("mnist", data_root, train=False)
    average = plain.inputs(slice(3)).mean((2, 3))
    assert_close(split.inputs(slice(3)).mean((2, 3)), average, rtol=0, atol=0.02)
    same = load_split("mnist", data_root, train=False, size=(1, 28, 28))
    assert_close(same.inputs(slice(3)), plain.inputs(slice(3)), rtol=0, atol=0)
    colour = write_npz(tmp_path / "colour.npz", images=COLOUR)
    write_folder(tmp_path / "val", GREY)
    write_folder(tmp_path / "coloured", COLOUR)
    folder = f"imagefolder:{tmp_path}"
    for name, size, message in (
        ("mnist", (3, 28, 28), "images of mnist must be RGB as the model takes them, got grey ones"),
        (colour, (1, 5, 4), "images of npz:.* must be grey as the model takes them, got RGB ones"),
        (colour, (4, 5, 4), "must be of 4 channels"),
        (folder, (3, 5, 4), "must be RGB as the model takes them, got grey ones"),
        (f"{folder}/coloured", (1, 5, 4), "must be grey as the model takes them, got RGB ones"),
    ):
        with pytest.raises(ValueError, match=message):
            load_split(name, data_root, train=False, size=size)


def test_a_grey_photograph_among_coloured_ones_is_taken_and_the_reverse_refused(tmp_path):
    write_folder(tmp_path / "val", COLOUR)
    Image.fromarray(GREY[0]).save(tmp_path / "val/ant/9.png")
    split = load_split(f"imagefolder:{tmp_path}", None, train=False)
    assert_close(split.images[3:4], torch.from_numpy(GREY[:1])[:, None].expand(1, 3, 5, 4).contiguous())
    write_folder(tmp_path / "grey/val", [GREY[0]] * 40)
    Image.fromarray(COLOUR[0]).save(tmp_path / "grey/val/ant/99.png")
    with pytest.raises(ValueError, match=r"image must be grey, of 8 bits, got .*99.png of Pillow's mode RGB"):
        load_split(f"imagefolder:{tmp_path}/grey", None, train=False).inputs(slice(None))


def test_bad_folders_are_refused_in_one_sentence(tmp_path):
    def load(folder, **options):
        return load_split(f"imagefolder:{tmp_path / folder}", None, **{"train": False} | options)

    write_folder(tmp_path / "strange/train", GREY)
    (tmp_path / "strange/val/cat").mkdir(parents=True)
    Image.fromarray(GREY[0]).save(tmp_path / "strange/val/cat/0.png")
    (tmp_path / "empty/val/ant").mkdir(parents=True)
    write_folder(tmp_path / "bad/val", GREY)
    damaged = tmp_path / "bad/val/ant/1.png"
    for folder, error, message in (
        (
            "none",
            FileNotFoundError,
            r"data must be a folder, got .*none: there is no such folder\. .*Lay pictures out as .*none/train/CLASS/",
        ),
        ("bad/val/ant/1.png", FileNotFoundError, r"data must be a folder, got .*1.png: there is no such folder"),
        ("empty", FileNotFoundError, "for each class, got .*val with none for the classes ant"),
        ("strange", ValueError, "classes of .*val must be those of .*train, got cat too"),
    ):
        with pytest.raises(error, match=message):
            load(folder)
    with pytest.raises(FileNotFoundError, match=r"data must hold train, got .* with val alone"):
        load("bad", train=True)
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a picture that Pillow reads, got .*ant.1.png"):
        load("bad").inputs(slice(None))
    damaged.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"a picture that Pillow reads, got .*ant.1.png"):
        load("bad")


class Stub:
    """What torchvision's classes hold once they have read their files."""

    images, calls = COLOUR, []

    def __init__(self, root, **options):
        self.calls.append((root, options))
        self.data, self.targets, self.classes = self.images, LABELS.tolist(), ["a", "b", "c"]


class StubSVHN(Stub):
    def __init__(self, root, **options):
        super().__init__(root, **options)
        self.data, self.labels = COLOUR.transpose(0, 3, 1, 2), LABELS
        del self.targets, self.classes


def test_colour_sets_of_torchvision_become_channels_first(monkeypatch, tmp_path):
    from torchvision import datasets

    monkeypatch.setattr(datasets, "CIFAR10", Stub)
    monkeypatch.setattr(datasets, "SVHN", StubSVHN)
    for name, options in (("cifar10", {"train": False}), ("svhn", {"split": "test"})):
        split = load_split(name, tmp_path, train=False, size=(3, 5, 4))
        assert_close(split.images, channels_first(COLOUR).contiguous(), rtol=0, atol=0)
        assert split.labels.tolist() == LABELS.tolist()
        assert Stub.calls[-1] == (tmp_path, options | {"download": False})
    assert split.classes == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("name", NAMES)
def test_data_that_is_not_there_is_one_sentence(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"data root must hold {NAMES[name]} as torchvision lays it out"):
        load_split(name, tmp_path, train=True)


def test_what_torchvision_cannot_do_is_one_sentence(monkeypatch):
    from urllib.error import URLError

    from torchvision import datasets

    def fail(error):
        def raising(*_, **__):
            raise error

        monkeypatch.setattr(datasets, "SVHN", raising)

    fail(URLError("no route"))
    with pytest.raises(ConnectionError, match=r"SVHN could not be downloaded: .*no route.*Give --data-root.* as ood"):
        load_split("svhn", None, train=True, argument="ood")
    fail(ModuleNotFoundError("No module named 'scipy'", name="scipy"))
    with pytest.raises(RuntimeError, match=r"SVHN needs scipy to read its files\. pip install scipy\."):
        load_split("svhn", None, train=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("npz:no/such.npz", "evaluation.ood must be an .npz file, got no/such.npz"),
        ("imagefolder:no/such", "evaluation.ood must be a folder, got no/such"),
        ("cifar10", "data root must hold CIFAR10 .* or give another set as evaluation.ood"),
    ],
)
def test_what_cannot_be_read_says_which_argument_named_it(tmp_path, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_split(name, tmp_path, train=False, argument="evaluation.ood")


@pytest.mark.parametrize("name", ["minst", "npz:", "imagefolder:", "zip:data.zip", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown data set .* Known: mnist, .*, npz:PATH, imagefolder:PATH"):
        load_split(name, None, train=True)


@pytest.mark.parametrize("labels", [torch.arange(100) // 10, torch.arange(100) % 10], ids=["by class", "in turn"])
def test_a_limit_takes_examples_from_all_over(labels):
    split = Split(torch.arange(100, dtype=torch.uint8)[:, None, None, None], labels, [])
    few = split.limited(20)
    places = few.images.flatten().long()
    assert (places // 5).tolist() == list(range(20)) and torch.equal(few.labels, labels[places])
    assert set(few.labels.tolist()) == set(range(10)) and torch.equal(few.images, split.limited(20).images)
    assert (
        (split.limited(30).images.diff(dim=0) > 0).all()
        and len(split.limited(30)) == 30
        and split.limited(100) is split
    )


def test_a_split_needs_no_size():
    split = Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), [])
    assert split.inputs(slice(None)).shape == (2, 1, 4, 4) and split.limited(None) is split
    assert num_batches(len(split), 5) == 1
