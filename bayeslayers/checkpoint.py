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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from bayeslayers.card import Card, PosteriorError, card_from_json, model_card
from bayeslayers.sampling import posterior

WEIGHTS, CONFIG, README = "model.safetensors", "config.json", "README.md"
_HEADER_BYTES = 2**20  # what a weight file may hold beside its tensors


def save_posterior(model: nn.Module, folder: str | Path, **fields: Any) -> Card:
    """Write a model's posterior to a folder: weights, `config.json` and a model card.

    The folder is written beside its place and moved there when complete, so that an interruption
    leaves what was there before.

    Args:
        model: Model with Bayesian layers.
        folder: Folder to make or replace.
        fields: Fields of the `Card`; the others are those of `model.card`, where there is one.

    Returns:
        The card as written.
    """
    folder = Path(folder)
    weights = save_tensors({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})
    card = getattr(model, "card", None) or Card()
    card = dataclasses.replace(card, **{"name": folder.name} | fields, sha256=hashlib.sha256(weights).hexdigest())
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
        raise FileExistsError(f"folder must be new, empty or a posterior, got {folder} with other files in it.")
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in ((WEIGHTS, weights), (CONFIG, card.to_json()), (README, model_card(card))):
            write_atomically(fresh / name, content if isinstance(content, bytes) else content.encode())
        fresh.chmod(0o755)
        _replace_folder(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return card


def _replace_folder(fresh: Path, folder: Path) -> None:
    """Move `fresh` to `folder`; what was there is gone only once the new one is in place."""
    old = fresh.with_name(fresh.name + ".old")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_card(folder: str | Path) -> Card:
    """Return the card of a posterior's folder, its fields checked.

    Raises:
        PosteriorError: If the folder or its `config.json` is missing or bad.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise PosteriorError(f"{folder} must hold a posterior, got no {CONFIG} in it.")
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
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise PosteriorError(f"{folder} must hold a posterior, got no {WEIGHTS} in it.")
    own = model.state_dict()
    # A prior may be stored as one tensor where the model still has a scalar: room for three per mean.
    limit = 4 * sum(t.numel() * t.element_size() for t in own.values()) + _HEADER_BYTES
    if path.stat().st_size > limit:
        raise PosteriorError(f"{path} must be a posterior of this model, got {path.stat().st_size} bytes, too many.")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != card.sha256:
        raise PosteriorError(f"{path} must have the sha256 that {CONFIG} names, got another: it is damaged or changed.")
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise PosteriorError(f"{path} must be a safetensors file, got one that is not: {error}.") from None
    _check_tensors(tensors, model, str(path))
    model.load_state_dict(tensors)
    return card


def _check_tensors(tensors: dict[str, Tensor], model: nn.Module, source: str) -> None:
    own = model.state_dict()
    if missing := sorted(own.keys() - tensors.keys()):
        raise PosteriorError(
            f"{source} must hold tensor '{missing[0]}', got none of that name ({len(missing)} missing)."
        )
    if unknown := sorted(tensors.keys() - own.keys()):
        raise PosteriorError(f"{source} must hold the model's tensors, got '{unknown[0]}' ({len(unknown)} unknown).")
    mean_shapes = {site.name: site.mean.shape for site in posterior(model)}
    for name, tensor in tensors.items():
        expected = own[name]
        prior_of = name.partition("_prior_")[0] if "_prior_" in name else None
        shapes = {expected.shape} | ({torch.Size(()), mean_shapes[prior_of]} if prior_of in mean_shapes else set())
        if tensor.shape not in shapes or tensor.dtype.is_floating_point != expected.dtype.is_floating_point:
            raise PosteriorError(
                f"{source}: tensor '{name}' must be {expected.dtype} of shape {tuple(expected.shape)}, got "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}."
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise PosteriorError(f"{source}: tensor '{name}' must be finite, got NaN or infinite values.")
        if name.endswith("_precision") and not (tensor > 0).all():
            raise PosteriorError(f"{source}: precision '{name}' must be > 0, got {float(tensor.min()):.4g}.")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a training state to one file, atomically.

    Args:
        path: File to write.
        state: Nested dicts, lists and tuples of tensors and plain values, as `state_dict()`s are.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_take_apart(state, tensors))
    write_atomically(Path(path), save_tensors(tensors, metadata={"state": tree}))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the state that `save_checkpoint` wrote.

    Raises:
        PosteriorError: If the file is missing, truncated or no checkpoint.
    """
    if not Path(path).is_file():
        raise PosteriorError(f"{path} must be a training checkpoint, got no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads((file.metadata() or {})["state"])
            return _put_together(tree, {name: file.get_tensor(name) for name in file.keys()})
    except (SafetensorError, KeyError, ValueError) as error:
        raise PosteriorError(f"{path} must be a training checkpoint, got a damaged or other file: {error}.") from None


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
