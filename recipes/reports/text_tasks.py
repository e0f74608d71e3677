"""Three networks of sequences on which defaults and steps are measured: a tiny BERT, a tiny GPT-2, and an LSTM.

They classify sentences of the language of `recipes.data.clauses`. Nothing is downloaded: BERT and GPT-2 are built from
configurations of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

import zoo
from bayeslayers.convert import to_deterministic
from recipes.data import clauses
from recipes.reports.small_tasks import Data, Task

TRAIN, TEST, WIDTH = 4000, 2000, 32


def read_clauses(root: Path | None, seed: int) -> Data:
    """Return sentences to train on, which the seed chooses, and to test on."""
    train, test = clauses.sentences(TRAIN, 100 + seed), clauses.sentences(TEST, 1)
    return Data(train.x, train.labels, test.x, test.labels, clauses.NAME)


class Logits(nn.Module):
    """A classifier of transformers as a network from ids to logits, told where the padding is.

    Args:
        network: The classifier.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        return self.network(input_ids=ids, attention_mask=(ids != 0).long()).logits


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError("BERT and GPT-2 need transformers, got no such package. pip install transformers.") from None
    return transformers


def _bert() -> nn.Module:
    library = _transformers()
    config = library.BertConfig(
        vocab_size=len(clauses.WORDS),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=clauses.LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        num_labels=2,
    )
    return Logits(library.BertForSequenceClassification(config))


def _gpt2() -> nn.Module:
    library = _transformers()
    config = library.GPT2Config(
        vocab_size=len(clauses.WORDS),
        n_positions=clauses.LENGTH,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_inner=2 * WIDTH,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        num_labels=2,
    )
    return Logits(library.GPT2ForSequenceClassification(config))


def _lstm() -> nn.Module:
    return to_deterministic(zoo.create("text_lstm", vocabulary=len(clauses.WORDS)))


TEXT_TASKS = {
    "bert": Task(read_clauses, _bert, 20, 50),
    "gpt2": Task(read_clauses, _gpt2, 20, 50),
    "lstm": Task(read_clauses, _lstm, 20, 50),
}
