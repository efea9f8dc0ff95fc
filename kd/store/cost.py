"""Cost of writing a store: tokens, bytes and seconds."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd.data.batches import Packed
from kd.errors import UserError
from kd.store.encoder import RowEncoder
from kd.store.folder import note_of
from kd.store.rows import Rows
from kd.system import files
from kd.system.console import console, format_duration


class StoreCost(NamedTuple):
    """Cost of some rows of a store."""

    tokens: int  # number of stored tokens
    size: float  # bytes
    head_and_validation: int  # bytes of the output layer and the validation rows
    seconds: float


def estimate_cost(encoder: RowEncoder, packed: Packed, batch: int, rows: float) -> StoreCost:
    """Return the cost of `rows` rows like the packed ones, measured on one batch."""
    output, per_row = encoder.head.output, packed.mean_target_tokens if encoder.truncate else packed.train.shape[1] - 1
    rest = sum(p.numel() for p in output.parameters()) + packed.val[:, 1:].size * output.weight.shape[1]
    for _ in range(2):  # the first forward pass is slower
        out, started = Rows(), time.monotonic()
        index = np.arange(min(batch, len(packed.train)))
        encoder.encode(packed.train, index, out, packed.train_spans, packed.boundary, packed.train_marks)
        encoded = len(out.bodies)  # waits for the compression, which is part of the time
    seconds, tokens = (time.monotonic() - started) / encoded * rows, rows * per_row
    return StoreCost(round(tokens), out.bytes / out.positions * tokens, rest * encoder.dtype.itemsize, seconds)


def print_cost(folder: Path, encoder: RowEncoder, packed: Packed, batch: int, rows: int) -> None:
    """Print size and duration of the writing. Raises UserError if the disk has no room for it."""
    tokens, size, rest, seconds = estimate_cost(encoder, packed, batch, rows)
    rest *= note_of(folder, "head") is None
    free = shutil.disk_usage(folder).free
    summary = (
        f"{tokens:,} tokens at about {size / tokens:,.0f} bytes each, {files.format_bytes(size)} in all, and "
        f"{files.format_bytes(rest)} of output layer and validation rows; "
        f"{files.format_bytes(free)} are free in {folder}"
    )
    if 1.1 * (size + rest) > free:
        raise UserError(
            option=folder,
            why=f"has no room for the store: {summary}",
            hint="keep less of each position (e.g. record=top_k record.k=20), take less text (data.tokens=…), or "
            "choose another disk with logits.path=…",
        )
    console.print(f"Writing {summary}; {format_duration(seconds)} if no one helps.", soft_wrap=True)
