"""Numbers that are read from the device together."""

from __future__ import annotations

import torch
from support.sync import reads_of_device

from bayeslayers.readings import Readings, read


def test_what_waits_is_read_together_and_once():
    readings = Readings()
    with reads_of_device() as reads:
        first = readings.later([torch.tensor(1.5), torch.tensor([2.5, 3.5])])
        second = readings.later([torch.tensor(4), torch.tensor(True)])
        none = readings.later([])
        assert reads == []
        assert (second(), first(), none()) == ([4, 1], [1.5, 2.5, 3.5], [])
        assert len(reads) == 1
        third = readings.later([torch.tensor(5.0)])
        assert (third(), first()) == ([5], [1.5, 2.5, 3.5])
        assert len(reads) == 2


def test_values_of_all_types_are_exact():
    count, small = 2**40 + 1, torch.tensor(0.1)
    assert read([small, torch.tensor(count), torch.tensor(2.5).bfloat16()]) == [small.item(), count, 2.5]
    assert read([torch.tensor(count), torch.tensor([3])]) == [count, 3]
    assert read([]) == []
    assert read([torch.tensor([[2.0]])]) == [2]


def test_a_read_of_nothing_is_none():
    with reads_of_device() as reads:
        assert Readings().later([])() == []
    assert reads == []
