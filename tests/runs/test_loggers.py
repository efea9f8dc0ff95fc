"""metrics.jsonl is the truth; W&B and TensorBoard are views that can fail without harm."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from kd.errors import UserError
from kd.experiment import fit
from kd.launch.local import LocalLauncher
from kd.launch.ray_launcher import Ray
from kd.runs import loggers
from kd.runs.identity import WandbMetadata, wandb_metadata
from kd.runs.loggers import join, views, wandb
from kd.runs.metrics_file import MetricsFile
from kd.runs.run import Run
from kd.system.files import read_metrics, write_json
from tests.refusals import refused
from tests.small import ENVIRONMENT, FORK, TINY, TRAIN, folder, here, result, small_config, train
from tests.wandb_server import serving


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
    closed_with = []
    monkeypatch.setattr(MetricsFile, "close", lambda self, final: closed_with.append(final))
    monkeypatch.setattr(fit, "export", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here(tmp_path, "logits=none", "teacher=none", "trainer.steps=1")
    state = json.loads((folder(tmp_path, "lm") / "state.json").read_text())
    assert closed_with == [None] and state["state"] == "failed" and state["exit_code"] == 1
    assert state["reason"].startswith("ZeroDivisionError") and "Traceback" in state["traceback"]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WANDB_MODE", "onlin", "'online', 'offline'"),
        ("WANDB_MODE", "OFFLINE", "'online', 'offline'"),
        ("WANDB_BASE_URL", "nonsense", "a valid URL"),
        ("WANDB_INIT_TIMEOUT", "abc", "a valid number"),
        ("WANDB_CONSOLE", "loud", "Input should be"),
    ],
)
def test_a_mistyped_variable_of_wandb_is_one_line_that_names_it(tmp_path, monkeypatch, variable, value, message):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv(variable, value)
    why = (f"could not start: {variable}={value}: ", message)
    with refused(option="logger", got="wandb", why=why, hint="type logger=none") as caught:
        views(wandb, tmp_path, WandbMetadata("a", "a", None, "lm", [], {}))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("error", [ImportError("no part"), AttributeError("no y"), ValueError("bad\nmore")])
def test_whatever_a_logger_raises_when_it_starts_is_one_line(tmp_path, error):
    def odd(folder, about):
        raise error

    with refused(option="logger", got="odd", why=f"could not start: {type(error).__name__}: ") as caught:
        views(odd, tmp_path, None)
    assert len(str(caught.value).splitlines()) == 1

    def mistake(folder, about):
        raise UserError("needs a package")

    with pytest.raises(UserError, match=r"^needs a package$"):
        views(mistake, tmp_path, None)


def inspected(path: Path, *flags: str) -> str:
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", *flags, str(path)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout


def inspect(path: Path) -> dict:
    """Config, summary, … of an offline W&B run, read by W&B's own tool."""
    return json.loads(inspected(path, "--summary"))


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in inspected(path).splitlines()]


def test_wandb_without_a_key_is_offline_shallow_and_one_run_per_run(tmp_path):
    train(tmp_path, "logger=wandb", "sweep=trial", "trainer.steps=4", HOME=str(tmp_path))
    run = folder(tmp_path, "fkl")
    (offline,) = (run / "wandb").glob("offline-run-*")
    shown = inspect(offline)
    assert run.name in shown["run_id"] and shown["summary"]["final/lm"] == result(run)["final"]["val/lm"]
    assert shown["config"].keys() >= {"student_params", "teacher_params", "tokens", "loss", "alpha_peak", "seed"}
    whole = shown["config"].pop("settings")
    assert whole["trainer"]["batch"] == 4 and whole["lr"]["option"] == "cosine"
    for key, value in shown["config"].items():
        assert "." not in key and isinstance(value, str | int | float), key
    assert {"perf/tokens_per_second", "perf/seconds_per_step", "perf/peak_memory_gb"} <= shown["summary"].keys()
    assert "perf" not in (run / "metrics.jsonl").read_text()  # which does not depend on the clock
    raw = b"".join(p.read_bytes() for p in offline.glob("*.wandb"))
    assert b"trial" in raw and b"distil" in raw


def test_wandb_run_that_comes_later_has_all_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "train/lm": 3.0}\n{"step": 2, "train/lm": 2.5, "val/lm": 2.6}\n'
    )
    about = WandbMetadata("fkl-100k-0", "fkl", "trial", "distil", ["fkl"], {"loss": "fkl"})
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


def view(folder: Path, about: WandbMetadata) -> None:
    os.environ |= {"WANDB_MODE": "offline", "HOME": str(folder)}
    (logger,) = wandb(folder, about)
    logger.close({"val/lm": 2.6})


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
        (logger,) = wandb(root / name, WandbMetadata(f"{name}-0", name, None, "distil", [name], {"loss": "fkl"}))
        logger.log_metrics({"train/lm": 2.0}, 1)
        if name == "teacher":
            for path in Path("/proc/self/task").glob("*/children"):
                for child in map(int, path.read_text().split()):
                    assert "wandb-core" in Path(f"/proc/{child}/comm").read_text()
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logger.close({"val/lm": 2.0})


