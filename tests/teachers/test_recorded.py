"""Logits that are recorded while a teacher is trained: exact, resumed exactly, read by windows."""

import copy
import os
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from kd.data.batches import rows_of_step
from kd.models import causal_lm
from kd.store import recorder
from kd.store.reader import Store
from kd.system import checkpoint_files
from kd.teachers.stored import window_share
from kd.training import module
from tests.refusals import refused
from tests.small import TOP, content, folder, here, outcome, result, type_in
from tests.teachers.killing import BATCH, PLAIN, ROWS, STEPS, at_step, die

RECORD = (*PLAIN, "record=top_k", "record.k=5")


def order(steps: range) -> list[tuple[int, int]]:
    """Return the rows of each training step, as pairs of row and step."""
    return [(int(row), step) for step in steps for row in rows_of_step(ROWS, BATCH, 0, step)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, dict]:
    """A root with a store recorded in training, and what the model was before each step."""
    root, before = tmp_path_factory.mktemp("recorded"), {}
    real = module.DistillationModule.training_step

    def spy(self, batch, index) -> None:
        before[self.global_step] = copy.deepcopy(self.student)
        real(self, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.DistillationModule, "training_step", spy)
        here(root, *RECORD, f"record.path={root / 'store'}")
    return root, before


def opened(root: Path, window=None) -> tuple[Store, np.ndarray]:
    held = Store(root / "store", root)
    return held, held.select_window(window)


def table(root: Path) -> np.ndarray:
    return np.load(next((root / "data").glob("*/train.npy")))


WINDOWS = {"all": None, "early": (0.0, 0.5), "late": (0.5, 1.0), "part": (0.3, 0.45), "a step": (0.5, 0.55)}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_what_is_recorded_is_what_the_model_said_before_it_learned_from_it(recorded, window):
    root, before = recorded
    held, rows = opened(root, window)
    low, high = (round(x * STEPS) for x in window or (0, 1))
    latest = dict(order(range(low, high)))  # of a row that came twice
    assert rows.tolist() == sorted(latest)
    for row, step in latest.items():
        ids = torch.from_numpy(table(root)[[row], :-1].astype(np.int64))
        with torch.no_grad():
            logp = before[step].head(before[step].hidden_states(ids)).log_softmax(-1)[0]
        top, columns = logp.topk(5)
        zeros = torch.zeros(32, dtype=torch.long)
        entries = held.read(np.array([row]), ids.numpy())
        stored = entries.at(torch.ones(1, 32, dtype=torch.bool)).target(slice(None), zeros, zeros, None)
        difference = stored.logp - logp.gather(-1, stored.ids)
        assert difference.abs().max() < 1 / 32 + 1e-3
        assert stored.logp.exp().sum(-1).numpy() == pytest.approx(top.exp().sum(-1).numpy(), rel=2e-3)
        assert (stored.ids == columns.sort(-1).values).float().mean() > 0.99


def test_a_row_that_came_twice_has_two_answers(recorded):
    """Or the test above could not tell the first from the latest."""
    root, _ = recorded
    twice = [row for row, count in Counter(row for row, _ in order(range(STEPS))).items() if count > 1]
    ids = table(root)[twice, :-1]
    early, late = (opened(root, window)[0].read(np.array(twice), ids) for window in ((0, 0.75), (0.75, 1)))
    assert len(twice) == STEPS * BATCH - ROWS
    assert all(
        (a != b).any() for a, b in zip(early.quantized_logp.split(160), late.quantized_logp.split(160), strict=True)
    )


def test_recording_changes_nothing_and_takes_no_forward_pass(recorded, tmp_path, monkeypatch):
    passes: list[tuple] = []
    real = causal_lm.CausalLM.hidden_states
    monkeypatch.setattr(
        causal_lm.CausalLM, "hidden_states", lambda self, ids: (passes.append(ids.shape), real(self, ids))[1]
    )
    plain = here(tmp_path / "plain", *PLAIN)
    alone = Counter(passes)
    passes.clear()
    run = here(tmp_path / "recording", *RECORD)
    # The validation rows, once more: what students are measured against.
    assert Counter(passes) - alone == Counter({(2, 32): 4})
    assert run.name == plain.name and outcome(run) == outcome(plain)
    (store,) = (tmp_path / "recording" / "stores").iterdir()
    expected = content(recorded[0] / "store")
    assert {n: d for n, d in content(store).items() if "manifest" not in n and "begun" not in n} == {
        n: d for n, d in expected.items() if "manifest" not in n and "begun" not in n
    }


def at_checkpoint(number: int) -> None:
    real = checkpoint_files.DigestIO.save_checkpoint

    def save(self, checkpoint, path, storage_options=None) -> None:
        if path.stem.endswith(f"{number}"):
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, checkpoint, path, storage_options)

    checkpoint_files.DigestIO.save_checkpoint = save


