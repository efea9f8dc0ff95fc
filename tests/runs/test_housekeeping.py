"""Disk use and removal: nothing that a sweep or a run needs goes without a word, and nothing without yes=true."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import filelock
import pytest

from kd.data import packing
from kd.experiment import cleanup, disk
from kd.experiment.cleanup import Root
from kd.experiment.dependencies import corpus
from kd.runs import __main__ as program
from kd.runs.run import Run
from kd.system import console
from kd.system.processes import process_info
from tests.refusals import refused
from tests.small import TOP, here, shared, small_config, write

STUDENT = ("trainer.steps=2", "teacher.steps=2")


def fill(root: Path) -> None:
    """A teacher, a student that read a store of it, and a store of another truncation that nobody reads."""
    here(root, *STUDENT, "logits=offline", *TOP)
    write(root, "teacher.steps=2", "truncation=top_k", "truncation.k=3")


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    return shared(tmp_path_factory, "housekeeping", fill)


@pytest.fixture
def root(filled, tmp_path, monkeypatch) -> Path:
    """A copy in the folder `runs`, which is where the program looks; with a cache of its own."""
    shutil.copytree(filled, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KD_ROOT", raising=False)
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    return Path("runs")


@pytest.fixture
def typed(monkeypatch, capsys):
    """Function that runs a command and returns its output."""
    wide = {"width": 250, "highlight": False}
    monkeypatch.setattr(program, "out", console.Terminal(**wide))
    monkeypatch.setattr(program, "console", console.Terminal(stderr=True, **wide))

    def run(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["runs", *words])
        try:
            program.main()
            ended = 0
        except SystemExit as error:
            ended = error.code
        out, err = capsys.readouterr()
        assert ended == code, err
        return out + err

    return run


def run_of(root: Path, start: str) -> str:
    (path,) = root.glob(f"{start}-*")
    return path.name


def listed(root: Path, name: str, *runs: str) -> None:
    """Write a sweep that lists runs."""
    lines = [{"run": run, "overrides": ["seed=1"]} for run in runs]
    (root / "sweeps").mkdir(exist_ok=True)
    (root / "sweeps" / f"{name}.json").write_text(json.dumps({"name": name, "runs": lines}))


def stopped(root: Path, start: str) -> Path:
    """Make a run one that was asked to end, with a checkpoint."""
    folder = root / run_of(root, start)
    (folder / "result.json").unlink()
    (folder / "state.json").write_text(json.dumps({"state": "preempted", "reason": "asked to end"}))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-00000001.ckpt").write_bytes(b"1" * 5000)
    return folder


def paths_and_users(root: Path, *kinds: str) -> dict[str, str]:
    """Paths of leftovers -> for what they are needed."""
    return {leftover.path.name: leftover.needed for leftover in cleanup.leftovers(Root(root), kinds)}


def test_list_has_every_run_and_every_folder_with_its_size(root, typed):
    listed(root, "mine", run_of(root, "fkl"))
    printed = " ".join(typed("list").split())
    for path in root.glob("*/result.json"):
        size = disk.disk_use(path.parent)
        assert f"{path.parent.name} done {size / 1000:.0f} kB" in printed
    assert "mine" in printed and "2 runs" in printed
    for place in ("data", "stores", "sweeps"):
        assert f"runs/{place}" in printed
    assert "rollouts" not in printed


def test_show_has_state_metrics_files_and_who_needs_it(root, typed):
    teacher, student = run_of(root, "lm"), run_of(root, "fkl")
    listed(root, "mine", student)
    words = " ".join(typed("show", student).split())
    assert "state done" in words and "val/lm" in words and "in sweeps mine" in words and "student/" in words
    assert f"needed by {student}" in " ".join(typed("show", str(root / teacher)).split())


def test_clean_removes_nothing_without_yes_and_by_default_what_nothing_can_need(root, typed):
    half = root / "data" / ".0123.0123456789ab.tmp"
    half.mkdir()
    (half / "train.bin").write_bytes(b"1" * 3000)
    left = root / run_of(root, "fkl") / "checkpoints"
    left.mkdir()
    (left / "step-00000001.ckpt").write_bytes(b"1" * 2000)
    assert paths_and_users(root, "temporary") == {}  # it may be being written
    for path in (half, half / "train.bin"):
        os.utime(path, (time.time() - 2 * cleanup.DAY,) * 2)
    printed = typed("clean")
    assert "can be removed: 5.0 kB" in printed and "python -m kd.runs clean yes=true" in printed
    assert "what=stores" in printed and half.exists() and left.exists()
    assert "removed: 5.0 kB" in typed("clean", "yes=true")
    assert not half.exists() and not left.exists()
    assert "Nothing to remove in runs." in typed("clean")
    assert len(list(root.glob("*/result.json"))) == 2 and len(list(root.glob("stores/*"))) == 2


def test_packed_data_and_stores_that_a_run_reads_are_none_of_the_leftovers(root, typed):
    old = root / "data" / "feedfacefeedface"
    old.mkdir()
    (old / "train.npy").write_bytes(b"1")
    assert paths_and_users(root, "data") == {old.name: ""}
    (unread,) = paths_and_users(root, "stores")
    assert json.loads((root / "stores" / unread / "manifest.json").read_text())["of"]["truncation"]["k"] == 3
    assert "removed" in typed("clean", "what=data,stores", "yes=true")
    (manifest,), (data,) = root.glob("stores/*/manifest.json"), root.glob("data/*/manifest.json")
    assert json.loads(manifest.read_text())["of"]["truncation"]["k"] == 5 and data.parent != old


def test_the_name_of_packed_data_is_that_of_its_folder(tmp_path):
    for words in ((), ("data.tokens=1500",), ("data.val_rows=4", "data.seq_len=16")):
        source, settings = corpus(small_config(tmp_path, *words))
        assert packing.pack(source, tmp_path, **settings).folder.name == packing.folder_name(source, **settings)


def test_what_a_sweep_or_an_unfinished_run_may_need_stays_until_needed_is_typed(root, typed):
    teacher, student = run_of(root, "lm"), run_of(root, "fkl")
    listed(root, "mine", student, "fkl-100k-not-yet-begun")
    assert paths_and_users(root, "stores").popitem()[1] == "perhaps, as sweep mine has 1 run that has not begun"
    printed = typed("clean", "what=stores", "yes=true")
    assert "needed=true" in printed and "sweep mine has 1 run that" in printed and len(list(root.glob("stores/*"))) == 2
    printed = typed("clean", teacher, student, "yes=true")
    assert "needed by sweep mine" in printed and f"needed by {student} learn" in printed
    assert (root / student).exists() and (root / teacher).exists()
    typed("clean", "what=stores", "yes=true", "needed=true")
    typed("clean", student, "yes=true", "needed=true")
    assert len(list(root.glob("stores/*"))) == 1 and not (root / student).exists() and (root / teacher).exists()


def other_seed(text: str) -> str:
    """A config that is another run's."""
    return json.dumps(json.loads(text) | {"seed": 7})