def test_responses_become_a_table_in_wandb(tmp_path):
    line = {"row": 3, "sample": 0, "prompt": "p", "reference": "<b>r", "response": "s\nt", "tokens": 2, "rouge_l": 0.25}
    text = json.dumps(line | {"ended": True, "exact_match": False, "response": "s\u2028t"}, ensure_ascii=False)
    (tmp_path / "responses.jsonl").write_text(f"{json.dumps(line | {'ended': False})}\n{text}\n", encoding="utf-8")
    process = FORK.Process(target=view, args=(tmp_path, WandbMetadata("run", "name", None, "distil", [], {})))
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


def test_tensorboard_shows_metrics_and_how_fast_they_come(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = here(tmp_path, "logger=tensorboard", "trainer.steps=3", "teacher=none", "logits=none")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"train/lm", "val/lm", "perf/tokens_per_second", "perf/seconds_per_step"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("perf/tokens_per_second")] == [1, 2, 3]
    speed, pace = (events.Scalars(f"perf/{k}")[-1].value for k in ("tokens_per_second", "seconds_per_step"))
    assert speed * pace == pytest.approx(4 * 32, rel=0.01)  # tokens of a step


def description(tmp_path: Path, *words: str, name: str = "fkl-100k-0123456789ab") -> WandbMetadata:
    return wandb_metadata(name, small_config(tmp_path, *words).flat(), {}, "abcd+")


def test_dashboards_are_given_what_a_run_was_made_with(tmp_path):
    shown = description(tmp_path, "trainer.precision=bf16", "lr=wsd").config
    expected = {
        "batch": 4, "micro_batch": 2, "steps": 12, "precision": "bf16", "seq_len": 32, "data": "markov", "git": "abcd+",
        "teacher_steps": 6, "teacher_lr": 8e-3, "teacher_batch": 2, "lr_schedule": "wsd", "lr_peak": 8e-3,
        "alpha_schedule": "constant", "alpha_peak": 0.9, "temperature_tau": 1.0, "tokens": 12 * 4 * 32,
    }  # fmt: skip
    assert {key: shown.get(key) for key in expected} == expected
    files = description(tmp_path, "data=instructions", "data.files=[a.jsonl,b.jsonl]").config
    assert files["data_files"] == "a.jsonl b.jsonl"
    assert description(tmp_path, "data=hub", "data.name=me/text").config["data_name"] == "me/text"
    alone = description(tmp_path, "logits=none", "teacher=none").config
    assert alone["alpha_peak"] == 0.0 and not alone.keys() & {"alpha_schedule", "teacher_steps"}
    named = description(tmp_path, "teacher=hub", "teacher.name=me/model", "student=100k", "optim=adamw").config
    assert "teacher_steps" not in named  # it was trained elsewhere
    whole = description(tmp_path, "loss=akl", "loss.mu=0.25").settings
    assert whole["loss"] == {"option": "akl", "mu": 0.25} and whole["trainer"]["log_every"] == 1


def test_no_key_is_a_word_in_the_config_and_a_number_in_the_history(tmp_path):
    run = here(tmp_path, "trainer.steps=2")
    history = {key for line in read_metrics(run / "metrics.jsonl") for key in line}
    assert {"lr", "alpha"} <= history  # as before
    shown = description(tmp_path).config
    assert not [key for key in history & shown.keys() if isinstance(shown[key], str)]


def test_runs_that_differ_have_names_that_do(tmp_path):
    axes = ("lr.peak=0.01", "lr.peak=0.02", "temperature.tau=2", "alpha.peak=0.5", "truncation=top_k", "teacher=200k")
    names = [description(tmp_path, word).name for word in axes]
    assert len(set(names)) == len(names)
    assert names[0] == "fkl 100k lr0.01 from 100k alpha0.9 seed0 0123" and " tau2 " in names[2]
    assert description(tmp_path, name="fkl-100k-ffff56789012").name != description(tmp_path).name


def joined(root: Path, name: str) -> None:
    os.environ |= {"WANDB_MODE": "offline", "HOME": str(root)}
    run = Run(root, name)
    wandb(run.folder, WandbMetadata(name, name, None, "distil", ["fkl"], {"loss": "fkl"}))[0].close({"val/lm": 2.6})
    (root / "joined").write_text(str([join(run, run.result(), group) for group in ("first", "second")]))


