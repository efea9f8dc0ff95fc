"""Rows of a shard in memory, and the file that is written from them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from kd.store.format import EncodedPositions, to_bytes
from kd.store.spec import row_hash
from kd.system import files

SHARD_BYTES = 1 << 28  # of hidden states, at most


class Rows:
    """Rows of a shard that is being written."""

    def __init__(self) -> None:
        self.hashes: list[int] = []
        self._bodies: list[Tensor | Future[bytes]] = []
        # Rows are compressed while the next ones are computed: beside an H200 it takes half of the forward pass's time.
        self._compression = ThreadPoolExecutor(2, "compression")
        self.rows: list[int] = []
        self.steps: list[int] = []
        self.positions, self.entries, self.mass = 0, 0, 0.0

    def add(self, ids: np.ndarray, hidden: Tensor) -> None:
        """Add rows ids [B, T] and the teacher's last hidden states [B, T, D]."""
        self.hashes += map(row_hash, ids)
        self._bodies += hidden.cpu()
        self.positions += ids.size

    def add_entries(self, ids: np.ndarray, pieces: list[EncodedPositions], mask: np.ndarray) -> None:
        """Add rows ids [B, T] and the entries of their positions where mask [B, T] is True, in order."""
        self.hashes += map(row_hash, ids)
        columns = ("count", "log_odds", "id_delta", "quantized_logp")
        count, log_odds, id_delta, quantized_logp = (
            np.concatenate([getattr(p, c).cpu().numpy() for p in pieces]) for c in columns
        )
        self.positions += len(count)
        self.entries += len(id_delta)
        self.mass += float(torch.from_numpy(log_odds).double().sigmoid().sum())
        count, log_odds = _spread(count, mask, 0), _spread(log_odds, mask, -np.inf)
        ends = count.sum(1).cumsum()
        for row, (start, end) in enumerate(zip([0, *ends], ends)):
            columns = count[row], log_odds[row], id_delta[start:end], quantized_logp[start:end]
            self._bodies.append(self._compression.submit(to_bytes, *columns))

    @property
    def bodies(self) -> list[Tensor | bytes]:
        """Return the hidden states or compressed entries of each row."""
        return [body.result() if isinstance(body, Future) else body for body in self._bodies]

    @property
    def bytes(self) -> int:
        return sum(b.nbytes if isinstance(b, Tensor) else len(b) for b in self.bodies)

    def save(self, folder: Path, name: str, **note) -> None:
        """Save as NAME.safetensors with a note."""
        tensors = {"hash": torch.tensor(self.hashes)}
        if self.rows:
            tensors |= {"row": torch.tensor(self.rows), "step": torch.tensor(self.steps)}
        bodies = self.bodies
        if isinstance(bodies[0], Tensor):
            tensors["hidden"] = torch.stack(bodies)
        else:
            tensors["offset"] = torch.tensor([0, *map(len, bodies)]).cumsum(0)
            tensors["entries"] = torch.frombuffer(bytearray(b"".join(bodies)), dtype=torch.uint8)
        counts = dict(count=len(self.hashes), positions=self.positions, entries=self.entries, mass=self.mass)
        save_tensors(tensors, folder, name, **counts, **note)


def _spread(values: np.ndarray, mask: np.ndarray, filler: float) -> np.ndarray:
    """Return values [N] at the places where mask [B, T] is True, and the filler elsewhere."""
    whole = np.full(mask.shape, filler, values.dtype)
    whole[mask] = values
    return whole


def save_tensors(tensors: dict[str, Tensor], folder: Path, name: str, **note) -> None:
    """Save NAME.safetensors, and then NAME.json, which marks it as complete."""
    with files.atomic(folder / f"{name}.safetensors") as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        temporary.chmod(0o644)  # safetensors leaves it to its owner alone, and a store is for all
        note |= {"size": temporary.stat().st_size, "digest": files.digest(temporary)}
    files.write_json(folder / f"{name}.json", note)