@pytest.mark.parametrize("change", [lambda text: "{", lambda text: "{}", other_seed])
def test_a_config_that_is_not_the_runs_keeps_data_and_stores(root, change):
    path = root / run_of(root, "fkl") / "config.json"
    path.write_text(change(path.read_text()))
    (root / "data" / "feedfacefeedface").mkdir()
    leftovers = paths_and_users(root, "data", "stores")
    assert "feedfacefeedface" in leftovers and all("is unknown" in needed for needed in leftovers.values())


def test_a_run_whose_result_is_damaged_is_not_unfinished(root):
    (root / run_of(root, "fkl") / "result.json").write_text("{")
    assert paths_and_users(root, "unfinished") == {}


def test_an_unfinished_run_goes_only_by_name_or_kind(root, typed):
    folder = stopped(root, "fkl")
    assert "Nothing to remove" in typed("clean", "yes=true") and folder.exists()
    listed(root, "mine", folder.name)
    assert "Nothing to remove" in typed("clean", "what=unfinished", "yes=true")
    listed(root, "mine")
    assert "preempted; it could go on" in typed("clean", "what=unfinished")
    typed("clean", "what=unfinished", "yes=true")
    assert not folder.exists()


def test_a_teacher_that_is_not_done_is_needed_by_its_student(root):
    stopped(root, "lm")
    assert paths_and_users(root, "unfinished") == {run_of(root, "lm"): f"{run_of(root, 'fkl')} learn from it"}