def test_run_that_was_made_before_its_sweep_gets_into_the_group(tmp_path):
    config = small_config(tmp_path).flat() | {"logger": "wandb", "logger.project": "mine", "logger.entity": None}
    run = Run(tmp_path, "fkl-100k-0123456789ab")
    write_json(run / "result.json", {"config": config, "final": {"val/lm": 2.6}, "environment": {"git": "abcd"}})
    (run / "metrics.jsonl").write_text('{"step": 1, "train/lm": 3.0}\n{"step": 2, "val/lm": 2.6}\n')
    process = FORK.Process(target=joined, args=(tmp_path, run.name))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and (tmp_path / "joined").read_text() == "[True, False]"
    _, second = sorted(run.folder.glob("wandb/offline-run-*"))
    (about_it,) = (line["run"] for line in records(second) if line["type"] == "run")
    assert about_it["run_group"] == "first" and about_it["project"] == "mine" and about_it["run_id"] == wandb_id(run)
    summary = inspect(second)["summary"]
    assert (summary["train/lm"], summary["val/lm"], summary["final/lm"]) == (3.0, 2.6, 2.6)
    assert not [line for line in records(second) if line["type"] == "history"]  # which it has already


def wandb_id(run: Run) -> str:
    return (run / "wandb-id").read_text()


def test_a_run_of_another_sweep_stays_in_its_group(tmp_path):
    config = small_config(tmp_path).flat() | {"logger": "wandb", "sweep": "theirs"}
    run = Run(tmp_path, "run")
    run.folder.mkdir()
    (run / "wandb-id").write_text("theirs")
    assert not join(run, {"config": config, "final": {}}, "mine")
    assert not join(run, {"config": config | {"sweep": None, "logger": "none"}, "final": {}}, "mine")


@contextlib.contextmanager
def silent() -> Iterator[tuple[str, list]]:
    """A server that accepts and never answers: its address, and who has come."""
    came, server = [], socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                came.append(server.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", came
    server.close()


@pytest.fixture
def online(monkeypatch):
    monkeypatch.delenv(loggers.ANSWER, raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(loggers, "WAIT", 0.5)
    yield monkeypatch
    os.environ.pop(loggers.ANSWER, None)


def answered(address: str, path: Path) -> None:
    os.environ |= {"WANDB_BASE_URL": address}
    began = time.monotonic()
    modes = [loggers.wandb_mode(), loggers.wandb_mode()]
    path.write_text(json.dumps([*modes, os.environ[loggers.ANSWER], time.monotonic() - began]))


def test_a_server_of_wandb_that_never_answers_is_asked_once(online, tmp_path):
    with silent() as (address, came):
        process = FORK.Process(target=answered, args=(address, tmp_path / "answer"))
        process.start()
        process.join(60)
        assert len(came) == 1
    *modes, seconds = json.loads((tmp_path / "answer").read_text())
    assert modes == ["offline"] * 3 and seconds < 20


def test_a_server_of_wandb_that_answers_is_taken(online, tmp_path):
    with serving() as (environment, _):
        process = FORK.Process(target=answered, args=(environment["WANDB_BASE_URL"], tmp_path / "answer"))
        process.start()
        process.join(60)
    assert json.loads((tmp_path / "answer").read_text())[:3] == ["online"] * 3


def test_a_sweep_asks_wandb_for_all_of_its_runs(online, tmp_path):
    calls = []
    online.setattr(loggers, "silent_server", lambda: calls.append(1) or "no answer")
    runs = [Run(tmp_path, name) for name in "ab"]
    LocalLauncher()._prepare_wandb("s", runs)
    assert calls == [1] and os.environ[loggers.ANSWER] == "offline"  # which its runs inherit
    del os.environ[loggers.ANSWER]
    os.environ["WANDB_MODE"] = "online"
    Ray(None, 1, 0)._prepare_wandb("s", runs)  # other machines may reach it, or not
    LocalLauncher()._prepare_wandb("s", [])
    assert calls == [1]


def test_a_failed_run_is_a_failed_run_in_wandb(tmp_path):
    words = ("teacher=none", "logits=none", "lr=constant", "lr.peak=1e30", "trainer.clip=0")
    train(tmp_path, "logger=wandb", *words, code=2)
    assert list(folder(tmp_path, "lm").glob("wandb/offline-run-*"))
    shutil.rmtree(tmp_path)


def test_a_sweep_checks_a_run_without_lightning(tmp_path):
    """Lightning takes 2 s to import, and the runs are trained elsewhere."""
    program = """
import sys
from kd.config.compose import composed
from kd.config.schema import ExperimentConfig
from kd.experiment.prerequisites import prepare
from kd.launch.command_line import register

register()
prepare(ExperimentConfig.from_hydra(composed(*sys.argv[1:]), sys.argv[1:]))
print("lightning" in sys.modules)
"""
    command = [sys.executable, "-c", program, *TINY, f"root={tmp_path}"]
    done = subprocess.run(command, cwd=TRAIN.parent, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr
