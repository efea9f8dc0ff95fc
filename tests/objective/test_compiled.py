"""The compiled loss equals the eager one, and is compiled once for all chunks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from kd.objective.chunked import Objective
from tests.cases import LOSSES, TREATMENTS, TRUNCATIONS, each
from tests.objective.sums import FULL, PLAIN, ROWS, SAME, case, grads_of, same

COLUMNS = {  # of the target: all, some, and some beside the probability of the others
    "dense": (FULL, SAME),
    "sparse": (TRUNCATIONS["top_k-k=5"], SAME),
    "leftover": (TRUNCATIONS["top_k-k=5"], TREATMENTS["leftover"]),
    "rest": (TRUNCATIONS["top_k-k=5"], TREATMENTS["rest"]),
}


def assert_compiled_equals_eager(loss, columns) -> None:
    head, hidden, label, target = case()
    kd_mask = torch.arange(ROWS) % 3 > 0
    for alpha in (0.9, 0.3):  # that alpha changes must not be compiled in
        eager, compiled = (
            Objective(loss, *columns, PLAIN, 5, compile)(
                head, hidden, label, target.__getitem__, alpha, kd_mask=kd_mask
            )
            for compile in (False, True)
        )
        same(compiled, eager)
        same(grads_of(compiled.total, head, hidden), grads_of(eager.total, head, hidden))


@pytest.mark.slow
@each("columns", COLUMNS)
@each("loss", LOSSES)
def test_compiled_equals_eager(loss, columns):
    torch.compiler.reset()
    assert_compiled_equals_eager(loss, columns)


@pytest.mark.slow
@each("columns", COLUMNS)
@each("loss", LOSSES)
def test_a_loss_is_one_graph_for_all_chunks(loss, columns, monkeypatch):
    """Capture graphs alone, which is fast. What torch cannot capture, it would compute eagerly and not say so."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    torch.compiler.reset()
    counters.clear()
    assert_compiled_equals_eager(loss, columns)
    for rows in range(2, ROWS):  # the last chunk has 1 to 5 rows
        head, hidden, label, target = case(rows)
        Objective(loss, *columns, PLAIN, 5, True)(head, hidden, label, target.__getitem__, 0.9)
    # Two kinds, with a mask and without one, for 5 rows, for any number and for a single row.
    assert counters["stats"]["unique_graphs"] <= 6 and not counters["graph_break"]


def test_a_loss_that_cannot_be_compiled_is_computed_as_it_is_unless_it_has_to_be(monkeypatch):
    def fails(*_):
        raise TorchDynamoException("no C compiler")

    monkeypatch.setattr(torch, "compile", lambda function: fails)
    head, hidden, label, target = case()
    objective = Objective(LOSSES["fkl"], FULL, SAME, PLAIN)
    expected = objective(head, hidden, label, target.__getitem__, 0.9).total
    assert torch.equal(replace(objective, compile=None)(head, hidden, label, target.__getitem__, 0.9).total, expected)
    with pytest.raises(TorchDynamoException):
        replace(objective, compile=True)(head, hidden, label, target.__getitem__, 0.9)
