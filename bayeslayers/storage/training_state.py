"""The state of a training on disk: nested dicts and tensors in one safetensors file with a hash."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from bayeslayers.files import write_atomically
from bayeslayers.storage.card import PosteriorError
from bayeslayers.storage.weight_file import parse_tensors


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
    """Return the state that `save_checkpoint` wrote. The file is read once, so that the checked data is returned.

    Raises:
        PosteriorError: If the file is missing, truncated, changed or not a checkpoint.
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
    """Return a hash of the whole state; the safetensors format has none of its own."""
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
    if isinstance(node, dict):  # as pairs, because keys need not be strings
        return {"dict": [[_take_apart(k, tensors), _take_apart(v, tensors)] for k, v in node.items()]}
    if isinstance(node, list | tuple):
        return {type(node).__name__: [_take_apart(item, tensors) for item in node]}
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"state must hold tensors and plain values, got {type(node).__name__}.")


def _put_together(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the state whose JSON form is `node`.

    Raises:
        ValueError, KeyError, TypeError: If it is not such a form.
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
