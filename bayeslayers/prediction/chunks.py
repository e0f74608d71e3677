"""How many draws of a prediction come next, and how many of them go through the network at once."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayeslayers.unwrap import holds_compiled

Run: TypeAlias = Callable[[Tensor], Iterator[Tensor]]

# Measured on 2 CPU cores with LeNet-5, ResNet-20 and an MLP at batches of 1 to 512: several draws at
# once win by up to half until the largest output of a layer outgrows the cache, and lose beyond it.
_CACHE_BYTES = 2**22
_DEVICE_BYTES = 2**26  # elsewhere, where a launch costs more; not measured
_WEIGHT_BYTES = 2**26
_MOST = 32


@dataclass(frozen=True)
class Plan:
    """How the draws of one prediction are made.

    Attributes:
        num_samples: Draws, at most.
        chunk: Draws to run at once; None chooses by the sizes of the network.
        generator: Source of the draws; torch's default one if None.
        antithetic: Draws come in pairs, mean + noise and mean - noise.
        checkpoint: No chunk reaches over a multiple of it, where draws may end.
    """

    num_samples: int
    chunk: int | None = None
    generator: torch.Generator | None = None
    antithetic: bool = False
    checkpoint: int | None = None

    def counts(self, at_once: AtOnce) -> Iterator[int]:
        """Yield how many draws come next, until there are `num_samples`."""
        done, pair = 0, 2 if self.antithetic else 1
        while done < self.num_samples:
            count = min(-(-at_once.size // pair) * pair, self.num_samples - done)
            if self.checkpoint:
                count = min(count, self.checkpoint - done % self.checkpoint)
            yield count
            done += count


class AtOnce:
    """How many draws go through a network at once, `size`: it is found with the first draw, and halved if memory ends.

    Of a compiled network, which has no hooks to measure it by, it is one.

    Args:
        model: The network.
        plan: Its `chunk`, or None to begin with one draw and choose then.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self.chosen, self._warned = model, plan.chunk is None, False
        self.size = plan.chunk or 1
        self._most = _MOST
        self._measured = not self.chosen or holds_compiled(model)
        self._largest, self._budget = 1, _CACHE_BYTES
        self._thread = threading.get_ident()

    def outputs(self, forward: Callable[[slice, Tensor], Tensor], count: int, batch: Tensor) -> Iterator[Tensor]:
        """Yield the outputs of `count` draws, as pieces of `forward(draws, batch)`."""
        with self._measuring():
            start = 0
            while start < count:
                size = min(self.size, count - start)
                try:
                    piece = forward(slice(start, start + size), batch)
                except (torch.OutOfMemoryError, MemoryError):
                    if size == 1:
                        raise
                    piece = None
                except Exception:
                    # The first draw ran alone: what fails now is a module that does not take several.
                    if size == 1 or not self.chosen:
                        raise
                    self._most = self.size = 1
                    continue
                if piece is None:  # out of the handler, which holds on to the memory
                    self.halve(size)
                    continue
                yield piece
                start += size

    def halve(self, size: int) -> None:
        """Go on with half as many draws at once as did not fit, and say so once."""
        self.size = self._most = max(1, size // 2)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{size} draws at once do not fit into memory: going on with {self.size}, fewer if need be. "
                "sample_chunk sets their number.",
                stacklevel=2,
            )

    def settle(self, draw_bytes: int = 0) -> None:
        """Choose `size`, once every batch has been through the network with one draw, of so many bytes of weights."""
        if not self._measured:
            self._measured = True
            weights = _WEIGHT_BYTES // max(1, draw_bytes)
            self.size = max(1, min(self._most, weights, self._budget // self._largest))

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Note the largest output of a layer of the first draw."""
        if self._measured:
            yield
            return
        handles: list[RemovableHandle] = []
        try:
            for module in self.model.modules():
                if next(module.children(), None) is None:
                    handles.append(module.register_forward_hook(self._note))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, arguments: object, output: object) -> None:
        if isinstance(output, Tensor) and threading.get_ident() == self._thread:  # others may call the model
            self._largest = max(self._largest, output.numel() * output.element_size())
            self._budget = _CACHE_BYTES if output.device.type == "cpu" else _DEVICE_BYTES
