"""Data with responses that a teacher wrote once: rows like those of kd/data/packing.py, in a folder of their own.

Sequence-level distillation, SeqKD: Kim & Rush 2016, arXiv 1606.07947. If the process is killed, the next one continues
with the rows that are missing.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from lightning.fabric.utilities import move_data_to_device

from kd.data import packing
from kd.data.batches import Packed, to_batch
from kd.rollout.base import Rollout
from kd.rollout.rows import as_rows
from kd.rollout.samplers import Samplers
from kd.system import files, sealed_folder

AT_ONCE = 64  # rows per batch and file


def by_teacher(
    packed: Packed, folder: Path, rollout: Callable[[Samplers], Rollout], samplers: Callable[[], Samplers],
    sides: tuple[str, ...] = ("train",),
) -> Packed:  # fmt: skip
    """Return the packed examples with the teacher's responses. They are made in `folder` unless they exist."""
    parts = folder.with_name(f"{folder.name}.parts")

    def make(temporary: Path) -> None:
        given = cache(samplers)
        written = {side: _all_parts(packed, side, parts, rollout, given) for side in sides}
        shutil.copytree(packed.folder, temporary)
        for side, (tokens, spans) in written.items():
            np.save(temporary / f"{side}.npy", tokens.astype(packed.train.dtype))
            np.save(temporary / f"{side}_spans.npy", spans)
        about = json.loads((temporary / "manifest.json").read_text())
        about = {k: v for k, v in about.items() if k not in ("digest", "digests")}
        spans = written["train"][1] if "train" in sides else _spans(packed, "train")
        about |= {"train_tokens": int(spans[:, 1].sum()), "written": folder.name}
        sealed_folder.write_manifest(temporary, about)

    data = packing.build_once(folder, make)
    shutil.rmtree(parts, ignore_errors=True)
    return data


def _all_parts(packed: Packed, side: str, parts: Path, rollout, samplers) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [R, T + 1] and spans [R, 2] of all rows of a side. Finished parts are kept in files of `parts`."""
    from kd.system.console import console, format_duration, track

    parts.mkdir(exist_ok=True)
    rows, data_spans = packed.train if side == "train" else packed.val, _spans(packed, side)
    name, salt = ("", []) if side == "train" else ("val-", [1])
    chosen = np.flatnonzero(_without_response(packed)) if side == "val" else np.arange(len(rows))
    paths = {start: parts / f"{name}{start:09}.npz" for start in range(0, len(chosen), AT_ONCE)}
    missing = [start for start, path in paths.items() if not whole(path)]
    if missing:
        given = samplers()
        write, before = rollout(given), (given.tokens, given.seconds)
        for start in track(missing, "the teacher writes"):
            index = chosen[start : start + AT_ONCE]
            shape = (len(index), rows.shape[1] - 1)
            seed = np.random.default_rng([given.seed, start, *salt]).integers(0, 2**62, shape)
            batch = to_batch(rows[index], index, seed, data_spans[index])
            new = as_rows(write(move_data_to_device(batch, given.teacher.model.device), 0, 0.0))
            keep(paths[start], tokens=new["tokens"].numpy(), span=new["span"].numpy())
        tokens, seconds = given.tokens - before[0], given.seconds - before[1]
        console.print(
            f"The teacher wrote {tokens:,} tokens in {format_duration(seconds)}, {tokens / seconds:,.0f} tokens/s."
        )
    tokens, spans = np.array(rows), np.array(data_spans)
    for start, path in paths.items():
        index, part = chosen[start : start + AT_ONCE], np.load(path)
        tokens[index], spans[index] = part["tokens"], part["span"]
    return tokens, spans


def _spans(packed: Packed, side: str) -> np.ndarray:
    """Return for each row the number of prompt tokens, and the number of tokens without padding [R, 2]."""
    spans = packed.train_spans if side == "train" else packed.val_spans
    assert spans is not None, "only prompts get responses"
    return spans


def _without_response(packed: Packed) -> np.ndarray:
    """Return a mask of the validation rows with nothing but the end token after their prompt [R]."""
    first, end = _spans(packed, "val").T
    return (end - first == 1) & (packed.val[np.arange(len(packed.val)), first] == packed.eos_token_id)


def keep(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as an .npz file, atomically."""
    with files.atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def whole(path: Path) -> bool:
    """Return True if the file of keep() exists, and is as it was written."""
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except zipfile.BadZipFile:
        return False
