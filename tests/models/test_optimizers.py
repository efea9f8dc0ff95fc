"""muP: what a width does to a step, and nothing else."""

import pytest
import torch

from kd.config import sizes
from kd.models import causal_lm
from kd.models.optimizers import mup
from kd.teachers.none import NoTeacher
from kd.training.module import DistillationModule
from tests.refusals import refused
from tests.small import here


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
