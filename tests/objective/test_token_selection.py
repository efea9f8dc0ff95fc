"""Token selection: independent of chunks, micro-batches and ranks."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from kd.data.batches import IGNORE, Batch
from kd.objective import losses
from kd.objective.chunked import Objective
from kd.objective.target import Target
from kd.objective.token_info import TokenInfo
from kd.objective.token_selection import Selection
from kd.parallel import collectives
from kd.teachers.base import Teacher
from kd.training import module
from kd.training.module import DistillationModule, Schedules
from tests.cases import LOSSES, TEMPERATURES, TREATMENTS, TRUNCATIONS, dense, logits, option
from tests.refusals import refused
from tests.small import TOP, here, result

ROWS, T, V = 6, 5, 17


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, []), (0.2, [3]), (0.4, [1, 3]), (0.5, [1, 3]), (0.6, [0, 1, 3]), (1.0, [0, 1, 2, 3, 4])],
)
def test_the_surest_go_first_by_hand(share, expected):
    """Select by hand; among equals the first in the batch goes first."""
    selection = option("routing", "entropy", share=share)(lambda measure: torch.tensor([0.5, 0.1, 2.0, 0.0, 0.5]))
    assert selection.token_info == TokenInfo()
    assert (~selection.kd_mask).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize(
    ("uncertainties", "hard", "weight"),
    [
        ([0.1, 0.5, 0.3], [0, 1, 1], [3, 1.5, 1.5]),
        ([0.1, 0.5, 0.3, 0.2], [0, 1, 1, 1], [4, 4 / 3, 4 / 3, 4 / 3]),  # of two in the middle the lower: 0.2
        ([0.9, 0.1, 0.1, 0.1, 0.8, 0.7, 0.6], [1, 0, 0, 0, 1, 1, 1], [7 / 4, 7 / 3, 7 / 3, 7 / 3, 7 / 4, 7 / 4, 7 / 4]),
        ([0.4, 0.4, 0.4], [1, 1, 1], [1, 1, 1]),  # none is easy
        ([0.4], [1], [1]),
        ([], [], []),
    ],
)
def test_the_uncertain_are_hard_by_hand(uncertainties, hard, weight):
    selection = option("routing", "uncertainty")(lambda measure: torch.tensor(uncertainties))
    info = selection.token_info
    assert (
        selection.kd_mask is None and info.provided().keys() == {"is_hard", "weight"} and info.is_hard.tolist() == hard
    )
    torch.testing.assert_close(info.weight, torch.tensor(weight, dtype=torch.float32))


def test_weights_make_one_mean_of_two():
    uncertainty, value = torch.rand(101), torch.rand(101)
    weight = option("routing", "uncertainty")(lambda measure: uncertainty).token_info.weight
    hard = uncertainty >= uncertainty.median()
    means = value[hard].mean() + value[~hard].mean()
    torch.testing.assert_close((value * weight).mean(), means)


def test_what_is_measured_is_what_the_teacher_leaves_to_other_tokens():
    measured = []
    option("routing", "uncertainty")(lambda measure: (measured.append(measure(TEACHER, V)), torch.rand(3))[1])
    torch.testing.assert_close(measured[0], 1 - TEACHER.label_logp().exp())


def test_none_asks_for_nothing():
    assert option("routing", "none")(None) == Selection()


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_without_meaning_is_refused_by_name(share):
    with refused(option="routing.share", got=share, need="a share from 0 to 1"):
        option("routing", "entropy", share=share)(lambda measure: torch.zeros(3))


class Model(torch.nn.Module):
    """Hidden states of a token are a row of a table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(64, 8)
        self.head = torch.nn.Linear(8, V)
        self.head.vocab = V

    def hidden_states(self, ids):
        return self.table(ids)


class Module(DistillationModule):
    """Module whose step needs no trainer, and leaves weights and gradients as they are."""

    global_step = 0

    def optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.step = lambda: None
        return optimizer

    def manual_backward(self, loss):
        loss.backward()


