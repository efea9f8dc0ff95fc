"""Tests that need a GPU. Skipped without CUDA; `pytest -m gpu` runs these alone, in a minute and a half.

KD_TEST_ON_CPU=1 runs them on a CPU instead, to see that the tests themselves work.
"""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from kd.data.batches import IGNORE, Batches
from kd.models import causal_lm
from kd.objective.chunked import Objective
from kd.objective.target import Target
from kd.objective.target_transforms import renormalise
from kd.objective.temperature import fixed
from kd.objective.truncation import full
from kd.parallel import fsdp
from kd.teachers.online import OnlineTeacher
from kd.training.module import DistillationModule, Schedules
from tests.cases import FORMS, LOSSES, TRUNCATIONS, each, option, token_info
from tests.cases import logits as random_logits
from tests.small import folder, here, result, small_words, start, train

DEVICE = torch.device("cpu" if os.environ.get("KD_TEST_ON_CPU") else "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]
FEW = ("trainer.steps=4", "trainer.val_every=4", "teacher.steps=4")
SOURCES = {
    "none": ("logits=none", "teacher=none", "student=200k"),
    "online": ("logits=online",),
    "top_k": ("logits=offline", "truncation=top_k", "truncation.k=5"),
    "random": ("logits=offline", "truncation=random", "truncation.draws=20"),
    "full": ("logits=offline", "loss=jsd"),
    "cotrained": ("logits=cotrained",),
    "recorded": ("logits=recorded", "truncation=top_k", "truncation.k=5"),
    "entropy": ("logits=online", "routing=entropy", "routing.share=0.3"),
}


def run(root: Path, *words: str) -> dict:
    """Result of a tiny run on the device, its weights under `student`."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    path = here(
        root, *small_words(FEW, words), *words, f"trainer.accelerator={'gpu' if DEVICE.type == 'cuda' else 'cpu'}"
    )
    return result(path) | {"student": load_file(path / "student" / "model.safetensors")}


def on_cpu(root: Path, *words: str) -> dict:
    path = here(root, *small_words(FEW, words), *words, "trainer.accelerator=cpu")
    return result(path) | {"student": load_file(path / "student" / "model.safetensors")}


def near(one: dict, two: dict, tolerance: float) -> None:
    """Assert that two runs ended with the same measures and weights, but for rounding."""
    for name, value in one["final"].items():
        assert value == pytest.approx(two["final"][name], rel=tolerance, abs=tolerance), name
    for name, weight in one["student"].items():
        torch.testing.assert_close(weight, two["student"][name], rtol=10 * tolerance, atol=tolerance, msg=name)


@each("words", SOURCES)
def test_each_source_learns_what_it_learns_on_a_cpu(words, tmp_path):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "cpu").mkdir()
    ours = run(tmp_path / "gpu", *words)
    near(ours, on_cpu(tmp_path / "cpu", *words), 2e-3)
    assert ours["flops"] > 0 and ours["peak_memory"] > 0


@each("words", {name: SOURCES[name] for name in ("none", "online", "top_k", "full", "cotrained")})
def test_bf16_stays_near_fp32(words, tmp_path):
    half, whole = run(tmp_path, *words, "trainer.precision=bf16"), run(tmp_path, *words)
    assert half["final"]["val/lm"] == pytest.approx(whole["final"]["val/lm"], abs=0.05)
    assert half["run"] != whole["run"]


@each("form", FORMS)
@each("loss", LOSSES)
def test_losses_and_gradients_equal_those_of_a_cpu(loss, form):
    student, target = random_logits(3), form(random_logits(1))
    expected = student.clone().requires_grad_()
    loss(expected.log_softmax(-1), target).sum().backward()
    ours = student.float().to(DEVICE).requires_grad_()
    loss(ours.log_softmax(-1), moved(target)).sum().backward()
    torch.testing.assert_close(ours.grad.cpu().double(), expected.grad, rtol=1e-3, atol=1e-4)


def moved(target):
    """A target on the device, in float32."""

    def move(x):
        return x.to(DEVICE, torch.float32 if x.is_floating_point() else x.dtype)

    values = {name: move(x) if isinstance(x, torch.Tensor) else x for name, x in vars(target).items()}
    values["token_info"] = target.token_info.map(move)
    return type(target)(**values)


CUTS = {"full": full, "top_k": TRUNCATIONS["top_k-k=5"], "top_p": TRUNCATIONS["top_p"]}


@each("cut", CUTS)
@each("loss", {name: LOSSES[name] for name in ("fkl", "jsd", "akl")} if DEVICE.type == "cpu" else LOSSES)
def test_compiled_loss_equals_the_eager_one(loss, cut):
    torch._dynamo.reset()
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1000, bias=False, device=DEVICE)
    hidden = torch.randn(300, 64, device=DEVICE, requires_grad=True)
    label = torch.randint(1000, (300,), device=DEVICE)
    other = torch.randn(300, 1000, device=DEVICE).log_softmax(-1)
    info = token_info(300, torch.float32).to(DEVICE)

    def signal(rows):
        return Target(label, other, complete=True, token_info=info)[rows]

    sums = []
    for compiled in (False, True):
        objective = Objective(loss, cut, renormalise, fixed, chunk=128, compile=compiled)
        total, kd, lm = objective(head, hidden, label, signal, 0.7)
        sums.append([*torch.autograd.grad(total, (hidden, head.weight)), total, kd, lm])
    # By norm: where p and q are equal but for rounding, the gradient of tvd has either sign.
    for eager, fused in zip(*sums, strict=True):
        assert (fused - eager).norm() <= 1e-3 * eager.norm()


def test_compiled_run_equals_the_eager_one(tmp_path):
    eager = run(tmp_path, "logits=online")
    (tmp_path / "compiled").mkdir()
    near(run(tmp_path / "compiled", "logits=online", "trainer.compile=true"), eager, 2e-3)


def instructions(root: Path) -> tuple[str, ...]:
    """Fifty sums, plain text to pretrain on, and a few steps of each stage."""
    rows = [{"prompt": f"{a} plus {b} is", "response": f" {a + b}."} for a in range(10) for b in range(5)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "plain.txt").write_text("\n\n".join(f"Line {i} is about {i} and {i + 1}." for i in range(400)))
    return (
        "data=instructions", "data.seq_len=48", "data.val_rows=6", f"data.files={root / 'sums.jsonl'}",
        "data.template=plain", "data.vocab=300", "data.val_share=0.2", "responses.samples=1", "start=pretrained",
        "start.steps=4", "plain=text", f"plain.files={root / 'plain.txt'}",
    )  # fmt: skip


@each("words", {
    "student": ("rollout=student", "rollout.share=1", "loss=jsd", "alpha.peak=1", "trainer.precision=bf16"),
    "mixed": ("rollout=mixed", "loss=minillm"),
    "teacher": ("rollout=teacher", "logits=none"),
})  # fmt: skip
def test_rollouts_write_and_learn(words, tmp_path):
    ended = run(tmp_path, *instructions(tmp_path), *words)
    assert 0 < ended["final"]["val/lm"] < 10
    assert "val/rouge_l" in ended["final"]


def test_out_of_memory_halves_the_rows(tmp_path, capsys):
    words = ("logits=none", "teacher=none", "student=1m", "data.tokens=80000", "trainer.batch=1024", "trainer.steps=2")
    if DEVICE.type != "cuda":
        pytest.skip("a CPU has no limit to set")
    torch.cuda.empty_cache()
    free = torch.cuda.memory_reserved() + 2**30
    torch.cuda.set_per_process_memory_fraction(free / torch.cuda.get_device_properties(0).total_memory)
    try:
        ended = run(tmp_path, *words, "trainer.micro_batch=1024")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert ended["micro_batch"] < 1024
    (tmp_path / "whole").mkdir()
    near(ended, run(tmp_path / "whole", *words, f"trainer.micro_batch={ended['micro_batch']}"), 2e-3)


class _Kept(lightning.Callback):
    """Losses of the training steps."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, *_):
        self.losses.append(module.last_step.metrics["loss"])


def losses(strategy, sharded: tuple[str, ...], checkpoint: Path | None = None) -> list[float]:
    torch.manual_seed(0)
    student, teacher = (causal_lm.build_model(size, None, 300, 64, "size") for size in ("200k", "500k"))
    module = DistillationModule(
        student, OnlineTeacher(teacher), Objective(option("loss", "fkl"), full, renormalise, fixed),
        Schedules(lambda progress: 0.9, lambda progress: 1e-3), partial(torch.optim.AdamW, weight_decay=0.1),
        max_steps=4, micro_batch_size=4, grad_clip=1.0, sharded=sharded,
    )  # fmt: skip
    recorder = _Kept()
    trainer = lightning.Trainer(
        accelerator=DEVICE.type, devices=1, max_steps=4, max_epochs=-1, callbacks=[recorder], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
        strategy=strategy or "auto", default_root_dir=checkpoint,
    )  # fmt: skip
    rows = torch.randint(0, 300, (32, 65), generator=torch.Generator().manual_seed(0)).numpy()
    trainer.fit(module, Batches(rows, 8, 0, 0, 4))
    if sharded:
        trainer.save_checkpoint(checkpoint / "step-4.ckpt")
        trainer.strategy.finish_writing()
        assert next(iter(student.parameters())).device.type == DEVICE.type
        assert any(fsdp.is_sharded(p) for p in student.parameters())
    return recorder.losses


def test_fsdp2_on_one_device_equals_no_fsdp(tmp_path, monkeypatch):
    expected = losses(None, ())
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29541")):
        monkeypatch.setenv(name, value)
    dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo", rank=0, world_size=1)
    try:
        ours = losses(fsdp.FSDP2Strategy(1), ("student", "teacher"), tmp_path)
    finally:
        dist.destroy_process_group()
    assert ours == pytest.approx(expected, rel=1e-4)
    assert list((tmp_path / "step-4.ckpt").glob("*.distcp"))


def test_killed_and_resumed_ends_as_if_never_killed(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    # Cold: torch for CUDA starts a thread while it is loaded, and such a process cannot be forked.
    train(tmp_path / "whole", "trainer.precision=bf16", cold=True)
    process = start(tmp_path / "killed", "trainer.precision=bf16", cold=True)
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        lines = [f.read_bytes().count(b"\n") for f in (tmp_path / "killed").glob("fkl*/metrics.jsonl")]
        if lines and lines[0] >= 8:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list((tmp_path / "killed").glob("fkl*/checkpoints/*.ckpt"))
    train(tmp_path / "killed", "trainer.precision=bf16", cold=True)
    ends = [folder(tmp_path / name, "fkl") for name in ("whole", "killed")]
    one, two = ([json.loads(line) for line in (e / "metrics.jsonl").read_text().splitlines()] for e in ends)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-3)
    weights = [load_file(e / "student" / "model.safetensors") for e in ends]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=2e-2, atol=2e-3, msg=name)


def test_masked_positions_reach_no_loss():
    """Labels of IGNORE on the device index nothing: an out-of-range index would be a device assert."""
    torch.manual_seed(0)
    student = causal_lm.build_model("100k", None, 300, 32, "size").to(DEVICE)
    ids = torch.randint(0, 300, (4, 32), device=DEVICE)
    labels = ids.clone()
    labels[:, ::2] = IGNORE
    mask = labels != IGNORE
    objective = Objective(option("loss", "fkl"), full, renormalise, fixed)
    sums = objective(student.head, student.hidden_states(ids)[mask], labels[mask], None, 0.0)
    assert torch.isfinite(sums.total)
