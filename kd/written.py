"""Data whose responses a teacher wrote, once: rows like those of kd/packing.py, in a folder of their own.

Sequence-level distillation, SeqKD: Kim & Rush 2016, arXiv 1606.07947. What is killed on the way goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lightning.fabric.utilities import move_data_to_device

from kd import data, files, packing
from kd.data import Packed
from kd.rollout import Rollout, Writers, as_rows

AT_ONCE = 64  # rows that are written together, and kept in a file


def by_teacher(
    packed: Packed, folder: Path, rollout: Callable[[Writers], Rollout], writers: Callable[[], Writers]
) -> Packed:
    """The packed examples with the teacher's responses for training, made in `folder` where they are not there yet."""
    parts = folder.with_name(f"{folder.name}.parts")

    def make(temporary: Path) -> None:
        tokens, spans = _all_parts(packed, parts, rollout, writers)
        shutil.copytree(packed.folder, temporary)
        np.save(temporary / "train.npy", tokens.astype(packed.train.dtype))
        np.save(temporary / "train_spans.npy", spans)
        about = json.loads((temporary / "manifest.json").read_text())
        about = {k: v for k, v in about.items() if k not in ("digest", "digests")}
        packing.seal(temporary, about | {"train_tokens": int(spans[:, 1].sum()), "written": folder.name})

    made = packing.once(folder, make)
    shutil.rmtree(parts, ignore_errors=True)
    return made


def _all_parts(packed: Packed, parts: Path, rollout, writers) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [R, T + 1] and spans [R, 2] of all training rows, as far as they are not in files of `parts` yet."""
    from kd.progress import clock, console, track

    parts.mkdir(exist_ok=True)
    paths = {start: parts / f"{start:09}.npz" for start in range(0, len(packed.train), AT_ONCE)}
    missing = [start for start, path in paths.items() if not whole(path)]
    if missing:
        given = writers()
        write = rollout(given)
        for start in track(missing, "the teacher writes"):
            index = np.arange(start, min(start + AT_ONCE, len(packed.train)))
            shape = (len(index), packed.train.shape[1] - 1)
            seed = np.random.default_rng([given.seed, start]).integers(0, 2**62, shape)
            batch = data.to_batch(packed.train[index], index, seed, packed.train_spans[index])
            rows = as_rows(write(move_data_to_device(batch, given.teacher.model.device), 0, 0.0))
            keep(paths[start], tokens=rows["tokens"].numpy(), span=rows["span"].numpy())
        rate = given.tokens / given.seconds
        console.print(f"The teacher wrote {given.tokens:,} tokens in {clock(given.seconds)}, {rate:,.0f} tokens/s.")
    found = [np.load(path) for path in paths.values()]
    return tuple(np.concatenate([part[name] for part in found]) for name in ("tokens", "span"))


def keep(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as an .npz file, whole or not at all."""
    with files.atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def whole(path: Path) -> bool:
    """Whether what keep() wrote is there, as it was written."""
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except zipfile.BadZipFile:
        return False
