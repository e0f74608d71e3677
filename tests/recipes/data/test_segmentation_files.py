from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.scenes import write_camvid, write_cityscapes
from torch.testing import assert_close

from recipes.data.augmentation import SceneAugmentation
from recipes.data.segmentation_files import IGNORED, batches
from recipes.data.segmentation_sets import CAMVID_CLASSES, CITYSCAPES_CLASSES, load_scenes


@pytest.fixture
def camvid(tmp_path):
    return write_camvid(tmp_path)


def test_camvid_has_three_splits_of_eleven_classes_and_void(camvid):
    splits = [load_scenes("camvid", camvid, part) for part in ("train", "val", "test")]
    assert [len(scenes) for scenes in splits] == [4, 2, 2]
    train = splits[0]
    x, y = train.inputs(slice(1, 3)), train.targets[1:3]
    assert x.shape == (2, 3, 36, 48) and x.dtype == torch.float32 and 0 <= float(x.min()) < float(x.max()) <= 1
    assert y.shape == (2, 36, 48) and y.dtype == torch.int64
    assert y.unique().tolist() == [0, 3, 8, IGNORED] and int((y == IGNORED).sum()) == 2 * 2 * 48
    raw = np.array(Image.open(camvid / "CamVid/train/1.png"))
    assert_close(x[0], torch.from_numpy(raw).permute(2, 0, 1) / 255)
    assert train.classes == list(CAMVID_CLASSES) and len(CAMVID_CLASSES) == 11


def test_cityscapes_maps_its_ids_to_the_nineteen_classes_of_torchvision(tmp_path):
    from torchvision.datasets import Cityscapes

    train = load_scenes("cityscapes", write_cityscapes(tmp_path), "train")
    theirs = {c.id: c.train_id for c in Cityscapes.classes if 0 <= c.id}
    assert {id: (255 if number in (255, -1) else number) for id, number in theirs.items()} == {
        id: number for id, number in train.labels.numbers.items() if id in theirs
    }
    names = {c.train_id: c.name for c in Cityscapes.classes if c.train_id not in (255, -1)}
    assert [names[k] for k in range(19)] == list(CITYSCAPES_CLASSES) == train.classes
    assert train.targets[:].unique().tolist() == [0, 10, 13, IGNORED]
    assert len(load_scenes("cityscapes", tmp_path, "val")) == len(load_scenes("cityscapes", tmp_path, "test")) == 3
    dataset = Cityscapes(str(tmp_path), split="train", target_type="semantic")  # whose layout this is
    assert sorted(dataset.images) == sorted(str(pair.image) for pair in train.pairs)


def test_an_unknown_set_is_named(camvid):
    with pytest.raises(ValueError, match=r"data must be a set with a label for each pixel, .*'camvids'.*'camvid'"):
        load_scenes("camvids", camvid, "train")


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_missing_split_is_named_with_the_layout(part, camvid):
    (camvid / "CamVid" / f"{part}annot").rename(camvid / "gone")
    with pytest.raises(FileNotFoundError, match=f"split {part} of CamVid, got no folder .*{part}annot. Lay it out as"):
        load_scenes("camvid", camvid, part)


def test_a_missing_split_of_cityscapes_is_named(tmp_path):
    write_cityscapes(tmp_path)
    (tmp_path / "gtFine/val").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"split val of Cityscapes, got no folder .*gtFine/val"):
        load_scenes("cityscapes", tmp_path, "test")


def test_a_picture_without_a_mask_is_named(camvid):
    (camvid / "CamVid/trainannot/2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"every picture must have a mask in .*trainannot, got .*train/2\.png"):
        load_scenes("camvid", camvid, "train")


def test_a_folder_without_pictures_is_named(camvid):
    for path in (camvid / "CamVid/val").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="a split must hold pictures, got none"):
        load_scenes("camvid", camvid, "val")


def damage(kind, camvid):
    """Damage the second training example, and return what its error says."""
    image, mask = camvid / "CamVid/train/1.png", camvid / "CamVid/trainannot/1.png"
    if kind == "unknown label":
        values = np.array(Image.open(mask))
        values[3, 4:9] = 77
        Image.fromarray(values).save(mask)
        return r"mask must hold the labels 0 to 11, got 77 at 5 pixels of .*trainannot/1\.png"
    if kind == "size":
        Image.fromarray(np.zeros((36, 40), dtype=np.uint8)).save(mask)
        return (
            r"mask must have the size of its picture, got 40 x 36 in .*trainannot/1\.png for 48 x 36 in .*train/1\.png"
        )
    if kind == "corrupt":
        image.write_bytes(image.read_bytes()[:300])
        return r"image must be a picture that Pillow reads, got .*train/1\.png: "
    if kind == "no picture":
        image.write_bytes(b"nothing")
        return r"image must be a picture that Pillow reads, got .*train/1\.png: "
    if kind == "colours":
        Image.fromarray(np.zeros((36, 48, 3), dtype=np.uint8)).save(mask)
        return r"mask must hold one label a pixel, .*trainannot/1\.png of mode RGB"
    Image.fromarray(np.full((36, 48), 300, dtype=np.uint16)).save(mask)
    return r"mask must hold labels from 0 to 255, got 300 to 300 in .*trainannot/1\.png"


