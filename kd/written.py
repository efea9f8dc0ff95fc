"""Data whose responses a teacher wrote, once: rows like those of kd/data.py, in a folder of their own.

Sequence-level distillation, SeqKD: Kim & Rush 2016, arXiv 1606.07947. What is killed on the way goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np

from kd import data, files
from kd.data import Packed
from kd.rollout import Rollout, Writers, as_rows

AT_ONCE = 64  # rows that are written together, and kept in a file


def by_teacher(
    packed: Packed, folder: Path, rollout: Callable[[Writers], Rollout], writers: Callable[[], Writers]
) -> Packed:
    """The packed examples with the teacher's responses for training, made in `folder` where they are not there yet."""
    if not (folder / "manifest.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):
            if not (folder / "manifest.json").exists():
                files.clear(folder.parent, folder.name)
                tokens, spans = _all_parts(packed, folder.with_name(f"{folder.name}.parts"), rollout, writers)
                with files.atomic(folder) as temporary:
                    shutil.copytree(packed.folder, temporary)
                    np.save(temporary / "train.npy", tokens.astype(packed.train.dtype))
                    np.save(temporary / "train_spans.npy", spans)
                    about = json.loads((temporary / "manifest.json").read_text())
                    about = {k: v for k, v in about.items() if k not in ("digest", "digests")}
                    data.seal(temporary, about | {"train_tokens": int(spans[:, 1].sum()), "written": folder.name})
        shutil.rmtree(folder.with_name(f"{folder.name}.parts"), ignore_errors=True)
    return data.opened(folder)


def _all_parts(packed: Packed, parts: Path, rollout, writers) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [R, T + 1] and spans [R, 2] of all training rows, as far as they are not in files of `parts` yet."""
    from kd.progress import track

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
            device = given.teacher.model.device
            rows = as_rows(
                write(batch._replace(**{k: getattr(batch, k).to(device) for k in batch._fields[:4]}), 0, 0.0)
            )
            with files.atomic(paths[start]) as temporary, open(temporary, "wb") as file:
                np.savez(file, tokens=rows["tokens"].numpy(), span=rows["span"].numpy())
    found = [np.load(path) for path in paths.values()]
    return tuple(np.concatenate([part[name] for part in found]) for name in ("tokens", "span"))


def whole(path: Path) -> bool:
    """Whether a part is there, as it was written."""
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except zipfile.BadZipFile:
        return False