def batch() -> Batch:
    """Six rows, in which some positions do not count."""
    ids = torch.arange(ROWS * T).view(ROWS, T)
    labels = ids % V
    labels[0, :2] = labels[3, 1:] = IGNORE
    return Batch(ids, labels, torch.arange(ROWS), ids + 1000)


TEACHER = dense(logits(1, ROWS * T, V, torch.float32) * torch.linspace(0.2, 3, ROWS * T).float()[:, None])


class TableTeacher(Teacher):
    """Says the same of a token, whatever batch it is in."""

    def __init__(self, trainable: bool = False):
        self.trainable, self.model = trainable, Model()
        self.rows_requested: list[int] = []  # rows of each micro-batch

    def signal(self, batch, mask):
        self.rows_requested.append(len(batch.ids))
        ids, labels, seed = batch.ids[mask], batch.labels[mask], batch.position_seeds[mask]
        return lambda rows: Target(labels[rows], TEACHER.logp[ids[rows]], seed=seed[rows])


def build_module(micro_batch: int, chunk: int, share: float = 0.3, teacher=None, loss="fkl", route=None) -> Module:
    objective = Objective(LOSSES[loss], TRUNCATIONS["full"], TREATMENTS["renormalise"], TEMPERATURES["fixed"], chunk)
    return Module(
        Model(), teacher or TableTeacher(), objective, Schedules(lambda _: 0.7, lambda _: 0.1), None, max_steps=2,
        micro_batch_size=micro_batch, grad_clip=0, token_selection=route or option("routing", "entropy", share=share),
    )  # fmt: skip


def step(module: Module, given: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Sums of loss, distillation and language modelling over the tokens of a step, and its gradients."""
    module.training_step(given, 0)
    sums = torch.tensor([module.last_step.metrics[name] for name in ("loss", "kd", "lm")], dtype=torch.float64)
    return sums * int((given.labels != IGNORE).sum()), [p.grad.clone() for p in module.student.parameters()]


def asked_for(module: Module, given: Batch) -> torch.Tensor:
    """Return a mask of the target positions that are distilled."""
    parts = [(part, part.labels != IGNORE) for part in given.split(module.micro_batch_size)]
    return torch.cat([selection.kd_mask for selection in module.select_tokens(parts)[1]])


def expected(share: float) -> torch.Tensor:
    mask = batch().labels != IGNORE
    logp = TEACHER.logp[batch().ids[mask]].double()
    entropy = -(logp.exp() * logp).sum(-1)
    return entropy > entropy.sort().values[round(share * len(entropy)) - 1]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 6])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_the_share_is_of_the_whole_step_however_it_is_cut(micro_batch, chunk, share):
    assert torch.equal(asked_for(build_module(micro_batch, chunk, share), batch()), expected(share))


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 6])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_a_step_is_the_same_however_it_is_cut(micro_batch, chunk):
    whole = step(build_module(6, 100), batch())
    sums, grads = step(build_module(micro_batch, chunk), batch())
    torch.testing.assert_close(sums, whole[0], rtol=1e-6, atol=1e-6)
    for a, b in zip(grads, whole[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


HARD = option("routing", "uncertainty")


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 6])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_atkd_is_that_of_the_whole_step_however_it_is_cut(micro_batch, chunk):
    """share * mean of dkd over easy tokens + (1 - share) * mean of tkd + dkd over hard ones, times all of them."""
    module, given = build_module(micro_batch, chunk, loss="atkd", route=HARD), batch()
    sums, grads = step(module, given)
    whole = step(build_module(6, 100, loss="atkd", route=HARD), given)
    torch.testing.assert_close(sums, whole[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(grads, whole[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    mask = given.labels != IGNORE
    student = module.student.head(module.student.hidden_states(given.ids[mask])).log_softmax(-1).double()
    target = Target(given.labels[mask], TEACHER.logp[given.ids[mask]].double())
    tkd, dkd = losses._decoupled_kl(student, target)
    unsure = 1 - target.label_logp().exp()
    hard = unsure >= unsure.median()
    assert 0 < hard.sum() < len(hard)
    mean = 0.2 * dkd[~hard].mean() + 0.8 * (tkd + dkd)[hard].mean()
    torch.testing.assert_close(sums[1], (mean * len(hard)).detach(), rtol=1e-5, atol=1e-6)


def test_atkd_of_each_micro_batch_would_be_another():
    given = batch()
    whole = step(build_module(6, 100, loss="atkd", route=HARD), given)[0][1]
    parts = [step(build_module(2, 100, loss="atkd", route=HARD), part)[0][1] for part in given.split(2)]
    assert (sum(parts) - whole).abs() > 1e-3


@pytest.mark.parametrize("micro_batch", [1, 4, 6])
def test_what_a_rollout_knows_reaches_the_loss(micro_batch):
    """Combine the rollout's token information with that of the routing, at target positions."""
    by_student = (torch.arange(ROWS) % 2)[:, None].expand(ROWS, T).float()
    given = batch()._replace(token_info=TokenInfo(by_student=by_student))
    module = build_module(micro_batch, 7, loss="distillm2")
    sums, _ = step(module, given)
    mask = given.labels != IGNORE
    student = module.student.head(module.student.hidden_states(given.ids[mask])).log_softmax(-1).double()
    target = Target(given.labels[mask], TEACHER.logp[given.ids[mask]].double())
    both = [LOSSES[name](student, target) for name in ("skl", "srkl")]
    kd = torch.where(by_student[mask] > 0, both[1], both[0])[expected(0.3)].sum()
    torch.testing.assert_close(sums[1], kd.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (4, 2), (1, 5)])
