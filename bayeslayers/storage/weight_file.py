"""The weight file of a posterior, treated as untrusted: tensors that do not fit a network are rejected before use."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from bayeslayers.layers import (
    POSTERIOR_STRUCTURE,
    POSTERIOR_SUFFIXES,
    PRIOR_STRUCTURE,
    BayesianLayer,
    attach_posterior,
)
from bayeslayers.sampling import posterior
from bayeslayers.storage.card import PosteriorError

WEIGHTS, CONFIG, README = "model.safetensors", "config.json", "README.md"
PICTURE = "picture.png"  # which README.md may show; a folder need not have it
_HEADER_BYTES = 4 * 2**20  # names and shapes of some 30,000 tensors
_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_WHOLE = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_KINDS = {**_FLOATS, **_WHOLE, torch.complex64: "C64"}


def member(folder: str | Path, name: str) -> Path:
    """Return the path of a file in a posterior's folder.

    Raises:
        PosteriorError: If the file is missing, or it is a link out of the folder. Links of a snapshot in the
            Hub's cache to the `blobs` of its repository are allowed.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise _missing(path)
    home, target = Path(folder).resolve(), path.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise PosteriorError(f"{path} must be a file of its folder, got a link out of it.")
    return path


def _missing(path: Path) -> PosteriorError:
    return PosteriorError(f"{path.parent} must hold a posterior, got no {path.name} in it.")


