"""Paths as people type them: a home folder as ~, brackets in a name, folders that cannot be written to."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
from rich.table import Table

from kd.errors import for_people, is_mistake
from kd.experiment.prerequisites import FinishedRun
from kd.experiment.summary import show
from kd.launch.job import Job
from kd.launch.pool import Pool
from kd.launch.summary import summary
from kd.runs import provenance
from kd.runs.run import Run
from kd.store.reader import Store
from kd.system import files
from kd.system.console import StepProgress, Terminal, console, styled, track
from kd.system.remote import create_root, local_root
from sweeps.fit.__main__ import main as fit_main
from sweeps.report.__main__ import main as report_main
from tests.refusals import refused
from tests.small import ENVIRONMENT, SMALL, TOP, TRAIN, here, listed, small_config, small_words, train, write


@pytest.fixture
def at_home(tmp_path, monkeypatch) -> Path:
    """A home folder, elsewhere than where the commands are typed."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("option", "more"),
    [
        ("root", ()),
        ("data.files", ("data=text",)),
        ("data.name", ("data=hub",)),
        ("plain.files", ("data=instructions", "plain=text")),
        ("data.tokenizer", ("data=text", "data.files=x")),
        ("student.name", ("student=hub", "data=text", "data.files=x")),
        ("teacher.name", ("teacher=hub", "data=text", "data.files=x")),
        ("logits.path", ("logits=offline",)),
        ("record.path", ("logits=none", "teacher=none", "record=top_k")),
    ],
)
def test_the_home_folder_is_expanded_in_every_setting_that_is_a_path(at_home, option, more):
    for typed, whole in (("~/a b/*[1]", f"{at_home}/a b/*[1]"), ("~", f"{at_home}"), ("a/~/b", "a/~/b")):
        config = small_config("runs", *more, f"{option}='{typed}'")
        assert config.flat()[option] == whole
    with refused(option="~nobody-here/x", why="no home folder for ~nobody-here"):
        small_config("runs", *more, f"{option}='~nobody-here/x'")


def test_the_home_folder_is_expanded_where_no_shell_did_it():
    """Bash does so for root=~/x, and not for data.files=~/x, with a dot in it."""
    home = os.path.expanduser("~")
    words = ["root=~/x", "data.files=~/a*.txt", "student.name=~/a,~", "x=a~b", "~record", "seed=1", "y='~/quoted'"]
    assert files.expanded_words(words) == [
        f"root={home}/x", f"data.files={home}/a*.txt", f"student.name={home}/a,{home}", "x=a~b", "~record", "seed=1",
        "y='~/quoted'",
    ]  # fmt: skip


def test_a_cache_in_the_home_folder(at_home, monkeypatch):
    monkeypatch.setenv("KD_CACHE", "~/cache")
    assert local_root("file:///x").parent == at_home / "cache"
    monkeypatch.delenv("KD_CACHE")
    assert local_root("file:///x").parent == at_home / ".cache" / "kd"


def test_runs_stores_and_reports_in_the_home_folder(at_home, capsys, monkeypatch):
    (at_home / "text.txt").write_text("\n\n".join(f"Line {i} is about {i * i}." for i in range(600)))
    words = ("root='~/runs'", "data=text", "data.seq_len=32", "data.val_rows=4", "data.files='~/text.txt'")
    words += ("logits=none", "teacher=none", "trainer.steps=1")
    run = here(at_home, *words, "data.vocab=300")
    assert run.parent == at_home / "runs"
    named = here(at_home, *words, "student=hub", f"student.name='~/runs/{run.name}/student'")
    assert named.parent == at_home / "runs" and named != run
    write("~/runs", *TOP, "logits.path='~/logits'", "teacher.steps=1")
    monkeypatch.setattr(sys, "argv", ["kd.store", "info", "~/logits", "--root", "~/runs"])
    from kd.store.__main__ import main

    main()
    assert str(Store(at_home / "logits", at_home).path) in capsys.readouterr().err
    (at_home / "points.csv").write_text("parameters,tokens,loss\n")
    assert fit_main(["--csv", "~/points.csv"]) == 2 and "cannot be read" not in capsys.readouterr().err
    assert sorted(p.name for p in at_home.iterdir() if p.name != ".cache") == [
        "logits",
        "points.csv",
        "runs",
        "text.txt",
    ]
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.slow
def test_a_sweep_whose_root_is_in_the_home_folder(at_home):
    words = ("-m", "logits=none", "teacher=none", "trainer.steps=1", "seed=0,1")
    output = train(Path.cwd(), *words, "root='~/runs'", HOME=str(at_home))
    assert len(json.loads(listed(at_home / "runs").read_text())["runs"]) == 2, output
    command = [sys.executable, str(TRAIN), "-m", *SMALL, *words[1:]]  # with the root from the environment
    environment = ENVIRONMENT | {"HOME": str(at_home), "KD_ROOT": "~/runs"}
    again = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert again.stderr.count("done before") == 2 and list(Path.cwd().iterdir()) == [], again.stderr
    assert report_main([listed(at_home / "runs").stem, "--root", "~/runs"]) == 0


# What is shown is shown as it is.

ODD = ("r[/b]m", "r[x]", "r[red]m", "r:x:", "a\\[b]")


