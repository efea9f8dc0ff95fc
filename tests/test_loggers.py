"""metrics.jsonl is the truth; W&B and TensorBoard are views that can fail without harm."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import train as product
from kd.errors import UserError
from kd.identity import About
from kd.loggers import MetricsFile, views, wandb
from kd.run import read_metrics
from tests.small import ENVIRONMENT, FORK, folder, here, result, train


def test_metrics_file_cuts_what_comes_after_the_checkpoint_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a": 3.0}\n{"step": 4, "a"')
    log = MetricsFile(path, step=2)
    log.log_metrics({"a": 9.0}, step=3)
    log.close(None)
    assert [(x["step"], x["a"]) for x in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_what_was_measured_before_the_first_step_is_there_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step, lines in ((0, [0]), (0, [0, 3]), (3, [0, 3])):  # killed before its first checkpoint, and after
        log = MetricsFile(path, step=step)
        for number in lines if not step else ():
            log.log_metrics({"a": 1.0}, step=number)
        log.close(None)
        assert [x["step"] for x in read_metrics(path)] == lines


def test_no_view_is_told_that_a_run_is_done_whose_student_could_not_be_written(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(MetricsFile, "close", lambda self, final: told.append(final))
    monkeypatch.setattr(product, "export", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here(tmp_path, "logits=none", "teacher=none", "trainer.steps=1")
    state = json.loads((folder(tmp_path, "lm") / "state.json").read_text())
    assert told == [None] and state["state"] == "failed" and state["exit_code"] == 1
    assert state["reason"].startswith("ZeroDivisionError") and "Traceback" in state["traceback"]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("WANDB_MODE", "onlin", "'online', 'offline'"),
        ("WANDB_MODE", "OFFLINE", "'online', 'offline'"),
        ("WANDB_BASE_URL", "nonsense", "a valid URL"),
        ("WANDB_INIT_TIMEOUT", "abc", "a valid number"),
        ("WANDB_CONSOLE", "loud", "Input should be"),
    ],
)
def test_a_mistyped_variable_of_wandb_is_one_line_that_names_it(tmp_path, monkeypatch, variable, value, says):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"^logger=wandb did not start: {variable}={value}: .*{says}") as caught:
        views(wandb, tmp_path, About("a", "a", None, "lm", [], {}))
    assert len(str(caught.value).splitlines()) == 1 and "type logger=none" in str(caught.value)


@pytest.mark.parametrize("error", [ImportError("no part"), AttributeError("no y"), ValueError("bad\nmore")])
def test_whatever_a_logger_raises_when_it_starts_is_one_line(tmp_path, error):
    def odd(folder, about):
        raise error

    said = rf"^logger=odd did not start: {type(error).__name__}: \w+"
    with pytest.raises(UserError, match=said) as caught:
        views(odd, tmp_path, None)
    assert len(str(caught.value).splitlines()) == 1

    def mistake(folder, about):
        raise UserError("needs a package")

    with pytest.raises(UserError, match=r"^needs a package$"):
        views(mistake, tmp_path, None)


def inspect(path: Path) -> dict:
    """Config, summary, … of an offline W&B run, read by W&B's own tool."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--summary", "--json", str(path)]
    return json.loads(subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout)


def test_wandb_without_a_key_is_offline_shallow_and_one_run_per_run(tmp_path):
    train(tmp_path, "logger=wandb", "sweep=trial", "trainer.steps=4", HOME=str(tmp_path))
    run = folder(tmp_path, "fkl")
    (offline,) = (run / "wandb").glob("offline-run-*")
    said = inspect(offline)
    assert run.name in said["run_id"] and said["summary"]["final/lm"] == result(run)["final"]["val/lm"]
    assert said["config"].keys() >= {"student_params", "teacher_params", "tokens", "loss", "alpha_peak", "seed"}
    for key, value in said["config"].items():
        assert "." not in key and isinstance(value, str | int | float), key
    raw = b"".join(p.read_bytes() for p in offline.glob("*.wandb"))
    assert b"trial" in raw and b"distil" in raw


