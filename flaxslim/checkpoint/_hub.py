"""A Hub repository -> a folder in the Hub's cache, with only the files that are needed."""

import glob
import re
from collections.abc import Collection
from pathlib import Path

from flaxslim.checkpoint import _folder
from flaxslim.errors import HubError, neighbours

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def plausible(name: str) -> bool:
    """Whether a string can be a Hub id.

    >>> plausible("gpt2"), plausible("owner/name"), plausible("./folder"), plausible("a/b/c")
    (True, True, False, False)
    """
    return bool(_ID.fullmatch(name)) and "--" not in name and ".." not in name


def fetch(repo: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Download config, side files and the one weight format that will be read.

    Files that the cache has are not downloaded again; without a connection the cache is all there
    is. `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` are respected. Raises `HubError`, and
    `UnsafePathError` or `CorruptFileError` for a bad index.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi(token=token).model_info(repo, revision=revision)
    except Exception as error:  # requests, the Hub's own, and OS errors; see _explain
        if not _unreachable(error):
            what = f"{_no_folder(repo)}, and the Hub could not be asked"
            raise _explain(repo, revision, error, what) from error
        return _cached(repo, revision, error)
    names = {sibling.rfilename for sibling in info.siblings or ()}
    found = _folder.choose(names)
    if not found:
        raise HubError(
            "the repository has no weights that flaxslim reads",
            path=repo,
            seen=", ".join(sorted(names)[:8]) or "no files",
            expected=", ".join(weights.name for weights in _folder.KNOWN),
            mend="look on the Hub for another repository or revision of this model",
        )
    taken = found[0]
    wanted = {name for name in names if _folder.travels(name)}
    wanted |= names & {_folder.CONFIG, _folder.CARD, taken.name}
    if taken.sharded:
        # Only the index says which files are shards; a second look at it costs nothing.
        folder = _download(repo, revision, token, {taken.name})
        wanted |= set(_folder.shard_names(_folder.inside(folder, taken.name)))
    return _download(repo, revision, token, wanted)


def _download(
    repo: str, revision: str | None, token: str | bool | None, names: Collection[str]
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            token=token,
            allow_patterns=[glob.escape(name) for name in sorted(names)],
        )
    except Exception as error:  # whatever the network library of the day raises
        raise _explain(repo, revision, error) from error
    return Path(folder)


def _cached(repo: str, revision: str | None, reason: Exception) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    offline = isinstance(reason, OfflineModeIsEnabled)
    why = "offline mode is on" if offline else "the Hub cannot be reached"
    mend = "unset HF_HUB_OFFLINE" if offline else "check the connection and HF_ENDPOINT"
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        raise HubError(
            f"{_no_folder(repo)}; {why}, and the cache does not have this checkpoint",
            path=_spelled(repo, revision),
            seen=None if offline else _first_cause(reason),
            near=_folders_near(repo),
            mend=f"name a folder that is there; or {mend}",
        ) from reason
    present = {name.name for name in folder.iterdir()}
    if _folder.CONFIG not in present or not _folder.choose(present):
        raise HubError(
            f"{why}, and the cache has only a part of this checkpoint",
            path=_spelled(repo, revision),
            seen=", ".join(sorted(present)) or "no files",
            mend=f"{mend}, or pass a local folder",
        ) from reason
    return folder


def _unreachable(error: Exception) -> bool:
    """No connection at all, offline mode included; not a Hub that answers with an error."""
    import requests
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, requests.exceptions.SSLError | requests.exceptions.ProxyError):
        return False
    kinds = (OfflineModeIsEnabled, requests.ConnectionError, requests.Timeout)
    return isinstance(error, kinds)


def _explain(
    repo: str,
    revision: str | None,
    error: BaseException,
    what: str = "the download did not finish",
) -> HubError:
    """The error in our words; `what` is said of one that is not known."""
    from huggingface_hub import errors

    where = _spelled(repo, revision)
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            "the repository is gated: its owner wants to know who downloads it",
            path=where,
            mend="ask for access on its page, then log in (hf auth login) or pass token=...",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            "the repository has no such revision",
            path=where,
            seen=repr(revision),
            mend="name a branch, a tag or a commit that its page lists",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            "there is no such repository on the Hub, or it is private, and no such folder here",
            path=where,
            near=_folders_near(repo),
            mend="check the spelling; for a private one log in (hf auth login) or pass token=...",
        )
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # it says only that the file is not in the cache either
    return HubError(
        what,
        path=where,
        seen=_first_cause(error),
        mend="try again (what arrived is kept), or check the connection and HF_ENDPOINT",
    )


def _spelled(repo: str, revision: str | None) -> str:
    return repo if revision is None else f"{repo} at {revision}"


def _no_folder(repo: str) -> str:
    """Said first: whoever mistypes a folder does not think of the Hub."""
    return f"there is no folder {repo} here"


def _folders_near(repo: str) -> list[str]:
    return neighbours(Path(repo), Path.is_dir)


def _first_cause(error: BaseException) -> str:
    """In a line; what network libraries raise on top of it repeats it, each in its own words."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
