"""Files of token rows during packing, and functions that packing text and packing examples share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from kd.data.tokenizer import bos_of, vocabulary_size
from kd.errors import UserError
from kd.system.console import console, track


def token_dtype(fast) -> type:
    return np.uint16 if vocabulary_size(fast) <= 1 << 16 else np.uint32


def save_rows(folder: Path, side: str, dtype: type, shape: tuple[int, int], val_rows: int) -> np.ndarray | slice:
    """Write SIDE.bin as SIDE.npy, and return the indices of the rows that are used."""
    chosen = slice(None)
    if side == "val":  # a random part of the whole, so that one long document does not fill it
        chosen = np.sort(np.random.default_rng(0).permutation(shape[0])[:val_rows])
    save_table(folder, side, dtype, shape, chosen)
    return chosen


def save_table(folder: Path, name: str, dtype: type, shape: tuple[int, int], chosen: np.ndarray | slice) -> None:
    """Write the chosen rows of NAME.bin as NAME.npy."""
    np.save(folder / f"{name}.npy", np.memmap(folder / f"{name}.bin", dtype, "r", shape=shape)[chosen])
    (folder / f"{name}.bin").unlink()


def announced_bos(fast, seq_len: int) -> list[int]:
    """Return the tokens that the tokenizer puts in front of a text, and print a line about them."""
    bos = bos_of(fast)
    if len(bos) > seq_len:
        why = f"the tokenizer puts {len(bos)} tokens in front of a text"
        raise UserError(option="data.seq_len", got=seq_len, why=why, need=f"at least {len(bos)}")
    if bos:
        names = " ".join(fast.convert_ids_to_tokens(bos))
        console.print(
            f"The tokenizer puts {names} in front of a text: here too, it is read and not learned.",
            soft_wrap=True,
        )  # fmt: skip
    return bos


def in_batches(documents: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` documents, under a progress bar."""
    batch = []
    for document in track(documents, "reading text"):
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
