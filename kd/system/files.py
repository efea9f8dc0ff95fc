"""Files that must not be lost: written to a temporary name in the same folder, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict

import xxhash

from kd import former_names
from kd.errors import UserError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name, of a file or folder, that becomes `path` if the block succeeds, and is removed otherwise.

    Raises UserError if the disk is full. The old content of `path` is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # processes of two hosts may share an id
    try:
        yield temporary
        for file in [p for p in temporary.rglob("*") if p.is_file()] or [temporary]:
            sync(file)
        aside = path.with_name(f".{path.name}.old.tmp")
        if temporary.is_dir() and path.is_dir():
            os.replace(path, aside)  # a folder cannot be replaced by another in one step
        os.replace(temporary, path)
        sync(path.parent)
        remove(aside)
    except BaseException as error:
        remove(temporary)
        if is_full(error, path):
            raise disk_full(path) from error
        raise


def is_full(error: BaseException, path: Path) -> bool:
    """Return True if a write to `path` failed for lack of space. torch and safetensors have own errors for this."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in full:
            return True
        messages = [os.strerror(number).lower() for number in full]
        if isinstance(cause, OSError) and cause.errno is None:  # numpy's, before and while it writes
            messages += ["not enough free space to write", " requested and "]
        if any(words in str(cause).lower() for words in messages):
            return True
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, Exception) and shutil.disk_usage(Path(path).parent).free < 1 << 16


def clear(folder: Path, name: str = "*") -> None:
    """Remove the temporary files of killed processes for `name`. The caller has to hold the lock of the folder."""
    for temporary in Path(folder).glob(f".{name}.*.tmp"):
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    shutil.rmtree(path, ignore_errors=True)
    if not path.is_dir():
        path.unlink(missing_ok=True)


def disk_full(path: Path) -> UserError:
    """Return the error for a write that found no space."""
    free = shutil.disk_usage(Path(path).parent).free
    return UserError(
        option=path,
        why=f"could not be written, as the disk is full: {free / 1e6:,.0f} MB are free there. Nothing was half-written",
        hint="free some space or choose another place with root=/other/folder, and type the same command: the run "
        "continues from its last checkpoint",
    )


def write_json(path: Path, value) -> None:
    """Write a value as indented JSON, atomically. Raises ValueError for NaN, which is no JSON."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def format_bytes(size: float) -> str:
    """Return a size as text: 12 kB, 3.4 MB, 1.2 TB."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:,.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"


