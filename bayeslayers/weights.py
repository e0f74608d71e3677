"""The weight file of a posterior, read with distrust: what does not fit a network is refused before it is held."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bayeslayers.card import PosteriorError
from bayeslayers.layers import POSTERIOR_SUFFIXES, ROOTS, BayesianLayer, attach_posterior
from bayeslayers.sampling import posterior

WEIGHTS, CONFIG, README = "model.safetensors", "config.json", "README.md"
_HEADER_BYTES = 4 * 2**20  # names and shapes of some 30,000 tensors
_FLOATS, _WHOLE = {"F64", "F32", "F16", "BF16"}, {"I64", "I32", "I16", "I8", "U8", "BOOL"}


def member(folder: str | Path, name: str) -> Path:
    """Return the path of a file of a posterior's folder.

    Raises:
        PosteriorError: If there is none, or it is a link that leaves the folder. The links of a snapshot in
            the Hub's cache, to the `blobs` of its repository, are the exception.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise PosteriorError(f"{folder} must hold a posterior, got no {name} in it.")
    home, target = Path(folder).resolve(), path.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise PosteriorError(f"{path} must be a file of its folder, got a link that leaves it.")
    return path


class Weights:
    """An open weight file: its header is known, its tensors are read one by one.

    Args:
        path: Its path, for messages.
        file: The safetensors file.

    Raises:
        PosteriorError: If a tensor is of a kind that no posterior has.
    """

    def __init__(self, path: Path, file: safe_open):
        self.path = path
        self._file = file
        slices = {name: file.get_slice(name) for name in file.keys()}
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        self.dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        if odd := [name for name, dtype in self.dtypes.items() if dtype not in _FLOATS | _WHOLE]:
            raise PosteriorError(f"{path}: tensor '{odd[0]}' must be of real numbers, got {self.dtypes[odd[0]]}.")

    def check_shapes(self, model: nn.Module) -> None:
        """Check names, shapes and kinds of the tensors against a model's, which may be on the meta device.

        Raises:
            PosteriorError: If a tensor is missing, unknown, of another shape or kind.
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
            prior_of = name.rpartition("_prior_")[0] if "_prior_" in name else None
            shapes = {tuple(expected.shape)} | ({(), means[prior_of]} if prior_of in means else set())
            if self.shapes[name] not in shapes or not self._fits(name, expected):
                raise PosteriorError(
                    f"{self.path}: tensor '{name}' must be {expected.dtype} of shape {tuple(expected.shape)}, got "
                    f"{self.dtypes[name]} of shape {self.shapes[name]}."
                )

    def _expected(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that a model takes from this file: its own, but roots and posteriors as the file has."""
        expected = dict(model.state_dict())
        for name, parameter in self._attachable(model).items():
            for suffix, shape in zip(POSTERIOR_SUFFIXES, (parameter.shape, (), ()), strict=True):
                expected[name + suffix] = parameter.new_empty(shape, device="meta")
        for path, layer in model.named_modules(remove_duplicate=False):
            if not isinstance(layer, BayesianLayer):
                continue
            names = [f"{path}.{root}" if path else root for root in ROOTS]
            found, allowed = [self.shapes.get(name) for name in names], layer.root_shapes()
            for name in names:
                expected.pop(name, None)
            if allowed and found != [None, None]:
                shapes = next((pair for pair in allowed if list(pair) == found), allowed[0])
                weight = layer.get_parameter("weight")
                expected |= {n: weight.new_empty(s, device="meta") for n, s in zip(names, shapes, strict=True)}
        return expected

    def _attachable(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the parameters that have a posterior in the file and none in the model, as those IVON trains."""
        own = model.state_dict()
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point()
            and all(name + suffix in self.shapes and name + suffix not in own for suffix in POSTERIOR_SUFFIXES)
        }

    def _attach(self, model: nn.Module) -> None:
        """Give parameters the buffers for what the file holds of them, outside of Bayesian layers."""
        for name in self._attachable(model):
            path, _, key = name.rpartition(".")
            attach_posterior(model.get_submodule(path), 1.0, 1.0, [key])
        for site in posterior(model):
            for suffix, prior in zip(POSTERIOR_SUFFIXES[1:], (site.prior_mean, site.prior_precision), strict=True):
                if not isinstance(site.module, BayesianLayer) and prior.shape != self.shapes[site.name + suffix]:
                    setattr(site.module, site.key + suffix, prior.new_empty(self.shapes[site.name + suffix]))

    def _fits(self, name: str, expected: Tensor) -> bool:
        """Whether a tensor is of the expected kind; floating-point numbers may be of another precision."""
        return not expected.is_complex() and expected.is_floating_point() == (self.dtypes[name] in _FLOATS)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor, its values checked as a model of that dtype will hold them.

        Raises:
            PosteriorError: If a value is not finite, or a precision is not positive.
        """
        tensor = self._file.get_tensor(name)
        tensor = tensor if dtype is None else tensor.to(dtype)
        check_values(name, tensor, str(self.path))
        return tensor

    def fill(self, model: nn.Module) -> None:
        """Load the tensors into a model, all or none; a parameter gets the posterior that the file has for it.

        Raises:
            PosteriorError: As `check_shapes` and `read` do.
        """
        self.check_shapes(model)
        tensors = {name: self.read(name, expected.dtype) for name, expected in self._expected(model).items()}
        self._attach(model)
        model.load_state_dict(tensors)


@contextmanager
def open_weights(folder: str | Path, sha256: str) -> Iterator[Weights]:
    """Open the weight file of a posterior's folder, once its hash has been found to be the card's.

    Raises:
        PosteriorError: If the file is missing, has another hash, or is no safetensors file.
    """
    path = member(folder, WEIGHTS)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        file.seek(0)
        while chunk := file.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise PosteriorError(f"{path} must have the sha256 that {CONFIG} names, got another: it is damaged or changed.")
    if header > _HEADER_BYTES:
        raise PosteriorError(f"{path} must be a safetensors file with a header of at most {_HEADER_BYTES} bytes.")
    try:
        with safe_open(path, framework="pt") as file:
            yield Weights(path, file)
    except SafetensorError as error:
        raise PosteriorError(f"{path} must be a safetensors file, got one that is not: {error}.") from None


def check_values(name: str, tensor: Tensor, source: str) -> None:
    """Check that the values are finite, and those of a precision > 0.

    Raises:
        PosteriorError: If they are not.
    """
    floating = tensor.is_floating_point() and tensor.numel() > 0
    low, high = map(float, tensor.aminmax()) if floating else (1.0, 1.0)  # in one pass, which NaN goes through
    if not (math.isfinite(low) and math.isfinite(high)):
        raise PosteriorError(f"{source}: tensor '{name}' must be finite, got NaN or infinite values.")
    if name.endswith("_precision") and not (low > 0 if floating else (tensor > 0).all()):
        raise PosteriorError(f"{source}: precision '{name}' must be > 0, got {float(tensor.min()):.4g}.")
