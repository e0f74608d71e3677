"""What a convolution is, beside its weight."""

from __future__ import annotations

from typing import NamedTuple


class Settings(NamedTuple):
    """A convolution's numbers, each of the tuples one entry per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
