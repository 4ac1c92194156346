"""The only door to the hub: pointers to repositories, their revisions, rows of data sets, and its errors in one line.

A folder of models or data may hold a `hub.yaml` instead of files. A model's::

    repo: meta-llama/Llama-2-7b-chat-hf
    revision: <commit>
    sizes: {num_layers: 32, ...}  # all or none: what `pkt plan` goes by before the model is there

A data set's names a repository for each of the pools that is not there as a file::

    train: {repo: openai/gsm8k, config: main, split: train, revision: <commit>}
    test: {repo: openai/gsm8k, config: main, split: test, revision: <commit>}

Whoever depends on such a folder runs again when a revision changes, and only then.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pkt_stages.errors import UserError, shown
from pkt_stages.params import build, read_yaml

POINTER = "hub.yaml"
# transformers' own words would send the user to options that this project does not have.
PLAIN_WORDS = {
    "trust_remote_code": "it asks for code of its own, which is never run",
}
T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """A split of a data set on the hub.

    Attributes:
        split: as `datasets` takes it: `train`, `train+validation`, `test[:100]`.
        config: the data set's configuration, if it has several.
        schema: of its rows, if it is not the benchmark's own (`tasks.Task.schemas`).
    """

    repo: str
    split: str
    revision: str
    config: str | None = None
    schema: str | None = None


def read_pointer(path: Path) -> dict[str, Any]:
    """The content of a `hub.yaml`.

    Raises:
        UserError: it is no readable mapping.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping, found {shown(content)}")
    return content


@dataclass(frozen=True)
class ModelPointer:
    """A model on the hub.

    Attributes:
        sizes: of its geometry, for `pkt plan`, which has to do without the model; checked where it is used
            (`models.load`).
    """

    repo: str
    revision: str
    sizes: Mapping[str, int] = field(default_factory=dict)


def read_model_pointer(path: Path) -> ModelPointer:
    """The model that a `hub.yaml` points to.

    Raises:
        UserError: no repository or revision, a key too many, sizes that are no mapping, or a repository that is no
            name on the hub.
    """
    content = read_pointer(path)
    needed = {"repo", "revision"}
    texts = all(isinstance(content.get(name), str) and content[name] for name in needed)
    sizes = content.get("sizes", {})
    if not texts or set(content) - {*needed, "sizes"}:
        raise UserError(f"{path}: expected the keys repo and revision with a text each, found {shown(content)}")
    if not isinstance(sizes, dict):
        raise UserError(f"{path}: sizes: expected a mapping, found {shown(sizes)}")
    return ModelPointer(_checked_name(path, content["repo"]), content["revision"], sizes)


def read_data_pointer(path: Path, pool: str) -> Split:
    """Where one pool (`train`, `test` or `texts`) of a data folder comes from.

    Raises:
        UserError: no such pool, settings that are missing or unknown, or a repository that is no name on the hub.
    """
    content = read_pointer(path)
    if not isinstance(content.get(pool), dict):
        raise UserError(f"{path}: expected a mapping `{pool}` with repo, split and revision, found {shown(content)}")
    found = build(Split, content[pool], f"{path}: {pool}")
    _checked_name(path, found.repo)
    return found


def is_repo_name(name: str) -> bool:
    """Whether a text has the form of a repository's name on the hub, `owner/name`."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII) is not None


def _checked_name(pointer: Path, repo: str) -> str:
    """The name; UserError if the hub's libraries would take it for something else, such as a folder of this machine."""
    if not is_repo_name(repo):
        raise UserError(f"{pointer}: repo: expected a name on the hub, owner/name, found {shown(repo)}")
    if Path(repo).exists():
        raise UserError(f"{pointer}: repo: {repo} is a folder here, which would be taken for it; rename the folder")
    return repo


def is_pinned(revision: str | None) -> bool:
    """Whether a revision is a commit, which cannot change."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def warn_unpinned(repo: str, revision: str | None) -> None:
    """Say on stderr that the result depends on what the hub holds today."""
    if not is_pinned(revision):
        print(
            f"pkt: warning: {repo} at revision {revision or 'main'} may change; `pkt pin` writes its commit down",
            file=sys.stderr,
        )


def read_hub_rows(split: Split) -> Iterator[dict[str, Any]]:
    """The rows of a split, in order.

    Raises:
        UserError: no network, no access, or no such data set, configuration, split or revision.
    """
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    warn_unpinned(split.repo, split.revision)
    yield from explained(
        split.repo,
        split.revision,
        lambda: load_dataset(split.repo, split.config, split=split.split, revision=split.revision),
        "the data set",
    )


def commit_of(repo: str, revision: str, kind: str) -> tuple[str, list[str]]:
    """Ask the hub for the commit that a revision stands for, and the names of its files.

    Args:
        kind: `model` or `dataset`.
    """
    from huggingface_hub import HfApi

    ask: Callable[..., Any] = HfApi().repo_info
    info = explained(repo, revision, lambda: ask(repo, revision=revision, repo_type=kind), f"the {kind}")
    return str(info.sha), [file.rfilename for file in info.siblings or ()]


def cached_commit(repo: str, revision: str | None) -> str | None:
    """The commit of a model's files in the local cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def explained(repo: str, revision: str | None, load: Callable[[], T], what: str = "the model") -> T:
    """Turn what the hub's libraries raise into one line that says what to do.

    Args:
        repo: a name on the hub, or a local folder.
        what: is loaded, for the message.

    Raises:
        UserError: naming the repository, the reason and the remedy.
    """
    from huggingface_hub import errors

    # It announces every one of its retries.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return load()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # transformers raises whatever a malformed file leads to
        causes = list(_causes(error))
    at = f"{repo} at revision {revision}" if revision else repo

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if has(errors.GatedRepoError):
        raise UserError(
            f"{at}: access is gated; accept its licence at https://huggingface.co/{repo}, then `hf auth login`"
        ) from None
    if has(errors.RevisionNotFoundError):
        raise UserError(f"{at}: the hub has no such revision (any more); `pkt pin` finds today's commit") from None
    if has(errors.RepositoryNotFoundError):
        raise UserError(f"{at}: no such repository, or a private one; check its name, or `hf auth login`") from None
    unreachable = ("Couldn't reach", "couldn't connect", "offline mode", "Cannot send a request", "Max retries")
    if has(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError) or any(
        words.lower() in str(cause).lower() for cause in causes for words in unreachable
    ):
        raise UserError(
            f"{at}: the hub cannot be reached and the files are not in the local cache; connect, or put a folder with"
            " the files in place of the name"
        ) from None
    plain = (words for option, words in PLAIN_WORDS.items() if option in str(causes[0]))
    reason = next(plain, " ".join(str(causes[0]).split())[:300])
    raise UserError(f"{at}: {what} cannot be loaded ({reason})") from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it came from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
