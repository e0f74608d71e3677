"""Posteriors and training states on disk: safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from bayeslayers.card import Card, PosteriorError, card_from_json, first_bad_field, likelihood_in, model_card
from bayeslayers.claims import chosen_likelihood, refuse_unwritten
from bayeslayers.sampling import posterior
from bayeslayers.unwrap import unwrapped
from bayeslayers.weights import (
    CONFIG,
    README,
    WEIGHTS,
    Weights,
    check_values,
    parse_tensors,
    parse_weights,
    read_member,
)

_CONFIG_BYTES = 4 * 2**20  # the names of some 100,000 classes


def save_posterior(model: nn.Module, folder: str | Path, **fields: Any) -> Card:
    """Write a model's posterior to a folder: weights, `config.json` and a model card.

    The folder is written beside its place and moved there when complete, so that an interruption
    leaves what was there before. (Only a power cut or a kill between the two renames of a replacement can
    leave it aside, whole, as `.NAME-*.old`.)

    Args:
        model: Model with Bayesian layers, also in torch's wrappers (`DataParallel`, `AveragedModel`, `torch.compile`):
            the network inside is saved, under its own names.
        folder: Folder to make or replace.
        fields: Fields of the `Card`; the others are those of `model.card`, where there is one. The likelihood is
            `model.likelihood`, where there is one; `likelihood` may also be a `Gaussian(0.3)`.

    Returns:
        The card as written.

    Raises:
        ValueError: If the model has no Bayesian layer, a value that is not finite or a precision
            that is not positive, a field of the card is bad or contradicts the model, or metrics were sampled
            from a posterior that nothing has written.
        FileExistsError: If the folder holds anything but a posterior.
    """
    folder, network = Path(os.path.expanduser(folder)).resolve(), unwrapped(model)
    if not any(True for _ in posterior(network)):
        raise ValueError("model must have Bayesian layers, got none. Build it from them, as BayesLinear.")
    weights = save_tensors(_checked_tensors(network))
    own = getattr(network, "card", None)
    card = own if isinstance(own, Card) else Card()
    fields = {"name": folder.name} | fields | chosen_likelihood(network, fields)
    try:
        card = dataclasses.replace(card, **fields, sha256=hashlib.sha256(weights).hexdigest())
    except ValidationError as error:
        raise ValueError(f"card has a bad {first_bad_field(error)}") from None
    likelihood_in(card)
    refuse_unwritten(network, card)
    write_folder(folder, {WEIGHTS: weights, CONFIG: card.to_json().encode(), README: model_card(card).encode()})
    return card


def _checked_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors, which can be loaded again.

    They are cloned, for a safetensors file has no two names for one memory, as a layer used twice gives.
    """
    state = network.state_dict()
    Weights(Path("model"), state)  # checks what the tensors are
    for name, tensor in state.items():
        check_values(name, tensor, "model")
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def write_folder(folder: Path, contents: dict[str, bytes]) -> None:
    """Make or replace a posterior's folder, whole or not at all.

    Args:
        folder: Folder, resolved.
        contents: Its files.

    Raises:
        FileExistsError: If the folder holds anything but a posterior.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not _replaceable(folder):
        raise FileExistsError(
            f"folder must be new, empty or a posterior, got {folder}, which holds something else. Choose another."
        )
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in contents.items():
            write_atomically(fresh / name, content)
        fresh.chmod(0o755)
        _replace_folder(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _replaceable(folder: Path) -> bool:
    """Whether a folder is empty or a posterior and nothing else, by its card: any project may have a config.json."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if held - {WEIGHTS, CONFIG, README}:
        return False
    try:
        return not held or bool(read_card(folder))
    except PosteriorError:
        return False


def _replace_folder(fresh: Path, folder: Path) -> None:
    """Move `fresh` to `folder`; what was there is gone only once the new one is in place."""
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
    """Return the card of a posterior's folder, its fields checked.

    Raises:
        PosteriorError: If the folder or its `config.json` is missing or bad.
    """
    folder = Path(os.path.expanduser(folder))
    return card_from_json(read_member(folder, CONFIG, _CONFIG_BYTES), str(folder / CONFIG))


