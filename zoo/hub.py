"""Posteriors on the Hugging Face Hub: OWNER/REPO[@REVISION], accessed through the Hub's own client.

`huggingface_hub` keeps the cache and reads the settings: HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from bayeslayers.storage.card import PosteriorError
from bayeslayers.storage.weight_file import CONFIG, README, WEIGHTS

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

_PATIENCE = 10  # seconds to wait for a first answer
LIBRARY = "bayeslayers"  # the Hub's tag for our posteriors, from `library_name` in their README.md
_LARGEST = {CONFIG: 2**22, README: 2**22, WEIGHTS: 2**36}  # bytes; an untrusted network has at most 2**33 numbers
ORGANISATION = "bayeslayers"  # whose posteriors are found by plain names; BAYESLAYERS_ORGANISATION names another
_PLAIN = re.compile(r"[a-z0-9][a-z0-9._]*(?:-[a-z0-9._]+)+(?:@[A-Za-z0-9][A-Za-z0-9._/+-]*)?")  # NETWORK-DATA
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/+-]*))?")
_REVISION = r"refs/(?:pr|convert)/[^/]+|[^/]+"  # an address encodes slashes in a branch's name as %2F
_MODEL = rf"(?!(?:datasets|spaces|buckets)/)({_PART}/{_PART})"
_HF_ADDRESS = re.compile(rf"{_MODEL}(?:@({_REVISION}))?(?:/.*)?")
_PAGE = re.compile(rf"{_MODEL}(?:/(?:tree|blob|resolve|raw|commits?)/({_REVISION})(?:/.*)?)?")
_WEBSITES = [
    f"{scheme}://{host}" for scheme in ("https", "http") for host in ("huggingface.co", "www.huggingface.co", "hf.co")
]
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN."


class Found(NamedTuple):
    """A posterior that a search found."""

    name: str
    downloads: int
    likes: int
    updated: str
    tags: tuple[str, ...] = ()


class Upload(NamedTuple):
    """The commit that holds some files: its address, and whether it was made for them or was there before."""

    address: str
    made: bool


def is_name(name: str) -> bool:
    """Return whether a name has the form of a posterior's name or address on the Hub.

    >>> is_name("ada/lenet5-mnist@v1"), is_name("lenet5-mnist"), is_name("../folder"), is_name("a/b/c")
    (True, False, False, False)
    >>> is_name("hf://ada/lenet5-mnist@v1"), is_name("https://huggingface.co/ada/lenet5-mnist/tree/main")
    (True, True)
    """
    try:
        parse(name)
    except ValueError:
        return is_address(name)
    return True


def is_address(name: str) -> bool:
    """Return whether a name is an address: "hf://...", or a link to a page."""
    return name.lower().startswith(("hf://", "http://", "https://"))


def in_organisation(name: str) -> str | None:
    """Return the repository that a plain name, NETWORK-DATA[@REVISION], has in the organisation; None for other forms.

    >>> in_organisation("resnet18-imagenet@v1"), in_organisation("my_folder"), in_organisation("../a-b")
    ('bayeslayers/resnet18-imagenet@v1', None, None)
    """
    repository = f"{os.environ.get('BAYESLAYERS_ORGANISATION') or ORGANISATION}/{name}"
    return repository if _PLAIN.fullmatch(name) and is_name(repository) else None


def parse(name: str) -> tuple[str, str | None]:
    """Return the repository and the revision of a name, or of a link to one of the repository's pages.

    >>> parse("ada/lenet5-mnist@v1"), parse("ada/lenet5-mnist")
    (('ada/lenet5-mnist', 'v1'), ('ada/lenet5-mnist', None))
    >>> parse("hf://ada/lenet5-mnist@v1"), parse("https://huggingface.co/ada/lenet5-mnist/blob/v1/config.json")
    (('ada/lenet5-mnist', 'v1'), ('ada/lenet5-mnist', 'v1'))

    Raises:
        ValueError: If it has another form.
    """
    form = _from_address(name) if is_address(name) else name
    if (found := _NAME.fullmatch(form)) is None or {"..", "--"} & {form[i : i + 2] for i in range(len(form))}:
        raise ValueError(
            f"repository must be OWNER/REPO or OWNER/REPO@REVISION, or a link to its page on the Hub, got "
            f"{name!r:.200}."
        )
    return found[1], found[2]


def _from_address(address: str) -> str:
    """Return OWNER/REPO[@REVISION] of an address; anything else is returned unchanged.

    The path of a file in the repository is dropped, because a posterior is all of its files.
    """
    from huggingface_hub import constants

    path, found = re.split("[?#]", address, maxsplit=1)[0].rstrip("/"), None
    if path[:5].lower() == "hf://":
        found = _HF_ADDRESS.fullmatch(path[5:].removeprefix("models/"))
    for hub in (constants.ENDPOINT, *_WEBSITES):
        if path.lower().startswith(f"{hub}/".lower()):
            found = _PAGE.fullmatch(path[len(hub) + 1 :])
    return address if found is None else found[1] + (f"@{unquote(found[2])}" if found[2] else "")


def fetch(name: str) -> Path:
    """Return the folder of a Hub posterior in the Hub's cache, downloading it if necessary.

    Args:
        name: "OWNER/REPO", or "OWNER/REPO@REVISION" for a branch, a tag or a commit; or an address of it.

    Raises:
        ValueError: If there is no such repository or revision that the user may read.
        PermissionError: If the Hub rejects the user's token.
        ConnectionError: If the Hub does not answer or is disabled, and the posterior is not in the cache.
        PosteriorError: If the repository does not hold a posterior.
    """
    from huggingface_hub import snapshot_download

    repository, revision = parse(name)
    for file, size in _sizes(repository, revision).items():
        if size > (limit := _LARGEST.get(file, size)):
            raise PosteriorError(f"{file} of {name} must have at most {limit} bytes, got {size}: it is not downloaded.")
    with _in_a_sentence(repository, revision):
        folder = snapshot_download(repository, revision=revision, allow_patterns=[CONFIG, WEIGHTS, README])
    for file in (CONFIG, WEIGHTS):
        if not (Path(folder) / file).is_file():
            raise PosteriorError(f"{name} must be a posterior on the Hub, got a repository without {file}.")
    return Path(folder)


def _sizes(repository: str, revision: str | None) -> dict[str, int]:
    """Return the sizes of a repository's files in bytes; none where the Hub cannot be asked."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return {}
    try:
        held = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_PATIENCE)
    except Exception:  # the download meets the same and says what it is, or takes the cache
        return {}
    return {file.rfilename: file.size or 0 for file in held.siblings or []}


