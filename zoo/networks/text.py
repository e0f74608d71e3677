"""Classifiers of sentences, given as ids of words, `(n, t)`, in which 0 is the padding behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one
from zoo.registry import register


class Words(nn.Module):
    """Embeddings of words, with those of their places added.

    Args:
        vocabulary: Number of words, the padding among them.
        length: Most words of a sentence.
        width: Features of a word.
        places: Whether the network needs to be told the places.
    """

    def __init__(self, vocabulary: int, length: int, width: int, places: bool = True):
        super().__init__()
        self.vocabulary, self.length = vocabulary, length
        self.word = bl.BayesEmbedding(vocabulary, width, padding_idx=0)
        self.place = bl.BayesEmbedding(length, width) if places else None
        with torch.no_grad():
            for table in (self.word, self.place):
                if table is not None:
                    table.weight.mul_(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or ids.shape[1] > self.length or ids.is_floating_point():
            raise ValueError(
                f"x must be ids of words, whole numbers of shape (n, t) with t <= {self.length}, got {ids.dtype} of "
                f"shape {tuple(ids.shape)}."
            )
        words = self.word(ids)
        if self.place is None:
            return words
        return words + self.place(torch.arange(ids.shape[1], device=ids.device).expand(ids.shape))


class Block(nn.Module):
    """A block of a transformer: attention and a perceptron, each behind a LayerNorm and beside a way around.

    Args:
        width: Features of a word.
        heads: Heads of the attention, which divide the features.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = bl.BayesLayerNorm(width), bl.BayesLayerNorm(width)
        self.query_key_value, self.merge = bl.BayesLinear(width, 3 * width), bl.BayesLinear(width, width)
        self.hidden, self.output = bl.BayesLinear(width, 2 * width), bl.BayesLinear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        parts = self.query_key_value(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=mask)
        x = x + self.merge(seen.transpose(1, 2).flatten(2))
        return x + self.output(F.gelu(self.hidden(self.norm2(x))))


class Transformer(nn.Module):
    """An encoder of words, whose outputs are averaged over the words of a sentence and classified.

    Args:
        words: Embeddings.
        width: Features of a word.
        depth: Number of blocks.
        heads: Heads of each.
        num_classes: Number of outputs.
    """

    def __init__(self, words: Words, width: int, depth: int, heads: int, num_classes: int):
        super().__init__()
        self.words = words
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = bl.BayesLayerNorm(width), bl.BayesLinear(width, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        x, mask = self.words(ids), ids != 0
        mask = mask | ~mask.any(1, keepdim=True)  # an empty sentence attends to its padding
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        return self.head(_mean(self.norm(x), mask))


class Recurrent(nn.Module):
    """A bidirectional LSTM of words, whose outputs are averaged over the words of a sentence and classified.

    Args:
        words: Embeddings.
        width: Features of a word.
        hidden: Features of the state.
        num_classes: Number of outputs.
    """

    def __init__(self, words: Words, width: int, hidden: int, num_classes: int):
        super().__init__()
        self.words = words
        self.lstm = bl.BayesLSTM(width, hidden, batch_first=True, bidirectional=True)
        self.head = bl.BayesLinear(2 * hidden, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != 0
        return self.head(_mean(self.lstm(self.words(ids))[0], mask | ~mask.any(1, keepdim=True)))


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the words of each sentence, without the padding."""
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@register
def text_transformer(
    num_classes: int = 2,
    input_size: Sequence[int] = (18,),
    vocabulary: int = 1000,
    width: int = 32,
    depth: int = 2,
    heads: int = 4,
) -> nn.Module:
    """Build a small transformer that classifies sentences.

    Args:
        num_classes: Number of outputs.
        input_size: Most words of a sentence, `(t,)`.
        vocabulary: Number of words, the padding 0 among them.
        width: Features of a word.
        depth: Number of blocks.
        heads: Heads of the attention, a divisor of `width`.
    """
    _check(num_classes=num_classes, vocabulary=vocabulary, width=width, depth=depth, heads=heads)
    if width % heads:
        raise ValueError(f"width must be a multiple of heads, got {width} and {heads}.")
    return Transformer(Words(vocabulary, _length(input_size), width), width, depth, heads, num_classes)


@register
def text_lstm(
    num_classes: int = 2,
    input_size: Sequence[int] = (18,),
    vocabulary: int = 1000,
    width: int = 32,
    hidden: int = 32,
) -> nn.Module:
    """Build a small bidirectional LSTM that classifies sentences.

    Args:
        num_classes: Number of outputs.
        input_size: Most words of a sentence, `(t,)`.
        vocabulary: Number of words, the padding 0 among them.
        width: Features of a word.
        hidden: Features of the state in each direction.
    """
    _check(num_classes=num_classes, vocabulary=vocabulary, width=width, hidden=hidden)
    return Recurrent(Words(vocabulary, _length(input_size), width, places=False), width, hidden, num_classes)


def _check(**numbers: Any) -> None:
    for name, value in numbers.items():
        at_least_one(name, value)


def _length(input_size: Sequence[int]) -> int:
    if len(input_size) != 1:
        raise ValueError(f"input_size must be the number of words, as [18], got {list(input_size)!r:.60}.")
    return at_least_one("input_size", input_size[0])
