"""One file of rows of a store."""

from __future__ import annotations

from pathlib import Path

import safetensors
import torch
from torch import Tensor

from kd.store.format import EncodedRows, from_bytes


class Shard:
    """File of rows, memory-mapped."""

    def __init__(self, path: Path):
        self.file = safetensors.safe_open(path, framework="pt")
        names = set(self.file.keys())
        small = {n: self.file.get_tensor(n).numpy() for n in names - {"hidden", "entries"}}
        self.hashes, self.offset = small["hash"], small.get("offset")
        self.rows, self.steps = small.get("row"), small.get("step")
        self.body = self.file.get_slice("entries" if "entries" in names else "hidden")

    def row(self, place: int) -> Tensor | bytes:
        """Return hidden states [T, D], or compressed entries, of a row."""
        if self.offset is None:
            return self.body[place]
        return self.body[int(self.offset[place]) : int(self.offset[place + 1])].numpy().tobytes()


def collate_rows(rows: list[Tensor | bytes]) -> Tensor | EncodedRows:
    """Return rows as a batch: hidden states [B, T, D], or entries."""
    return torch.stack(rows) if isinstance(rows[0], Tensor) else from_bytes(rows)
