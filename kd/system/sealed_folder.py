"""Folders that are filled once, by one of several processes, with a digest of each file in manifest.json."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from kd.errors import UserError
from kd.system import files
from kd.system.files import read_json

MANIFEST = "manifest.json"


def fill_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill a folder that is missing: one process calls `make` with a temporary name, and others wait for it."""
    if (folder / MANIFEST).exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(lock_of(folder)):
        if not (folder / MANIFEST).exists():
            files.clear(folder.parent, folder.name)
            with files.atomic(folder) as temporary:
                make(temporary)


def lock_of(folder: Path) -> Path:
    """Return the lock that a process holds while it fills a folder."""
    return folder.with_name(f"{folder.name}.lock")


def write_manifest(folder: Path, about: dict) -> None:
    """Write the manifest: the entries in `about`, and the digests of all files."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    manifest = about | {"digests": {str(p.relative_to(folder)): files.digest(p) for p in paths}}
    files.write_json(folder / MANIFEST, manifest | {"digest": files.digest_of(manifest)})


def read_manifest(folder: Path, content: str) -> dict[str, Any]:
    """Return the manifest; raise UserError if files differ from the ones that were written. content: in words."""
    manifest = read_json(folder / MANIFEST) or {}
    if manifest.pop("digest", None) != files.digest_of(manifest):
        raise _damaged(folder, MANIFEST, content)
    for name, expected in manifest["digests"].items():
        if not (folder / name).exists() or files.digest(folder / name) != expected:
            raise _damaged(folder, name, content)
    return manifest


def _damaged(folder: Path, name: str, content: str) -> UserError:
    return UserError(
        option=folder / name,
        why="is damaged: its bytes are not those that were written",
        hint=f"remove {content} and type the same command again",
        commands=[shlex.join(["rm", "-r", str(folder)])],
    )
