"""Logits from a store do what those of a running teacher do, for every loss, and no teacher is loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kd.config.compose import composed, default_config
from kd.data.batches import Batch, to_batch
from kd.experiment import fit, prerequisites
from kd.models import hub
from kd.objective.chunked import Objective
from kd.objective.losses import akl
from kd.objective.signals import ProjectedSignal
from kd.objective.target import Target
from kd.objective.target_transforms import renormalise
from kd.objective.truncation import subsample
from kd.store import reader
from kd.store.format import QUANTIZATION_STEP, from_bytes
from tests.cases import LOSSES, TREATMENTS, close, each, gradient, option, token_info
from tests.refusals import refused
from tests.small import TOP, folder, here, result, shared, write
from tests.store.test_format import ROWS, SIZE, heavy, read, written

V = 17  # of the tiny data


@pytest.fixture(scope="module")
def whole(trained_root, tmp_path_factory) -> Path:
    """A root with a store of everything."""

    def fill(root: Path) -> None:
        shutil.copytree(trained_root, root, dirs_exist_ok=True)
        write(root, "truncation=full")

    return shared(tmp_path_factory, "full-store", fill)


@pytest.fixture
def root(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "root")
    return tmp_path / "root"


def outcome(run: Path) -> tuple[list[dict], bytes]:
    """Return metrics and student of a run. FLOPs are left out, since a store needs no forward passes of the teacher."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "flops"} for line in lines], weights(run)


def weights(run: Path) -> bytes:
    return (run / "student" / "model.safetensors").read_bytes()


def both(root: Path, *words: str) -> tuple[Path, Path]:
    """Train the same run online and offline."""
    return here(root, "logits=online", *words), here(root, "logits=offline", *words)


RANDOM = ("truncation=random", "truncation.draws=20")


@each(
    "words",
    {
        "defaults": (),
        "micro-batches": ("trainer.micro_batch=1", "trainer.chunk=7"),
        "one batch": ("trainer.micro_batch=4", "trainer.chunk=1000"),
        "akl, softened": ("loss=akl", "temperature.tau=2"),
        "alpha grows from 0": ("alpha=linear_increasing", "trainer.steps=6"),
        "no distillation at all": ("alpha.peak=0",),
        "top_k of everything": TOP,
        "with the rest": (*TOP, "target=rest"),
        "leftover to the true token": (*TOP, "target=leftover", "loss=rkl"),
        "revised": (*TOP, "target=revise"),
        "routed": ("routing=entropy", "routing.share=0.3"),
        "random of everything": RANDOM,
        "bf16": ("trainer.precision=bf16",),
        "spread of all logits": ("temperature=normkd", *TOP),
        "spread of the teacher's": ("temperature=std", *TOP),
        "entropy of the teacher": ("temperature=entropy", *TOP, "target=leftover"),
        "power of all probabilities": ("temperature=wttm", *TOP),
    },
)
def test_student_of_a_whole_store_is_that_of_the_teacher_bit_for_bit(root, words):
    path = ("record=full",) if "trainer.precision=bf16" in words else (f"logits.path={full(root)}", "record=full")
    online = here(root, "logits=online", *words)
    offline = here(root, "logits=offline", *words, *path)
    assert online != offline and outcome(online) == outcome(offline)


def full(root: Path) -> Path:
    """The store of everything."""
    return next(p.parent for p in root.glob("stores/*/manifest.json") if '"name": "full"' in p.read_text())


@each(
    "words",
    {
        "top_k": TOP,
        "top_p": ("truncation=top_p", "truncation.p=0.8"),
        "top_p_k": ("truncation=top_p_k", "truncation.p=0.9", "truncation.k=6"),
        "with the rest": (*TOP, "target=rest"),
        "leftover to the true token": (*TOP, "target=leftover"),
        "revised, softened": (*TOP, "target=revise", "temperature.tau=2"),
        "softened": (*TOP, "temperature.tau=2", "loss=rkl"),
    },
)
def test_student_of_a_store_of_a_part_is_that_of_the_teacher_to_rounding(root, words):
    online, offline = both(root, *words)
    for a, b in zip(outcome(online)[0], outcome(offline)[0], strict=True):
        assert a.keys() == b.keys()
        assert {k: b[k] for k in a if "grad" not in k} == pytest.approx(
            {k: a[k] for k in a if "grad" not in k}, abs=0.02
        )
        # Validation is against the whole teacher: what is not about the student is the same number.
        assert all(a[k] == b[k] for k in a if "teacher" in k)
    assert weights(online) != weights(offline)