def test_the_share_is_of_all_ranks(sizes, monkeypatch):
    """Every rank sees the entropies of all, and takes the part of the answer that is its own."""
    pieces = [Batch(*part) for part in zip(*(x.split(sizes) for x in batch() if x is not None), strict=True)]
    entropies = []
    for piece in pieces:
        monkeypatch.setattr(collectives, "all_gather", lambda value: (entropies.append(value), [value])[1])
        asked_for(build_module(2, 7), piece)
    monkeypatch.setattr(collectives, "all_gather", lambda value: entropies)
    masks = []
    for number, piece in enumerate(pieces):
        monkeypatch.setattr(collectives, "rank", lambda number=number: number)
        masks.append(asked_for(build_module(2, 7), piece))
    assert torch.equal(torch.cat(masks), expected(0.3))


def test_a_token_that_is_not_distilled_weighs_as_much_as_any_other():
    """The sum is of alpha * kd + (1 - alpha) * lm over the distilled tokens, and of lm over the others."""
    module, given = build_module(2, 7), batch()
    sums, _ = step(module, given)
    mask = given.labels != IGNORE
    student = module.student.head(module.student.hidden_states(given.ids[mask])).log_softmax(-1).double()
    teacher = TEACHER.logp[given.ids[mask]].double()
    kd = (teacher.exp() * (teacher - student)).sum(-1)
    lm = -student.gather(-1, given.labels[mask][:, None])[:, 0]
    which = expected(0.3)
    by_hand = torch.stack([torch.where(which, 0.7 * kd + 0.3 * lm, lm).sum(), kd[which].sum(), lm.sum()])
    torch.testing.assert_close(sums, by_hand.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("trainable", "times"), [(False, 1), (True, 2)])
def test_a_teacher_is_asked_once_per_micro_batch_and_one_that_learns_twice(trainable, times):
    teacher = TableTeacher(trainable)
    step(build_module(2, 100, teacher=teacher), batch())
    assert teacher.rows_requested == [2, 2, 2] * times


# Through train.py


ROUTED = ("routing=entropy", "routing.share=0.4")


