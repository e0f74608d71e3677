"""Posteriors and training states on disk: safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from bayeslayers.card import Card, PosteriorError, card_from_json, first_bad_field, model_card
from bayeslayers.sampling import posterior
from bayeslayers.weights import CONFIG, README, WEIGHTS, check_values, member, open_weights

_CONFIG_BYTES = 4 * 2**20  # the names of some 100,000 classes


def save_posterior(model: nn.Module, folder: str | Path, **fields: Any) -> Card:
    """Write a model's posterior to a folder: weights, `config.json` and a model card.

    The folder is written beside its place and moved there when complete, so that an interruption
    leaves what was there before. (Only a power cut between the two renames of a replacement can leave
    it aside, whole, as `.NAME-*.old`.)

    Args:
        model: Model with Bayesian layers.
        folder: Folder to make or replace.
        fields: Fields of the `Card`; the others are those of `model.card`, where there is one.

    Returns:
        The card as written.

    Raises:
        ValueError: If the model has no Bayesian layer, a value that is not finite or a precision
            that is not positive, or a field of the card is bad.
        FileExistsError: If the folder holds anything but a posterior.
    """
    folder = Path(folder).resolve()
    if not any(True for _ in posterior(model)):
        raise ValueError("model must have Bayesian layers, got none. Build it from them, as BayesLinear.")
    # Cloned, for a safetensors file has no two names for one memory, as a layer used twice gives.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        check_values(name, tensor, "model")
    weights = save_tensors(tensors)
    card = getattr(model, "card", None) or Card()
    try:
        card = dataclasses.replace(card, **{"name": folder.name} | fields, sha256=hashlib.sha256(weights).hexdigest())
    except ValidationError as error:
        raise ValueError(f"card has a bad {first_bad_field(error)}") from None
    write_folder(folder, {WEIGHTS: weights, CONFIG: card.to_json().encode(), README: model_card(card).encode()})
    return card


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
    path = member(folder, CONFIG)
    if (size := path.stat().st_size) > _CONFIG_BYTES:
        raise PosteriorError(f"{path} must have at most {_CONFIG_BYTES} bytes, got {size}.")
    return card_from_json(path.read_bytes(), str(path))


def load_posterior(folder: str | Path, model: nn.Module) -> Card:
    """Load a posterior's weights into a model of the same architecture, having checked them.

    Args:
        folder: Folder that `save_posterior` wrote.
        model: Model to fill; left as it was if anything is wrong.

    Returns:
        The posterior's card.

    Raises:
        PosteriorError: If a file is missing or truncated, its hash differs, a tensor is missing,
            unknown or of another shape, a value is not finite, or a precision is not positive.
    """
    card = read_card(folder)
    with open_weights(folder, card.sha256) as weights:
        weights.fill(model)
    return card


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a training state to one file, atomically.

    Args:
        path: File to write.
        state: Nested dicts, lists and tuples of tensors and plain values, as a `state_dict` is.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_take_apart(state, tensors))
    write_atomically(Path(path), save_tensors(tensors, metadata={"state": tree, "sha256": _digest(tree, tensors)}))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the state that `save_checkpoint` wrote.

    Raises:
        PosteriorError: If the file is missing, truncated, changed or no checkpoint.
    """
    if not Path(path).is_file():
        raise PosteriorError(f"{path} must be a training checkpoint, got no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        tree = metadata["state"]
        if metadata["sha256"] != _digest(tree, tensors):
            raise ValueError("its sha256 is another")
        return _put_together(json.loads(tree), tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise PosteriorError(f"{path} must be a training checkpoint, got a damaged or other file: {error}.") from None


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
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    items = [_put_together(item, tensors) if kind != "dict" else item for item in content]
    if kind == "dict":
        return {_put_together(k, tensors): _put_together(v, tensors) for k, v in items}
    return tuple(items) if kind == "tuple" else items


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its old or its new content is there at any time, also after a power cut."""
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
        os.unlink(temporary)
        raise