def test_sample_in_a_store_teaches_what_the_teacher_does(root):
    words = ("trainer.steps=60", "trainer.val_every=60", "trainer.log_every=60", "trainer.checkpoint_every=60")
    online, offline = both(root, *words, *RANDOM)
    assert result(offline)["final"]["val/fkl"] == pytest.approx(result(online)["final"]["val/fkl"], rel=0.1)
    assert result(offline)["final"]["val/fkl"] < 0.5 * outcome_of_nothing(root)


def outcome_of_nothing(root: Path) -> float:
    """val/fkl of a student that hardly learned."""
    return result(here(root, "logits=online", "trainer.steps=1"))["final"]["val/fkl"]


def test_every_position_of_a_batch_gets_what_is_stored_of_it(root):
    """Micro-batches and positions that are not counted shift nothing."""
    held = write(root, *TOP)
    rows = np.load(next((root / "data").glob("*/train.npy")))
    index = np.array([5, 41, 0, 59])
    batch = to_batch(rows[index], index, np.zeros((4, 32), np.int64))
    batch = batch._replace(teacher_rows=held.read(index, batch.ids.numpy()))
    mask = torch.rand(4, 32, generator=torch.Generator().manual_seed(0)) < 0.7

    def tables(batch: Batch, mask: torch.Tensor) -> list[dict]:
        target = held.signal(batch, mask)(slice(None))
        assert (target.label == batch.labels[mask]).all()
        return [dict(zip(i, x, strict=True)) for i, x in zip(target.ids.tolist(), target.logp.tolist(), strict=True)]

    everything = tables(batch, torch.ones_like(mask))
    for size in (1, 3, 4):
        pieces = zip(batch.split(size), mask.split(size), strict=True)
        by_position = [table for part, which in pieces for table in tables(part, which)]
        assert by_position == [everything[i] for i in mask.flatten().nonzero().flatten()]


# Losses


STORED = {
    "top_k": {"k": 5},
    "top_p": {"p": 0.8},
    "top_p_k": {"p": 0.9, "k": 5},
    "random": {"draws": 20},
}


def stored(target: Target, name: str, **settings) -> Target:
    """A part of a target, as a store gives it back."""
    draws = settings.get("draws")
    truncated = option("truncation", name, **settings)(target)
    (decoded,) = read(from_bytes(written(truncated, draws).bodies), draws)
    return replace(target, logp=decoded.logp, ids=decoded.ids)


def rounded(target: Target) -> Target:
    """A target with log-probabilities that are multiples of STEP, but for what makes their sum right."""
    logp = (target.logp / QUANTIZATION_STEP).round() * QUANTIZATION_STEP
    return replace(target, logp=logp + (target.logp.logsumexp(-1) - logp.logsumexp(-1))[:, None])


FORMS = {
    f"{name}-{transform}": (name, treatment)
    for name in STORED
    for transform, treatment in TREATMENTS.items()
    if name != "random" or transform in ("renormalise", "revise")
}


@each("loss", LOSSES)
@each("form", FORMS)
def test_every_loss_of_stored_logits_is_that_of_the_rounded_ones(loss, form):
    name, treatment = form
    target = replace(heavy(ROWS * SIZE, V), token_info=token_info(ROWS * SIZE, torch.float32))
    student = torch.randn(ROWS * SIZE, V, generator=torch.Generator().manual_seed(3))
    computed = option("truncation", name, **STORED[name])(target)
    expected = treatment(computed if name == "random" else rounded(computed))
    held = treatment(stored(target, name, **STORED[name]))
    assert loss(student.log_softmax(-1), held).isfinite().all()
    if name == "random" and loss.func is akl:
        return  # of tokens drawn equally often, which are in the head depends on their order
    close(loss(student.log_softmax(-1), held), loss(student.log_softmax(-1), expected), rtol=5e-3, atol=5e-3)
    slopes = [gradient(lambda z, t=t: loss(z.log_softmax(-1), t), student) for t in (held, expected)]
    close(*slopes, rtol=5e-3, atol=5e-3)


