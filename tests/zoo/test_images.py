from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from recipes.data.split import load_split
from zoo.images import images_in, open_image, reduced

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def turned(path):
    """Write the picture sideways, with the tag that says so."""
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(PICTURE).transpose(Image.Transpose.ROTATE_90).save(path, exif=tag)
    return path


def test_an_image_is_opened_upright_from_a_file_and_from_pillow(tmp_path):
    path = turned(tmp_path / "a.png")
    assert_close(np.array(open_image(path)), PICTURE)
    assert_close(np.array(open_image(str(path))), PICTURE)
    with Image.open(path) as image:
        assert_close(np.array(open_image(image)), PICTURE)
        assert image.size == (6, 4)  # as it was
    plain = Image.fromarray(PICTURE)
    assert_close(np.array(open_image(plain)), PICTURE)


@pytest.mark.parametrize("size", [(9400, 9400), (2**26 + 1, 1)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(size, tmp_path, monkeypatch):
    Image.new("1", size).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own warning comes later
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    with pytest.raises(
        ValueError, match=rf"got .*a.png: its {size[0]} x {size[1]} pixels exceed the limit of 67108864"
    ):
        open_image(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image, pytest.raises(ValueError, match=r"got a 1 image: its .* pixels"):
        open_image(image)


def test_a_training_set_with_an_image_of_too_many_pixels_names_it(tmp_path):
    (tmp_path / "ant").mkdir()
    Image.fromarray(PICTURE).save(tmp_path / "ant/0.png")
    for number in range(1, 40):
        (tmp_path / f"ant/{number:02}.png").symlink_to(tmp_path / "ant/0.png")
    (tmp_path / "ant/38.png").unlink()
    Image.new("1", (9400, 9400)).save(tmp_path / "ant/38.png")
    split = load_split(f"imagefolder:{tmp_path}", None, train=True, size=(3, 8, 8))
    assert split.inputs(slice(0, 5)).shape == (5, 3, 8, 8)
    with pytest.raises(ValueError, match=r"^image must be .*, got .*38.png: its 9400 x 9400 pixels .* smaller\.$"):
        split.inputs(slice(None))


def test_what_cannot_be_opened_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^image not found: .*nowhere.png\.$"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"^image not found: "):
        open_image(tmp_path)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"^image must be a picture that Pillow reads, got .*text.png: "):
        open_image(tmp_path / "text.png")
    cut = turned(tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:90])
    with pytest.raises(ValueError, match=r"^image must be a picture that Pillow reads, got .*cut.png: "):
        open_image(cut)
    with Image.open(cut) as image, pytest.raises(ValueError, match=r"that Pillow reads, got a RGB image: "):
        open_image(image)


def test_a_format_that_another_program_draws_is_refused(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")  # Pillow goes by the content
    with pytest.raises(
        ValueError, match=r"got .*a.png: its format, EPS, needs another program to render. Save it as PNG"
    ):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "I", "F"])
def test_a_large_image_is_reduced_to_means_and_ample_for_its_use(mode):
    image = Image.new("L", (4096, 2048), 10)
    image.paste(200, (0, 0, 2048, 2048))
    found = reduced(image.convert(mode), (32, 32))
    assert found.size == (256, 128) and found.mode == mode
    values = np.array(found.convert("L"))
    expected = np.array(image.convert(mode).convert("L"))[::16, ::16]
    assert_close(values, expected)


def test_an_image_that_is_small_or_wanted_large_stays_as_it_is():
    small = Image.new("RGB", (2048, 2048))
    assert reduced(small, (8, 8)) is small
    large = Image.new("RGB", (4096, 2048))
    assert reduced(large, (512, 512)) is large and reduced(large, (256, 256)).size == (2048, 1024)
    for mode in ("1", "P", "I;16"):
        other = Image.new(mode, (4096, 2048))
        assert reduced(other, (8, 8)) is other


def test_a_large_picture_trains_as_its_small_form_does(tmp_path):
    (tmp_path / "ant").mkdir()
    small = np.kron(PICTURE, np.ones((2, 2, 1), np.uint8))
    Image.fromarray(np.kron(small, np.ones((256, 256, 1), np.uint8))).save(tmp_path / "ant/0.png")
    Image.fromarray(np.kron(small, np.ones((8, 8, 1), np.uint8))).save(tmp_path / "ant/1.png")
    large, expected = load_split(f"imagefolder:{tmp_path}", None, train=True, size=(3, 12, 8)).images[:]
    assert (large.int() - expected.int()).abs().max() <= 1


HIDDEN = (".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/0.png", "@eaDir/0.png")


def test_what_hides_in_a_folder_becomes_neither_class_nor_picture(tmp_path):
    for name in ("ant", "bee"):
        for file in ("0.png", "1.JPG", "deep/2.png", "._0.png", ".DS_Store", "Thumbs.db", "notes.txt", *HIDDEN):
            path = tmp_path / "train" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PICTURE).save(path, "PNG") if "._" not in file else path.write_bytes(b"not a picture")
    for file in HIDDEN:
        (tmp_path / "train" / file).parent.mkdir(exist_ok=True)
        Image.fromarray(PICTURE).save(tmp_path / "train" / file)
    expected = [tmp_path / "train/ant" / name for name in ("0.png", "1.JPG", "deep/2.png")]
    assert images_in(tmp_path / "train/ant") == expected
    split = load_split(f"imagefolder:{tmp_path}", None, train=True)
    assert split.classes == ["ant", "bee"] and split.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert split.inputs(slice(None)).shape == (6, 3, 6, 4)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "train").rename(tmp_path / ".cache/pets")  # a folder named by its user may hide
    assert load_split(f"imagefolder:{tmp_path}/.cache/pets", None, train=True).classes == ["ant", "bee"]


def test_a_folder_with_nothing_but_hidden_things_is_one_sentence(tmp_path):
    for file in HIDDEN:
        (tmp_path / file).parent.mkdir()
        Image.fromarray(PICTURE).save(tmp_path / file)
    with pytest.raises(FileNotFoundError, match=r"a folder for each class, got .* with none for any class. Lay"):
        load_split(f"imagefolder:{tmp_path}", None, train=True)


def test_pictures_are_numbered_as_torchvision_does(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ("b/2.png", "b/10.png", "B/x.png", "a/z/0.png", "a/z.png", "a/y/0.png", "a c/0.bmp", "a-c/0.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PICTURE).save(tmp_path / name)
    split, theirs = load_split(f"imagefolder:{tmp_path}", None, train=True), ImageFolder(tmp_path)
    assert [str(path) for path in split.images.paths] == [path for path, _ in theirs.samples]
    assert torch.equal(split.labels, torch.tensor(theirs.targets)) and split.classes == theirs.classes
