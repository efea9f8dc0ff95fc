"""Documents of plain text as rows of tokens: joined with an end-of-text token and cut."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np

from kd.data.batches import FIRST, between
from kd.data.corpora import Corpus
from kd.data.counts import Counts
from kd.data.row_files import announced_bos, in_batches, save_rows, save_table, token_dtype
from kd.data.split import TrainValSplit
from kd.data.templates import special_as_text
from kd.data.tokenizer import byte_counts, tokenize
from kd.errors import UserError


def write_text(
    folder: Path, corpus: Corpus, documents: Iterable[str], split: TrainValSplit, fast, seq_len: int, tokens: float,
    val_rows: int, special: bool, isolate: bool = False,
) -> dict:  # fmt: skip
    """Write rows of documents that are joined, and return the manifest's entries about them.

    isolate: write marks of the documents' first tokens too.
    """
    rows = _TextRows(folder, corpus, fast, seq_len, special, isolate)
    # Of a stream the first validation rows, of a whole the same random ones, however much there is for training.
    limit = {"train": tokens, "val": val_rows * rows.size if corpus.streaming else math.inf}
    with closing(rows):
        for batch in in_batches(documents, 256):
            rows.add(batch, split, limit)
            if all(rows.tokens[side] >= limit[side] for side in rows.tokens):
                break
    return rows.manifest(tokens, val_rows)


class _TextRows:
    """Rows of a text under way: SIDE.bin, and the bytes that each token of the validation stands for."""

    def __init__(self, folder: Path, corpus: Corpus, fast, seq_len: int, special: bool, isolate: bool):
        self.folder, self.fast, self.special, self.has_words = folder, fast, special, bool(corpus.words)
        self.isolate = isolate
        self.dtype, self.counts, self.size = token_dtype(fast), Counts("documents"), seq_len + 1
        self.as_text = special_as_text(fast, special)
        self.end, self.bos = ([], []) if corpus.words else ([fast.eos_token_id], announced_bos(fast, seq_len))
        self.tokens = {"train": 0, "val": 0}
        names = ["train", "val", "val_bytes", *(("train_marks", "val_marks") if isolate else ())]
        self.files = {name: open(folder / f"{name}.bin", "wb") for name in names}

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def add(self, batch: list[str], split: TrainValSplit, limit: dict[str, float]) -> None:
        """Write a batch of documents, each to its side unless that has reached its limit of tokens."""
        self.counts.read += len(batch)
        pairs = [(text, split(text)) for text in batch if text.strip()]
        self.counts.left_out["empty"] += len(batch) - len(pairs)
        pairs = [(text, side) for text, side in pairs if self.tokens[side] < limit[side]]
        encoded = tokenize([text for text, _ in pairs], self.fast, self.special)
        for (text, side), ids in zip(pairs, encoded, strict=True):
            if self.tokens[side] < limit[side]:
                self._add(text, side, ids)

    def _add(self, text: str, side: str, ids: list[int]) -> None:
        part = _text_slice(ids, self.end, self.bos) if self.special else slice(None)
        if self.special and not ids[part]:
            self.counts.left_out["empty"] += 1
            return
        self.counts.used[side] += 1
        self.counts.special_as_text += not self.has_words and self.as_text(text)
        place = self.tokens[side] % self.size
        row = _with_bos(ids[part] + self.end, self.bos, place, self.size)
        np.array(row, self.dtype).tofile(self.files[side])
        if self.isolate:
            marks = np.zeros(len(row), np.uint8)
            marks[0] = FIRST
            marks.tofile(self.files[f"{side}_marks"])
        self.tokens[side] += len(row)
        if side == "val" and not self.has_words:
            spread = [*byte_counts(text, ids, self.fast)[part], *(0 for _ in self.end)]
            spread = _with_bos(spread, [0 for _ in self.bos], place, self.size)
            np.array(spread, np.float32).tofile(self.files["val_bytes"])

    def manifest(self, tokens: float, val_rows: int) -> dict:
        """Make tables of the files, and return the manifest's entries about them. tokens: for training, at most."""
        counts = self.counts
        for side in ("train", "val"):
            rows = int(min(self.tokens[side], tokens if side == "train" else math.inf)) // self.size
            if rows == 0:
                _too_short(self.tokens, self.size)
            counts.rows[side] = min(rows, val_rows) if side == "val" else rows
            chosen = save_rows(self.folder, side, self.dtype, (rows, self.size), val_rows)
            if self.isolate:
                save_table(self.folder, f"{side}_marks", np.uint8, (rows, self.size), chosen)
        counts.left_out["limit"] = counts.read - sum(counts.used.values()) - counts.left_out["empty"]
        about = {"counts": counts.as_dict(), "train_tokens": self.tokens["train"], "bytes_per_token": None}
        if not self.has_words:
            boundary = (*self.end, *self.bos)
            bytes_per_token = _bytes_per_token(self.folder, (rows, self.size), chosen, boundary)
            about |= {"bytes_per_token": bytes_per_token, "measured_bytes": True}
            about |= {"boundary": boundary} if self.bos else {}
        (self.folder / "val_bytes.bin").unlink()
        return about


def _bytes_per_token(
    folder: Path, shape: tuple[int, int], chosen: np.ndarray | slice, boundary: tuple[int, ...]
) -> float | None:  # fmt: skip
    """Return the bytes that a measured token stands for: all but the first of a row, and those in front of a text."""
    measured = np.memmap(folder / "val_bytes.bin", np.float32, "r", shape=shape)[chosen, 1:]
    if (folder / "val_marks.npy").exists():  # the first token of a document is not measured either
        is_learned = (np.load(folder / "val_marks.npy")[:, 1:] == 0) & ~between(np.load(folder / "val.npy"), boundary)
        return float(measured[is_learned].mean(dtype=np.float64)) or None
    learned = measured.size - between(np.load(folder / "val.npy"), boundary).sum()
    return float(measured.sum(dtype=np.float64) / learned) or None


def _text_slice(ids: list[int], end: list[int], bos: list[int]) -> slice:
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
