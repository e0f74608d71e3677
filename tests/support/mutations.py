"""Ways to change a posterior's folder, for test_fuzz.py: by accident, by malice, and hidden behind a right hash.

A kind takes a random generator, the files of a valid folder, which it changes, and the new folder, for what is no file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import struct
from pathlib import Path

import zoo

CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"
VALUES = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, math.nan,
    math.inf, -math.inf, "", "mlp", "a\nb\x1b[31m", "\ud800", "../../x", "x" * 10_000, [], [[]], {}, {"": None}, [None],
    [1, "a"], [0], [-1], [1.5], [2**40], [10**30], [math.nan], [1] * 3000, [[1, 2], [3]], {"a": {"b": [1]}},
    "torchvision:resnet18", "torchvision:none", "x:y", "os.system", "lenet5", "resnet20", "__class__",
]  # fmt: skip
KWARGS = [
    "widths", "input_size", "num_classes", "activation", "mean", "std", "pretrained", "name", "depth", "self",
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "U64", "BOOL", "C64", "F8_E4M3", "F4", "X", 7, None]
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "U64": 8, "BOOL": 1, "C64": 8}


class Files:
    """The files of a folder, taken apart: the card, the header of the weights and their bytes."""

    def __init__(self, folder: Path):
        self.raw = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.card = json.loads(self.raw[CONFIG])
        size = int.from_bytes(self.raw[WEIGHTS][:8], "little")
        self.header = json.loads(self.raw[WEIGHTS][8 : 8 + size])
        self.data = bytearray(self.raw[WEIGHTS][8 + size :])

    def names(self):
        return [name for name in self.header if name != "__metadata__"]

    def pack(self) -> bytes:
        header = json.dumps(self.header).encode()
        return struct.pack("<Q", len(header)) + header + self.data


def with_card(files: Files) -> None:
    files.card["sha256"] = hashlib.sha256(files.raw[WEIGHTS]).hexdigest()
    files.raw[CONFIG] = json.dumps(files.card).encode()


def with_weights(files: Files) -> None:
    files.raw[WEIGHTS] = files.pack()
    with_card(files)


def some_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, double or insert bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed)) if changed else 0
        kind = rng.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            changed[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 4:
            changed[at : at + 8] = rng.choice([bytes(8), b"\xff" * 8, b"\0\0\xc0\x7f\0\0\x80\x7f"])
        else:
            changed += changed[at:]
    return bytes(changed)


def bytes_of_weights(rng, files, folder):
    files.raw[WEIGHTS] = some_bytes(rng, files.raw[WEIGHTS])


def bytes_of_weights_rehashed(rng, files, folder):
    files.raw[WEIGHTS] = some_bytes(rng, files.raw[WEIGHTS])
    with_card(files)


def bytes_of_config(rng, files, folder):
    files.raw[CONFIG] = some_bytes(rng, files.raw[CONFIG])


def length_of_header(rng, files, folder):
    length = rng.choice([0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(5000), len(files.raw[WEIGHTS])])
    files.raw[WEIGHTS] = struct.pack("<Q", length) + files.raw[WEIGHTS][8:]
    with_card(files)


def header_of_tensor(rng, files, folder):
    """Another dtype, shape or place of a tensor; now and then with the bytes that it would need."""
    name = rng.choice(files.names())
    entry = files.header[name]
    what = rng.choice(["dtype", "shape", "data_offsets", "shape"])
    if what == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif what == "shape":
        shapes = [[], [0], [1], [-1], [2**31, 2**31], [2**63], [2**64 - 1, 0], [10**30], [1.5], ["3"], None, {}]
        shapes += [[1] * 3000, entry["shape"][::-1], [*entry["shape"], 1], [math.prod(entry["shape"])], [2**20, 2**12]]
        entry["shape"] = rng.choice(shapes)
    else:
        start, end = entry["data_offsets"]
        places = [
            [end, start],
            [0, end],
            [start, 2**62],
            [start, 2**64 - 1],
            [-1, end],
            [start],
            [],
            None,
            [start + 1, end],
        ]
        entry["data_offsets"] = rng.choice([*places, [start, end + 4], [0, 0], [0, len(files.data)], [1.5, 2.5]])
    if rng.random() < 0.3:
        files.data += bytes(rng.choice([1, 4, 4096]))
    with_weights(files)


def tensors_laid_out_again(rng, files, folder):
    """A valid safetensors file of other tensors: left out, added, renamed, of another shape or kind."""
    tensors = {name: [entry["dtype"], entry["shape"]] for name, entry in files.header.items() if name != "__metadata__"}
    name = rng.choice(list(tensors))
    kind = rng.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice(["extra", "", "a\nb", "x" * 2000, "__metadata", "hidden1", name + "_precision"])] = [
            "F32",
            [2],
        ]
    elif kind == 2:
        tensors[name.upper()] = tensors.pop(name)
    elif kind == 3:
        tensors[name][0] = rng.choice([dtype for dtype in DTYPES if dtype in BYTES])
    elif kind == 4:
        tensors[name][1] = rng.choice([[], [0], [1], [3, 5], [5, 3], [15], [2, 2, 2], [0, 10**9]])
    else:
        tensors |= {f"extra{i}": ["U8", [0]] for i in range(rng.choice([10, 3000]))}
    files.header, files.data = {}, bytearray()
    for key, (dtype, shape) in tensors.items():
        start = len(files.data)
        files.data += struct.pack("<f", 1.5)[: BYTES[dtype]] * 2 ** (BYTES[dtype] == 8) * math.prod(shape)
        files.header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(files.data)]}
    with_weights(files)


def header_of_other_json(rng, files, folder):
    value = rng.choice([*VALUES, {"__metadata__": rng.choice(VALUES)}, dict.fromkeys(files.header, rng.choice(VALUES))])
    if rng.random() < 0.5:
        files.header[rng.choice([*files.names(), "__metadata__", "new"])] = value
    else:
        files.header = value
    with_weights(files)


def numbers_of_tensor(rng, files, folder):
    """NaN, infinite, negative, zero or tiny numbers in a tensor."""
    start, end = files.header[rng.choice(files.names())]["data_offsets"]
    at = rng.randrange(start, end, 4)
    number = rng.choice([math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, 1e-45, 3e38, rng.gauss(0, 10)])
    files.data[at : at + 4] = struct.pack("<f", number)
    with_weights(files)


def value_in_card(rng, files, folder):
    files.card[rng.choice(list(files.card))] = rng.choice(VALUES)
    if rng.random() < 0.2:
        files.card[rng.choice(["extra", "__class__", "", "self"])] = rng.choice(VALUES)
    files.raw[CONFIG] = json.dumps(files.card).encode()


def field_of_card_gone(rng, files, folder):
    for key in rng.sample(list(files.card), rng.choice([1, 1, 3])):
        del files.card[key]
    files.raw[CONFIG] = json.dumps(files.card).encode()


def arguments_of_builder(rng, files, folder):
    """Hostile arguments of the network, also of other networks of the zoo."""
    if rng.random() < 0.3:
        files.card["builder"] = rng.choice([*zoo.list_models(), "mlp"])
    large = [[10**9], [10**6] * 4, [1] * 100_000, [2**31 - 1], [999_999], [3] * 2000, 10**9, 10**6, [1, 10**5, 10**5]]
    for key in rng.sample(KWARGS, rng.choice([1, 1, 2])):
        files.card["kwargs"][key] = rng.choice(rng.choice([VALUES, large]))
    if rng.random() < 0.3:
        files.card["input_size"] = files.card["kwargs"].get("input_size")
    with_card(files)


def nesting(rng, files, folder):
    depth = rng.choice([10, 200, 400, 900, 990, 3000, 100_000])
    left, right = rng.choice([("[", "]"), ('{"a":', "}")])
    nested = left * depth + "1" + right * depth
    field = rng.choice(["kwargs", "optimizer", "metrics", "class_names", "format_version", "new"])
    files.card[field] = "HERE"
    text = json.dumps(files.card)
    inside = f'{{"widths": {nested}}}' if rng.random() < 0.5 else nested
    files.raw[CONFIG] = rng.choice([nested, text.replace('"HERE"', inside)]).encode()


def missing_empty_or_swapped(rng, files, folder):
    one, other = rng.sample([CONFIG, WEIGHTS, README], 2)
    kind = rng.randrange(4)
    if kind == 0:
        del files.raw[one]
    elif kind == 1:
        files.raw[one] = b""
    elif kind == 2:
        files.raw[one], files.raw[other] = files.raw[other], files.raw[one]
    else:
        del files.raw[one]
        (folder / one).mkdir()


def odd_files(rng, files, folder):
    """Links out of the folder, to nothing and in circles; pipes; files with holes."""
    name = rng.choice([CONFIG, WEIGHTS, README])
    content, path = files.raw.pop(name), folder / name
    kind = rng.randrange(7)
    outside = folder.parent / "outside" / name
    if kind == 0:
        path.symlink_to(outside)
    elif kind == 1:
        path.symlink_to("../outside/" + name)
    elif kind == 2:
        path.symlink_to(rng.choice(["nowhere", name, "/dev/zero", "/dev/stdin", ".."]))
    elif kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        (folder / "inside").write_bytes(content)
        path.symlink_to("inside")  # allowed: it stays
    elif kind == 5:
        with path.open("wb") as file:
            file.write(rng.choice([b"", content]))
            file.truncate(2**26)
    else:
        (folder / "blobs").symlink_to(outside.parent)
        path.symlink_to(f"blobs/{name}")


KINDS = [
    bytes_of_weights, bytes_of_weights_rehashed, bytes_of_config, length_of_header, header_of_tensor,
    tensors_laid_out_again, header_of_other_json, numbers_of_tensor, value_in_card, field_of_card_gone,
    arguments_of_builder, nesting, missing_empty_or_swapped, odd_files,
]  # fmt: skip