@pytest.mark.parametrize("name", ODD)
def test_no_name_is_markup(name, tmp_path, capsys, monkeypatch):
    run = Run(tmp_path / name, f"fkl{name}")
    result = {
        "config": {"trainer.steps": 1},
        "final": {"val/lm": 1.0},
        "entropy": 1.0,
        "tokens": 1,
        "seconds": 1.0,
        "flops": 1.0,
    }
    monkeypatch.setattr(provenance, "done_before", lambda result: "done before")
    monkeypatch.setattr(provenance, "doubts", lambda result: [f"a note on {name}"])
    show(FinishedRun(run, result, before=True))
    job = Job(run, [], f"words={name}")
    Pool([job], 1)._say(job, f"says {name}")
    console.print(Pool([job], 1).board())
    console.print(summary(name, [job]))
    console.print(f"Text with {name}.")
    message = capsys.readouterr().err.replace("\n", "")
    assert f"{run.location}" in message and f"A note on {name}." in message
    assert f"words={name}  says {name}" in message and f"sweep {name}" in message and f"Text with {name}." in message
    assert message.count(name) >= 7


def test_titles_and_cells_with_brackets(tmp_path, capsys):
    out = io.StringIO()
    terminal = Terminal(file=out, force_terminal=True, color_system=None, width=200)
    table = Table(title="t[/b]")
    table.add_column("h[/b]")
    table.add_row("c[/b]")
    table.add_row(styled("s[/b]", "dim"))
    terminal.print(table)
    assert all(f"{letter}[/b]" in out.getvalue() for letter in "thcs")
    assert list(track([1, 2], "copying to [/b]")) == [1, 2]
    steps = StepProgress("m[/b]", 1, 0)
    steps.update(1, 1, "x[/b]")
    steps.stop()
    assert "m[/b]" in capsys.readouterr().err


def test_a_run_in_a_root_with_brackets(tmp_path):
    root = tmp_path / "r[/b]m"
    words = ("logits=none", "teacher=none", "trainer.steps=1", "data.tokens=2000", f"root='{root}'")
    output = train(tmp_path, *words)
    assert f"All of it: {root}/lm" in output
    (run,) = root.glob("lm*")
    assert f"All of it: {run}" in train(tmp_path, *words)


# Folders that cannot be written to.


def test_errors_of_places_are_mistakes_and_others_are_none():
    for number in (errno.EROFS, errno.EACCES, errno.ENAMETOOLONG):
        assert "/x" in str(for_people(OSError(number, "no", "/x"))) and "root=/other/folder" in str(
            for_people(OSError(number, "no", "/x"))
        )
    for error in (OSError(errno.EIO, "broken", "/x"), FileNotFoundError(2, "gone", "/x")):
        with pytest.raises(OSError) as caught:
            for_people(error)
        assert caught.value is error and not is_mistake(error)
    with pytest.raises(OSError, match="long") as caught:
        Path("/tmp", "a" * 300).mkdir()
    assert is_mistake(caught.value)


@pytest.mark.parametrize(("inside", "reason"), [("/proc", "No such file or directory"), ("FILE", "Not a directory")])
def test_a_root_that_cannot_be_created_is_refused_by_its_name(tmp_path, inside, reason):
    (tmp_path / "file").touch()
    root = f"{inside}/runs".replace("FILE", f"{tmp_path / 'file'}")
    with refused(option="root", got=root, why=reason, need="a folder that can be written to", hint="type e.g. root="):
        create_root(root)


def test_no_command_has_a_traceback_for_a_root_that_cannot_be_created(tmp_path):
    for words in ((), ("-m",), ("plan=true",)):
        output = train(tmp_path, *words, "logits=none", "teacher=none", "root=/proc/runs", code=2)
        assert "root=/proc/runs cannot be created" in output and "Traceback" not in output


READ_ALONE = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
mountable = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0 if which("unshare") else True,
    reason="needs the right to mount",
)


@pytest.fixture(scope="module")
def read_only_root(tmp_path_factory) -> Path:
    """A root with a finished run and the sweep that made it."""
    root = tmp_path_factory.mktemp("kept")
    train(root, "-m", *ALONE)
    return root


ALONE = ("logits=none", "teacher=none", "trainer.steps=1", "data.tokens=2000", "sweep=s")


@mountable
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (ALONE, 0, "Done before"),
        (("-m", *ALONE), 0, "done before"),
        ((*ALONE, "seed=1"), 2, "Read-only file system"),
        pytest.param(("-m", *ALONE, "seed=1"), 2, "Read-only file system", marks=pytest.mark.slow),
        pytest.param((*ALONE, "data.seq_len=16"), 2, "Read-only file system", marks=pytest.mark.slow),
        (("report", "s"), 2, "Read-only file system"),
    ],
)
def test_a_root_that_is_read_alone_shows_what_is_done_and_says_what_cannot_be(read_only_root, words, code, message):
    command = [
        str(TRAIN),
        *(w for w in words if w == "-m"),
        *small_words(SMALL, words),
        f"root={read_only_root}",
        *(w for w in words if w != "-m"),
    ]
    if words[0] == "report":
        command = ["-m", "sweeps.report", "s", "--root", str(read_only_root)]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", READ_ALONE, "sh", str(read_only_root), sys.executable, *command],
        env=ENVIRONMENT, cwd=TRAIN.parent, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr, done.stderr
