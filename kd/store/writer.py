"""Writer of a store by a finished teacher, shard by shard.

Every file is written to a temporary name and renamed. Then a note with its size and digest is written beside it. The
manifest comes last. A shard with a note is never written again, so a killed writer continues with the next shard.
Several writers share the work: each takes shards that no other holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np

from kd.data.batches import Packed
from kd.objective.chunked import chunks
from kd.store.cost import print_cost
from kd.store.encoder import RowEncoder
from kd.store.folder import begin, commit, note_of
from kd.store.rows import SHARD_BYTES, Rows
from kd.system import files
from kd.system.console import StepProgress
from kd.system.hardware import disable_malloc_trim

SHARD_TOKENS = 1 << 20  # positions of a shard, at most
SHARDS = 8  # shards, at least, if there are enough rows; so a killed writer loses little


def write(
    folder: Path,
    spec: dict,
    about: dict,
    packed: Packed,
    encoder: RowEncoder,
    batch: int,
    part: tuple[int, int] = (1, 1),
) -> None:
    """Write the missing files of the store that `spec` describes. Several processes may do so at the same time.

    batch: rows per forward pass. part: number of this machine and their count, for machines that do not share a disk.
    With several machines merge() writes the manifest. Raises UserError if there is no room.
    """
    rows, size = packed.train.shape
    shards = shard_ranges(rows, size, encoder)
    begin(folder, spec, about=about, shards=list(shards))
    if encoder.device.type == "cpu":
        disable_malloc_trim()
    own_shards = dict(list(shards.items())[part[0] - 1 :: part[1]])
    missing = {name: rows for name, rows in own_shards.items() if note_of(folder, name) is None}
    work = _Files(folder, packed, encoder, batch, missing)
    if missing:
        print_cost(folder, encoder, packed, batch, work.rows)
    progress = StepProgress(f"store of {spec['teacher']}", work.rows, 0, "row")
    try:
        # First the files that no other process holds; then wait for the others, and write the files of dead ones.
        for wait in (False, True):
            for name in [*(["head", "validation"] if part[0] == 1 else []), *missing]:
                with try_lock(folder / f".{name}.lock", wait) as is_locked:
                    if is_locked and note_of(folder, name) is None:
                        work.write(name, progress)
    finally:
        progress.stop()
    if part[1] == 1:
        commit(folder, spec, files.load_json(folder / "begun.json")["about"])
        for lock in folder.glob(".*.lock"):
            lock.unlink(missing_ok=True)


class _Files:
    """Files that a process may have to write. shards: rows of the data in each shard."""

    def __init__(self, folder: Path, packed: Packed, encoder: RowEncoder, batch: int, shards: dict[str, range]):
        self.folder, self.packed, self.encoder, self.batch, self.shards = folder, packed, encoder, batch, shards
        self.rows, self.done = sum(map(len, shards.values())), 0

    def write(self, name: str, progress: StepProgress) -> None:
        """Write one file: head, validation or a shard."""
        files.clear(self.folder, f"{name}*")
        if name == "head":
            return self.encoder.save_head(self.folder)
        if name == "validation":
            return self.encoder.save_validation(self.folder, self.packed.val, self.batch, self.packed.val_marks)
        out, packed = Rows(), self.packed
        for piece in chunks(len(self.shards[name]), self.batch):
            index = np.array(self.shards[name][piece])
            self.encoder.encode(
                packed.train, index, out, packed.train_spans, packed.boundary, packed.train_marks
            )  # fmt: skip
            self.done += piece.stop - piece.start
            progress.update(self.done, self.done * (packed.train.shape[1] - 1))
        out.save(self.folder, name, first=self.shards[name].start)


def shard_ranges(rows: int, size: int, encoder: RowEncoder) -> dict[str, range]:
    """Return the rows of each shard. They depend on the data and the teacher only, so all writers use the same."""
    maximum = SHARD_TOKENS // size
    if encoder.truncate is None:
        maximum = SHARD_BYTES // (encoder.dtype.itemsize * size * encoder.head.output.weight.shape[1])
    per_shard = max(1, min(maximum, -(-rows // SHARDS)))
    starts = range(0, rows, per_shard)
    return {f"shard-{number:05}": range(first, min(first + per_shard, rows)) for number, first in enumerate(starts)}


@contextmanager
def try_lock(path: Path, wait: bool) -> Iterator[bool]:
    """Yield True if this process holds the lock, and False if another one does."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