@pytest.fixture(scope="module")
def root(trained_root, tmp_path_factory) -> Path:
    return Path(shutil.copytree(trained_root, tmp_path_factory.mktemp("routed") / "root"))


def near(one: Path, two: Path) -> None:
    """Assert that two runs measured the same but for rounding, whatever they cost."""
    a, b = ({k: v for k, v in result(run)["final"].items() if k != "flops"} for run in (one, two))
    assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_runs_of_other_micro_batches_and_chunks_are_one_run(root):
    whole = here(root, *ROUTED, "trainer.micro_batch=4")
    for words in (("trainer.micro_batch=1",), ("trainer.micro_batch=3", "trainer.chunk=7")):
        near(here(root, *ROUTED, *words), whole)
    plain = here(root, "trainer.micro_batch=4")
    assert result(plain)["final"]["val/lm"] != pytest.approx(result(whole)["final"]["val/lm"], abs=1e-4)


def test_all_routed_is_language_modelling(root):
    routed, lm = here(root, "routing=entropy", "routing.share=1"), here(root, "alpha.peak=0")
    near(routed, lm)


def test_none_routed_is_the_plain_run(root):
    routed, plain = here(root, "routing=entropy", "routing.share=0", "alpha.peak=0.8"), here(root, "alpha.peak=0.8")
    near(routed, plain)
    assert result(routed)["flops"] > result(plain)["flops"]  # its output layer ran twice


def test_a_store_of_a_part_routes_nearly_as_the_teacher(root):
    """Select by the largest entropy that the stored entries allow."""
    masks = {}
    real = module.DistillationModule.select_tokens
    for source in ("online", "offline"):
        seen = []

        def spy(self, parts, seen=seen):
            signals, selections = real(self, parts)
            seen.append(torch.cat([selection.kd_mask for selection in selections]))
            return signals, selections

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.DistillationModule, "select_tokens", spy)
            here(root, f"logits={source}", *TOP, *ROUTED)
        masks[source] = torch.cat(seen)
    assert masks["online"].float().mean() == masks["offline"].float().mean() == pytest.approx(0.6, abs=0.01)
    assert (masks["online"] == masks["offline"]).float().mean() > 0.8


def test_a_store_of_draws_is_refused(root):
    with refused(option="routing", got="entropy", why="random draws=30, too little", hint="record=top_k"):
        here(root, "logits=offline", "truncation=random", "truncation.draws=30", *ROUTED)


def test_atkd_is_a_loss_and_a_routing(root):
    run = here(root, "loss=atkd", "routing=uncertainty")
    near(here(root, "loss=atkd", "routing=uncertainty", "trainer.micro_batch=1", "trainer.chunk=7"), run)
    assert 0 < result(run)["final"]["val/fkl"] < result(here(root, "alpha.peak=0"))["final"]["val/fkl"]


@pytest.mark.parametrize(
    ("loss", "by"),
    [
        ("atkd", "routing=uncertainty"),
        ("distillm2", "rollout=student, rollout=pairs or rollout=adaptive"),
        ("minillm", "rollout=mixed"),
    ],
)
def test_a_loss_that_is_not_told_what_it_asks_for_is_refused_before_anything_is_trained(root, loss, by):
    with refused(option="loss", hint=f"type {by} too"):
        here(root, f"loss={loss}")


def test_a_teacher_that_learns_can_be_routed(root):
    run = here(root, "logits=cotrained", *ROUTED)
    plain = here(root, "logits=cotrained")
    a, b = result(run), result(plain)
    assert a["final"]["val/teacher_lm"] == b["final"]["val/teacher_lm"]  # it is not touched
    assert a["flops"] > b["flops"] and a["final"]["val/lm"] != b["final"]["val/lm"]


def test_a_share_without_meaning_is_refused_before_anything_is_trained(root):
    with refused(option="routing.share", got=2, need="a share from 0 to 1"):
        here(root, "routing=entropy", "routing.share=2")
