"""How many samples of a prediction come next, and how many of them run through the network at once."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayeslayers.inputs import Batch
from bayeslayers.outputs import Output
from bayeslayers.unwrap import holds_compiled

Run: TypeAlias = Callable[[Batch], Iterator[Tensor]]

# Measured on 2 CPU cores with LeNet-5, ResNet-20 and an MLP at batches of 1 to 512: several samples at once save up to
# two thirds of the time until the largest layer output outgrows the first limit, and cost time beyond it. Two or three
# at once cost up to twice as much as one after the other. Long networks gain least, for a call costs little beside
# their arithmetic.
_CACHE_BYTES = 3 * 2**20
_TOTAL_BYTES = 5 * 2**23  # of the outputs of all layers
_DEVICE_FACTOR = 64  # elsewhere, where a launch costs more; not measured
_LANES = 4  # channels of several samples side by side fill vector registers best in multiples of 8 or 16
_WEIGHT_BYTES = 2**26
_AHEAD_BYTES = 2**20  # of weights sampled together that run one after the other: alone, LeNet-5's take twice as long
_MOST = 32


@dataclass(frozen=True)
class Plan:
    """How the samples of one prediction are drawn.

    Attributes:
        num_samples: Samples, at most.
        chunk: Samples to run at once; None chooses by the sizes of the network.
        generator: Source of the samples; torch's default one if None.
        antithetic: Samples come in pairs, mean + noise and mean - noise.
        checkpoint: Sampling may stop at its multiples, so no chunk crosses one.
        output: Which part of what the network returns is predicted.
    """

    num_samples: int
    chunk: int | None = None
    generator: torch.Generator | None = None
    antithetic: bool = False
    checkpoint: int | None = None
    output: Output | None = None

    def counts(self, at_once: AtOnce) -> Iterator[int]:
        """Yield the sizes of the next chunks, about equal, until there are `num_samples` samples."""
        done, pair = 0, 2 if self.antithetic else 1
        while done < self.num_samples:
            left = self.num_samples - done
            if self.checkpoint:
                left = min(left, self.checkpoint - done % self.checkpoint)
            chunks = math.ceil(left / pair / math.ceil(at_once.drawn / pair))
            count = pair * math.ceil(left / pair / chunks)
            yield count
            done += count


class AtOnce:
    """The number of samples that run through a network at once, `size`.

    The first sample determines it, and it is halved if memory runs out. For a compiled network it is one, because
    no hooks can measure the network.

    Args:
        model: The network.
        plan: Its `chunk` is the size; with None, the first chunk is one sample, and `settle` chooses the size.

    Attributes:
        size: The number.
        drawn: The number of samples whose weights are drawn together, `size` or more.
        inspected: Whether `inspecting` has measured the network, so that `settle` may come before the first sample.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self.chosen, self._warned = model, plan.chunk is None, False
        self.size = self.drawn = plan.chunk or 1
        self._most = _MOST
        self._measured = not self.chosen or holds_compiled(model)
        self.inspected = False
        self._largest, self._total, self._factor = 1, 1, 1
        self._thread = threading.get_ident()

    @contextmanager
    def inspecting(self, examples: int) -> Iterator[None]:
        """Measure the network by a forward pass of one example inside the scope, in place of the first sample.

        Args:
            examples: Size of the batches to come.
        """
        with self._measuring():
            yield
        self._largest, self._total = self._largest * examples, self._total * examples
        self.inspected = True

    def outputs(self, forward: Callable[[slice, Batch], Tensor], count: int, batch: Batch) -> Iterator[Tensor]:
        """Yield the outputs of `count` samples, as pieces of `forward(samples, batch)`."""
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
                    # The first sample ran alone, so this module fails on several at once.
                    if size == 1 or not self.chosen:
                        raise
                    self._most = self.size = self.drawn = 1
                    continue
                if piece is None:  # outside the handler, which would keep the memory alive
                    self.halve(size)
                    continue
                yield piece
                start += size

    def halve(self, size: int) -> None:
        """Continue with half as many samples at once as did not fit, and warn once."""
        self.size = self.drawn = self._most = max(1, size // 2)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{size} samples at once do not fit into memory: continuing with {self.size}, fewer if needed. "
                "sample_chunk sets their number.",
                stacklevel=2,
            )

    def settle(self, draw_bytes: int = 0) -> None:
        """Choose `size` after the first sample; a sample's weights take `draw_bytes` bytes."""
        if not self._measured:
            self._measured = True
            weights = max(1, draw_bytes)
            outputs = self._factor * min(_CACHE_BYTES / self._largest, _TOTAL_BYTES / self._total)
            wanted = _LANES * round(min(outputs, _MOST) / _LANES) if outputs >= _LANES - 1 else 1
            self.size = max(1, min(self._most, _WEIGHT_BYTES // weights, wanted))
            self.drawn = self.size * max(1, min(self._most, _AHEAD_BYTES // weights) // self.size)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Record the sizes of the layers' outputs for the first sample."""
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
            size = output.numel() * output.element_size()
            self._largest, self._total = max(self._largest, size), self._total + size
            self._factor = 1 if output.device.type == "cpu" else _DEVICE_FACTOR
