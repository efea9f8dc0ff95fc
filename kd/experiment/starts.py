"""First weights of a student that is made of its teacher: a folder `starts/DIGEST` of the root, made once.

Its name is a digest of all that the weights depend on: the teacher, which parts stay and, if these are chosen by
activations, the data. manifest.json lists the layers that stayed and their influence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd.config.groups import TeacherInit
from kd.config.schema import ExperimentConfig
from kd.data.batches import NOT_LEARNED, Packed, to_batch
from kd.models import flops, importance, prune
from kd.models.causal_lm import CausalLM
from kd.models.prune import Importance, Widths
from kd.parallel import collectives
from kd.runs.identity import model_name
from kd.system import sealed_folder
from kd.system.console import console


def ensure_start(config: ExperimentConfig, packed: Packed, folder: Path, teacher: Callable[[], CausalLM]) -> str:
    """Return the folder of the student's first weights; make them of the finished teacher if there are none."""

    def make(temporary: Path) -> None:
        about = _write(config, packed, teacher(), temporary)
        layers, name = ", ".join(map(str, about["layers"])), model_name(config.flat(), "teacher")
        new = ", with new weights" if config.start.stage == "teacher" and about["keep"] == "random" else ""
        console.print(f"The student has layers {layers} of {about['of_layers']} of {name}{new}.", soft_wrap=True)

    sealed_folder.fill_once(folder, make)
    sealed_folder.read_manifest(folder, "the first weights")
    return str(folder)


def student_shape(config: ExperimentConfig, vocab: int):
    """Return the Hugging Face config of the student; layers of the highest influence count as evenly spread ones.

    Raises UserError for parts that this teacher does not have, or that kd cannot cut.
    """
    teacher = config.teacher
    shape = flops.shape_of(teacher.size, teacher.name, vocab, config.data.seq_len, "teacher.name").config
    return prune.pruned_config(shape, _layers(_start(config), shape), _widths(_start(config)))


def _start(config: ExperimentConfig) -> TeacherInit:
    assert isinstance(config.start, TeacherInit), "the student is not made of its teacher"
    return config.start


def _widths(start: TeacherInit) -> Widths:
    return Widths(start.ffn, start.kv_heads, start.hidden)


def _layers(start: TeacherInit, shape, measured: Importance | None = None) -> list[int]:
    """Return the layers that stay, or whose shapes a student with new weights has."""
    prune.family_of(shape)  # refuses other architectures
    total = shape.num_hidden_layers
    prune.check_layers(total, start.layers)
    if not isinstance(start.layers, int | None):
        return list(start.layers)
    if start.ranks_layers and measured:
        return prune.choose_layers(total, start.layers or total, "influence", measured.layers.tolist())
    return prune.choose_layers(total, start.layers or total, "every" if start.keep == "every" else "uniform")


def _write(config: ExperimentConfig, packed: Packed, teacher: CausalLM, folder: Path) -> dict[str, Any]:
    """Write the student into a folder; return the content of its manifest."""
    start, model = _start(config), teacher.model
    measured = None
    if start.measures:
        model.to(collectives.device(config.trainer.accelerator))
        measured = importance.measure(model, _sample(packed, start.sample, config.trainer.micro_batch, model.device))
        model.cpu()
    layers, widths = _layers(start, model.config, measured), _widths(start)
    shape = prune.pruned_config(model.config, layers, widths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if start.keep == "random":
            student = type(model)(shape)
        else:
            student = prune.pruned_model(model, prune.choose_parts(layers, widths, measured), shape)
    student.save_pretrained(folder)
    influence = measured.layers.tolist() if measured else None
    about = {"keep": start.keep, "layers": layers, "of_layers": model.config.num_hidden_layers, "influence": influence}
    sealed_folder.write_manifest(folder, about)
    return about


def _sample(packed: Packed, rows: int, batch: int, device: torch.device) -> Iterator[importance.Rows]:
    """Yield the first rows of the training data; a mask is False at padding."""
    width = packed.train.shape[1] - 1
    for first in range(0, min(rows, len(packed.train)), batch):
        index = np.arange(first, min(first + batch, rows, len(packed.train)))
        marks = None if packed.train_marks is None else packed.train_marks[index]
        given = to_batch(packed.train[index], index, np.zeros((len(index), width), np.int64), marks=marks)
        ends = np.full(len(index), width)
        if packed.train_spans is not None:
            ends = packed.train_spans[index, 1].astype(np.int64)
        elif marks is not None:  # the last token of a document is learned, and padding is not
            ends = marks.shape[1] - np.argmax(marks[:, ::-1] != NOT_LEARNED, axis=1)
        mask = torch.arange(width) < torch.from_numpy(ends)[:, None]
        positions = None if given.positions is None else given.positions.to(device)
        yield importance.Rows(given.ids.to(device), mask.to(device), positions)
