# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Finds models in the local cache of Hugging Face; nothing is ever downloaded.

The cache is laid out by huggingface_hub: models--<org>--<name>/refs/<revision> holds a commit, and
snapshots/<commit> the files of that commit.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Final

from mrv1._files import FileError, read_file
from mrv1.config import model_root
from mrv1.errors import ConfigError, InvalidArgumentError

DEFAULT_REVISION: Final = "main"

# A name with or without an organisation, as huggingface_hub checks it.
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_MAX_REF_BYTES: Final = 4096
_MAX_LISTED: Final = 8


def hub_cache() -> Path:
    """The cache's directory: HF_HUB_CACHE, else HF_HOME/hub, else below XDG_CACHE_HOME."""
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if not chosen:
        home = os.environ.get("HF_HOME")
        if not home:
            caches = os.environ.get("XDG_CACHE_HOME") or str(Path("~", ".cache"))
            home = str(Path(caches, "huggingface"))
        chosen = str(Path(home, "hub"))
    return Path(os.path.expandvars(chosen)).expanduser()


def find_model(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Returns the directory of a model.

    Args:
        model: A directory, or the name of a model in the local Hugging Face cache ("org/name"). A
            path that exists wins over a name.
        revision: Branch, tag or commit of a name; None is "main". A directory has none.

    Raises:
        InvalidArgumentError: `model` is neither; or `revision` is not one, or given for a
            directory.
        ConfigError: There is no such directory, and the cache has no such model or revision. The
            message says where it was looked for and which snapshots there are.
    """
    root = model_root(model)
    if revision is not None:
        _check_revision(revision)
    if os.path.lexists(root) or not isinstance(model, str) or not _NAME.fullmatch(model):
        if revision is not None:
            raise InvalidArgumentError(
                field="revision", value=revision, allowed=f"None where the model is a path: {root}"
            )
        return root
    return _find_snapshot(model, DEFAULT_REVISION if revision is None else revision)


def _check_revision(revision: object) -> None:
    # Parts are names of files: "refs/pr/1" is one revision, "../x" leaves the cache.
    if (
        not isinstance(revision, str)
        or not revision
        or "\0" in revision
        or PurePosixPath(revision).is_absolute()
        or ".." in PurePosixPath(revision).parts
    ):
        raise InvalidArgumentError(
            field="revision", value=revision, allowed="None, a branch, a tag or a commit"
        )


def _find_snapshot(name: str, revision: str) -> Path:
    home = hub_cache() / f"models--{name.replace('/', '--')}"
    if not home.is_dir():
        raise ConfigError(
            "is not a directory here, and the local Hugging Face cache has no model of that name: "
            f"there is no {home} (HF_HUB_CACHE and HF_HOME say where the cache is; mrv1 does not "
            "download)",
            path=name,
        )
    snapshots, ref = home / "snapshots", home / "refs" / revision
    commit = revision
    if ref.is_file():
        try:
            commit = read_file(ref, _MAX_REF_BYTES).decode("utf-8").strip()
        except (FileError, UnicodeDecodeError) as error:
            raise ConfigError(f"does not hold a commit: {error}", path=ref) from None
    if commit and len(PurePosixPath(commit).parts) == 1 and (snapshots / commit).is_dir():
        return snapshots / commit
    sought = f"{ref} or {snapshots / revision}" if commit == revision else snapshots / commit
    raise ConfigError(
        f"revision {revision!r} is not in the local Hugging Face cache: there is no {sought}; "
        f"snapshots there are: {_list_snapshots(home)}",
        path=name,
    )


def _list_snapshots(home: Path) -> str:
    """The commits that are there, each with the branches and tags that point to it."""
    names: dict[str, list[str]] = {}
    for ref in sorted((home / "refs").rglob("*")):
        if ref.is_file():
            try:
                commit = read_file(ref, _MAX_REF_BYTES).decode("utf-8", "replace").strip()
            except FileError:
                continue
            names.setdefault(commit, []).append(str(ref.relative_to(home / "refs")))
    snapshots = home / "snapshots"
    commits = sorted(path.name for path in snapshots.iterdir()) if snapshots.is_dir() else []
    if not commits:
        return "none"
    listed = [
        f"{commit} ({', '.join(names[commit])})" if commit in names else commit
        for commit in commits[:_MAX_LISTED]
    ]
    more = len(commits) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")
