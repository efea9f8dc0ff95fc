"""Documents of plain text as rows of tokens: joined with an end-of-text token and cut."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kd.data.batches import between
from kd.data.corpora import Corpus
from kd.data.counts import Counts
from kd.data.row_files import announced_bos, in_batches, save_rows, token_dtype
from kd.data.split import TrainValSplit
from kd.data.templates import special_as_text
from kd.data.tokenizer import byte_counts, tokenize
from kd.errors import UserError


def write_text(
    folder: Path, corpus: Corpus, documents: Iterable[str], split: TrainValSplit, fast, seq_len: int, tokens: float,
    val_rows: int, special: bool,
) -> dict:  # fmt: skip
    """Write rows of documents that are joined, and return the manifest's entries about them."""
    dtype, counts, as_text = token_dtype(fast), Counts("documents"), special_as_text(fast, special)
    count, size = {"train": 0, "val": 0}, seq_len + 1
    # Of a stream the first validation rows, of a whole the same random ones, however much there is for training.
    limit = {"train": tokens, "val": val_rows * size if corpus.streaming else math.inf}
    end, bos = ([], []) if corpus.words else ([fast.eos_token_id], announced_bos(fast, seq_len))
    with (
        open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val,
        open(folder / "val_bytes.bin", "wb") as val_bytes,
    ):  # fmt: skip
        out = {"train": train, "val": val}
        for batch in in_batches(documents, 256):
            counts.read += len(batch)
            pairs = [(text, split(text)) for text in batch if text.strip()]
            counts.left_out["empty"] += len(batch) - len(pairs)
            pairs = [(text, side) for text, side in pairs if count[side] < limit[side]]
            encoded = tokenize([text for text, _ in pairs], fast, special)
            for (text, side), ids in zip(pairs, encoded, strict=True):
                if count[side] < limit[side]:
                    part = _own(ids, end, bos) if special else slice(None)
                    if special and not ids[part]:
                        counts.left_out["empty"] += 1
                        continue
                    counts.used[side] += 1
                    counts.special_as_text += not corpus.words and as_text(text)
                    place = count[side] % size
                    row = _with_bos(ids[part] + end, bos, place, size)
                    np.array(row, dtype).tofile(out[side])
                    count[side] += len(row)
                    if side == "val" and not corpus.words:
                        spread = [*byte_counts(text, ids, fast)[part], *(0 for _ in end)]
                        np.array(_with_bos(spread, [0 for _ in bos], place, size), np.float32).tofile(val_bytes)
            if all(count[side] >= limit[side] for side in count):
                break
    for side in ("train", "val"):
        rows = int(min(count[side], limit[side] if side == "train" else math.inf)) // size
        if rows == 0:
            _too_short(count, size)
        counts.rows[side] = min(rows, val_rows) if side == "val" else rows
        taken = save_rows(folder, side, dtype, (rows, size), val_rows)
    counts.left_out["limit"] = counts.read - sum(counts.used.values()) - counts.left_out["empty"]
    about = {"counts": counts.as_dict(), "train_tokens": count["train"], "bytes_per_token": None}
    if not corpus.words:
        boundary = (*end, *bos)
        bytes_per_token = _bytes_per_token(folder, (rows, size), taken, boundary)
        about |= {"bytes_per_token": bytes_per_token, "measured_bytes": True}
        about |= {"boundary": boundary} if bos else {}
    (folder / "val_bytes.bin").unlink()
    return about


def _bytes_per_token(
    folder: Path, shape: tuple[int, int], taken: np.ndarray | slice, boundary: tuple[int, ...]
) -> float | None:  # fmt: skip
    """Return the bytes that a measured token stands for: all but the first of a row, and those in front of a text."""
    measured = np.memmap(folder / "val_bytes.bin", np.float32, "r", shape=shape)[taken, 1:]
    learned = measured.size - between(np.load(folder / "val.npy"), boundary).sum()
    return float(measured.sum(dtype=np.float64) / learned) or None


def _own(ids: list[int], end: list[int], bos: list[int]) -> slice:
    """Return the part of a text without a bos and an end that are written out in it: both are put around it anyway."""
    first = len(bos) if ids[: len(bos)] == bos else 0
    last = len(ids) - len(end) if end and ids[-len(end) :] == end else len(ids)
    return slice(first, max(first, last))


def _with_bos(tokens: list, bos: list, place: int, size: int) -> list:
    """Return a document with bos in front of it, and in front of all of it that begins a row.

    place: where in a row of `size` tokens the document begins. Every row then begins with bos, as a text of its own
    would.
    """
    if not bos:
        return tokens
    row, start = list(bos[: size - place]) if place else [], 0
    while start < len(tokens):
        if (place + len(row)) % size == 0:
            row += bos
        room = size - (place + len(row)) % size
        row += tokens[start : start + room]
        start += room
    return row


def _too_short(count: dict[str, int], size: int):
    raise UserError(
        f"the text gives {count['train']:,} tokens for training and {count['val']:,} for validation",
        need=f"{size:,} tokens of each, one row",
        hint="choose more text, shorter rows (data.seq_len=64), or more validation (data.val_share=0.2)",
    )
