"""Ordinary weights of an encoder from a file, loaded as its means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file of ordinary weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another file, such as one of `torch.save`, which could run code.
    """
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise FileNotFoundError(f"pretrained must be True, a name of weights or a file of them, got {path}: no file.")
    try:
        return load_file(file)
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"weights must be a safetensors file, got {file}: {error}. Convert one of torch.save by "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors')."
        ) from None


def fill_encoder(encoder: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load ordinary weights into an encoder by name.

    What the file holds beyond the encoder, such as a classifier's last layer, is left out.

    Args:
        encoder: Encoder of segmentation-models-pytorch.
        tensors: The weights, under the encoder's names, or those of timm's network within it.
        source: The file, for messages.

    Raises:
        ValueError: If one is missing or has another shape.
    """
    own = encoder.state_dict()
    theirs = {name: name if name in tensors else name.removeprefix("model.") for name in own}
    if missing := [name for name in theirs.values() if name not in tensors]:
        raise ValueError(
            f"weights of {source} must be those of the encoder, got none for {missing[0]!r} ({len(missing)} of "
            f"{len(own)} missing). Name them as the encoder does."
        )
    for name, tensor in own.items():
        if (found := tensors[theirs[name]]).shape != tensor.shape:
            raise ValueError(
                f"weights of {source} must fit the encoder, got shape {tuple(found.shape)} for {name!r} of shape "
                f"{tuple(tensor.shape)}."
            )
    encoder.load_state_dict({name: tensors[theirs[name]] for name in own})
