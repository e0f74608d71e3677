"""The card of a posterior: the contents of `config.json` beside the weights."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from bayeslayers.display import one_line
from bayeslayers.likelihoods import KINDS, Likelihood, likelihood_named

FORMAT_VERSION = 1
ABOUT_DATA = (  # true of another posterior too
    "likelihood",
    "likelihood_parameters",
    "class_names",
    "input_size",
    "resize",
    "dataset",
)
METHODS = ("sample", "mean", "local", "moments", "linearised", "dropout")  # those of `bl.predict`
LARGEST_INPUT = 2**25  # numbers of one example, or of the image that it is taken from: 128 MiB
_DEEPEST, _LONGEST_TEXT, _MOST_METRICS = 32, 100_000, 1000


class PosteriorError(ValueError):
    """Raised for an invalid posterior on disk; the message names the file and the fault.

    The message is one printable line, even if the names in an untrusted file are not.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Card:
    """What a posterior is, how it was trained and how it performed.

    Attributes:
        name: Name of the posterior.
        builder: Name of its network in the zoo's registry, or None for the user's own network.
        kwargs: Arguments of the builder.
        base_model: Name of the network whose adapters these are, or which was trained further; empty for none.
        likelihood: "categorical", "bernoulli" or "gaussian".
        likelihood_parameters: Its parameters, such as `{"variance": 0.3}`; None in cards of older releases.
        class_names: Names of the classes, in the order of the outputs.
        input_size: Shape of one example, `(c, h, w)` for images.
        resize: Side to which images are resized before the central crop; None for the side of the input.
        dataset: Training data, and the number of examples it was evaluated on.
        dataset_size: Number of training examples N.
        temperature: T of the tempered posterior.
        optimizer: Name and hyperparameters of the optimiser.
        recipe: Command that trained it.
        versions: Library versions at training.
        method: How it predicted for these metrics, as in `bl.predict`.
        metrics: Measured metrics, with `num_samples` and `seed` of the evaluation.
        baseline: The same metrics for the same network trained by `baseline["optimizer"]`.
        verification: Metrics on the small bundled slice of the test data, with `num_samples` and `seed`, for
            `bayeslayers verify`.
        notes: Anything a user should know.
        license: Licence of the posterior, as the Hub names it ("mit"); empty where its author has not said.
        sha256: Hash of `model.safetensors`.
        format_version: Version of this format, which a `config.json` must name.
    """

    name: str = "posterior"
    builder: str | None = None
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    base_model: str = ""
    likelihood: str = "categorical"
    likelihood_parameters: dict[str, Any] | None = None
    class_names: list[str] = dataclasses.field(default_factory=list)
    input_size: list[int] = dataclasses.field(default_factory=list)
    resize: int | None = None
    dataset: str = ""
    dataset_size: int | None = None
    temperature: float | None = None
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    method: str = "sample"
    metrics: dict[str, float | int] = dataclasses.field(default_factory=dict)
    baseline: dict[str, float | int | str] = dataclasses.field(default_factory=dict)
    verification: dict[str, float | int] = dataclasses.field(default_factory=dict)
    notes: str = ""
    license: str = ""
    sha256: str = ""
    format_version: int = FORMAT_VERSION

    @field_validator("*", mode="before")
    @classmethod
    def _as_json_has_it(cls, value: Any) -> Any:
        return _plain(value)

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"must be one of {', '.join(METHODS)}, got {value[:40]!r}")
        return value

    @field_validator("input_size")
    @classmethod
    def _bounded_size(cls, value: list[int]) -> list[int]:
        if any(n < 1 for n in value) or math.prod(value) > LARGEST_INPUT:
            raise ValueError(f"must be integers >= 1 whose product is at most {LARGEST_INPUT}, got {value[:8]}")
        return value

    @field_validator("versions", "metrics", "baseline", "verification")
    @classmethod
    def _bounded_number(cls, value: dict[str, Any]) -> dict[str, Any]:
        if len(value) > _MOST_METRICS:
            raise ValueError(f"must have at most {_MOST_METRICS} entries, got {len(value)}")
        return value

    def to_json(self) -> str:
        """Return the text of `config.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a value as JSON represents it: lists for tuples, Python's numbers for NumPy's.

    Raises:
        ValueError: If it is nested too deeply, or a text in it is too long.
    """
    if depth > _DEEPEST:
        raise ValueError(f"must be nested at most {_DEEPEST} levels deep")
    if isinstance(value, Mapping):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        raise ValueError(f"must hold texts of at most {_LONGEST_TEXT} characters, got one of {len(value)}")
    if isinstance(value, bool | int | float):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def likelihood_in(card: Card) -> Likelihood:
    """Return the likelihood that a card names, with its parameters.

    >>> likelihood_in(Card(likelihood="gaussian", likelihood_parameters={"variance": 0.3}))
    Gaussian(variance=0.3)

    Raises:
        ValueError: If no likelihood has that name, or it takes no such parameters.
    """
    parameters, kind = card.likelihood_parameters or {}, KINDS[likelihood_named(card.likelihood).name]
    known = [field.name for field in dataclasses.fields(kind)]
    for key, value in parameters.items():
        if key not in known or not all(map(_is_number, value if isinstance(value, list) else [value])):
            raise ValueError(
                f"likelihood_parameters of {card.likelihood!r} must be numbers named {' or '.join(known) or 'nothing'}"
                f", got {key!r}: {value!r:.40}."
            )
    try:
        return kind(**parameters)
    except TypeError as error:  # a list where a number belongs
        raise ValueError(str(error)) from None


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def likelihood_fields(likelihood: Any) -> dict[str, Any]:
    """Return the two fields of a card that describe a likelihood.

    >>> from bayeslayers import Gaussian
    >>> likelihood_fields(Gaussian(0.3))
    {'likelihood': 'gaussian', 'likelihood_parameters': {'variance': 0.3}}

    Raises:
        ValueError: If no card can name it.
    """
    if type(likelihood) not in KINDS.values():
        names = ", ".join(f"bl.{kind.__name__}" for kind in KINDS.values())
        raise ValueError(
            f"likelihood must be one that a card can name, {names}, got {type(likelihood).__name__}. Save the model "
            "without it, and set model.likelihood again after loading."
        )
    given = {field.name: getattr(likelihood, field.name) for field in dataclasses.fields(likelihood)}
    parameters = {name: _plain(value) for name, value in given.items() if value is not None}
    return {"likelihood": likelihood.name, "likelihood_parameters": parameters}