# Unbiasedness


DRAWS, TIMES = 20, 400


def mean_slope(targets: list[Target], student: torch.Tensor) -> torch.Tensor:
    """Mean over targets of the gradient of fkl [N, V]."""
    return sum(gradient(lambda z, t=t: LOSSES["fkl"](z.log_softmax(-1), t), student) for t in targets) / len(targets)


def error(draws: int) -> torch.Tensor:
    """Return the standard error of the gradient [N, V], which is student - count / draws."""
    p = heavy(ROWS * SIZE, V).logp.exp()
    return (p * (1 - p) / (draws * TIMES)).sqrt()


@pytest.fixture(scope="module")
def sampled() -> tuple[torch.Tensor, torch.Tensor, list[Target]]:
    """A student, the gradient from the whole teacher, and the teacher stored many times as a sample."""
    target = heavy(ROWS * SIZE, V)
    student = torch.randn(ROWS * SIZE, V, generator=torch.Generator().manual_seed(3))
    exact = gradient(lambda z: LOSSES["fkl"](z.log_softmax(-1), target), student)
    seeds = torch.arange(TIMES)[:, None] * 1009 + torch.arange(ROWS * SIZE)
    targets = [stored(Target(target.label, target.logp, seed=s), "random", draws=DRAWS) for s in seeds]
    return student, exact, targets


def test_mean_gradient_from_stored_draws_is_that_of_the_whole_teacher(sampled):
    student, exact, targets = sampled
    z = (mean_slope(targets, student) - exact) / error(DRAWS)
    assert z.abs().max() < 5 and 0.8 < z.square().mean() < 1.25
    assert error(DRAWS).max() < 0.1 * exact.abs().max()
    # The same test finds the bias of the most probable tokens alone, as many of them as a sample has.
    entries = sum(int((t.logp > -torch.inf).sum()) for t in targets) // (len(targets) * ROWS * SIZE)
    cut = renormalise(stored(heavy(ROWS * SIZE, V), "top_k", k=entries))
    z = (mean_slope([cut], student) - exact) / error(DRAWS)
    assert z.abs().max() > 10 and z.square().mean() > 10


@pytest.mark.parametrize("draws", [1, 7, DRAWS])
def test_fewer_draws_of_a_store_are_again_a_sample_of_the_teacher(sampled, draws):
    student, exact, targets = sampled
    some = []
    for number, target in enumerate(targets):
        seed = torch.arange(ROWS * SIZE) * 7 + 10**6 * number
        some.append(subsample(DRAWS, draws, replace(target, seed=seed)))
        count = some[-1].logp.exp() * draws
        assert (count - count.round()).abs().max() < 1e-4 and (count.sum(-1).round() == draws).all()
    z = (mean_slope(some, student) - exact) / error(draws)
    assert z.abs().max() < 5.5 and 0.8 < z.square().mean() < 1.25


def test_fewer_draws_of_a_store_are_some_of_those_it_holds(root):
    held = write(root, *RANDOM)
    rows = np.load(next((root / "data").glob("*/train.npy")))[:4]
    batch = to_batch(rows, np.arange(4), np.random.default_rng(0).integers(0, 2**62, (4, 32)))
    batch = batch._replace(teacher_rows=held.read(batch.row_ids.numpy(), batch.ids.numpy()))
    target = held.signal(batch, torch.ones_like(batch.ids, dtype=torch.bool))(slice(None))
    some = held.truncation_for({"name": "random", "draws": 7}, option("truncation", "random", draws=7))(target)
    counts = torch.zeros(2, 128, V)
    for number, (t, draws) in enumerate(((target, 20), (some, 7))):
        counts[number].scatter_add_(-1, t.ids, (t.logp.exp() * draws).round())
    assert (counts[0].sum(-1) == 20).all() and (counts[1].sum(-1) == 7).all()
    assert (counts[1] <= counts[0]).all() and (counts[1] < counts[0]).any()