class Weights:
    """The tensors of a file by name, which are checked against a model and then loaded into it, all or none.

    Args:
        path: Path of the file, for messages.
        tensors: What it holds.

    Raises:
        PosteriorError: If the file is not a mapping of names to tensors, or a tensor's dtype is not allowed.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        self.path = path
        if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
            raise PosteriorError(f"{path} must hold tensors by name, got {type(tensors).__name__}.")
        self._tensors = tensors
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS | _WHOLE:
                kind = _kind(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise PosteriorError(f"{path}: tensor '{name}' must be of real numbers, got {kind}.")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def check_shapes(self, model: nn.Module) -> None:
        """Check names, shapes and dtypes of the tensors against a model's, which may be on the meta device.

        Raises:
            PosteriorError: If a tensor is missing, unknown, or of another shape or kind of dtype.
        """
        own = self._expected(model)
        if missing := sorted(own.keys() - self.shapes.keys()):
            raise PosteriorError(
                f"{self.path} must hold tensor '{missing[0]}', got none of that name ({len(missing)} missing)."
            )
        if unknown := sorted(self.shapes.keys() - own.keys()):
            raise PosteriorError(
                f"{self.path} must hold the model's tensors, got '{unknown[0]}' ({len(unknown)} unknown)."
            )
        means = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        for name, expected in own.items():
            # A prior may be one number in the file and a tensor in the model, or the other way round.
            prior_of = (
                name.rpartition("_prior_")[0] if "_prior_" in name and not name.endswith(PRIOR_STRUCTURE) else None
            )
            shapes = {tuple(expected.shape)} | ({(), means[prior_of]} if prior_of in means else set())
            if self.shapes[name] not in shapes or not self._fits(name, expected):
                raise PosteriorError(
                    f"{self.path}: tensor '{name}' must be {expected.dtype} of shape {tuple(expected.shape)}, got "
                    f"{_kind(self._tensors[name])} of shape {self.shapes[name]}."
                )

    def _expected(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that a model takes from this file: its own, and the file's correlations."""
        expected = dict(model.state_dict())
        for name, parameter in self._attachable(model).items():
            for suffix, shape in zip(POSTERIOR_SUFFIXES, (parameter.shape, (), ()), strict=True):
                expected[name + suffix] = parameter.new_empty(shape, device="meta")
        for path, layer in model.named_modules(remove_duplicate=False):
            if not isinstance(layer, BayesianLayer):
                continue
            prefix = f"{path}." if path else ""
            for prior, names in ((False, POSTERIOR_STRUCTURE), (True, PRIOR_STRUCTURE)):
                found = {name: self.shapes[prefix + name] for name in names if prefix + name in self.shapes}
                for name in names:
                    expected.pop(prefix + name, None)
                if found and (allowed := layer.structure_shapes(prior)):
                    alike = [shapes for shapes in allowed if shapes.keys() == found.keys()] or allowed
                    like = next(iter(layer.own_tensors().values()))
                    expected |= {
                        prefix + name: like.new_empty(shape, device="meta")
                        for name, shape in next((shapes for shapes in alike if shapes == found), alike[0]).items()
                    }
        return expected

    def _attachable(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the parameters with a posterior in the file but not in the model, such as those that IVON trains."""
        own = model.state_dict()
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point()
            and all(name + suffix in self.shapes and name + suffix not in own for suffix in POSTERIOR_SUFFIXES)
        }

    def _attach(self, model: nn.Module) -> None:
        """Give parameters outside of Bayesian layers the buffers for their posteriors in the file."""
        for name in self._attachable(model):
            path, _, key = name.rpartition(".")
            attach_posterior(model.get_submodule(path), 1.0, 1.0, [key])
        for site in posterior(model):
            for suffix, prior in zip(POSTERIOR_SUFFIXES[1:], (site.prior_mean, site.prior_precision), strict=True):
                if not isinstance(site.module, BayesianLayer) and prior.shape != self.shapes[site.name + suffix]:
                    setattr(site.module, site.key + suffix, prior.new_empty(self.shapes[site.name + suffix]))

    def _fits(self, name: str, expected: Tensor) -> bool:
        """Whether a tensor has the expected kind of dtype; floating-point tensors may differ in precision."""
        found = self._tensors[name]
        return not expected.is_complex() and expected.is_floating_point() == found.is_floating_point()

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor in the dtype of a model, with its values checked after the cast.

        Raises:
            PosteriorError: If a value is not finite, or a precision is not positive.
        """
        tensor = self._tensors[name]
        tensor = tensor if dtype is None else tensor.to(dtype)
        check_values(name, tensor, str(self.path))
        return tensor

    def fill(self, model: nn.Module) -> None:
        """Load the tensors into a model, all or none; parameters get the posteriors that the file has for them.

        Raises:
            PosteriorError: As `check_shapes` and `read` do.
        """
        self.check_shapes(model)
        tensors = {name: self.read(name, expected.dtype) for name, expected in self._expected(model).items()}
        self._attach(model)
        # The model's own state holds the versions of its modules; without them some would load as older versions.
        state = model.state_dict()
        for name in state.keys() - tensors.keys():
            del state[name]
        state.update(tensors)
        model.load_state_dict(state)


def read_member(folder: str | Path, name: str, limit: int | None = None) -> bytes:
    """Return the content of a file in a posterior's folder, read once, so that the checked data is used.

    Args:
        folder: Folder.
        name: The file's name.
        limit: Largest size in bytes; None for no limit but memory.

    Raises:
        PosteriorError: As `member` does, or if the file is larger.
    """
    path = member(folder, name)
    try:
        file = path.open("rb")
    except FileNotFoundError:  # since `member` looked, where no lock keeps a writer out
        raise _missing(path) from None
    with file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise PosteriorError(f"{path} must have at most {limit} bytes, got {size}.")
        try:
            return file.read()
        except MemoryError:
            raise PosteriorError(f"{path} must fit into memory, got {size} bytes.") from None


def parse_weights(data: bytes, sha256: str, folder: str | Path) -> Weights:
    """Return the tensors of a weight file whose hash must be the card's.

    Args:
        data: Content of the file.
        sha256: Hash in the card.
        folder: Its folder, for messages.

    Raises:
        PosteriorError: If its hash differs, or it is not a safetensors file.
    """
    path = Path(folder) / WEIGHTS
    if hashlib.sha256(data).hexdigest() != sha256:
        raise PosteriorError(f"{path} must have the sha256 that {CONFIG} names, got another: it is damaged or changed.")
    if int.from_bytes(data[:8], "little") > _HEADER_BYTES:
        raise PosteriorError(f"{path} must be a safetensors file with a header of at most {_HEADER_BYTES} bytes.")
    return Weights(path, parse_tensors(data, f"{path} must be a safetensors file, got one that is not"))


def parse_tensors(data: bytes, complaint: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Args:
        data: Its content.
        complaint: How an error begins.

    Raises:
        PosteriorError: If it is not one, or a tensor's dtype is unknown to torch.
    """
    try:
        return load_tensors(data)
    except (SafetensorError, KeyError, MemoryError) as error:
        raise PosteriorError(f"{complaint}: {error}.") from None


def _kind(tensor: Tensor) -> str:
    """Return safetensors' name of a tensor's dtype."""
    return _KINDS.get(tensor.dtype, str(tensor.dtype))


def check_values(name: str, tensor: Tensor, source: str) -> None:
    """Check that the values are finite, and in the range that the tensor's name requires.

    A precision and the standard deviation of the inputs must be > 0, the running variance of a norm >= 0.

    Raises:
        PosteriorError: If they are not.
    """
    floating = tensor.is_floating_point() and tensor.numel() > 0
    low, high = map(float, tensor.aminmax()) if floating else (1.0, 1.0)  # one pass, which propagates NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        raise PosteriorError(f"{source}: tensor '{name}' must be finite, got NaN or infinite values.")
    if name.endswith("_precision") and not (low > 0 if floating else (tensor > 0).all()):
        raise PosteriorError(f"{source}: precision '{name}' must be > 0, got {float(tensor.min()):.4g}.")
    if f".{name}".endswith(".normalise.std") and not low > 0:
        raise PosteriorError(f"{source}: standard deviation '{name}' must be > 0, got {low:.4g}.")
    if f".{name}".endswith(".running_var") and not low >= 0:
        raise PosteriorError(f"{source}: variance '{name}' must be >= 0, got {low:.4g}.")
