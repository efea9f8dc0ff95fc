"""An objective never holds the logits of all positions."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kd.objective.chunked import Objective, chunks
from kd.objective.target import Target
from tests.cases import LOSSES, TEMPERATURES, TREATMENTS, TRUNCATIONS, dense, each, logits, option, token_info
from tests.objective.sums import FULL, PLAIN, SAME, D, case, plainly


class Elements(TorchDispatchMode):
    """Counts the elements of all tensors that are alive, and remembers the most."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.most = 0  # total: with some that are gone, which are looked for where there may be most

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                count = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.total += count - self.alive.get(storage.cdata, (None, 0))[1]
                self.alive[storage.cdata] = storage, count
        if self.total > self.most:
            self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
            self.total = sum(count for _, count in self.alive.values())
            self.most = max(self.most, self.total)
        return out


ONE_BY_ONE = (
    {name: (loss, FULL, SAME, PLAIN) for name, loss in LOSSES.items()}
    | {name: (LOSSES["fkl"], truncation, SAME, PLAIN) for name, truncation in TRUNCATIONS.items()}
    | {name: (LOSSES["fkl"], TRUNCATIONS["top_k-k=5"], treatment, PLAIN) for name, treatment in TREATMENTS.items()}
    | {name: (LOSSES["fkl"], FULL, SAME, temperature) for name, temperature in TEMPERATURES.items()}
)


def share_of_logits(total_of, rows: int = 600, columns: int = 64) -> float:
    """Return the most elements alive during forward and backward, as a share of the whole logits.

    They are measured on 5 and on 10 chunks of 6 rows: what outlives a chunk grows with the rows.
    """
    few, many = (most_elements(total_of, measured, columns) for measured in (30, 60))
    return (few + (rows - 30) * (many - few) / 30) / (rows * columns)


def most_elements(total_of, rows: int, columns: int) -> int:
    head, hidden, label, _ = case(rows, columns)
    teacher = torch.nn.Linear(D, columns)
    seed = torch.arange(rows)

    def signal(rows):
        logp = teacher(hidden[rows].detach()).log_softmax(-1).detach()
        return Target(label[rows], logp, seed=seed[rows], token_info=token_info(len(logp), torch.float32))

    with Elements() as elements:
        total_of(head, hidden, label, signal).backward()
    return elements.most


def test_random_grows_with_the_number_of_draws_and_not_with_its_square():
    draws = 500
    with Elements() as elements:
        option("truncation", "random", draws=draws)(dense(logits(1)))
    assert elements.most < 50 * draws * len(logits(1))


@each("parts", ONE_BY_ONE)
def test_never_holds_as_much_as_the_whole_logits(parts):
    objective = Objective(*parts, chunk=6)
    assert share_of_logits(lambda *inputs: objective(*inputs, 0.5).total) < 0.5


def test_the_count_of_elements_sees_logits_in_one_piece_or_in_many():
    def whole(head, hidden, label, signal, rows=slice(None)):
        return plainly(LOSSES["fkl"], FULL, SAME, PLAIN, 0.5, head, hidden[rows], label[rows], signal(rows))[0]

    assert share_of_logits(whole) > 1
    assert share_of_logits(lambda *inputs: sum(whole(*inputs, rows) for rows in chunks(len(inputs[1]), 6))) > 1