@dataclasses.dataclass(frozen=True)
class Stored:
    """A posterior as it was read from a folder.

    Attributes:
        card: Its card.
        weights: Its tensors, whose values are checked when they are taken.
        files: Content of the two files.
    """

    card: Card
    weights: Weights
    files: dict[str, bytes]


def read_posterior(folder: str | Path) -> Stored:
    """Read a posterior's folder, each file once.

    Raises:
        PosteriorError: If a file is missing or bad, or the hash of the weights is not the card's.
    """
    folder = Path(os.path.expanduser(folder))
    files = {CONFIG: read_member(folder, CONFIG, _CONFIG_BYTES)}
    card = card_from_json(files[CONFIG], str(folder / CONFIG))
    files[WEIGHTS] = read_member(folder, WEIGHTS)
    return Stored(card, parse_weights(files[WEIGHTS], card.sha256, folder), files)


def load_posterior(folder: str | Path, model: nn.Module) -> Card:
    """Load a posterior's weights into a model of the same architecture, having checked them.

    The model gets the posterior's card as `model.card`, and the likelihood that it names as `model.likelihood`.

    Args:
        folder: Folder that `save_posterior` wrote.
        model: Model to fill; left as it was if anything is wrong.

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
    likelihood = getattr(network, "likelihood", None)
    if likelihood is None or (card.likelihood, card.likelihood_parameters) != ("categorical", None):
        likelihood = likelihood_in(
            card
        )  # other cards are of a release that wrote "categorical" whatever the model said
    network.__dict__.update(card=card, likelihood=likelihood)
    return card


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a training state to one file, atomically.

    Args:
        path: File to write.
        state: Nested dicts, lists and tuples of tensors and plain values, as a `state_dict` is.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_take_apart(state, tensors))
    write_atomically(
        Path(os.path.expanduser(path)),
        save_tensors(tensors, metadata={"state": tree, "sha256": _digest(tree, tensors)}),
    )


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the state that `save_checkpoint` wrote. The file is read once: what was hashed is what is returned.

    Raises:
        PosteriorError: If the file is missing, truncated, changed or no checkpoint.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise PosteriorError(f"{path} must be a training checkpoint, got no such file.")
    complaint = f"{path} must be a training checkpoint, got a damaged or other file"
    data = path.read_bytes()
    tensors = parse_tensors(data, complaint)
    try:
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if metadata["sha256"] != _digest(metadata["state"], tensors):
            raise ValueError("its sha256 is another")
        state = _put_together(json.loads(metadata["state"]), tensors)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except KeyError as error:
        raise PosteriorError(f"{complaint}: it has no {error}.") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise PosteriorError(f"{complaint}: {error}.") from None


def _digest(tree: str, tensors: dict[str, Tensor]) -> str:
    """Return a hash of the whole state, which the safetensors format itself does not keep."""
    digest = hashlib.sha256(tree.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _take_apart(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a JSON form of `node`, its tensors moved to `tensors` under numbered names."""
    if isinstance(node, Tensor):
        name = str(len(tensors))
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(node, dict):  # as pairs, for keys need not be strings
        return {"dict": [[_take_apart(k, tensors), _take_apart(v, tensors)] for k, v in node.items()]}
    if isinstance(node, list | tuple):
        return {type(node).__name__: [_take_apart(item, tensors) for item in node]}
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"state must hold tensors and plain values, got {type(node).__name__}.")


def _put_together(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the state of whose JSON form `node` is a part.

    Raises:
        ValueError: If it is no such form, KeyError or TypeError likewise.
    """
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_put_together(k, tensors): _put_together(v, tensors) for k, v in content}
    if kind not in ("list", "tuple"):
        raise ValueError(f"it holds a {kind}")
    items = [_put_together(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its old or its new content is there at any time, also after a power cut.

    Raises:
        OSError: If it cannot be written, as on a full disk; named by `path`, which is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
