"""Several processes that do one run equal one process to rounding, resume exactly, and end together."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd.parallel import collectives
from tests.refusals import refused
from tests.small import folder, outcome, result, small_config, start, train

pytestmark = pytest.mark.slow

TWO = ("trainer=ddp",)
SOURCES = {
    "none": ("logits=none", "teacher=none", "student=200k"),
    "online": ("logits=online",),
    "offline": ("logits=offline", "truncation=top_k", "truncation.k=5"),
    "cotrained": ("logits=cotrained",),
    "routed": ("logits=online", "routing=entropy", "routing.share=0.3"),
}


def run_of(root: Path) -> Path:
    """The student's run: the one that was made last."""
    return max(root.glob("*/config.json"), key=lambda p: p.stat().st_mtime_ns).parent


def near(one: Path, two: Path) -> None:
    """Assert that two runs measured, and made, the same but for rounding."""
    pairs = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (one, two)]
    assert len(pairs[0]) == len(pairs[1])
    for a, b in zip(*pairs, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    a, b = (load_file(r / "student" / "model.safetensors") for r in (one, two))
    for name, weight in a.items():
        assert torch.allclose(weight, b[name], rtol=1e-3, atol=1e-4), (name, (weight - b[name]).abs().max())


@pytest.mark.parametrize("source", SOURCES)
def test_two_processes_equal_one(root, source):
    words = SOURCES[source]
    train(root, *words)
    one = run_of(root)
    alone = shutil.move(one, root.parent / "alone")
    train(root, *words, *TWO)
    assert run_of(root).name == one.name
    near(alone, run_of(root))
    a, b = result(alone), result(run_of(root))
    assert {k: a[k] for k in ("tokens", "flops", "train_rows")} == {k: b[k] for k in ("tokens", "flops", "train_rows")}


@pytest.mark.parametrize("source", SOURCES)
def test_two_shards_equal_one_process(root, source):
    words = (*SOURCES[source], "data.val_rows=7", *(["trainer.shard_teacher=true"] if source == "online" else []))
    train(root, *words[: len(SOURCES[source]) + 1])
    one = run_of(root)
    alone = shutil.move(one, root.parent / "alone")
    train(root, *words, "trainer=fsdp")
    near(alone, run_of(root))


@pytest.mark.parametrize("devices", ["ddp", "fsdp"])
def test_layers_that_are_computed_again_change_nothing(root, devices):
    """Compare with the run without them: bit for bit on a CPU, since the same products are computed."""
    words = ("logits=online", f"trainer={devices}")
    train(root, *words)
    plain = outcome(shutil.move(run_of(root), root.parent / "plain"))
    train(root, *words, "trainer.gradient_checkpointing=true")
    assert outcome(run_of(root)) == plain


def test_shares_need_not_be_even(root):
    words = ("trainer.batch=5", "data.val_rows=5")
    train(root, *words)
    one = shutil.move(run_of(root), root.parent / "alone")
    train(root, *words, "trainer.devices=3", "trainer.micro_batch=1")
    near(one, run_of(root))


def test_same_command_again_starts_no_process(root):
    train(root, *TWO)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    train(root, *TWO)
    train(root)  # in how many processes is no part of a run
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def test_damaged_shard_is_found_and_the_checkpoint_before_is_used(root):
    words = ("trainer=fsdp",)
    whole = Path(shutil.copytree(root, root.parent / "whole"))
    train(whole, *words)
    process = start(root, *words)
    wait_for(13, root, process)  # 12 steps and 2 validations: checkpoints at 6 and 9
    process.kill()
    process.wait()
    assert gone(root, 5)
    damaged = max(root.glob("fkl*/checkpoints/*.ckpt"))
    shard = max(damaged.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    output = train(root, *words)
    assert output.replace("\n", "").count(f"{damaged} is damaged") == 1
    assert outcome(folder(root, "fkl")) == outcome(folder(whole, "fkl"))


def test_replicated_student_of_a_sharded_teacher(root):
    train(root)
    one = shutil.move(run_of(root), root.parent / "alone")
    train(root, *TWO, "trainer.shard_teacher=true")
    near(one, run_of(root))


def ranks_of(root: Path) -> list[int]:
    """The ranks of a run in `root`, by their ids."""
    pids = subprocess.run(["pgrep", "-f", r"train\.py --rank"], capture_output=True, text=True).stdout.split()
    return [int(p) for p in pids if Path(f"/proc/{p}/cwd").exists() and os.readlink(f"/proc/{p}/cwd") == str(root)]


def wait_for(lines: int, root: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(p.read_bytes().count(b"\n") >= lines for p in root.glob("fkl*/metrics.jsonl")):
            return
        time.sleep(0.002)
    raise AssertionError(process.communicate()[0])


def gone(root: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while ranks_of(root) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not ranks_of(root)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_with_its_ranks_goes_on_bit_for_bit(root, strategy):
    """Students with dropout: every rank goes on with the random numbers that it had."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = next((root / "data").glob("*/tokenizer"))
    config = GPT2Config(vocab_size=17, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5)
    GPT2LMHeadModel(config).save_pretrained(root.parent / "gpt2")
    shutil.copytree(tokenizer, root.parent / "gpt2", dirs_exist_ok=True)
    words = ("student=hub", f"student.name={root.parent / 'gpt2'}", f"trainer={strategy}")
    whole = Path(shutil.copytree(root, root.parent / "whole"))
    train(whole, *words)
    process = start(root, *words)
    wait_for(9, root, process)
    process.kill()
    process.wait()
    assert gone(root, 5)
    saved = list(root.glob("fkl*/checkpoints/*.ckpt"))
    assert saved and all(path.is_dir() == (strategy == "fsdp") for path in saved)
    other = {"ddp": "fsdp", "fsdp": "ddp"}[strategy]
    output = train(root, *words[:2], f"trainer={other}", code=2)
    assert f"trainer.strategy={strategy}" in output and "Traceback" not in output
    train(root, *words)
    assert outcome(folder(root, "fkl")) == outcome(folder(whole, "fkl"))


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_dies_ends_the_run_as_failed_and_leaves_no_other(root, number):
    process = start(root, *TWO, "trainer.steps=3000")
    wait_for(3, root, process)
    os.kill(rank := sorted(ranks_of(root))[number], signal.SIGKILL)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 2 and rank and "SIGKILL" in output and "Traceback" not in output, output
    assert "killed by SIGKILL" in json.loads((folder(root, "fkl") / "state.json").read_text())["reason"]
    assert gone(root, 1) and not list(root.glob("fkl*/result.json"))


def test_ranks_start_again_and_the_run_ends_bit_for_bit(root):
    whole = Path(shutil.copytree(root, root.parent / "whole"))
    train(whole, *TWO)
    process = start(root, *TWO, "trainer.max_restarts=1")
    wait_for(9, root, process)
    os.kill(max(ranks_of(root)), signal.SIGKILL)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and "Traceback" not in output, output
    assert outcome(folder(root, "fkl")) == outcome(folder(whole, "fkl"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_asked_to_end_its_ranks_save_a_checkpoint_and_end_too(root, strategy):
    process = start(root, f"trainer={strategy}", "trainer.steps=3000")
    wait_for(3, root, process)
    process.send_signal(signal.SIGSTOP)  # so that what follows reaches it at one moment, however busy the machine is
    for pid in (process.pid, *ranks_of(root)):  # as SLURM does, and one more for the same reason
        os.kill(pid, signal.SIGUSR2)
    process.terminate()
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 143 and gone(root, 1)
    state = json.loads((folder(root, "fkl") / "state.json").read_text())
    step = int(re.search(r"step (\d+) of 3000", state["reason"])[1])
    assert state["state"] == "preempted"
    assert (folder(root, "fkl") / "checkpoints" / f"step-{step:08}.ckpt").exists()


def test_what_is_not_finite_is_said_once_with_the_rows_of_all_ranks(root):
    words = ("lr=constant", "lr.peak=1e30", "trainer.clip=0", "trainer.max_restarts=1")  # it would be so again
    output = train(root, *TWO, *words, code=2)
    report = json.loads((folder(root, "fkl") / "state.json").read_text())
    assert "not finite" in report["reason"] and len(report["rows"]) == 4
    assert output.count("not finite") == 1 and "Traceback" not in output


def test_in_a_sweep(root):
    output = train(root, "-m", "loss=rkl,tvd", "trainer.steps=3", *TWO)
    assert len(list(root.glob("rkl*/result.json"))) == len(list(root.glob("tvd*/result.json"))) == 1, output
    configs = [json.loads(p.read_text()) for p in root.glob("*/config.json")]
    assert sorted(c["trainer"]["devices"] for c in configs) == [1, 2, 2]  # the teacher was made by one


@pytest.mark.parametrize(
    ("words", "option", "fields"),
    [
        (("trainer.devices=5",), "devices", {"hint": "trainer.batch=5"}),
        (("trainer.devices=2", "logits=none", "record=top_k"), "devices", {"hint": "trainer.devices=1"}),
        (("trainer.strategy=horovod",), "strategy", {"need": "ddp"}),
        (("trainer.strategy=fsdp",), "strategy", {"hint": "trainer.devices=2"}),
        (("trainer=fsdp", "trainer.batch=5"), "strategy", {"hint": "trainer.batch=4"}),
        (("trainer=fsdp", "trainer.compile=true"), "strategy", {"hint": "leave trainer.compile out"}),
        (("trainer=ddp", "logits=offline", "trainer.shard_teacher=true"), "shard_teacher", {"why": "no teacher"}),
        (
            ("trainer=ddp", "logits=cotrained", "trainer.shard_teacher=true"),
            "shard_teacher",
            {"hint": "trainer.strategy=fsdp"},
        ),
    ],
)
def test_what_cannot_be_shared_out_is_said_with_what_to_type(tmp_path, words, option, fields):
    with refused(option=f"trainer.{option}", **fields):
        small_config(tmp_path, *words)


def test_shares_cover_every_row_once(monkeypatch):
    for count in range(1, 6):
        monkeypatch.setattr(collectives, "world_size", lambda count=count: count)
        for rows in range(12):
            covered = []
            for number in range(count):
                monkeypatch.setattr(collectives, "rank", lambda number=number: number)
                covered += range(rows)[collectives.rank_slice(rows)]
            assert covered == list(range(rows))