def at_the_end(_: int) -> None:
    recorder.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("killer", "number"), [(at_step, 2), (at_step, 10), (at_checkpoint, 9), (at_the_end, 0)])
def test_killed_recording_ends_with_the_same_bytes(recorded, tmp_path, killer, number):
    words = (*RECORD, f"record.path={tmp_path / 'store'}")
    die(tmp_path, words, killer, number)
    assert not (tmp_path / "store" / "manifest.json").exists()
    here(tmp_path, *words)
    actual, expected = content(tmp_path / "store"), content(recorded[0] / "store")
    assert actual.keys() == expected.keys()
    assert {n: d for n, d in actual.items() if n != "manifest.json"} == {
        n: d for n, d in expected.items() if n != "manifest.json"
    }
    Store(tmp_path / "store", tmp_path).verify()


def test_what_was_recorded_after_the_checkpoint_that_is_gone_on_from_is_forgotten(recorded, tmp_path):
    """Two checkpoints back, and shards of other lengths from there."""
    words = (*RECORD, f"record.path={tmp_path / 'store'}")
    die(tmp_path, words, at_checkpoint, 15)
    newest = max((folder(tmp_path, "lm") / "checkpoints").glob("*.ckpt"))
    assert newest.stem.endswith("12") and (tmp_path / "store" / "shard-00000012.json").exists()
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        here(tmp_path, *words, "trainer.checkpoint_every=5")
    held, rows = opened(tmp_path)
    expected, _ = opened(recorded[0])
    assert held.manifest["count"] == expected.manifest["count"] == STEPS * BATCH
    assert held.manifest["entries"] == expected.manifest["entries"]
    ids = table(tmp_path)[rows, :-1]
    expected.select_window(None)
    assert (held.read(rows, ids).quantized_logp == expected.read(rows, ids).quantized_logp).all()


def student(root: Path, *words: str) -> Path:
    return here(root, "logits=offline", "teacher=none", f"logits.path={root / 'store'}", *TOP, *words)


def test_student_reads_the_rows_of_the_window_alone(recorded, monkeypatch):
    root, _ = recorded
    read: set[int] = set()
    real = Store.read
    monkeypatch.setattr(
        Store, "read", lambda self, index, ids: (read.update(index.tolist()), real(self, index, ids))[1]
    )
    runs = set()
    for word, steps in (("late", range(10, 20)), ("[0.0,0.25]", range(5)), ("early", range(10)), ("null", range(20))):
        read.clear()
        run = student(root, f"logits.window={word}")
        rows = {row for row, _ in order(steps)}
        assert read <= rows and len(read) >= min(len(rows), 40)
        assert result(run)["train_rows"] == len(rows)
        runs.add(run.name)
    assert len(runs) == 4


def test_recorded_logits_teach(recorded):
    root, _ = recorded
    words = ("target=rest", "seed=1")
    first, run = (student(root, *words, f"trainer.steps={steps}") for steps in (1, 60))
    assert result(run)["final"]["val/fkl"] < 0.5 * result(first)["final"]["val/fkl"]
    teacher = result(folder(root, "lm"))["final"]
    assert result(run)["final"]["val/teacher_lm"] == pytest.approx(teacher["val/lm"], abs=1e-6)


@pytest.mark.parametrize(
    "window", ["middle", "[1.0,0.5]", "[0.5]", "[0,2]", "[-0.5,0.5]", "[0.5,0.5]", "0.5", "[0,0.5,1]"]
)
def test_a_window_that_cannot_be_is_refused(recorded, window):
    with refused(option="logits.window", need=" "):
        student(recorded[0], f"logits.window={window}")


def test_a_window_without_a_step_is_refused(recorded):
    with refused(option="logits.window", got=[0.51, 0.54], why="no step of the teacher's training"):
        student(recorded[0], "logits.window=[0.51,0.54]")


