"""Finished teacher as a run holds it: its attention, its weights in fewer bits, and what these change in its loss."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.fabric.utilities import move_data_to_device

from kd.config.schema import ExperimentConfig
from kd.data.batches import IGNORE, Packed, ValidationBatches
from kd.experiment.dependencies import teacher_computation
from kd.models import causal_lm, weights
from kd.models.causal_lm import CausalLM
from kd.objective.chunked import chunks, default_chunk_size
from kd.parallel import collectives
from kd.system import files
from kd.system.console import console
from kd.system.files import read_json
from kd.system.hardware import out_of_memory
from kd.system.remote import local_root
from kd.teachers.online import OnlineTeacher


def load(config: ExperimentConfig, packed: Packed, vocab: int, name: str) -> CausalLM:
    """Return a finished teacher of a folder or of the Hub, with trainer.attention and teacher.dtype.

    Its loss on the held-out rows is measured with and without teacher.dtype, once for each teacher, and printed.
    """
    model = causal_lm.build_model(None, name, vocab, config.data.seq_len, "teacher.name")
    if config.trainer.attention:
        model.set_attention(config.trainer.attention)
    if config.teacher.dtype is None:
        return model
    path, first = _path(config, packed, name), collectives.rank() == 0
    measures = first and not path.exists()
    whole = _loss(config, packed, model) if measures else None
    device = collectives.device(config.trainer.accelerator)
    weights.hold(model, config.teacher.dtype, config.trainer.precision, device)
    if config.teacher.dtype in weights.QUANTISED:
        model.to(device)  # where its matrices are
    if measures:
        path.parent.mkdir(parents=True, exist_ok=True)
        rounded = _loss(config, packed, model)
        files.write_json(path, {"dtype": config.teacher.dtype, "loss": rounded, "loss_before": whole})
    if first:
        _print(read_json(path) or {})
    return model


def losses(config: ExperimentConfig, packed: Packed, name: str | None) -> dict | None:
    """Return what load() measured: dtype, and the loss with it and before it, nats per token; None if it did not."""
    return read_json(_path(config, packed, name)) if name and config.teacher.dtype else None


def _path(config: ExperimentConfig, packed: Packed, name: str) -> Path:
    teacher = files.folder_fingerprint(name) or name
    data, computation = [packed.folder.name, config.data.to_dict()], teacher_computation(config)
    key = files.digest_of([data, teacher, computation, config.trainer.precision])
    return local_root(config.root) / "teacher_losses" / f"{key[:16]}.json"


def _print(measured: dict) -> None:
    dtype, loss, before = (measured.get(key) for key in ("dtype", "loss", "loss_before"))
    if loss is None or before is None:
        text = "its effect on the teacher's held-out loss was not measured, for lack of memory or of references."
    else:
        text = f"the teacher's held-out loss is {loss:.4f} nats per token, {loss - before:+.4f} from {before:.4f}."
    console.print(f"teacher.dtype={dtype}: {text}", soft_wrap=True)


@torch.no_grad()
def _loss(config: ExperimentConfig, packed: Packed, model: CausalLM) -> float | None:
    """Return a model's mean loss on the held-out rows, nats per token.

    None if the rows have no target tokens, or memory runs out.
    """
    trainer = config.trainer
    device, half = collectives.device(trainer.accelerator), trainer.precision == "bf16"
    total, count = 0.0, 0
    rows = ValidationBatches(
        packed.val, trainer.micro_batch, response_spans=packed.val_spans, boundary=packed.boundary,
        marks=packed.val_marks,
    )  # fmt: skip
    try:
        teacher = OnlineTeacher(model.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            for batch in rows:
                batch = move_data_to_device(batch, device)
                mask = batch.labels != IGNORE
                label, signal = batch.labels[mask], teacher.signal(batch, mask)
                for part in chunks(len(label), trainer.chunk or default_chunk_size(model.head)):
                    total -= signal(part).logp.gather(-1, label[part, None]).double().sum().item()
                count += len(label)
    except Exception as error:
        if not out_of_memory(error):
            raise
        model.to("cpu")
        return None
    return total / count if count else None