def test_a_run_at_work_is_never_removed(root, typed):
    folder = stopped(root, "fkl")
    (folder / "state.json").write_text(json.dumps({"state": "running", "reason": ""} | process_info()))
    assert paths_and_users(root, "unfinished") == {}
    assert "is at work" in typed("clean", folder.name, "yes=true", "needed=true", code=2)
    (leftover,) = cleanup.leftovers(Root(root), ("stores",))
    with Run(root / "stores", leftover.path.name).lock(wait=False):
        assert "left, as a process works on it" in typed("clean", "what=stores", "yes=true")
    assert leftover.path.exists()
    with filelock.FileLock(root / run_of(root, "lm") / ".lock"):
        assert not cleanup.remove(cleanup.named_runs(Root(root), [run_of(root, "lm")])[0])


def test_text_of_teachers_and_the_cache_go_by_kind(root, typed):
    (root / "responses").mkdir()
    (root / "responses" / "0123.npz").write_bytes(b"1" * 2000)
    (root / "rollouts" / "4567.parts").mkdir(parents=True)
    (root / "rollouts" / "4567.lock").touch()
    digests = Path(os.environ["KD_CACHE"]) / "digests"
    digests.mkdir(parents=True)
    (digests / "a.json").write_text("{}")
    code = digests.parent / "compiled"
    code.mkdir()
    (code / "kernel.so").write_bytes(b"1" * 2000)
    assert "compiled" in typed("clean", "what=cache") and code.exists()
    assert paths_and_users(root, "responses", "rollouts") == {"0123.npz": "", "4567.parts": ""}
    typed("clean", "what=responses,rollouts,cache", "yes=true")
    assert not any((root / "responses").iterdir()) and not digests.exists() and digests.parent.exists()
    assert not code.exists()


@pytest.mark.parametrize("words, fields", [
    (("list", "x"), "x: list takes no name. Type python -m kd.runs show x."),
    (("list", "rot=runs"), "Type root=runs."),
    (("list", "root=nowhere"), "root=nowhere does not exist."),
    (("list", "--root", "nowhere"), "root=nowhere does not exist."),
    (("list", "--root=nowhere"), "root=nowhere does not exist."),
    (("list", "root=s3://bucket/runs"), "need a folder of this machine"),
    (("show",), "got 0 names; need the name of one run"),
    (("show", "fkl-100"), "is no run in runs. Type fkl-100k-"),
    (("show", "zzz"), "See all runs by python -m kd.runs list root=runs."),
    (("clean", "what=everything"), "need all, or some of temporary, checkpoints"),
    (("clean", "yes=1"), "need true or false. Type yes=true"),
    (("clean", "fkl", "what=data"), "need runs by name, or kinds"),
    (("clean", "yess=true"), "Type yes=true."),
])  # fmt: skip
def test_a_wrong_command_says_what_to_type(root, typed, words, fields):
    assert fields in typed(*words, code=2)
    assert len(list(root.glob("*/result.json"))) == 2


def test_a_sweeps_list_that_is_damaged_stops_before_anything_is_removed(root):
    (root / "sweeps").mkdir(exist_ok=True)
    (root / "sweeps" / "mine.json").write_text("{")
    with refused(option=root / "sweeps" / "mine.json", why="is damaged"):
        Root(root)


def test_sizes_leave_links_and_what_vanishes_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "y").symlink_to(tmp_path / "a")
    assert disk.disk_use(tmp_path / "a") == 3 and disk.disk_use(tmp_path / "gone") == 0
    assert disk.disk_use(tmp_path / "b") < 500