def test_a_window_of_a_finished_teacher_is_refused_before_a_store_is_written(trained_root, tmp_path):
    root = shutil.copytree(trained_root, tmp_path / "root")
    with refused(option="logits.window", why="covers no window", hint="leave logits.window out"):
        here(root, "logits=offline", *TOP, "logits.window=late")
    with refused(option="logits.window", why="covers no window"):
        here(root, "logits=offline", *TOP, "logits.window=late", f"logits.path={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()


def test_shares_that_words_stand_for():
    assert window_share("early") == (0, 0.5) and window_share("late") == (0.5, 1) and window_share(None) is None
    assert window_share([0, 1]) == (0, 1) and window_share((0.25, 0.5)) == (0.25, 0.5)


def test_a_teacher_that_is_named_has_to_be_the_recorded_one(recorded):
    root, _ = recorded
    with refused(why=("its teacher is lm-100k-", ", and here it is lm-100k-")):
        student(root, "teacher=100k")


@pytest.mark.parametrize("logits", ["online", "cotrained"])
def test_recording_where_nothing_is_stored_is_refused(tmp_path, logits):
    with refused(option="record", got="top_k", conflict=f"logits={logits}", why="would do nothing"):
        here(tmp_path, f"logits={logits}", "record=top_k")
    assert not list(tmp_path.iterdir())


def test_whole_distributions_of_a_teacher_in_training_are_refused(tmp_path):
    with refused(option="record", got="full", hint="record=top_p_k"):
        here(tmp_path, *PLAIN, "record=full")


def test_a_run_that_is_done_is_recorded_by_what_is_printed(recorded, tmp_path):
    here(tmp_path, *PLAIN)
    words = (*RECORD, f"record.path={tmp_path / 'store'}")
    with refused(why="is done, and nothing was recorded", commands="rm -r ") as caught:
        here(tmp_path, *words)
    type_in(str(caught.value))
    here(tmp_path, *words)
    here(tmp_path, *words)  # now there is nothing to do
    name = "shard-00000009.safetensors"
    assert (tmp_path / "store" / name).read_bytes() == (recorded[0] / "store" / name).read_bytes()


@pytest.mark.parametrize("name", ["shard-00000009.safetensors", "head.safetensors", "manifest.json"])
def test_damage_to_what_cannot_be_made_again_is_said(recorded, tmp_path, name):
    path = recorded[0] / "store" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    try:
        with refused(option=path, why="is damaged", hint="copy that file again"):
            student(recorded[0], "seed=5")
    finally:
        path.write_bytes(whole)


def begun_without(root: Path) -> tuple[str, ...]:
    die(root, PLAIN, at_checkpoint, 12)
    return RECORD


def begun_with_less(root: Path) -> tuple[str, ...]:
    die(root, (*PLAIN, "record=top_k", "record.k=4"), at_checkpoint, 12)
    return RECORD


def store_removed(root: Path) -> tuple[str, ...]:
    die(root, (*RECORD, f"record.path={root / 'store'}"), at_checkpoint, 12)
    shutil.rmtree(root / "store")
    return RECORD


def shard_removed(root: Path) -> tuple[str, ...]:
    die(root, (*RECORD, f"record.path={root / 'store'}"), at_checkpoint, 12)
    (root / "store" / "shard-00000003.safetensors").unlink()
    return RECORD


@pytest.mark.parametrize("begun", [begun_without, begun_with_less, store_removed, shard_removed])
def test_a_recording_that_would_lack_its_beginning_is_refused_with_what_mends_it(recorded, tmp_path, begun):
    words = (*begun(tmp_path), f"record.path={tmp_path / 'store'}")
    with refused(option=tmp_path / "store", why="continues at step 9: the rest", commands="rm -r ") as caught:
        here(tmp_path, *words)
    assert re.search("recorded up to step [03],", caught.value.why)
    type_in(str(caught.value))
    here(tmp_path, *words)
    assert opened(tmp_path)[0].manifest["count"] == opened(recorded[0])[0].manifest["count"]


def test_checkpoints_far_apart_do_not_fill_the_memory(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "SHARD_BYTES", 100)
    here(tmp_path, *RECORD, f"record.path={tmp_path / 'store'}", "trainer.checkpoint_every=10")
    (held, rows), (expected, same) = opened(tmp_path), opened(recorded[0])
    assert len(held.shards) == STEPS and (rows == same).all()
    ids = table(tmp_path)[rows, :-1]
    assert (held.read(rows, ids).quantized_logp == expected.read(rows, ids).quantized_logp).all()


def test_draws_and_bf16_are_recorded(tmp_path):
    words = (*PLAIN, "trainer.steps=6", "trainer.precision=bf16")
    plain = outcome(here(tmp_path / "plain", *words))
    run = here(tmp_path, *words, "record=random", "record.draws=9", f"record.path={tmp_path / 'store'}")
    assert outcome(run) == plain
    held, rows = opened(tmp_path)
    entries = held.read(rows, table(tmp_path)[rows, :-1])
    assert {int(c.sum()) for c in entries.quantized_logp.split(entries.count.flatten().tolist())} == {9}
    learner = ("logits=offline", "teacher=none", f"logits.path={tmp_path / 'store'}", "truncation=random")
    assert result(here(tmp_path, *learner, "truncation.draws=4", "trainer.steps=2"))["state"] == "done"


def test_a_store_is_recorded_to_a_url(recorded, tmp_path):
    url = f"memory://{tmp_path.name}/store"
    here(tmp_path, *RECORD, f"record.path={url}")
    here(tmp_path, *RECORD, f"record.path={url}")  # it is there
    system = fsspec.filesystem("memory")
    name = "shard-00000009.safetensors"
    assert system.cat_file(f"{url}/{name}") == (recorded[0] / "store" / name).read_bytes()
    here(tmp_path, "logits=offline", "teacher=none", *TOP, f"logits.path={url}", "logits.window=late")
