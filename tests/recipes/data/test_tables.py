"""Tables: what is read from archives and CSV files, and which file and row an error names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from recipes.data import tables
from recipes.data.gap import EDGES, NOISE, curve, inside
from recipes.data.names import expanded, short_name, without_folders
from recipes.data.tables import load_table, read_csv, read_npz


def write(folder, text, name="cars.csv"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def archive(folder, **arrays):
    np.savez(folder / "table.npz", **arrays)
    return folder / "table.npz"


ROWS = {"x": np.arange(12.0).reshape(6, 2), "y": np.arange(6)}


def test_an_archive_has_its_own_splits(tmp_path):
    table = load_table(f"npz:{archive(tmp_path, **ROWS, test_index=np.array([[0, 2], [1, 5]]))}")
    assert table.num_splits == 2 and table.x.dtype == torch.float64
    train, test = table.split(1)
    assert_close(test.labels, torch.tensor([[1.0], [5.0]]))
    assert_close(train.x, torch.tensor([[0.0, 1.0], [4.0, 5.0], [6.0, 7.0], [8.0, 9.0]]))
    with pytest.raises(ValueError, match="split must be from 0 to 1, got 2"):
        table.split(2)


def test_a_named_set_lies_in_the_folder_uci(tmp_path):
    (tmp_path / "uci").mkdir()
    np.savez(tmp_path / "uci" / "energy.npz", **ROWS)
    table = load_table("energy", tmp_path)
    assert table.num_splits == 20 and [len(part) for part in table.split(3)] == [5, 1]
    assert not torch.equal(table.split(0)[1].x, table.split(4)[1].x)
    assert_close(table.split(3)[1].x, table.split(3)[1].x)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_has_features_and_targets_by_name(tmp_path, separator):
    text = "weight,power,use\n1,2,3\n\n4,5e-1,-6\n".replace(",", separator)
    path = write(tmp_path, text)
    table = load_table(f"csv:{path}")
    assert table.features == ("weight", "power") and table.targets == ("use",)
    assert_close(table.x, torch.tensor([[1, 2], [4, 0.5]]).double())
    assert_close(table.y, torch.tensor([[3], [-6]]).double())
    chosen = read_csv(path, ["power", "weight"])
    assert chosen.features == ("use",) and chosen.y.tolist() == [[2, 1], [0.5, 4]]


def test_csv_without_names(tmp_path):
    table = read_csv(write(tmp_path, "\ufeff1,2\n3,4"))
    assert table.features == () and table.x.tolist() == [[1], [3]] and table.y.tolist() == [[2], [4]]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a,b\n1,2\n3,four\n", "row 3 of .*cars.csv must have a number in column b, got 'four'"),
        ("a,b\n1,2\n3,\n", "row 3 of .*cars.csv must have a number in column b, got none. Fill missing"),
        ("a,b\n1,2\n3,nan\n", "row 3 of .*cars.csv must have a finite number in column b, got 'nan'"),
        ("1,2\n3,inf\n", "row 2 of .*cars.csv must have a finite number in column 2, got 'inf'"),
        ("a,b\n1,2\n3\n", "row 3 of .*cars.csv must have 2 values as the first one, got 1"),
        ("a,a\n1,2\n", "must name every column once in row 1, got a, a"),
        ("a,b\n", "must hold rows of numbers, got none"),
        ("", "must hold rows of numbers, got none"),
        ("1\n2\n", "must have a feature beside its target"),
        ("a,b\n1,2\n\n3,x\n", "row 4 of"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, error):
    with pytest.raises(ValueError, match=error) as caught:
        read_csv(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_an_unknown_target_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"target must name columns of .*got 'pwer'. Did you mean 'power'"):
        read_csv(write(tmp_path, "weight,power\n1,2\n"), ["pwer"])


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "cars.csv").write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(ValueError, match=r"cars.csv must be text in UTF-8"):
        read_csv(tmp_path / "cars.csv")


@pytest.mark.parametrize(
    ("arrays", "error"),
    [
        ({"x": ROWS["x"]}, "must hold the arrays x and y, got none of the name y"),
        ({**ROWS, "y": np.array([None] * 6)}, "must be a NumPy archive of numbers"),
        ({**ROWS, "y": np.array(list("abcdef"))}, "y of .*table.npz must hold numbers"),
        ({**ROWS, "y": np.arange(5)}, r"must hold x \(n, d\) and y"),
        ({**ROWS, "x": np.where(ROWS["x"] == 7, np.nan, ROWS["x"])}, "x of .* got nan in row 3, column 1, and 0 more"),
        ({**ROWS, "test_index": np.array([[0, 6]])}, "test_index of .*integers from 0 to 5"),
        ({**ROWS, "test_index": np.array([[0.5]])}, "test_index of .*float64"),
    ],
)
def test_a_bad_archive_is_named(tmp_path, arrays, error):
    with pytest.raises(ValueError, match=error):
        read_npz(archive(tmp_path, **arrays))


def test_a_file_that_is_no_archive_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cars.csv must be a NumPy archive of numbers"):
        read_npz(write(tmp_path, "1,2"))


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_VALUES", 3)
    with pytest.raises(ValueError, match="at most 3 numbers, got more by row 2"):
        read_csv(write(tmp_path, "1,2\n3,4\n5,6\n"))
    with pytest.raises(ValueError, match="must hold at most 3 numbers"):
        read_npz(archive(tmp_path, **ROWS))
    monkeypatch.setattr(tables, "LONGEST_LINE", 10)
    with pytest.raises(ValueError, match=r"row 2 of .* must have at most 10 characters"):
        read_csv(write(tmp_path, "1,2\n3,4444444444444\n"))
    monkeypatch.setattr(tables, "LARGEST_FILE", 5)
    with pytest.raises(ValueError, match="must have at most 5 bytes, got 12"):
        read_csv(write(tmp_path, "1,2\n3,4\n5,6\n"))


def test_an_unknown_table_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown table 'energi'. Did you mean 'energy'"):
        load_table("energi")
    with pytest.raises(FileNotFoundError, match=r"data must be a file, got .*energy.npz, which is not there"):
        load_table("energy", tmp_path)


def test_names_of_csv_files_are_short():
    assert short_name("csv:data/cars.csv") == "cars" and without_folders("csv:/data/cars.csv") == "csv:cars.csv"
    assert expanded("csv:~/cars.csv") == "csv:" + expanded("~/cars.csv")


def test_the_toy_has_no_examples_in_its_gap():
    train, test = load_table("gap").split(0)
    assert len(train) == len(test) == 200 and load_table("gap").num_splits == 1
    for part in (train, test):
        assert not ((part.x > EDGES[0]) & (part.x < EDGES[1])).any()
        assert 0.8 * NOISE < float((part.labels - curve(part.x)).std()) < 1.2 * NOISE
    assert EDGES[0] < float(inside(5).min()) < float(inside(5).max()) < EDGES[1]