def upload(contents: dict[str, bytes], name: str, message: str, private: bool = False) -> Upload:
    """Commit files to a repository of the Hub, creating it if necessary, unless it has just these already.

    Args:
        contents: The files.
        name: "OWNER/REPO", or "OWNER/REPO@BRANCH"; a missing branch is created.
        message: Commit message.
        private: Make the repository private.

    Raises:
        PermissionError: If the user may not write there.
        ValueError: If `private` is set and the repository exists and is public.
        ConnectionError: If the Hub does not answer, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    repository, branch = parse(name)
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"publish needs {constants.ENDPOINT}, but HF_HUB_OFFLINE is set. Unset it.")
    api = HfApi()
    operations = [CommitOperationAdd(file, content) for file, content in contents.items()]
    with _in_a_sentence(repository, branch):
        held = _held(api, repository, branch)
        if held is None:
            api.create_repo(repository, private=private, exist_ok=True)
        public = private and not (held or api.model_info(repository)).private
    if public:
        raise ValueError(f"repository {repository!r} must be private, got a public one that exists already.")
    if held is not None and _has(held, contents):
        return Upload(f"{api.endpoint}/{repository}/commit/{held.sha}", made=False)
    with _in_a_sentence(repository, branch):
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message=message, revision=branch)
    return Upload(commit.commit_url, made=True)


def _held(api: HfApi, repository: str, revision: str | None) -> ModelInfo | None:
    """Return what a repository holds, with hashes and sizes; None where it or its revision does not exist."""
    from huggingface_hub import errors

    try:
        return api.model_info(repository, revision=revision, files_metadata=True)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        return None


def _has(held: ModelInfo, contents: dict[str, bytes]) -> bool:
    """Return whether a repository has files of these contents, by Git's hashes of them."""
    files = {file.rfilename: file for file in held.siblings or []}

    def same(name: str, content: bytes) -> bool:
        if (file := files.get(name)) is None:
            return False
        if file.lfs is not None:
            return file.lfs.sha256 == hashlib.sha256(content).hexdigest()
        blob = b"blob %d\0" % len(content) + content
        return file.blob_id == hashlib.sha1(blob, usedforsecurity=False).hexdigest()

    return all(same(name, content) for name, content in contents.items())


def search(query: str = "", limit: int = 20, tags: Sequence[str] = ()) -> list[Found]:
    """Return posteriors of the Hub whose name contains the query, most downloaded first.

    Args:
        query: Part of the name; empty for all posteriors.
        limit: Largest number of results.
        tags: Tags that all results have: a task as the Hub names it ("image-classification"), a data set ("mnist", or
            "dataset:ylecun/mnist" as the Hub names it), a network ("lenet5"), a method ("vogn").

    Raises:
        ConnectionError: If the Hub does not answer.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"search needs {constants.ENDPOINT}, but HF_HUB_OFFLINE is set. Unset it.")
    with _in_a_sentence(query, None):
        # Without a network this fails at once, where the client would warn and retry for half a minute.
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
        wanted = [LIBRARY, *tags]
        models = list(HfApi().list_models(search=query or None, filter=wanted, sort="downloads", limit=limit))
    return [
        Found(
            model.id,
            model.downloads or 0,
            model.likes or 0,
            str(model.last_modified or "")[:10],
            (*(model.tags or ()),),
        )
        for model in models
    ]


@contextmanager
def _in_a_sentence(repository: str, revision: str | None) -> Iterator[None]:
    """Turn each error of the Hub's client into a built-in error of one sentence."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(
            f"repository {repository!r} is gated: ask for access on {hub}/{repository}. {_LOGIN}"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"revision of {repository!r} must be a branch, tag or commit, got {revision!r}.") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"unknown posterior {repository!r}: no folder of that path, and no repository on {hub} that you may "
            f"read. If it is private: {_LOGIN[0].lower()}{_LOGIN[1:]}"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            where = repository if revision is None else f"{repository}@{revision}"
            raise ConnectionError(
                f"posterior {where!r} is not a folder and not in the Hub's cache, and HF_HUB_OFFLINE forbids asking "
                f"{hub}. Unset it."
            ) from None
        raise ConnectionError(_no_answer(hub, repository, error.__cause__ or error)) from None
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(f"{hub} rejects your token for {repository!r}. {_LOGIN}") from None
        raise ConnectionError(_no_answer(hub, repository, error)) from None
    except errors.HFValidationError as error:
        raise ValueError(f"repository must have a name that the Hub allows, got {repository!r}: {error}") from None
    except Exception as error:  # an error of the HTTP library that the client uses
        raise ConnectionError(_no_answer(hub, repository, error)) from error


def _no_answer(hub: str, repository: str, error: BaseException) -> str:
    reason = " ".join(str(error).split()).rstrip(".")
    return f"{hub} must answer for {repository!r}, got {type(error).__name__}: {reason[:300]}."
