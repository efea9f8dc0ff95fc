"""Cases around a store: a teacher's bare forward pass, writing a store, training from it, and reading it alone."""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kd.bench.work import WARM_UP, Shape, Work
from kd.store.location import FORMAT

if TYPE_CHECKING:
    from kd.store.encoder import RowEncoder
    from kd.store.reader import Store

TRUNCATIONS: dict[str, dict] = {
    "random": {"name": "random", "draws": 50},
    "top_12": {"name": "top_k", "k": 12},
    "top_50": {"name": "top_k", "k": 50},
    "full": {"name": "full"},
}
SHARP = 12.0  # on the last norm of a random teacher: 50 draws are then some 12 different tokens, as those of a real one


def forward(work: Work) -> None:
    """All logits of the teacher, in plain PyTorch."""
    import torch

    teacher = work.teacher().to(work.dtype)
    for ids, _ in work.batches():
        with torch.inference_mode():
            teacher(input_ids=ids, use_cache=False)
        work.tick()


def write(work: Work, truncation_name: str) -> dict[str, float]:
    """Write a shard as kd.store does, a batch per step. The last step waits until all of it is on disk."""
    import numpy as np

    from kd.store.rows import Rows

    encoder, table = encoder_of(work, truncation_name), work.rows()
    out = Rows()
    with tempfile.TemporaryDirectory() as folder:
        for step in range(work.steps):
            if step == WARM_UP:
                out = Rows()
            encoder.encode(table, np.arange(work.shape.batch) + step % work.shape.rounds * work.shape.batch, out)
            if step == work.steps - 1:
                out.save(Path(folder), "shard")
            work.tick()
    (start, _), (end, _) = work.ticks[WARM_UP - 1], work.ticks[-1]
    return {"tokens_per_second": work.shape.tokens * (work.steps - WARM_UP) / (end - start)}


def train(work: Work, truncation_name: str, compile: bool = False) -> dict[str, float]:
    """kd with logits=offline and fkl; also the seconds that a step waits for its batch."""
    from kd.bench.cases import fitted

    with tempfile.TemporaryDirectory() as folder:
        trainer, module, batches = fitted(work, "fkl", compile, stored(Path(folder), work.shape, truncation_name))
        waits = Waits(batches)
        trainer.fit(module, waits)
    return {"waited": statistics.median(waits.seconds)}


def read(work: Work, truncation_name: str) -> None:
    """Random rows of a store, from disk to targets, on one core."""
    import torch

    from kd.data.batches import Batches
    from kd.objective.chunked import chunks

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = stored(Path(folder), work.shape, truncation_name)
        for batch in Batches(work.rows(), work.shape.batch, 0, 0, work.steps):
            # Read here, not ahead in a thread as in training, so that it is timed.
            batch = batch._replace(teacher_rows=store.read(batch.row_ids.numpy(), batch.ids.numpy()))
            signal = store.signal(batch, torch.ones_like(batch.ids, dtype=torch.bool))
            for rows in chunks(batch.ids.numel(), 256):
                signal(rows)
            work.tick()


class Waits:
    """Batches, with the seconds that their consumer has waited for each."""

    def __init__(self, batches):
        self.batches, self.seconds = batches, []

    def __iter__(self):
        items = iter(self.batches)
        while True:
            started = time.perf_counter()
            batch = next(items, None)
            if batch is None:
                return
            self.seconds.append(time.perf_counter() - started)
            yield batch


def described(truncation_name: str, precision: str) -> dict:
    spec = {"format": FORMAT, "teacher": "random", "weights": None, "tokenizer": None, "data": None}
    return spec | {"truncation": TRUNCATIONS[truncation_name], "precision": precision, "seed": 0}


def encoder_of(work: Work, truncation_name: str) -> RowEncoder:
    """Return the encoder of a random teacher with distributions about as sharp as those of a trained one."""
    import torch

    from kd.models.causal_lm import CausalLM
    from kd.objective import truncation
    from kd.store.encoder import RowEncoder
    from kd.system.hardware import disable_malloc_trim
    from kd.teachers.online import OnlineTeacher

    model = work.teacher()
    with torch.no_grad():
        model.model.norm.weight.mul_(SHARP)
    disable_malloc_trim()
    settings = dict(TRUNCATIONS[truncation_name])
    function = getattr(truncation, settings.pop("name"))
    keep = None if truncation_name == "full" else partial(function, **settings)
    teacher = OnlineTeacher(CausalLM(model, work.shape.vocab))
    return RowEncoder.finished(teacher, described(truncation_name, work.shape.precision), keep, "auto")


def stored(folder: Path, shape: Shape, truncation_name: str) -> Store:
    """Return a store of the case's rows.

    On a CPU another process writes it, so that its teacher takes no memory here.
    """
    import torch

    from kd.store.reader import Store

    if torch.cuda.is_available():
        _write_all(folder, shape, truncation_name)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    else:
        process = multiprocessing.get_context("spawn").Process(target=_write_all, args=(folder, shape, truncation_name))
        process.start()
        process.join()

    return Store(folder, folder)


def _write_all(folder: Path, shape: Shape, truncation_name: str) -> None:
    from kd.data.batches import Packed
    from kd.models.flops import cost
    from kd.store import writer

    work = Work(shape, 1)
    encoder, rows = encoder_of(work, truncation_name), work.rows()
    head, model = encoder.head, encoder.teacher.model
    assert model is not None, "an encoder's teacher runs here"
    about = {"key": "", "words": "", "seq_len": shape.seq_len, "vocab": shape.vocab, "validation": 1,
             "head": {"softcap": head.softcap, "scale": head.scale},
             "cost": cost(model.model, shape.seq_len)._asdict()}  # fmt: skip
    packed = Packed(folder, rows, rows[:1], None, None, {})
    writer.write(folder, described(truncation_name, shape.precision), about, packed, encoder, shape.batch)
