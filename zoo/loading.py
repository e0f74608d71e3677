"""Trained posteriors: bundled with the zoo, in the user's folders, and on the Hub."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from torch import nn

from bayeslayers.checks import did_you_mean
from bayeslayers.storage.card import PosteriorError
from bayeslayers.storage.model_card import model_card
from bayeslayers.storage.posterior import Stored, read_posterior, write_folder
from bayeslayers.storage.weight_file import CONFIG, README, WEIGHTS, read_member
from zoo import hub
from zoo.untrusted import build, build_checked

BUNDLED = Path(__file__).parent / "posteriors"
_README_BYTES = 4 * 2**20


def list_posteriors() -> list[str]:
    """Return the names of the bundled posteriors, sorted."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def resolve(name: str | Path) -> Path:
    """Return the folder of a posterior: of a bundled one, of a path, or in the Hub's cache.

    Args:
        name: A bundled name, a path, or "OWNER/REPO[@REVISION]" on the Hub; they are tried in this order. The last
            may also be "hf://OWNER/REPO[@REVISION]", or a link to a page of the repository.

    Raises:
        ValueError: If there is no such posterior; PosteriorError if it is in a subfolder of that path.
        OSError: If the Hub cannot be reached: PermissionError, ConnectionError.
    """
    if str(name) in list_posteriors():
        return BUNDLED / str(name)
    if isinstance(name, str) and hub.is_address(name):
        return hub.fetch(name)
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):  # False, without an error, for an invalid path
        if (folder / WEIGHTS).is_file():
            return folder
        if inside := sorted(str(path.parent) for path in folder.glob(f"*/{WEIGHTS}")):  # a training run
            raise PosteriorError(f"posterior must be its own folder, got {folder}. Did you mean {' or '.join(inside)}?")
        return folder
    if isinstance(name, str) and hub.is_name(name):
        return hub.fetch(name)
    raise ValueError(
        f"unknown posterior {str(name)!r:.200}: not a bundled name, a folder or OWNER/REPO on the Hub."
        f"{did_you_mean(str(name)[:100], list_posteriors())} zoo.list_posteriors() has the bundled ones."
    )


def load(name: str | Path) -> nn.Module:
    """Build a posterior's network and load its means and precisions, in eval mode.

    Args:
        name: A bundled name, such as "lenet5-mnist"; the path of a folder that `save_posterior` wrote; or
            "OWNER/REPO[@REVISION]", a repository of the Hub, which is downloaded once and cached; or its address,
            as for `resolve`.

    Returns:
        The network. It takes images as `ToTensor` gives them, float in [0, 1], `(n, c, h, w)` at the
        card's size. `model.card` is its card.

    Raises:
        ValueError: If there is no such posterior.
        PosteriorError: If its files are missing, damaged or inconsistent.
        OSError: If the Hub cannot be reached: PermissionError, ConnectionError.
    """
    folder = resolve(name)
    return _filled(read_posterior(folder), folder)


def _filled(stored: Stored, folder: Path) -> nn.Module:
    """Return the network of a posterior that was read from a folder."""
    card, weights = stored.card, stored.weights
    if card.builder is None:
        raise PosteriorError(
            f"{folder} must name its network's builder, got none. Build the network and call "
            "bayeslayers.load_posterior(folder, model)."
        )
    source = str(folder / CONFIG)
    model = build(card, source) if folder.parent == BUNDLED else build_checked(card, weights, source)
    weights.fill(model)
    return model.eval()


def publish(folder: str | Path, name: str, private: bool = False) -> str:
    """Check a posterior and commit its three files to a repository of the Hub; return the commit's address.

    The model card is rewritten under the repository's name, unless its author has edited it.

    Args:
        folder: Folder that `save_posterior` wrote.
        name: "OWNER/REPO", or "OWNER/REPO@BRANCH"; a missing repository or branch is created.
        private: Make the repository private.

    Raises:
        PosteriorError: If the folder's files are missing, damaged or inconsistent.
        ValueError: If the name is not a repository's, or `private` is set and the repository is public.
        OSError: If the Hub denies access or does not answer: PermissionError, ConnectionError.
    """
    repository, _ = hub.parse(name)
    folder = Path(os.path.expanduser(folder))
    stored = _checked(folder)
    card, files = stored.card, stored.files
    if card.builder is not None:
        _filled(stored, folder)
    readme = read_member(folder, README, _README_BYTES) if (folder / README).is_file() else b""
    if readme in (b"", model_card(card).encode()):
        readme = model_card(dataclasses.replace(card, name=repository)).encode()
    return hub.upload(files | {README: readme}, name, f"Publish {card.name}", private)


def download(name: str | Path, output: str | Path | None = None) -> Path:
    """Fetch a posterior, check its files, and return their folder.

    Args:
        name: As for `load`.
        output: Folder to make or replace; None leaves the posterior in the Hub's cache, or in its own folder.

    Raises:
        FileExistsError: If `output` holds anything but a posterior.
        ValueError: As for `load`, including PosteriorError.
        OSError: As for `load`.
    """
    folder = resolve(name)
    files = _checked(folder).files
    if output is None:
        return folder
    if (folder / README).is_file():
        files[README] = read_member(folder, README, _README_BYTES)
    output = Path(os.path.expanduser(output))
    write_folder(output.resolve(), files)
    return output


def _checked(folder: Path) -> Stored:
    """Return a posterior after checking every tensor."""
    stored = read_posterior(folder)
    for tensor in stored.weights.shapes:
        stored.weights.read(tensor)
    return stored
