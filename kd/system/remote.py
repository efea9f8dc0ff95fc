"""Roots under an fsspec URL: the work is done in a folder of this machine; the files under the URL are what counts.

Nothing is renamed under a URL, since object stores cannot rename. A checkpoint is objects with names of their own, then
a note with their digests; without the note it is no checkpoint. A run is done once result.json, written last, exists. A
URL that does not answer is tried again, see kd/system/retries.py.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from kd.errors import UserError
from kd.system import files, retries
from kd.system.retries import Unreachable, explained, patiently

T = TypeVar("T")
# These have no folders to be made, and some of their clients would make a bucket.
OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci"}
ASK_AGAIN = 5  # seconds between two reads


class Damaged(UserError):
    """Error of a file under a URL that has changed since it was written."""


def is_url(root: str | Path) -> bool:
    return "://" in str(root)


def default_root() -> str:
    """Return the root of a command that names none."""
    return os.environ.get("KD_ROOT") or "runs"


def is_default_root(root: str | Path) -> bool:
    """Return True if a command that names no root has this one."""
    return str(root) == files.expanded(default_root())


def local_root(root: str | Path) -> Path:
    """Return the folder of a root on this machine: the root itself, or for a URL one in $KD_CACHE or ~/.cache/kd."""
    if not is_url(root):
        return Path(root)
    cache = files.cache()
    files.check_cache(cache, "KD_CACHE")
    return files.local_path(str(root).rstrip("/"), cache)


def create_root(root: str | Path) -> Path:
    """Return local_root(root), created if it does not exist; raise UserError if it cannot be."""
    folder = local_root(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why, need = f"cannot be created: {error.strerror}", "a folder that can be written to"
        raise UserError(option="root", got=root, why=why, need=need, hint="type e.g. root=runs") from None
    return folder


def fetch(root: str | Path, name: str) -> Path:
    """Return a file of a root on this machine, copied again if the root is a URL. The file may not exist."""
    path = local_root(root) / name
    if is_url(root):
        Remote(str(root), local_root(root)).get(name)
    return path


def publish(root: str | Path, name: str) -> None:
    """Copy a file of local_root(root) to a root that is a URL."""
    if is_url(root):
        Remote(str(root), local_root(root)).put(name)


class Remote:
    """Folder under a URL, and its copy on this machine. All methods raise UserError if the URL fails.

    wait: seconds for which a URL that does not answer is tried again; None for retries.PATIENCE.
    """

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url.rstrip("/"), folder
        self.lost = False  # another machine works on it now
        self._seen: dict[str, tuple[float, int, dict | None]] = {}  # read at, time of the local state, content
        self._system: tuple[Any, str] | None = None  # file system of fsspec, and the path in it

    def _tried(self, what: str, act: Callable[..., T], wait: float | None) -> T:
        """Return act(system, path), with a new connection at each try."""

        def act_there() -> T:
            import fsspec  # slow, and not needed for a local folder

            try:
                system, path = self._system = self._system or fsspec.core.url_to_fs(self.url)
                return act(system, path.rstrip("/"))
            except Exception as error:
                if self._system and isinstance(explained(self.url, what, error), Unreachable):
                    type(self._system[0]).clear_instance_cache()
                    self._system = None
                raise

        return patiently(self.url, what, act_there, wait)

    def read(self, name: str, wait: float | None = None) -> dict | None:
        """Return the content of a JSON file under the URL; None if there is none."""

        def act(system, path: str) -> dict | None:
            try:
                return json.loads(system.cat_file(f"{path}/{name}"))
            except FileNotFoundError:
                return None
            except ValueError as error:
                why, hint = f"is damaged ({error})", "remove this file to make it again"
                raise Damaged(option=f"{self.url}/{name}", why=why, hint=hint) from None

        return self._tried("read", act, wait)

    def read_cached(self, name: str, wait: float | None = None) -> dict | None:
        """Return read(), cached for ASK_AGAIN seconds, or until this machine writes to the run."""
        local = self.folder / "state.json"
        written = local.stat().st_mtime_ns if local.exists() else 0
        seen = self._seen.get(name)
        if seen is not None:
            read_at, state, content = seen
            done = content and name == "result.json"  # a result never changes
            if done or (state == written and time.monotonic() - read_at <= ASK_AGAIN):
                return content
        content = self.read(name, wait)
        self._seen[name] = (time.monotonic(), written, content)
        return content

    def forget(self) -> None:
        """Drop the cache of read_cached()."""
        self._seen.clear()

    def get(self, name: str, wait: float | None = None, to: Path | None = None) -> bool:
        """Copy a file from the URL; return False if there is none. Raises UserError for a name outside of the folder.

        to: destination; by default the same name in the folder.
        """
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            why = f"has a note that names a file outside of it, {name}; nothing was copied there"
            raise UserError(option=self.url, why=why, hint="remove that note if it is not from kd")
        to = to or self.folder / name

        def act(system, path: str) -> bool:
            try:
                with files.atomic(to) as temporary:
                    system.get_file(f"{path}/{name}", str(temporary))
            except FileNotFoundError:
                to.unlink(missing_ok=True)
                return False
            return True

        return self._tried("read", act, wait)

    def names(self, name: str = "", wait: float | None = None) -> list[str]:
        """Return the names of all files below a folder of the URL, relative to the URL."""

        def act(system, path: str) -> list[str]:
            system.invalidate_cache()
            below = f"{path}/{name}".rstrip("/")
            paths = system.find(below) if system.exists(below) else []
            return sorted(str(x).removeprefix(path).lstrip("/") for x in paths)

        return self._tried("read", act, wait)

    def put(self, *names: str, wait: float | None = None) -> None:
        """Copy files, and all files of folders, to the URL. Names that do not exist are left out."""
        for name in names:
            source = self.folder / name
            for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
                inner = file.relative_to(self.folder)
                passing = any(part.endswith((".tmp", ".lock")) for part in inner.parts)
                if file.is_file() and not file.is_symlink() and not passing:
                    self._put(file, inner.as_posix(), wait)

    def _put(self, file: Path, name: str, wait: float | None) -> None:
        def act(system, path: str) -> None:
            _make_parent(system, f"{path}/{name}")
            system.put_file(str(file), f"{path}/{name}")

        self._tried("written", act, wait)

    def write(self, name: str, value: dict, wait: float | None = None) -> None:
        """Write a JSON file to the URL."""

        def act(system, path: str) -> None:
            _make_parent(system, f"{path}/{name}")
            system.pipe_file(f"{path}/{name}", (json.dumps(value, indent=1) + "\n").encode())

        self._tried("written", act, wait)

    def remove(self, *names: str, wait: float | None = None) -> None:
        def act(system, path: str) -> None:
            for name in names:
                if system.exists(f"{path}/{name}"):
                    system.rm(f"{path}/{name}", recursive=True)

        self._tried("written", act, wait)

    def put_best_effort(self, *names: str) -> None:
        """Copy files that can wait to the URL: a failure is a warning."""
        try:
            if not self.lost:
                self.put(*names, wait=retries.SOON)
        except UserError as error:
            warnings.warn(f"{error}\nWhat is not there is in {self.folder}; it is copied the next time.")

    def create(self, name: str, value: dict, wait: float | None = None) -> bool:
        """Write a JSON file to the URL unless one exists; return True if it was written."""

        def act(system, path: str) -> bool:
            _make_parent(system, f"{path}/{name}")
            try:
                system.pipe_file(f"{path}/{name}", json.dumps(value).encode(), mode="create")
            except FileExistsError:
                return False
            except (TypeError, NotImplementedError) as error:
                raise UserError(
                    option=self.url,
                    why="this file system cannot create a file only if it does not exist, so that two machines could "
                    "not share a root there",
                    hint="choose a URL of another file system, or a folder",
                ) from error
            return True

        return self._tried("written", act, wait)


def _make_parent(system, path: str) -> None:
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    if not OBJECTS & protocols:
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
