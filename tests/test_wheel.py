"""kd as a wheel: all that a run reads is in it, and its programs work from any folder, without the repository."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.small import ENVIRONMENT, TINY, shared

REPOSITORY = Path(__file__).parent.parent
SOURCES = ("kd", "sweeps", "conf", "train.py", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SHORT = [*TINY, "trainer.steps=2", "teacher.steps=2"]


def build(folder: Path) -> None:
    """Build a wheel of the repository in a copy of it, with the packages that this Python has."""
    source, skip = folder / "source", shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in SOURCES:
        path = REPOSITORY / name
        source.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, source / name, ignore=skip) if path.is_dir() else shutil.copy(path, source / name)
    script = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    (path,) = shared(tmp_path_factory, "wheel", build).glob("kd-*.whl")
    return path


def test_a_wheel_has_every_file_that_a_run_or_a_report_reads_and_no_test(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    of_code = [p for folder in ("kd", "sweeps") for p in (REPOSITORY / folder).rglob("*")]
    expected = {p.relative_to(REPOSITORY).as_posix() for p in of_code if p.suffix in (".py", ".yaml", ".html")}
    expected |= {f"kd/{p.relative_to(REPOSITORY).as_posix()}" for p in (REPOSITORY / "conf").rglob("*.yaml")}
    assert names == expected | {"train.py"}


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    """Folder of the console scripts of an environment that has the wheel, and its dependencies from this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in dependencies))  # not their .pth files
    command = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-index", wheel], check=True, capture_output=True)
    return folder / "bin"


def start(programs: Path, program: str, folder: Path, *words: str) -> subprocess.Popen:
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    options = {"env": environment, "cwd": folder, "text": True, "start_new_session": True}
    return subprocess.Popen([programs / program, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def typed(programs: Path, program: str, folder: Path, *words: str, code: int = 0) -> str:
    """Run a program in a folder, and return its output."""
    process = start(programs, program, folder, *words)
    printed, _ = process.communicate(timeout=250)
    assert process.returncode == code, printed
    return printed


@pytest.mark.slow
def test_a_run_a_sweep_its_report_and_the_other_programs_in_an_empty_folder(programs, tmp_path):
    assert "All of it: runs/fkl-100k-" in typed(programs, "kd-train", tmp_path, *SHORT)
    printed = typed(programs, "kd-train", tmp_path, "-m", *SHORT, "seed=1,2", "sweep=mine")
    assert "run 2 of 2  seed=2  done after" in printed
    assert "2 seeds" in typed(programs, "kd-report", tmp_path, "mine")
    report = (tmp_path / "runs/sweeps/mine.md").read_text()
    assert "kd-train data=markov" in report and "train.py" not in report
    assert "mine" in typed(programs, "kd-runs", tmp_path, "list")


@pytest.mark.slow
def test_programs_import_nothing_from_the_folder_they_are_started_in(programs, tmp_path):
    for name in ("train.py", "sweeps.py", "kd.py"):
        (tmp_path / name).write_text("raise SystemExit('not this one')")
    store = ["teacher.steps=2", "record=top_k", "record.k=5", "logits.path=kept"]
    assert "5.0 entries" in typed(programs, "kd-store", tmp_path, "write", *TINY, *store)
    printed = typed(programs, "kd-report", tmp_path, "mine", code=2)
    assert "To run one, type e.g. kd-train sweeps=demo." in printed


@pytest.mark.slow
def test_help_and_errors_name_the_program_that_was_typed(programs, tmp_path):
    help_ = typed(programs, "kd-train", tmp_path, "--help")
    assert "\n  kd-train sweeps=loss " in help_ and "\n  kd-report loss " in help_ and "python train.py" not in help_
    assert "see all settings by kd-train --help" in typed(programs, "kd-train", tmp_path, "--nope", code=2).lower()
    assert "kd-train --help" in typed(programs, "kd-train", tmp_path, "qzx=1", code=2)


@pytest.mark.slow
def test_a_program_takes_signals_as_train_py_does(programs, tmp_path):
    process = start(programs, "kd-train", tmp_path, *TINY, "trainer.steps=100000", "teacher.steps=2")
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("runs/fkl-*/checkpoints/*.ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143, printed
    (state,) = tmp_path.glob("runs/fkl-*/state.json")
    assert json.loads(state.read_text())["state"] == "preempted"