def test_wandb_run_that_comes_later_has_all_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "train/lm": 3.0}\n{"step": 2, "train/lm": 2.5, "val/lm": 2.6}\n'
    )
    about = About("fkl-100k-0", "fkl", "trial", "distil", ["fkl"], {"loss": "fkl"})
    ids = []
    for _ in range(2):  # killed, it goes on as the same run, which has them already
        process = FORK.Process(target=view, args=(tmp_path, about))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        ids.append((tmp_path / "wandb-id").read_text())
    assert ids[0] == ids[1]
    first, second = (inspect(path)["summary"] for path in sorted(tmp_path.glob("wandb/offline-run-*")))
    assert (first["_step"], first["train/lm"], first["val/lm"]) == (2, 2.5, 2.6)
    assert "train/lm" not in second and first["final/lm"] == second["final/lm"] == 2.6


def view(folder: Path, about: About) -> None:
    os.environ |= {"WANDB_MODE": "offline", "HOME": str(folder)}
    (made,) = wandb(folder, about)
    made.close({"val/lm": 2.6})


def test_wandb_whose_process_died_lets_the_next_run_begin(tmp_path):
    process = FORK.Process(target=two_views, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert len(list(tmp_path.glob("*/wandb/offline-run-*"))) == 2


def two_views(root: Path) -> None:
    os.environ |= {"WANDB_MODE": "offline", "HOME": str(root)}
    for name in ("teacher", "student"):
        (root / name).mkdir()
        (made,) = wandb(root / name, About(f"{name}-0", name, None, "distil", [name], {"loss": "fkl"}))
        made.log_metrics({"train/lm": 2.0}, 1)
        if name == "teacher":
            for path in Path("/proc/self/task").glob("*/children"):
                for child in map(int, path.read_text().split()):
                    assert "wandb-core" in Path(f"/proc/{child}/comm").read_text()
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.close({"val/lm": 2.0})


def test_responses_become_a_table_in_wandb(tmp_path):
    line = {"row": 3, "sample": 0, "prompt": "p", "reference": "<b>r", "response": "s\nt", "tokens": 2, "rouge_l": 0.25}
    text = json.dumps(line | {"ended": True, "exact_match": False, "response": "s\u2028t"}, ensure_ascii=False)
    (tmp_path / "responses.jsonl").write_text(f"{json.dumps(line | {'ended': False})}\n{text}\n", encoding="utf-8")
    process = FORK.Process(target=view, args=(tmp_path, About("run", "name", None, "distil", [], {})))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    (path,) = tmp_path.glob("wandb/offline-run-*/files/media/table/responses*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["row", "sample", "prompt", "reference", "response", "rouge_l", "ended"]
    assert table["data"] == [[3, 0, "p", "<b>r", "s\nt", 0.25, False], [3, 0, "p", "<b>r", "s\u2028t", 0.25, True]]


def test_wandb_with_a_dead_network_trains_and_goes_offline(tmp_path):
    output = train(
        tmp_path, "logger=wandb", "trainer.steps=3", "teacher=none", "logits=none", WANDB_MODE="online",
        WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="5",
    )  # fmt: skip
    assert "logged offline" in output
    assert result(folder(tmp_path, "lm"))["state"] == "done"


def test_tensorboard_writes_event_files(tmp_path):
    train(tmp_path, "logger=tensorboard", "trainer.steps=3", "teacher=none", "logits=none")
    assert list(folder(tmp_path, "lm").glob("tensorboard/events*"))


def test_a_failed_run_is_a_failed_run_in_wandb(tmp_path):
    words = ("teacher=none", "logits=none", "lr=constant", "lr.peak=1e30", "trainer.clip=0")
    train(tmp_path, "logger=wandb", *words, code=2)
    assert list(folder(tmp_path, "lm").glob("wandb/offline-run-*"))
    shutil.rmtree(tmp_path)