def test_top_k_wants_the_head_larger_than_it_is():
    """Measure the bias of top-k (Anshumann et al. 2025, arXiv 2503.16870, section 3) on a student that is right."""
    target = heavy(ROWS * SIZE, V)
    cut = renormalise(stored(target, "top_k", k=5))
    pull = -gradient(lambda z: LOSSES["fkl"](z.log_softmax(-1), cut), target.logp)
    head = torch.zeros_like(pull, dtype=torch.bool).scatter(-1, cut.ids, True)
    assert (pull[head] > 0).all() and (pull[~head] < 0).all()
    renormalised = target.logp.masked_fill(~head, -30).log_softmax(-1)
    rest = gradient(lambda z: LOSSES["fkl"](z.log_softmax(-1), cut), renormalised)
    assert rest.abs().max() < 0.02  # there it comes to rest


# No teacher


def test_no_teacher_is_loaded_once_the_store_is_there(root, monkeypatch):
    words = ("logits=offline", f"logits.path={full(root)}", "record=full")
    online = here(root, "logits=online")
    shutil.rmtree(folder(root, "lm"))
    monkeypatch.setattr(hub, "pretrained", None)
    monkeypatch.setattr(prerequisites, "teacher_model", None)
    for more in ((), ("teacher=none",), ("logits.path=null",)):
        run = here(root, *words, *more)
        assert outcome(run) == outcome(online)
        shutil.rmtree(run)


def test_measures_of_a_student_are_those_it_has_online(root):
    """Validate one student against the teacher, and against a store of draws."""
    online, offline = (here(root, source, *RANDOM, "alpha.peak=0") for source in ("logits=online", "logits=offline"))
    assert weights(online) == weights(offline)
    a, b = result(online)["final"], result(offline)["final"]
    assert a.keys() == b.keys() and {k: v for k, v in a.items() if k != "flops"} == {
        k: v for k, v in b.items() if k != "flops"
    }


def test_a_store_in_bf16_is_read_by_a_run_in_fp32(root, tmp_path):
    for name in ("full", "random"):
        words = ("teacher.lr=4e-3", f"truncation={name}")  # a teacher that is not too sure to be told in bf16
        held = write(root, *words, "trainer.precision=bf16", f"logits.path={tmp_path / name}")
        run = here(root, *words, "logits=offline", f"logits.path={held.path}")
        whole = here(root, *words, "logits=online")
        assert result(run)["final"]["val/fkl"] == pytest.approx(result(whole)["final"]["val/fkl"], abs=0.01)
        teacher = [result(folder_of_run)["final"]["val/teacher_lm"] for folder_of_run in (run, whole)]
        assert teacher[0] == pytest.approx(teacher[1], abs=1e-3)


def test_runs_of_many_kinds_read_one_store(root, monkeypatch):
    path = full(root)
    before = {p: p.stat().st_mtime_ns for p in path.iterdir()}
    monkeypatch.setattr(prerequisites, "teacher_model", None)
    kinds = [("loss=rkl",), ("loss=jsd", "temperature.tau=2"), ("loss=tvd", "seed=3", "trainer.batch=3"), TOP, RANDOM]
    for kind in kinds:
        assert result(here(root, "logits=offline", "record=full", "trainer.steps=2", *kind))["state"] == "done"
    assert {p: p.stat().st_mtime_ns for p in path.iterdir()} == before
    assert len(list(root.glob("*/result.json"))) == 1 + len(kinds)


def test_a_rank_composes_no_config(root, monkeypatch):
    """Run fit() without Hydra, as a rank does. Only the writer of a store needs the store's settings."""
    given, real = [], fit.fit
    monkeypatch.setattr(fit, "fit", lambda *arguments: given.append(arguments) or {})
    here(root, "logits=offline", "record=top_k", "record.k=5", "trainer.steps=2", *TOP)
    composed.cache_clear()
    default_config.cache_clear()
    assert real(*given[0])["state"] == "done"


