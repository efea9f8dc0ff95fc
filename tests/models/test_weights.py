"""Weights of a frozen model in fewer bits: their values, their bytes, and what is refused."""

import builtins
import shutil

import pytest
import torch
import transformers
from torch import nn

from kd.models import flops, weights
from kd.models.causal_lm import CausalLM
from tests.models.examples import CONFIGS, IDS, V
from tests.refusals import refused
from tests.small import TOP, folder, here, result, small_config, write

CPU = torch.device("cpu")


def model(name: str = "llama", dtype: str | None = None, precision: str = "fp32") -> CausalLM:
    torch.manual_seed(0)
    built = CausalLM(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]), V)
    weights.hold(built.eval().requires_grad_(False), dtype, precision, CPU)
    return built


def logits(one: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        return one.head(one.hidden_states(IDS)).float()


def stored_bytes(one: CausalLM) -> int:
    return sum(t.numel() * t.element_size() for t in (*one.parameters(), *one.buffers()))


def test_int8_is_rounded_by_output_to_127_steps():
    linear = nn.Linear(3, 2, bias=True)
    linear.weight.data = torch.tensor([[1.27, -0.634, 0.0], [0.0, 0.0, 0.0]])
    linear.bias.data = torch.tensor([0.5, 2.0])
    small = weights.Int8Linear(linear)
    # A step of the first output is 0.01; an output of zeros stays one.
    assert small.rounded.tolist() == [[127, -63, 0], [0, 0, 0]]
    assert torch.allclose(small(torch.tensor([[1.0, 1.0, 1.0]])), torch.tensor([[1.27 - 0.63 + 0.5, 2.0]]))


def test_rounding_is_within_half_a_step():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False)
    small = weights.Int8Linear(linear)
    off = (small.rounded * small.scale[:, None] - linear.weight).abs()
    assert (off <= small.scale[:, None] / 2 * 1.001).all() and off.max() > 0


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gemma2"])
@pytest.mark.parametrize(("dtype", "most"), [("bf16", 0.03), ("int8", 0.03), ("nf4", 0.4)])
def test_logits_are_near_those_of_whole_weights(name, dtype, most):
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    whole, fewer = logits(model(name)), logits(model(name, dtype))
    off = (fewer - whole).square().mean().sqrt() / whole.std()
    assert 0 < off < most


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [None, "fp32", "bf16", "int8", "nf4"])
def test_bytes_are_those_that_a_plan_counts(dtype, precision):
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    one, cost = model("llama", dtype, precision), flops.cost(model().model, 32)
    rotary = sum(b.numel() * b.element_size() for b in model().buffers())
    expected = weights.held_bytes(cost, dtype, precision)
    if dtype == "nf4":  # the state of a weight is no tensor of the module
        expected -= round(0.02 * cost.non_embedding)
    assert stored_bytes(one) - rotary == pytest.approx(expected, rel=0.1)
    assert flops.cost(one.model, 32) == cost


def test_what_was_chosen_before_holds():
    """Hold again as a training step and a store do, which know only the precision."""
    one = model("llama", "fp32", "bf16")
    weights.hold(one, None, "bf16", CPU)
    assert {p.dtype for p in one.parameters()} == {torch.float32}


def test_output_layer_embeddings_and_vectors_are_not_rounded():
    assert not hasattr(weights.Int8Linear(nn.Linear(2, 2)), "weight")
    whole, fewer = model(), model(dtype="int8")
    floating = {name for name, p in fewer.model.named_parameters() if p.dtype == torch.float32}
    assert "lm_head.weight" in floating and "model.embed_tokens.weight" in floating
    assert all(torch.equal(fewer.model.get_parameter(name), whole.model.get_parameter(name)) for name in floating)
    assert not any("proj" in name for name in floating)


def test_matrices_that_would_stay_whole_are_refused():
    with refused(option="teacher.dtype", got="int8", why="would stay as they are", hint="teacher.dtype=bf16"):
        model("gpt2", "int8")


def test_four_bits_without_bitsandbytes_say_what_to_install(monkeypatch):
    usual = builtins.__import__

    def without(name, *rest):
        if name == "bitsandbytes":
            raise ImportError
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with refused(option="teacher.dtype", got="nf4", need="bitsandbytes", hint="pip install 'kd[bitsandbytes]'"):
        model(dtype="nf4")


@pytest.mark.parametrize(
    ("words", "conflict"),
    [(("logits=cotrained",), "logits=cotrained"), (("logits=recorded", *TOP), "logits=recorded"),
     (("trainer.precision=bf16", "teacher.dtype=bf16"), "trainer.precision=bf16"),
     (("trainer=ddp", "trainer.shard_teacher=true"), "trainer.shard_teacher=true")],
)  # fmt: skip
def test_a_teacher_that_cannot_have_them_is_refused(tmp_path, words, conflict):
    with refused(option="teacher.dtype", conflict=conflict):
        small_config(tmp_path, "teacher.dtype=int8", *words)


def test_no_teacher_has_no_dtype(tmp_path):
    with refused(option="teacher.dtype", got="int8", why="no teacher"):
        small_config(tmp_path, "teacher.dtype=int8", "logits=none", "teacher=none")


def test_the_effect_on_the_teachers_loss_is_measured_once_and_is_in_the_result(trained_root, tmp_path, capfd):
    root = shutil.copytree(trained_root, tmp_path / "root")
    words = ("trainer.steps=2", "trainer.val_every=2")
    whole = result(here(root, "logits=online", *words))
    fewer = result(here(root, "logits=online", *words, "teacher.dtype=int8"))
    assert whole["run"] != fewer["run"] and whole["teacher_weights"] is None
    measured = fewer["teacher_weights"]
    assert measured["dtype"] == "int8"
    assert measured["loss"] == pytest.approx(fewer["final"]["val/teacher_lm"], rel=1e-5)
    assert measured["loss_before"] == pytest.approx(whole["final"]["val/teacher_lm"], rel=1e-5)
    assert 0 < abs(measured["loss"] - measured["loss_before"]) < 0.05
    assert "teacher.dtype=int8: the teacher's held-out loss is" in capfd.readouterr().err
    (file,) = (root / "teacher_losses").glob("*.json")
    written = file.stat().st_mtime_ns
    here(root, "logits=online", *words, "teacher.dtype=int8", "seed=1")
    assert file.stat().st_mtime_ns == written


def test_a_store_of_a_rounded_teacher_is_another_one(trained_root, tmp_path):
    root = shutil.copytree(trained_root, tmp_path / "root")
    whole = write(root, *TOP)
    fewer = write(root, *TOP, "teacher.dtype=int8")
    assert whole.folder != fewer.folder and fewer.spec["dtype"] == "int8" and "dtype" not in whole.spec
    assert "teacher.dtype=int8" in fewer.words
    words = ("logits=offline", *TOP, f"logits.path={fewer.folder}", "trainer.steps=1")
    with refused(option="teacher.dtype", got=None, hint="teacher.dtype=int8"):
        here(root, *words)
    here(root, *words, "teacher.dtype=int8")
    assert result(folder(root, "fkl"))["config"]["teacher.dtype"] == "int8"
