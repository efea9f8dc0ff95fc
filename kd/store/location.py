"""Location and format number of a store."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kd.system import files

FORMAT = 1  # of stores


class Place(NamedTuple):
    """Where a store is, or is to be."""

    path: str  # folder or URL
    key: str  # of its content
    cache: Path  # keeps copies of what is read from a URL

    @property
    def folder(self) -> Path:
        return files.local_path(self.path, self.cache)

    def manifest(self) -> Path:
        return files.download(self.path, self.folder, "manifest.json")
