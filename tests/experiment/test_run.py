"""A run from the command line: made once, resumed exactly, verified, and never half a result."""

import json
import math
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import filelock
import pytest
import torch

from kd.runs.identity import axes, sizes_of
from kd.runs.run import Run
from kd.system.checkpoint_files import DigestIO
from kd.system.signals import ASKED, Preempted, Requests, requests
from kd.training.module import DistillationModule
from tests.refusals import refused
from tests.small import folder, here, outcome, result, shared, start, train, type_in


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A root with one run, from start to end, and its teacher."""
    root = shared(tmp_path_factory, "whole", lambda root: train(root, *RUN, cold=True))
    return Path(shutil.copytree(root, tmp_path_factory.mktemp("whole") / "root"))


@pytest.fixture
def begun(whole, tmp_path) -> Path:
    """A root where data and teacher are made, and the student is not."""
    shutil.copytree(whole, tmp_path / "begun", ignore=lambda _, names: [n for n in names if n.startswith("fkl")])
    return tmp_path / "begun"


RUN = ("truncation=random", "truncation.draws=8")


def kill(root: Path, lines: int, *words: str, after: float = 0.0) -> None:
    """Start the run, and end it with SIGKILL once it has logged so many lines (and a moment later)."""
    process = start(root, *RUN, *words)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        files = list(root.glob("fkl*/metrics.jsonl"))
        if files and files[0].read_bytes().count(b"\n") >= lines:
            time.sleep(after)
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_result_says_what_the_run_was(whole):
    run = folder(whole, "fkl")
    record = result(run)
    assert record["state"] == "done" and record["config"]["truncation"] == "random"
    assert record["tokens"] == 12 * 4 * 32
    assert record["entropy"] < record["final"]["val/lm"] < math.log(16) + 1
    assert record["environment"]["torch"] == torch.__version__
    measures = {"lm", "ece", "fkl", "rkl", "tvd", "agreement", "teacher_lm", "teacher_ece"}
    assert {f"val/{m}" for m in measures} <= record["final"].keys()
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "val/lm" in x] == [5, 10, 12]
    assert [x["step"] for x in lines if "train/loss" in x] == list(range(1, 13))
    assert not (run / "checkpoints").exists()


def test_same_command_again_is_instant_and_touches_nothing(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    began = time.monotonic()
    assert "lm " in train(whole, *RUN)
    assert time.monotonic() - began < 20
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_student_loads_with_plain_transformers_and_says_the_same(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder(whole, "fkl") / "student"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = tokenizer("s1 s2 s3", return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 3) and model(ids).logits.shape == (1, 3, 17)
    assert "knowledge-distillation" in (path / "README.md").read_text()


def test_teacher_is_the_run_of_its_own_command(whole, tmp_path):
    train(tmp_path, "logits=none", "teacher=none", "trainer.steps=6", "trainer.batch=2", "trainer.micro_batch=2",
          "trainer.val_every=100", "trainer.log_every=20")  # fmt: skip
    assert folder(tmp_path, "lm").name == folder(whole, "lm").name
    assert outcome(folder(tmp_path, "lm")) == outcome(folder(whole, "lm"))


SOME = [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("seed", SOME)
def test_killed_anywhere_ends_bit_for_bit_as_if_never_killed(whole, begun, seed):
    rng = random.Random(seed)
    for _ in range(3):
        kill(begun, rng.randrange(1, 15), after=rng.random() * 0.05)
    train(begun, *RUN)
    assert outcome(folder(begun, "fkl")) == outcome(folder(whole, "fkl"))


def test_killed_while_the_teacher_is_made(whole, tmp_path):
    process = start(tmp_path, *RUN)
    while not list(tmp_path.glob("lm*/metrics.jsonl")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    train(tmp_path, *RUN)
    assert outcome(folder(tmp_path, "fkl")) == outcome(folder(whole, "fkl"))


def newest(root: Path) -> Path:
    return max((folder(root, "fkl") / "checkpoints").glob("*.ckpt"))


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, begun):
    kill(begun, 13)  # 12 steps and 2 validations: checkpoints at 6 and 9
    damaged = newest(begun)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    output = train(begun, *RUN)
    assert f"{damaged} is damaged" in output.replace("\n", "")
    assert outcome(folder(begun, "fkl")) == outcome(folder(whole, "fkl"))


def test_all_checkpoints_damaged_is_an_error_that_says_what_to_type(begun):
    kill(begun, 13)
    for path in (folder(begun, "fkl") / "checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-100])
    output = train(begun, *RUN, code=2)
    assert "rm -r" in output and "Traceback" not in output


def test_checkpoint_holds_no_teacher_and_no_code(begun):
    kill(begun, 13)
    checkpoint = torch.load(newest(begun), weights_only=True)
    assert not any("outside" in k or "teacher" in k for k in checkpoint["state_dict"])
    assert all(k.startswith("student.") for k in checkpoint["state_dict"])


def test_folder_in_use_by_another_process_is_an_error(begun):
    kill(begun, 3)
    with filelock.FileLock(folder(begun, "fkl") / ".lock"):
        output = train(begun, *RUN, code=2)
    assert "is being used by another process" in output and "Traceback" not in output


def test_non_finite_loss_is_a_failure_and_no_result(begun):
    output = train(begun, "lr=constant", "lr.peak=1e30", "trainer.clip=0", code=2)
    run = folder(begun, "fkl")
    report = json.loads((run / "state.json").read_text())
    assert "not finite" in report["reason"] and report["rows"] and report["largest_weights"]
    assert not (run / "result.json").exists() and not (run / "student").exists()
    assert str(run / "state.json") in output.replace("\n", "")


def test_sigterm_is_no_success(begun):
    process = start(begun, *RUN, "trainer.steps=3000")
    while not list(begun.glob("fkl*/metrics.jsonl")):
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 143


def test_full_disk_says_so_and_leaves_no_half_file(begun):
    process = start(begun, *RUN, "trainer.steps=13")
    while not list(begun.glob("fkl*/metrics.jsonl")):
        time.sleep(0.005)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    output = process.communicate()[0]
    assert process.returncode == 2, output
    assert "the disk is full" in output and "Traceback" not in output
    assert not [p for p in begun.rglob("*.tmp")] and not list(begun.glob("fkl*/checkpoints/*.ckpt"))
    train(begun, *RUN, "trainer.steps=13")


def test_micro_batches_change_the_result_by_rounding_only(whole, begun):
    train(begun, *RUN, "trainer.micro_batch=4")
    one, two = result(folder(whole, "fkl"))["final"], result(folder(begun, "fkl"))["final"]
    assert one["val/lm"] == pytest.approx(two["val/lm"], abs=1e-5)


def test_settings_without_effect_are_no_part_of_a_run(whole):
    output = train(whole, *RUN, "trainer.checkpoint_every=7", "sweep=other")
    assert len(list(whole.glob("fkl*"))) == 1, output


def test_unknown_sweep_is_no_run(begun):
    assert "demo" in train(begun, "sweeps=nope", code=2)


def test_works_from_any_folder(tmp_path, whole):
    os.makedirs(tmp_path / "elsewhere")
    output = train(tmp_path / "elsewhere", *RUN, "root=../made")
    assert (tmp_path / "made").is_dir() and "All of it: ../made/fkl" in output.replace("\n", "")


def test_student_with_dropout_resumes_exactly_and_uses_it_from_the_start(begun):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = next((begun / "data").glob("*/tokenizer"))
    config = GPT2Config(vocab_size=17, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5)
    GPT2LMHeadModel(config).save_pretrained(begun / "gpt2")
    shutil.copytree(tokenizer, begun / "gpt2", dirs_exist_ok=True)
    words = (*RUN, "student=hub", f"student.name={begun / 'gpt2'}")
    shutil.copytree(begun, begun.parent / "whole", ignore=shutil.ignore_patterns("gpt2"))
    train(begun.parent / "whole", *words)
    kill(begun, 5, *words[2:])
    train(begun, *words)
    assert outcome(folder(begun, "fkl")) == outcome(folder(begun.parent / "whole", "fkl"))


def test_damaged_teacher_is_named_and_not_used(begun):
    weights = folder(begun, "lm") / "student" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    output = train(begun, *RUN, code=2)
    assert f"{weights.parent} is damaged" in output.replace("\n", "") and not list(begun.glob("fkl*/result.json"))


def test_a_signal_that_python_loses_is_not_forgotten():
    """Lose the exception, as in a callback of the garbage collector or of an import."""
    requests_of_process, handlers = Requests(), {number: signal.getsignal(number) for number in ASKED}
    try:
        requests_of_process.watch()
        with pytest.raises(Preempted):
            requests_of_process._received(signal.SIGTERM, None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    with pytest.raises(Preempted):
        requests_of_process.end_if_asked()


def test_a_damaged_state_is_said_and_stops_nothing(tmp_path):
    run = Run(tmp_path, "x")
    run.folder.mkdir()
    (run / "state.json").write_text("{")
    assert run.state()["state"] == "not begun" and "state.json is damaged" in run.state()["reason"]


def test_axes_are_a_level_deep_without_dots_and_none_without_a_meaning():
    config = {
        "seed": 3, "data": "python", "data.seq_len": 256, "data.tokens": None, "logits": "online", "logits.path": "/x",
        "student.size": "200k", "student.name": None, "teacher.size": None, "teacher.name": "a/big", "teacher.seed": 0,
        "truncation": "top_k", "truncation.k": 50, "temperature": "fixed", "temperature.tau": 2.0, "loss": "jsd",
        "loss.beta": 0.5, "alpha": "wsd", "alpha.peak": 0.9, "lr": "cosine", "lr.peak": 1e-3, "optim": "AdamW",
        "optim.betas": [0.9, 0.95], "trainer.steps": 10, "trainer.batch": 4, "root": "runs", "rollout": "student",
        "rollout.share": 0.5, "rollout.top_k": None,
    }  # fmt: skip
    sizes = {"student": (20, 10), "teacher": (200, 100)}
    assert axes(config, sizes) == {
        "seed": 3, "data": "python", "logits": "online", "student": "200k", "teacher": "big", "truncation": "top_k",
        "truncation_k": 50, "temperature": "fixed", "temperature_tau": 2.0, "loss": "jsd", "loss_beta": 0.5,
        "alpha_schedule": "wsd", "alpha_peak": 0.9, "lr_schedule": "cosine", "lr_peak": 1e-3, "optim": "AdamW",
        "tokens": 10240, "batch": 4, "steps": 10, "seq_len": 256,
        "rollout": "student", "rollout_share": 0.5,
        "student_params": 20, "student_params_non_embedding": 10,
        "teacher_params": 200, "teacher_params_non_embedding": 100,
    }  # fmt: skip
    alone = axes(config | {"logits": "none"}, {"student": (20, 10)})
    assert alone["loss"] == "lm" and alone["alpha_peak"] == 0 and alone["lr_peak"] == 1e-3
    assert not {"alpha", "temperature", "temperature_tau", "truncation", "loss_beta"} & alone.keys()


def test_sizes_are_read_back_from_a_result():
    result = {"parameters": 20, "non_embedding": 10, "teacher_parameters": None, "teacher_non_embedding": None}
    assert sizes_of(result) == {"student": (20, 10)}
    assert sizes_of(result | {"teacher_parameters": 200, "teacher_non_embedding": 100})["teacher"] == (200, 100)
    assert sizes_of({"parameters": 20}) == {}  # of an earlier version


# Asked to end within a step

INSTRUCTIONS = ("data=instructions", "data.seq_len=48", "data.val_rows=4", "data.val_share=0.2",
                "data.template=plain", "data.vocab=300",
                "start=pretrained", "start.steps=2", "start.batch=2", "plain=text")  # fmt: skip
STEPS = 5  # of the student alone


class Asked:
    """Has this process asked to end before a step of the student, or within it after so many micro-batches."""

    def __init__(self, monkeypatch, step: int, micro_batches: int | None):
        self.calls = 0
        backward, on_end, step_of = (
            getattr(DistillationModule, name) for name in ("manual_backward", "on_train_batch_end", "training_step")
        )

        def asks(module, now: bool) -> None:
            requests.pending |= module.max_steps == STEPS and module.global_step == step and now

        def training_step(module, *args):
            self.calls = 0
            asks(module, micro_batches == 0)
            step_of(module, *args)

        def manual_backward(module, *args):
            backward(module, *args)
            self.calls += 1
            asks(module, self.calls == micro_batches)

        def on_train_batch_end(module, *args):
            on_end(module, *args)
            asks(module, micro_batches is None)

        for function in (training_step, manual_backward, on_train_batch_end):
            monkeypatch.setattr(DistillationModule, function.__name__, function)


def interrupted(root: Path, monkeypatch, step: int, micro_batches: int | None, *words: str) -> Path:
    """The run folder after the run was asked to end there."""
    with monkeypatch.context() as patch:
        Asked(patch, step, micro_batches)
        with pytest.raises(Preempted):
            here(root, *words)
    assert requests.pending
    requests.pending = False
    return next(path.parent.parent for path in root.glob("*/checkpoints/*.ckpt"))


def alike(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(k in ("seconds", "step_times") or alike(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


@pytest.mark.parametrize(
    ("words", "micro_batches"),
    [(("logits=none", "teacher=none"), 1), (("logits=none", "teacher=none", "record=top_k", "record.k=4"), 2),
     (("logits=cotrained",), 2), ((*INSTRUCTIONS, "rollout=student", "rollout.share=1"), 0),
     pytest.param((*INSTRUCTIONS, "rollout=adaptive", "rollout.threshold=0.9", "rollout.capacity=8"), 2,
                  marks=pytest.mark.slow),
     pytest.param((*INSTRUCTIONS, "rollout=mixed", "rollout.epochs=2", "loss=minillm"), 2, marks=pytest.mark.slow)],
    ids=["lm", "recorded", "cotrained", "student", "adaptive", "mixed"],
)  # fmt: skip
def test_a_run_that_is_asked_to_end_within_a_step_saves_the_last_whole_one(tmp_path, monkeypatch, words, micro_batches):
    words = (*words, "trainer.batch=6", "trainer.micro_batch=2", f"trainer.steps={STEPS}")
    words += ("trainer.checkpoint_every=100",)
    if "data=instructions" in words:
        rows = [{"prompt": f"{a} plus {b} is", "response": f" {a + b}."} for a in range(10) for b in range(5)]
        (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "plain.txt").write_text("\n\n".join(f"Line {i} is about {i} and {i + 1}." for i in range(400)))
        words += (f"data.files={tmp_path / 'sums.jsonl'}", f"plain.files={tmp_path / 'plain.txt'}")
    clean = here(tmp_path / "clean", *words)
    for name in ("between", "within"):  # with data and teacher
        shutil.copytree(tmp_path / "clean", tmp_path / name, ignore=shutil.ignore_patterns(clean.name, "stores"))
    between = interrupted(tmp_path / "between", monkeypatch, 3, None, *words)
    within = interrupted(tmp_path / "within", monkeypatch, 3, micro_batches, *words)
    (one,), (other,) = (list((run / "checkpoints").glob("*.ckpt")) for run in (between, within))
    assert one.name == other.name == "step-00000003.ckpt"
    assert alike(torch.load(one, weights_only=True), torch.load(other, weights_only=True))
    assert here(tmp_path / "within", *words) == within
    assert outcome(within) == outcome(clean)


def test_a_step_that_was_saved_is_not_saved_again_and_one_that_nothing_came_before_is_not_at_all(tmp_path, monkeypatch):
    words = ("logits=none", "teacher=none", "trainer.batch=4", "trainer.micro_batch=1", "trainer.checkpoint_every=2")
    words += (f"trainer.steps={STEPS}",)
    run = interrupted(tmp_path, monkeypatch, 4, 2, *words)
    newest = run / "checkpoints" / "step-00000004.ckpt"
    written = newest.stat().st_mtime_ns
    interrupted(tmp_path, monkeypatch, 4, 1, *words)  # in the step that it goes on with
    assert newest.stat().st_mtime_ns == written
    with monkeypatch.context() as patch:
        Asked(patch, 0, 1)
        with pytest.raises(Preempted):
            here(tmp_path / "new", *words)
    requests.pending = False
    assert not list(tmp_path.glob("new/*/checkpoints/*"))


def test_a_checkpoint_of_another_version_is_refused_with_what_to_type(tmp_path, monkeypatch):
    words = ("logits=none", "teacher=none", "trainer.batch=4", "trainer.micro_batch=2", f"trainer.steps={STEPS}")
    run = interrupted(tmp_path, monkeypatch, 4, None, *words)
    path = max((run / "checkpoints").glob("*.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    for change in ({"format": checkpoint["format"] + 1}, {"format": None}):
        DigestIO().save_checkpoint(checkpoint | change, path)
        with refused(option=path, why="saved by another version of kd", commands="rm -r ") as caught:
            here(tmp_path, *words)
    type_in(str(caught.value))
    assert here(tmp_path, *words) == run and result(run)["state"] == "done"


def test_a_batch_larger_than_the_data_is_said(tmp_path, capsys):
    here(tmp_path, "logits=none", "teacher=none", "trainer.steps=1", "trainer.batch=100", "trainer.micro_batch=50")
    assert "A batch of 100 rows is larger than the data, of 60 rows" in capsys.readouterr().err
    here(tmp_path, "logits=none", "teacher=none", "trainer.steps=1", "trainer.batch=60", "trainer.micro_batch=60")
    assert "larger than the data" not in capsys.readouterr().err
