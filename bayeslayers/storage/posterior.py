"""Posteriors on disk: safetensors and JSON, written atomically."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from bayeslayers.files import one_writer, write_atomically
from bayeslayers.layers import POSTERIOR_SUFFIXES
from bayeslayers.sampling import sites_of
from bayeslayers.storage.card import Card, PosteriorError, card_from_json, first_bad_field, likelihood_in
from bayeslayers.storage.claims import chosen_likelihood, refuse_unwritten
from bayeslayers.storage.model_card import model_card
from bayeslayers.storage.weight_file import (
    CONFIG,
    PICTURE,
    README,
    WEIGHTS,
    Weights,
    check_values,
    parse_weights,
    read_member,
)
from bayeslayers.unwrap import unwrapped

_CONFIG_BYTES = 4 * 2**20  # the names of some 100,000 classes


def save_posterior(model: nn.Module, folder: str | Path, *, half: bool = False, **fields: Any) -> Card:
    """Write a model's posterior to a folder: weights, `config.json` and a model card.

    The folder is written under a temporary name and renamed when complete, so that an interruption
    leaves the previous contents. (Only a power cut or a kill between the two renames of a replacement can
    leave the old folder, complete, under the name `.NAME-*.old`.)

    Args:
        model: Model with Bayesian layers, also in torch's wrappers (`DataParallel`, `AveragedModel`, `torch.compile`):
            the network inside is saved, under its own names.
        folder: Folder to make or replace.
        half: Store means and precisions in 16 bits, half of the file. Means become float16, or bfloat16 where one
            exceeds its range: a mean moves by 0.05 % at most, and by 0.4 % in bfloat16. Precisions become bfloat16,
            and standard deviations move by 0.2 % at most. Statistics of norms keep their precision. A network that
            loads the posterior keeps its own dtype.
        fields: Fields of the `Card`; the others come from `model.card`, if there is one. The likelihood is
            `model.likelihood`, if there is one; `likelihood` may also be an object such as `Gaussian(0.3)`.

    Returns:
        The card as written.

    Raises:
        ValueError: If the model has no Bayesian layer, a value that is not finite or a precision
            that is not positive, a field of the card is invalid or contradicts the model, or metrics were
            sampled from a posterior that was never trained.
        FileExistsError: If the folder holds anything but a posterior.
    """
    network = unwrapped(model)
    sites_of(network)
    tensors = checked_tensors(network)
    return write_posterior(
        network, folder, halved(tensors, {name for name, _ in network.named_parameters()}) if half else tensors, fields
    )


def write_posterior(
    network: nn.Module, folder: str | Path, tensors: dict[str, Tensor], fields: Mapping[str, Any]
) -> Card:
    """Write tensors of a network to a folder, with its card; see `save_posterior`.

    Args:
        network: The network, for its card and likelihood.
        folder: Folder to make or replace.
        tensors: What is stored.
        fields: Fields of the card.
    """
    folder, weights = Path(os.path.expanduser(folder)).resolve(), save_tensors(tensors)
    own = getattr(network, "card", None)
    card = own if isinstance(own, Card) else Card()
    fields = {"name": folder.name, **fields, **chosen_likelihood(network, dict(fields))}
    try:
        card = dataclasses.replace(card, **fields, sha256=hashlib.sha256(weights).hexdigest())
    except ValidationError as error:
        raise ValueError(f"card has a bad {first_bad_field(error)}") from None
    likelihood_in(card)
    refuse_unwritten(network, card)
    write_folder(folder, {WEIGHTS: weights, CONFIG: card.to_json().encode(), README: model_card(card).encode()})
    return card


def checked_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors, checked so that they can be loaded again.

    They are cloned, because a safetensors file cannot hold two names for one memory, as of a layer used twice.
    """
    state = network.state_dict()
    Weights(Path("model"), state)  # checks what the tensors are
    for name, tensor in state.items():
        check_values(name, tensor, "model")
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def halved(tensors: dict[str, Tensor], means: set[str]) -> dict[str, Tensor]:
    """Return the tensors of a network with means and precisions in 16 bits.

    Args:
        tensors: Its state.
        means: Names of its parameters.
    """
    precisions = {name + POSTERIOR_SUFFIXES[0] for name in means}

    def stored(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.element_size() <= 2:
            return tensor
        if name in precisions:
            return tensor.bfloat16()
        fits = tensor.numel() == 0 or float(tensor.abs().max()) <= torch.finfo(torch.float16).max
        return tensor.to(torch.float16 if fits else torch.bfloat16) if name in means else tensor

    return {name: stored(name, tensor) for name, tensor in tensors.items()}


def write_folder(folder: Path, contents: dict[str, bytes]) -> None:
    """Make or replace a posterior's folder atomically; of several writers the last one's stays.

    Args:
        folder: Folder, resolved.
        contents: Its files.

    Raises:
        FileExistsError: If the folder holds anything but a posterior.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with one_writer(folder.parent):
        _refuse_other_contents(folder)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in contents.items():
            write_atomically(fresh / name, content)
        fresh.chmod(0o755)
        with one_writer(folder.parent):
            _refuse_other_contents(folder)
            _replace_folder(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _refuse_other_contents(folder: Path) -> None:
    if folder.exists() and not _replaceable(folder):
        raise FileExistsError(
            f"folder must be new, empty or a posterior, got {folder}, which holds something else. Choose another."
        )


def _replaceable(folder: Path) -> bool:
    """Whether a folder is empty or holds only a posterior. Its card decides: any project may have a config.json."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if held - {WEIGHTS, CONFIG, README, PICTURE}:
        return False
    try:
        return not held or bool(_card_in(folder))
    except PosteriorError:
        return False


def _replace_folder(fresh: Path, folder: Path) -> None:
    """Move `fresh` to `folder`; the old contents are deleted only once the new folder is in place."""
    old = fresh.with_name(fresh.name + ".old")
    try:
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_card(folder: str | Path) -> Card:
    """Return the card of a posterior's folder, with its fields checked.

    Raises:
        PosteriorError: If the folder or its `config.json` is missing or invalid.
    """
    folder = Path(os.path.expanduser(folder))
    with one_writer(folder.resolve().parent, reads=True):
        return _card_in(folder)


def _card_in(folder: Path) -> Card:
    return card_from_json(read_member(folder, CONFIG, _CONFIG_BYTES), str(folder / CONFIG))


@dataclasses.dataclass(frozen=True)
class Stored:
    """A posterior as it was read from a folder.

    Attributes:
        card: Its card.
        weights: Its tensors, whose values are checked when they are read.
        files: Content of the two files.
    """

    card: Card
    weights: Weights
    files: dict[str, bytes]

    @property
    def half(self) -> bool:
        """Whether `save_posterior` stored it in half precision."""
        return torch.bfloat16 in self.weights.dtypes.values()


def read_posterior(folder: str | Path) -> Stored:
    """Read a posterior's folder, each file once, while no `save_posterior` replaces it.

    Raises:
        PosteriorError: If a file is missing or invalid, or the hash of the weights is not the card's.
    """
    folder = Path(os.path.expanduser(folder))
    with one_writer(folder.resolve().parent, reads=True):
        files = {CONFIG: read_member(folder, CONFIG, _CONFIG_BYTES)}
        card = card_from_json(files[CONFIG], str(folder / CONFIG))  # before the large file is read
        files[WEIGHTS] = read_member(folder, WEIGHTS)
    return Stored(card, parse_weights(files[WEIGHTS], card.sha256, folder), files)


def load_posterior(folder: str | Path, model: nn.Module) -> Card:
    """Check a posterior's weights, then load them into a model of the same architecture.

    The model gets the posterior's card as `model.card`, and the card's likelihood as `model.likelihood`.

    Args:
        folder: Folder that `save_posterior` wrote.
        model: Model to fill; unchanged if anything is wrong.

    Returns:
        The posterior's card.

    Raises:
        PosteriorError: If a file is missing or truncated, its hash differs, a tensor is missing,
            unknown or of another shape, a value is not finite, or a precision is not positive.
    """
    stored = read_posterior(folder)
    card, weights = stored.card, stored.weights
    network = unwrapped(model)
    weights.fill(network)
    take_card(network, card)
    return card


def take_card(network: nn.Module, card: Card) -> None:
    """Give a network the card of a posterior that it has loaded, and the card's likelihood."""
    likelihood = getattr(network, "likelihood", None)
    if likelihood is None or (card.likelihood, card.likelihood_parameters) != ("categorical", None):
        likelihood = likelihood_in(card)  # older releases wrote "categorical" for every model
    network.__dict__.update(card=card, likelihood=likelihood)
