"""Location and format number of a store."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kd.system import files

FORMAT = 1  # of stores


class Place(NamedTuple):
    """Place of a store, existing or to be written."""

    path: str  # folder or URL
    key: str  # digest of its content
    cache: Path  # folder for copies of files from a URL

    @property
    def folder(self) -> Path:
        return files.local_path(self.path, self.cache)

    def manifest(self) -> Path:
        return files.download(self.path, self.folder, "manifest.json")
