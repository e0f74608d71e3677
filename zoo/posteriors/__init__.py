"""Trained posteriors: those bundled in this folder, one folder each, and those in folders of the user's."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from bayeslayers.card import PosteriorError
from bayeslayers.checkpoint import CONFIG, load_posterior, read_card
from bayeslayers.checks import near
from zoo.registry import card_of, create, describe

BUNDLED = Path(__file__).parent


def list_posteriors() -> list[str]:
    """Return the names of the bundled posteriors, sorted."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def resolve(name: str | Path) -> Path:
    """Return the folder of a posterior: a bundled name's, or the folder of that path.

    Raises:
        ValueError: If there is neither.
    """
    if str(name) in list_posteriors():
        return BUNDLED / str(name)
    if Path(name).is_dir():
        return Path(name)
    raise ValueError(
        f"unknown posterior {str(name)!r}: neither a bundled name nor a folder.{near(str(name), list_posteriors())} "
        "zoo.list_posteriors() has the bundled ones."
    )


def load(name: str | Path) -> nn.Module:
    """Build a posterior's network and load its means and precisions, in eval mode.

    Args:
        name: A bundled name, as "lenet5-mnist", or the path of a folder that `save_posterior` wrote.

    Returns:
        The network. It takes images as `ToTensor` gives them, float in [0, 1], `(n, c, h, w)` at the
        card's size. `model.card` is its card.

    Raises:
        ValueError: If there is no such posterior.
        PosteriorError: If its files are missing, damaged or do not fit.
    """
    folder = resolve(name)
    card = read_card(folder)
    if card.builder is None:
        raise PosteriorError(
            f"{folder} must name its network's builder, got none. Build the network and call "
            "bayeslayers.load_posterior(folder, model)."
        )
    try:
        model = create(card.builder, **card.kwargs)
        if card_of(model).input_size != card.input_size:
            raise ValueError(f"input_size must be {card_of(model).input_size}, as its network's, got {card.input_size}.")
        describe(model, card)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise PosteriorError(f"{folder / CONFIG} must describe a network of the zoo: {reason}") from None
    load_posterior(folder, model)
    return model.eval()
