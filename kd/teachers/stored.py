"""Teachers whose logits are read from a store; the teacher itself is not loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from kd.data.batches import Batch
from kd.errors import UserError
from kd.models.flops import Cost
from kd.objective.chunked import Signal
from kd.teachers.base import Teacher, TeacherOrigin, Truncation, traits

if TYPE_CHECKING:
    from kd.store.format import EncodedRows


@traits("reads_store")
def offline(
    origin: TeacherOrigin, path: str | None = None, window: str | tuple | None = None, seed: int = 0
) -> Teacher:
    """The teacher's logits are read from a store, which is written first if there is none; the teacher is not loaded.

    path: folder or URL of the store. window: early, late or [0.5,1.0], the share of a recorded teacher's training to
    read. seed: of the draws of a store of samples.
    """
    return _from_store(origin, window)


@traits("reads_store", "recorded")
def recorded(origin: TeacherOrigin, window: str | tuple | None = "late", seed: int = 0) -> Teacher:
    """Logits of the teacher during its own training, which are recorded first; Peng et al. call them online logits.

    window: early, late or [0.5,1.0], the share of the teacher's training to read. seed: of the draws of a store of
    samples. Peng et al. 2024, arXiv 2410.16215, section 3.4.
    """
    return _from_store(origin, window)


def _from_store(origin: TeacherOrigin, window: str | tuple | None) -> StoredTeacher:
    assert origin.store is not None, "a run with stored logits has opened its store"
    return StoredTeacher(origin.store, window)


class SignalStore(Protocol):
    """Part of a store's interface that a teacher uses; see kd.store.reader.Store."""

    @property
    def cost(self) -> Cost | None: ...

    def select_window(self, window: tuple[float, float] | None) -> np.ndarray | None: ...
    def signal(self, batch: Batch, mask: Tensor) -> Signal: ...
    def reference(self, batch: Batch, mask: Tensor) -> Signal: ...
    def read(self, row_ids: np.ndarray, ids: np.ndarray) -> EncodedRows | Tensor | None: ...
    def truncation_for(self, requested: dict, function: Truncation) -> Truncation: ...


class StoredTeacher(Teacher):
    """Teacher whose logits are read from a store, for the rows of the window alone."""

    def __init__(self, store: SignalStore, window: str | tuple | None = None):
        self.store, self.cost = store, store.cost
        self.rows = store.select_window(window_share(window))

    def signal(self, batch: Batch, mask: Tensor) -> Signal:
        return self.store.signal(batch, mask)

    def reference(self, batch: Batch, mask: Tensor) -> Signal:
        return self.store.reference(batch, mask)

    def read(self, row_ids: np.ndarray, ids: np.ndarray) -> EncodedRows | Tensor | None:
        return self.store.read(row_ids, ids)

    def truncation(self, requested: dict, function: Truncation) -> Truncation:
        return self.store.truncation_for(requested, function)


def window_share(window: str | tuple | None) -> tuple[float, float] | None:
    """Return the share of the teacher's training that logits.window names; raises UserError for what has no meaning."""
    if window is None:
        return None
    shares = {"early": (0.0, 0.5), "late": (0.5, 1.0)}.get(window, ()) if isinstance(window, str) else window
    pair = isinstance(shares, list | tuple) and len(shares) == 2 and all(type(x) in (int, float) for x in shares)
    if not pair or not 0 <= shares[0] < shares[1] <= 1:
        raise UserError(
            option="logits.window",
            got=window,
            need="early, late, or two shares of the teacher's training from 0 to 1, the smaller first",
            hint="type e.g. logits.window=[0.5,1.0]",
        )
    return float(shares[0]), float(shares[1])