KINDS = ["unknown label", "size", "corrupt", "no picture", "colours", "16 bits"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_names_the_file_and_the_reason(kind, camvid):
    message = damage(kind, camvid)
    with pytest.raises(ValueError, match=message):
        scenes = load_scenes("camvid", camvid, "train")
        list(batches(scenes, 4, 0, 0, 0, SceneAugmentation(), (16, 16)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_skipped_and_counted_on_request(kind, camvid):
    message = damage(kind, camvid)
    scenes = load_scenes("camvid", camvid, "train", skip=True)
    assert [pair.image.name for pair in scenes.pairs] == ["0.png", "2.png", "3.png"]
    (fault,) = scenes.skipped
    assert re.match(message, fault)
    assert len(scenes.targets[:]) == 3


def test_a_split_of_faults_alone_is_refused(camvid):
    for path in (camvid / "CamVid/val").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="data must hold a picture that can be read, got 2 with faults: image must be"):
        load_scenes("camvid", camvid, "val", skip=True)


def test_images_of_two_sizes_are_not_one_batch(tmp_path):
    write_camvid(tmp_path / "a")
    write_camvid(tmp_path / "b", size=(30, 40))
    for kind in ("val", "valannot"):
        (tmp_path / "b/CamVid" / kind / "1.png").rename(tmp_path / "a/CamVid" / kind / "1.png")
    scenes = load_scenes("camvid", tmp_path / "a", "val")
    assert scenes.inputs(slice(1)).shape == (1, 3, 36, 48) and scenes.targets[1:].shape == (1, 30, 40)
    with pytest.raises(ValueError, match="images of a batch must be of one size, got 30 x 40, 36 x 48"):
        scenes.inputs(slice(2))
    assert len(scenes.of_one_size(torch.tensor([1, 0]))) == 1


def test_class_weights_are_powers_of_the_share_of_pixels(camvid):
    scenes = load_scenes("camvid", camvid, "train")
    counts = scenes.targets[:].flatten().bincount(minlength=256)[:11].double()
    weights = torch.tensor(scenes.class_weights(0.5), dtype=torch.float64)
    assert_close(weights[3] / weights[0], (counts[0] / counts[3]).sqrt())
    assert_close(weights[8] / weights[0], (counts[0] / counts[8]).sqrt())
    assert_close(weights[5], weights[8])  # of a class without pixels: as the rarest one
    assert_close(weights.mean(), torch.tensor(1.0, dtype=torch.float64))
    assert scenes.class_weights(0.0) is None


def test_parts_of_a_split_are_always_the_same(tmp_path):
    scenes = load_scenes("cityscapes", write_cityscapes(tmp_path), "train")
    rest, out = scenes.held_out(3)
    names = [[pair.image.name for pair in part.pairs] for part in (rest, out, scenes)]
    assert len(names[1]) == 3 and sorted(names[0] + names[1]) == sorted(names[2])
    assert names[1] == [pair.image.name for pair in scenes.held_out(3)[1].pairs]
    assert len(scenes.limited(5)) == 5 and scenes.limited(None) is scenes
    with pytest.raises(ValueError, match="validation must leave training examples, got 8 of 8"):
        scenes.held_out(8)
    assert scenes.targets.digest() != rest.targets.digest()


def test_batches_depend_on_seed_epoch_and_number_alone(tmp_path):
    scenes = load_scenes("cityscapes", write_cityscapes(tmp_path), "train")
    augmentation = SceneAugmentation(scale=[0.7, 1.4], flip=True, brightness=0.2, contrast=0.2)

    def read(seed, epoch, start):
        return list(batches(scenes, 3, seed, epoch, start, augmentation, (16, 24)))

    whole = read(0, 1, 0)
    assert len(whole) == 2 and whole[0][0].shape == (3, 3, 16, 24) and whole[0][1].shape == (3, 16, 24)
    assert_close(read(0, 1, 1), whole[1:], rtol=0, atol=0)
    assert not torch.equal(read(0, 2, 0)[0][0], whole[0][0]) and not torch.equal(read(1, 1, 0)[0][0], whole[0][0])