def test_a_run_with_a_store_costs_no_flops_of_a_teacher(root):
    online, offline = both(root, "trainer.steps=2")
    plain = here(root, "logits=none", "teacher=none", "trainer.steps=2")
    assert result(offline)["flops"] == result(plain)["flops"] < result(online)["flops"]


def test_a_store_that_needs_a_teacher_says_so(root, tmp_path):
    with refused(option=tmp_path / "none", why="teacher=none cannot write a store", hint="logits.path"):
        here(root, "logits=offline", "teacher=none", f"logits.path={tmp_path / 'none'}", *TOP)
    with refused(option="logits", got="offline", need="a teacher"):
        here(root, "logits=offline", "teacher=none")


def test_full_store_answers_with_a_projection(root):
    held = reader.Store(full(root), root / "stores")
    rows = np.load(next((root / "data").glob("*/val.npy")))
    batch = to_batch(rows[2:4], np.array([2, 3]), np.zeros((2, 32), np.int64))
    mask = torch.ones_like(batch.ids, dtype=torch.bool)
    signal = held.reference(batch, mask)
    assert isinstance(signal, ProjectedSignal) and signal(slice(3, 9)).logp.shape == (6, V)
    other = to_batch(rows[3:5], np.array([2, 3]), np.zeros((2, 32), np.int64))
    with refused(option=held.path, why="those of validation row 2 differ"):
        held.reference(other, mask)


def test_objective_truncates_a_stored_target_like_a_whole_one():
    """A part of what is stored, in any chunk."""
    target = heavy(ROWS * SIZE, V)
    held = stored(target, "top_k", k=10)
    student = torch.randn(ROWS * SIZE, V, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    for name, settings in {"top_k": {"k": 3}, "top_p_k": {"p": 0.6, "k": 8}}.items():
        objective = Objective(
            LOSSES["fkl"], option("truncation", name, **settings), renormalise, option("temperature", "fixed", tau=2.0)
        )
        close(
            objective.distillation_loss(student, held),
            objective.distillation_loss(student, target),
            rtol=0.05,
            atol=0.02,
        )


def test_recorded_logits_are_those_of_a_teacher_recorded_by_hand(tmp_path):
    """Made on demand, once, and read by window."""
    by_hand = tmp_path / "by_hand"
    as_made = ("trainer.steps=6", "trainer.batch=2", "trainer.val_every=100", "trainer.log_every=20")
    record = ("record=top_k", "record.k=5", f"record.path={tmp_path / 'store'}")
    here(by_hand, "logits=none", "teacher=none", *as_made, *record)
    outcomes = []
    for window in ("early", "late"):
        words = (*TOP, f"logits.window={window}")
        a = here(tmp_path / "a", "logits=recorded", *words)
        b = here(by_hand, "logits=offline", f"logits.path={tmp_path / 'store'}", *words)
        assert weights(a) == weights(b)
        outcomes.append(weights(a))
    assert outcomes[0] != outcomes[1]
    held = reader.Store(tmp_path / "store", tmp_path)
    index = held._shard(held.shards[-1]).rows[-2:]
    ids = np.load(next((by_hand / "data").glob("*/train.npy")))[index, :-1]
    assert held.read(index, ids).count.shape == (2, 32)  # of the whole training where no window was picked
    assert len(list((tmp_path / "a" / "recorded" / "stores").glob("*/manifest.json"))) == 1
    assert not (tmp_path / "a" / "stores").exists() and not list((tmp_path / "a").glob("lm*"))


@pytest.mark.parametrize(
    "words", [["truncation=full"], ["teacher=none", *TOP], ["teacher=hub", "teacher.name=x", *TOP]]
)
def test_recorded_logits_need_a_size_and_a_truncation(words, tmp_path):
    with refused(option="logits", got="recorded", hint="teacher=1m truncation=top_p_k"):
        here(tmp_path, "logits=recorded", *words)