def card_from_json(text: str | bytes, source: str) -> Card:
    """Return the card that a `config.json` holds.

    Args:
        text: Contents of the file.
        source: Its path, for messages.

    Raises:
        PosteriorError: If it is not a JSON object, has a newer format, or has an unknown, missing or
            wrongly typed field.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PosteriorError(f"{source} must be JSON, got a file that is not: {error}.") from None
    if not isinstance(fields, dict):
        raise PosteriorError(f"{source} must hold a JSON object, got {type(fields).__name__}.")
    version = fields.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        newer = " Update bayeslayers." if type(version) is int and version > FORMAT_VERSION else ""
        raise PosteriorError(f"{source} must have a format_version from 1 to {FORMAT_VERSION}, got {version!r}.{newer}")
    try:
        card = TypeAdapter(Card).validate_json(json.dumps(fields))
        likelihood_in(card)
        return card
    except ValidationError as error:
        raise PosteriorError(f"{source} has a bad {first_bad_field(error)}") from None
    except ValueError as error:
        raise PosteriorError(f"{source} must name a likelihood: {error}") from None
    except RecursionError:
        raise PosteriorError(f"{source} must be nested less deeply.") from None


def first_bad_field(error: ValidationError) -> str:
    """Return the first invalid field of a card and the reason, as one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    return f"field '{where}': {reason}." if where else f"structure: {reason}."
