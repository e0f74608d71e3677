"""Trained posteriors: bundled with the zoo, in the user's folders, and on the Hub."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import nn

from bayeslayers.checks import did_you_mean
from bayeslayers.storage.card import Card, PosteriorError
from bayeslayers.storage.model_card import is_generated, model_card
from bayeslayers.storage.posterior import Stored, read_posterior, write_folder
from bayeslayers.storage.weight_file import CONFIG, PICTURE, README, WEIGHTS, read_member
from zoo import hub
from zoo.untrusted import build, build_checked

BUNDLED = Path(__file__).parent / "posteriors"
_README_BYTES = _PICTURE_BYTES = 4 * 2**20
_PNG = b"\x89PNG\r\n\x1a\n"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


class Published(NamedTuple):
    """What became of one posterior of `publish_all`.

    Attributes:
        name: Its bundled name.
        repository: Its repository on the Hub.
        address: Address of the commit that holds it; empty where it was not published.
        uploaded: Whether it was uploaded now, not unchanged there.
        error: Why it was not published; empty where it was.
    """

    name: str
    repository: str
    address: str = ""
    uploaded: bool = False
    error: str = ""


def list_posteriors() -> list[str]:
    """Return the names of the bundled posteriors, sorted."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def resolve(name: str | Path) -> Path:
    """Return the folder of a posterior: of a bundled one, of a path, or in the Hub's cache.

    Args:
        name: A bundled name, a path, or "OWNER/REPO[@REVISION]" on the Hub; they are tried in this order. The last
            may also be "hf://OWNER/REPO[@REVISION]", or a link to a page of the repository. A plain name with a
            hyphen, such as "resnet18-imagenet", that is none of these is looked up in the Hub's organisation
            "bayeslayers", or in that of the environment variable BAYESLAYERS_ORGANISATION.

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
    near, where = did_you_mean(str(name)[:100], list_posteriors()), "OWNER/REPO on the Hub"
    if isinstance(name, str) and (repository := hub.in_organisation(name)):
        try:
            return hub.fetch(repository)
        except (ValueError, OSError) as error:
            if isinstance(error, PosteriorError) or not (near or isinstance(error, ValueError)):
                raise
            where += f", and {repository} {'is not' if isinstance(error, ValueError) else 'cannot be asked for'} there"
    raise ValueError(
        f"unknown posterior {str(name)!r:.200}: not a bundled name, a folder or {where}."
        f"{near} `bayeslayers list`, or zoo.list_posteriors(), has the bundled ones."
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


def publish(
    folder: str | Path,
    name: str,
    private: bool = False,
    *,
    license: str | None = None,
    draw: Callable[[nn.Module], bytes | None] | None = None,
) -> str:
    """Check a posterior and commit its files to a repository of the Hub; return the commit's address.

    The model card is rewritten under the repository's name, with a picture, unless its author has edited it. Nothing
    is uploaded where the repository holds the same files already.

    Args:
        folder: Folder that `save_posterior` wrote.
        name: "OWNER/REPO", or "OWNER/REPO@BRANCH"; a missing repository or branch is created.
        private: Make the repository private.
        license: Licence of the posterior, as the Hub names it ("mit"); None for that of its card.
        draw: Function that returns the picture of the card, a PNG, for the loaded network, or None. The picture is
            `picture.png` of the folder where that exists, else what `draw` returns, else bars of the card's metrics.

    Raises:
        PosteriorError: If the folder's files are missing, damaged or inconsistent.
        ValueError: If the name is not a repository's, or `private` is set and the repository is public.
        OSError: If the Hub denies access or does not answer: PermissionError, ConnectionError.
    """
    return _publish(folder, name, private, license, draw).address


def publish_all(organisation: str, private: bool = False) -> Iterator[Published]:
    """Publish every bundled posterior under its name, and yield what became of each, whether or not others fail.

    What an organisation has unchanged is not uploaded, so that a second call completes an interrupted one.

    Args:
        organisation: Owner of the repositories on the Hub.
        private: Make the repositories private.

    Raises:
        ValueError: If no repository can have that owner.
    """
    names = list_posteriors()
    hub.parse(f"{organisation}/{names[0]}")
    for name in names:
        try:
            upload = _publish(BUNDLED / name, f"{organisation}/{name}", private)
        except (ValueError, OSError) as error:
            yield Published(name, f"{organisation}/{name}", error=str(error))
        else:
            yield Published(name, f"{organisation}/{name}", upload.address, upload.made)


def _publish(
    folder: str | Path,
    name: str,
    private: bool,
    license: str | None = None,
    draw: Callable[[nn.Module], bytes | None] | None = None,
) -> hub.Upload:
    repository, _ = hub.parse(name)
    if license is not None and not _LICENCE.fullmatch(license):
        raise ValueError(f"license must be as the Hub names it, such as 'apache-2.0' or 'mit', got {license!r:.80}.")
    folder = Path(os.path.expanduser(folder))
    stored = _checked(folder)
    card, files = stored.card, dict(stored.files)
    model = None if card.builder is None else _filled(stored, folder)
    readme = read_member(folder, README, _README_BYTES) if (folder / README).is_file() else b""
    generated = not readme or is_generated(readme.decode(errors="replace"), card)
    if license is not None:
        card = dataclasses.replace(card, license=license)
        files[CONFIG] = card.to_json().encode()
    if picture := _picture(folder, card, model, draw):
        files[PICTURE] = picture
    if generated:
        readme = model_card(dataclasses.replace(card, name=repository), picture is not None).encode()
    return hub.upload(files | {README: readme}, name, f"Publish {card.name}", private)


def _picture(
    folder: Path, card: Card, model: nn.Module | None, draw: Callable[[nn.Module], bytes | None] | None
) -> bytes | None:
    """Return the picture of a posterior's card, or None where there is nothing to show."""
    if (folder / PICTURE).is_file():
        picture = read_member(folder, PICTURE, _PICTURE_BYTES)
        if not picture.startswith(_PNG):
            raise PosteriorError(f"{folder / PICTURE} must be a PNG, got a file that is not.")
        return picture
    if draw is not None and model is not None and (drawn := draw(model)):
        return drawn
    from bayeslayers.plots.canvas import rendered
    from bayeslayers.plots.metric_bars import has_bars, metric_bars

    return rendered(metric_bars(card.metrics, card.baseline)) if has_bars(card.metrics) else None


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
