"""The first module of every network of the zoo, which checks and normalises the input."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayeslayers.checks import at_least_one
from bayeslayers.storage.card import LARGEST_INPUT

_TOLERANCE = 0.5  # around [0, 1]: noise and sharpening stay within it, normalised images and bytes do not
_LARGEST_RESIZE = 8  # limits the memory that an untrusted card can demand


def image_size(size: Sequence[int], minimum: int = 1) -> tuple[int, int, int]:
    """Return `input_size` as `(c, h, w)`.

    Raises:
        ValueError: If it is not three integers >= 1, or h or w is below `minimum`.
    """
    numbers = tuple(size) if isinstance(size, Sequence) else (size,)
    if len(numbers) != 3 or not all(type(n) is int for n in numbers) or numbers[0] < 1 or min(numbers[1:]) < minimum:
        raise ValueError(f"input_size must be (c, h, w), integers with c >= 1 and h, w >= {minimum}, got {size!r}.")
    return numbers


def check_resize(name: str, resize: int, size: Sequence[int]) -> None:
    """Raise if images would be resized to a side below that of inputs of `size`, or far above it."""
    side = max(size[1:]) if len(size) == 3 else 0
    if not side <= at_least_one(name, resize) <= _LARGEST_RESIZE * side:
        raise ValueError(
            f"{name} must be 1 to {_LARGEST_RESIZE} times the side of an input {tuple(size)}, got {resize}."
        )
    if size[0] * resize**2 > LARGEST_INPUT:
        raise ValueError(f"{name} must give images of at most {LARGEST_INPUT} numbers, got {resize}.")


def _readable(x: Tensor) -> bool:
    """Whether the values of a tensor can be read, unlike while torch traces, captures a graph or maps over a batch."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and not x.is_meta
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


class Normalise(nn.Module):
    """`(x - mean) / std` per channel, for inputs of one size in [0, 1], as `ToTensor` returns them.

    Args:
        size: Shape of one example, `(c, h, w)` or `(features,)`, every number >= 1.
        mean: Mean per channel, or one for all.
        std: Standard deviation per channel, or one for all, > 0.
        any_size: Check only the channels, for networks that take images of any height and width.

    A checkpoint of a torch.nn network has neither mean nor std; loading it leaves them unchanged.
    """

    mean: Tensor
    std: Tensor
    range_known: bool = False  # whether the range of the inputs needs no further check

    def __init__(
        self,
        size: Sequence[int],
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        any_size: bool = False,
    ):
        super().__init__()
        self.any_size = any_size
        self.size = tuple(at_least_one("input_size", n) for n in size)
        if not self.size:
            raise ValueError("input_size must have one dimension or more, got none.")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, self.size[0]):
                raise ValueError(f"{name} must have 1 or {self.size[0]} values, one per channel, got {len(values)}.")
            # Checked on the CPU: a network on the meta device has no values.
            numbers = torch.tensor(values, dtype=torch.float32, device="cpu")
            if not numbers.isfinite().all() or (name == "std" and not (numbers > 0).all()):
                raise ValueError(f"{name} must be finite{' and > 0' * (name == 'std')}, got {list(values)}.")
            self.register_buffer(name, numbers.to(torch.get_default_device()).reshape(-1, *[1] * (len(size) - 1)))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(
                f"x must be floating point in [0, 1], got {x.dtype}. zoo.transforms(model) converts images; "
                "divide bytes by 255."
            )
        if not self._fits(tuple(x.shape[1:])):
            expected = f"{self.size[0]}, h, w" if self.any_size else ", ".join(str(n) for n in self.size)
            raise ValueError(
                f"x must have the shape (n, {expected}), got {tuple(x.shape)}. {self._advice(tuple(x.shape))}"
            )
        if not self.range_known and len(self.size) == 3 and _readable(x):
            self._check_range(x)
        return (x.to(self.mean.dtype) - self.mean) / self.std

    def _advice(self, shape: tuple[int, ...]) -> str:
        """Return what to do with an input of another shape."""
        if self._fits(shape):
            return "x.unsqueeze(0) is a batch of one."
        if self._fits((1, *shape[1:])):
            return "x.unsqueeze(1) adds the channel."
        resized = "zoo.transforms(model) resizes images; " if len(self.size) == 3 else ""
        return f"{resized}zoo.create(..., input_size=...) builds for another size."

    def _check_range(self, x: Tensor) -> None:
        """Warn once if images are far outside [0, 1]; only the first call checks on an accelerator, where it waits."""
        low, high = map(float, x.detach().aminmax())
        far = low < -_TOLERANCE or high > 1 + _TOLERANCE
        self.range_known = far or x.device.type != "cpu"
        if far:
            warnings.warn(
                f"x must hold images with values from 0 to 1, got {low:.4g} to {high:.4g}. zoo.transforms(model) "
                "converts images; divide bytes by 255, and leave normalisation to the model.",
                stacklevel=3,
            )

    def _fits(self, size: tuple[int, ...]) -> bool:
        """Return whether examples of this shape are accepted."""
        if not self.any_size:
            return size == self.size
        return len(size) == len(self.size) and size[0] == self.size[0] and min(size) > 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(prefix + name in state_dict for name in self._buffers):  # an ordinary checkpoint
            state_dict = {**state_dict, **{prefix + name: buffer for name, buffer in self._buffers.items()}}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"size={self.size}"
