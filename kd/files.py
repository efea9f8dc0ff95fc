"""Files that must not be lost: written to a temporary name in the same folder, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from kd.errors import UserError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name, file or folder, that becomes `path` when the block ends well and vanishes when it does not.

    Raises UserError when the disk is full; what stood at `path` before is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # processes of two hosts may share an id
    try:
        yield temporary
        for file in [p for p in temporary.rglob("*") if p.is_file()] or [temporary]:
            _sync(file)
        aside = path.with_name(f".{path.name}.old.tmp")
        if temporary.is_dir() and path.is_dir():
            os.replace(path, aside)  # a folder cannot be replaced by another in one step
        os.replace(temporary, path)
        _sync(path.parent)
        _remove(aside)
    except BaseException as error:
        _remove(temporary)
        if is_full(error, path):
            raise disk_full(path) from error
        raise


def is_full(error: BaseException, path: Path) -> bool:
    """Whether a write to path failed for want of room; torch and safetensors say so in words of their own."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in full:
            return True
        said = [os.strerror(number).lower() for number in full]
        if isinstance(cause, OSError) and cause.errno is None:  # numpy's, before and while it writes
            said += ["not enough free space to write", " requested and "]
        if any(words in str(cause).lower() for words in said):
            return True
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, Exception) and shutil.disk_usage(Path(path).parent).free < 1 << 16


def clear(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of files that were to be `name`; only for who holds the lock of the folder."""
    for temporary in Path(folder).glob(f".{name}.*.tmp"):
        _remove(temporary)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if not path.is_dir():
        path.unlink(missing_ok=True)


def disk_full(path: Path) -> UserError:
    """The error for a write that found no room."""
    free = shutil.disk_usage(Path(path).parent).free
    return UserError(
        f"No room to write {path}: {free / 1e6:,.0f} MB are free there. Nothing was half-written. Free some space or "
        "choose another place with root=/other/folder, then type the same command: it goes on from the last checkpoint."
    )


def write_json(path: Path, value) -> None:
    """value as indented JSON, atomically; NaN is refused, since it is no JSON."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def amount(size: float) -> str:
    """12 kB, 3.4 MB, 1.2 TB"""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:,.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000


def digest(path: Path) -> str:
    """xxh3-128 of a file's bytes: finds any damage, at several GB/s."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def digest_of(value) -> str:
    """xxh3-128 of anything that JSON can hold."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def stamp(name: str | None) -> str | None:
    """Names, sizes and times of the files of a local folder, as a digest; None where `name` is no folder."""
    if not name or not Path(name).is_dir():
        return None
    found = sorted(p for p in Path(name).rglob("*") if p.is_file())
    described = [[str(p.relative_to(name)), p.stat().st_size, p.stat().st_mtime_ns] for p in found]
    return digest_of(described)


def local(path: str | Path, cache: Path) -> Path:
    """A folder, or of a URL the folder in `cache` that keeps copies of what was read from it."""
    return Path(cache) / digest_of(str(path))[:16] if "://" in str(path) else Path(path)


def fetch(path: str, folder: Path, name: str) -> Path:
    """Where file `name` of a folder or URL is on this machine, copied if need be; it may not exist.

    A manifest is always copied anew, beside one that was written here. Raises UserError if a URL cannot be read.
    """
    if "://" not in path:
        return folder / name
    copy = folder / ("fetched.json" if name == "manifest.json" else name)
    if name == "manifest.json" or not copy.exists():
        from kd.remote import Remote  # which needs this module

        Remote(path, folder).get(name, to=copy)
    return copy


def is_name(text: str) -> bool:
    """Whether text can be the name of one file or folder; a path to anywhere else cannot."""
    return re.fullmatch(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*", text) is not None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
