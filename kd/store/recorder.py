"""Recorder of a teacher's logits during its own training."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd.data.batches import IGNORE, Batch
from kd.errors import UserError
from kd.objective.target import Target
from kd.store.encoder import RowEncoder
from kd.store.folder import begin, commit, note_of, notes_of
from kd.store.format import EncodedPositions, encode
from kd.store.rows import SHARD_BYTES, Rows
from kd.store.spec import draws_of
from kd.store.transfer import upload
from kd.system import files
from kd.system.remote import Remote
from kd.teachers.base import Teacher


class Recorder:
    """Writer of a store from the logits of a model's own training steps.

    A shard ends at each checkpoint, so that a resumed run continues with complete ones. url: destination of the
    complete store; None to leave it in the folder.
    """

    def __init__(
        self, folder: Path, spec: dict, about: dict, keep: Callable[[Target], Target], step: int,
        checkpoints: Path, url: str | None = None,
    ):  # fmt: skip
        self.folder, self.spec, self.about, self.truncate, self.url = folder, spec, about, keep, url
        begin(folder, spec)
        if url and step:
            self._pull(url)
        (folder / "manifest.json").unlink(missing_ok=True)
        covered = 0
        for name, note in notes_of(folder).items():
            if not name.startswith("shard-"):
                continue
            if note["steps"][0] >= step:  # recorded after the checkpoint, so these steps run again
                (folder / f"{name}.json").unlink()
            elif note["steps"][0] == covered:
                covered = note["steps"][1]
        if covered != step:
            raise UserError(
                option=folder,
                why=f"has what was recorded up to step {covered}, and the run continues at step {step}: the rest would "
                "be missing",
                hint="to train and record the run from the start, type this, and then the same command again",
                commands=[shlex.join(["rm", "-r", str(checkpoints), str(folder)])],
            )
        self.begun = step
        self.sent: set[str] = set()
        self.pieces: list[EncodedPositions] = []
        self.out = Rows()

    def observe(self, seed: Tensor, rows: slice, logits: Tensor) -> None:
        """Take logits [n, V] of the positions `rows` of a batch, whose position seeds are seed [N]."""
        # No truncation looks at the label.
        target = Target(seed[rows], logits.float().log_softmax(-1), seed=seed[rows])
        self.pieces.append(encode(self.truncate(target), draws_of(self.spec["truncation"])))

    def discard(self) -> None:
        """Drop the observed logits of a batch that is computed again."""
        self.pieces.clear()

    def batch(self, batch: Batch, step: int) -> None:
        """Add a batch of optimizer step `step`. All its positions have been observed."""
        if self.out.bytes > SHARD_BYTES and self.out.steps[-1] < step:  # checkpoints may be far apart
            self.flush(step)
        self.out.add_entries(batch.ids.cpu().numpy(), self.pieces, (batch.labels != IGNORE).cpu().numpy())
        self.pieces = []
        self.out.rows += batch.row_ids.tolist()
        self.out.steps += [step] * len(batch.row_ids)

    def flush(self, step: int) -> None:
        """Write the rows recorded before `step` as a shard."""
        if self.out.bodies:
            self.out.save(self.folder, f"shard-{self.begun:08}", steps=[self.begun, step])
        self.begun, self.out = step, Rows()

    def _pull(self, url: str) -> None:
        """Copy missing shards from the URL. A shard whose upload was cut off is left out."""
        remote = Remote(url, self.folder)
        for note in (x for x in remote.names() if x.startswith("shard-") and x.endswith(".json")):
            name = note.removesuffix(".json")
            if note_of(self.folder, name) is None and remote.get(f"{name}.safetensors"):
                written = remote.read(note)
                if written and files.digest(self.folder / f"{name}.safetensors") == written["digest"]:
                    files.write_json(self.folder / note, written)

    def send(self, wait: float) -> None:
        """Copy the complete shards to the URL, so that another machine can continue with them.

        wait: seconds for a URL that is away, see kd/system/retries.py.
        """
        if not self.url:
            return
        remote = Remote(self.url, self.folder)
        for name in sorted(notes_of(self.folder).keys() - self.sent):
            remote.put(f"{name}.safetensors", f"{name}.json", wait=wait)
            self.sent.add(name)

    def finish(
        self, trained: Teacher, device: torch.device, validation: np.ndarray, batch: int, steps: int,
        marks: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Write the last shard, the output layer, and the trained model's hidden states for the validation rows.

        marks: of these rows, see kd.data.batches.to_batch.
        """
        self.flush(steps)
        encoder = RowEncoder(trained, self.spec, self.truncate, device)
        encoder.save_head(self.folder)
        encoder.save_validation(self.folder, validation, batch, marks)
        commit(self.folder, self.spec, self.about | {"steps": steps})
        if self.url:
            upload(self.folder, self.url)
