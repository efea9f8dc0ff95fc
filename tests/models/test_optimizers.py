"""muP: what a width does to a step, and nothing else. Moments of 8 bits: near, and exactly resumed."""

import shutil
import sys
from functools import partial

import pytest
import torch

from kd.config import sizes
from kd.models import causal_lm
from kd.models.optimizers import adamw8, mup
from kd.teachers.none import NoTeacher
from kd.training.module import DistillationModule
from tests.refusals import refused
from tests.small import here, outcome, small_config


def groups(size: str) -> dict[str, dict]:
    """Options of the optimizer's group that a parameter is in, by its name."""
    student = causal_lm.build_model(size, None, 50, 8, "student.name")
    module = DistillationModule(
        student, NoTeacher(), None, None, mup, max_steps=1, micro_batch_size=1, grad_clip=0
    )  # fmt: skip
    group = {id(p): g for g in module.configure_optimizers().param_groups for p in g["params"]}
    return {name.removeprefix("model."): group[id(p)] for name, p in student.model.named_parameters()}


def test_width_divides_the_rate_of_inner_matrices_alone():
    by_name = groups("500k")  # 128 wide
    inner, outer = by_name["layers.0.self_attn.q_proj.weight"], by_name["embed_tokens.weight"]
    vectors = by_name["norm.weight"]
    assert inner["scale"] == 64 / 128 and outer["scale"] == vectors["scale"] == 1
    # The decay of a step is rate times decay: that of plain AdamW.
    assert inner["scale"] * inner["weight_decay"] == pytest.approx(0.1) and outer["weight_decay"] == 0.1
    assert vectors["weight_decay"] == 0


def test_an_output_layer_of_its_own_is_an_inner_matrix(monkeypatch):
    monkeypatch.setitem(sizes.SIZES, "500k", sizes.SIZES["500k"]._replace(tied=False))
    by_name = groups("500k")
    assert by_name["lm_head.weight"]["scale"] == 64 / 128 and by_name["embed_tokens.weight"]["scale"] == 1


def test_step_of_a_matrix_is_that_of_adamw_at_its_own_rate():
    weight = torch.arange(6.0).view(2, 3) / 7
    stepped = []
    for make, lr, decay in ((mup, 0.01, 0.1), (torch.optim.AdamW, 0.01 * 64 / 192, 0.1 * 192 / 64)):
        p = torch.nn.Parameter(weight.clone())
        p.grad = torch.sin(torch.arange(6.0)).view(2, 3)
        group = {"params": [p], "width": 192}
        optimizer = make([group], weight_decay=0.1) if make is mup else make([p], betas=(0.9, 0.95), weight_decay=decay)
        for g in optimizer.param_groups:
            g["lr"] = 0.01 * g["scale"] if make is mup else lr
        optimizer.step()
        stepped.append(p.detach())
    assert torch.equal(*stepped) and not torch.equal(stepped[0], weight)


def test_width_is_a_number_of_at_least_one():
    with refused(option="optim.base_width", got=0, need="at least 1"):
        mup([{"params": [], "width": 1}], base_width=0)


def test_at_its_base_width_mup_is_adamw(tmp_path):
    words = ("logits=none", "teacher=none", "trainer.steps=6")
    plain, same, other = (
        here(tmp_path, *words, *more) / "student" / "model.safetensors"
        for more in (["optim=adamw"], [], ["optim.base_width=192"])  # 100k is 64 wide
    )
    assert plain.read_bytes() == same.read_bytes() != other.read_bytes()


def steps(make, state: dict | None = None, weights: list | None = None, first: int = 0, last: int = 4):
    """Step a matrix and a vector by gradients that depend on the step alone; return the optimizer and the weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((128, 64), (64,))
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p, weight in zip(params, weights or (), strict=weights is not None):
        p.data.copy_(weight)
    optimizer = make([{"params": params, "width": 64}])
    if state:
        optimizer.load_state_dict(state)
    for step in range(first, last):
        generator.manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        optimizer.step()
    return optimizer, [p.detach().clone() for p in params]


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


def test_moments_of_eight_bits_are_near_those_of_adamw(bitsandbytes):
    (eight, rounded), (_, whole) = (
        steps(partial(make, betas=(0.9, 0.95), weight_decay=0.1)) for make in (adamw8, torch.optim.AdamW)
    )
    assert torch.allclose(rounded[1], whole[1], rtol=1e-6)  # a small one has 32 bits
    assert 0 < (rounded[0] - whole[0]).norm() / whole[0].norm() < 0.01
    state = next(iter(eight.state.values()))
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert sum(t.numel() * t.element_size() for t in state.values() if torch.is_tensor(t)) < 2.6 * 128 * 64


def test_moments_of_eight_bits_resume_exactly(bitsandbytes, tmp_path):
    """Load the state from a file as a checkpoint does, which holds plain containers and tensors alone."""
    _, whole = steps(adamw8)
    optimizer, half = steps(adamw8, last=2)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    _, resumed = steps(adamw8, torch.load(tmp_path / "state", weights_only=True), half, first=2)
    assert all(map(torch.equal, whole, resumed))


def test_moments_of_eight_bits_without_bitsandbytes_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with refused(option="optim", got="adamw8", need="bitsandbytes", hint="pip install 'kd[bitsandbytes]'"):
        adamw8([])


def test_moments_of_eight_bits_are_of_whole_weights(tmp_path):
    with refused(option="optim", got="adamw8", conflict="trainer.strategy=fsdp", hint="optim=adamw"):
        small_config(tmp_path, "optim=adamw8", "trainer=fsdp", "trainer.batch=4")


def test_a_run_with_moments_of_eight_bits_resumes_bit_for_bit(bitsandbytes, trained_root, tmp_path, monkeypatch):
    """Stop after a checkpoint, as a signal does, and go on."""
    words = ("logits=online", "optim=adamw8", "student=200k", "trainer.steps=6", "trainer.checkpoint_every=2")
    roots = [shutil.copytree(trained_root, tmp_path / name) for name in ("whole", "halves")]
    whole = outcome(here(roots[0], *words))
    step = DistillationModule.training_step

    def stopping(module, batch, index):
        if module.global_step == 4:
            raise KeyboardInterrupt
        return step(module, batch, index)

    with monkeypatch.context() as patch, pytest.raises(BaseException):  # noqa: B017, of the program
        patch.setattr(DistillationModule, "training_step", stopping)
        here(roots[1], *words)
    assert list(roots[1].glob("*/checkpoints/step-00000004.ckpt"))
    assert outcome(here(roots[1], *words)) == whole