def digest(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes. It finds any damage, at several GB/s."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def digest_of(value) -> str:
    """Return the xxh3-128 of a value that JSON can hold."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def folder_fingerprint(name: str | None) -> str | None:
    """Return the digest of a local folder's content, names and bytes of its files; None if `name` is no folder.

    Hidden files are left out: tools keep notes in them, such as the time of a download. For an adapter, the folder of
    its base model counts too.
    """
    if not name or not Path(name).is_dir():
        return None
    paths = sorted(p for p in Path(name).rglob("*") if p.is_file())
    paths = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(name).parts)]
    described = [[str(p.relative_to(name)), known_digest(p)] for p in paths]
    with suppress(OSError, ValueError, AttributeError):  # no adapter, or one that fails when it is loaded
        base = folder_fingerprint(
            json.loads((Path(name) / "adapter_config.json").read_text()).get("base_model_name_or_path")
        )
        described += [["base", base]] if base else []
    return digest_of(described)


LARGE = 1 << 20  # bytes, smallest file with a cached digest
SETTLED = 2  # seconds after a change, before which another one may leave the same times behind


def known_digest(path: Path) -> str:
    """Return digest(), cached for large files: the same path, inode, size, mtime and ctime mean the same content.

    A program that restores the mtime of a changed file still moves the ctime, which no program can set.
    """
    path = Path(path).absolute()
    before = _state(path)
    if before["size"] < LARGE:
        return digest(path)
    cache_file = cache() / "digests" / f"{xxhash.xxh3_128_hexdigest(str(path).encode())}.json"
    try:
        cached = json.loads(cache_file.read_text())
        if cached["file"] == before:
            return str(cached["digest"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged
        pass
    computed = digest(path)
    if _state(path) == before and before["ctime"] < time.time_ns() - SETTLED * 10**9:
        with suppress(OSError, UserError):  # the cache is optional
            write_json(cache_file, {"file": before, "digest": computed})
    return computed


class _FileState(TypedDict):
    """Attributes of a file that change with its content."""

    path: str
    inode: int
    size: int
    mtime: int  # ns, as is ctime
    ctime: int


def _state(path: Path) -> _FileState:
    stat = path.stat()
    return {
        "path": str(path),
        "inode": stat.st_ino,
        "size": stat.st_size,
        "mtime": stat.st_mtime_ns,
        "ctime": stat.st_ctime_ns,
    }


def cache() -> Path:
    """Return kd's cache folder, outside of any root: $KD_CACHE, or ~/.cache/kd."""
    return Path(expanded(os.environ.get("KD_CACHE") or "~/.cache/kd"))


def expanded(path: str) -> str:
    """Return a path with ~ or ~user at its start replaced by that home folder, as a shell does outside of quotes.

    Raises UserError if there is no such home folder, so that no folder of that name is made.
    """
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        why = f"there is no home folder for {whole.partition('/')[0]}"
        raise UserError(option=path, why=why, hint="type the whole path")
    return whole


def expanded_words(words: list[str]) -> list[str]:
    """Return the words of a command line with ~ expanded if it is not quoted. Hydra cannot read an unquoted ~."""
    return [re.sub(r"(?<=[=,(\[])~[\w.-]*(?=[/,)\]]|$)", lambda match: expanded(match[0]), word) for word in words]


def local_path(path: str | Path, cache: Path) -> Path:
    """Return a folder; for a URL, the folder in `cache` that keeps copies of its files."""
    return Path(cache) / digest_of(str(path))[:16] if "://" in str(path) else Path(path)


def download(path: str, folder: Path, name: str) -> Path:
    """Return the path of file `name` of a folder or URL on this machine, copied if necessary. The file may not exist.

    A manifest is always copied again, unless it was written on this machine. Raises UserError if a URL cannot be read.
    """
    if "://" not in path:
        return folder / name
    copy = folder / ("fetched.json" if name == "manifest.json" else name)
    if name == "manifest.json" or not copy.exists():
        from kd.system.remote import Remote  # which needs this module

        Remote(path, folder).get(name, to=copy)
    return copy


def is_name(text: str) -> bool:
    """Return True if text can be the name of one file or folder; False for a path to another place."""
    return re.fullmatch(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*", text) is not None


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_cache(folder: str | Path, variable: str) -> None:
    """Raise UserError for a cache folder that cannot be written. variable: environment variable that names it."""
    reason = None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UserError(
            option=folder,
            why=reason,
            need="a folder that can be written, as copies of remote data and runs are kept in it",
            hint=f"choose another one in the environment: type {variable}=/other/folder before the command",
        )


def read_json(path: Path) -> dict | None:
    """Return the content of a JSON file; None if it does not exist. Raises UserError if it is damaged."""
    try:
        return load_json(path)
    except FileNotFoundError:
        return None


def load_json(path: Path) -> dict:
    """Return the content of a JSON file that has to exist. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path, error) from None


def read_metrics(path: Path) -> list[dict]:
    """Return all complete lines of a metrics.jsonl, with today's names. A last line that a kill cut off is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        return [former_names.current_metrics(json.loads(line)) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: ValueError) -> UserError:
    removal = shlex.join(["rm", "-r", str(path.parent)])
    hint = "remove its folder to make it again"
    return UserError(option=path, why=f"is damaged ({error})", hint=hint, commands=[removal])
