"""First weights that are made of the teacher: made once, checked, named by what they depend on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kd.data import packing
from kd.data.batches import FIRST, NOT_LEARNED
from kd.experiment import planner, starts
from kd.experiment.cleanup import Root, leftovers
from kd.experiment.dependencies import Plan
from kd.experiment.prerequisites import prepare
from kd.models import causal_lm, flops
from kd.runs.identity import axes, readable
from tests.refusals import refused
from tests.small import here, result, small_config

START = ("start=teacher", "student=teacher", "trainer.steps=2", "trainer.val_every=2", "teacher.steps=2")
WIDTHS = ("start.layers=1", "start.ffn=64", "start.kv_heads=2", "start.hidden=32", "start.sample=4")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("starts")


@pytest.fixture(scope="module")
def run(root) -> Path:
    """A run whose student has the last layer of its teacher."""
    return here(root, *START, "start.layers=1")


def folder_of(root: Path, *words: str) -> Path:
    folder = Plan.from_config(small_config(root, *START, *words)).pruned
    assert folder is not None
    return folder


def teacher_of(root: Path) -> causal_lm.CausalLM:
    """Return the trained teacher in a root."""
    (folder,) = (path for path in root.glob("lm-100k-*") if "1l" not in path.name)
    return causal_lm.build_model(None, str(folder / "student"), 17, 32, "teacher.name")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_student_has_the_weights_of_the_layers_that_stay(root, run):
    teacher = teacher_of(root).model.state_dict()
    student = weights(folder_of(root, "start.layers=1"))
    assert {name.replace("layers.0.", "layers.1.") for name in student} < teacher.keys()
    for name, weight in student.items():
        assert torch.equal(weight, teacher[name.replace("layers.0.", "layers.1.")])
    about = json.loads((folder_of(root, "start.layers=1") / "manifest.json").read_text())
    assert (about["keep"], about["layers"], about["of_layers"]) == ("uniform", [1], 2)


def test_run_is_counted_and_named_as_what_it_is(root, run):
    outcome, config = result(run), result(run)["config"]
    model = causal_lm.build_model(None, str(run / "student"), 17, 32, "student.name").model
    assert outcome["parameters"] == flops.cost(model, 32).parameters < outcome["teacher_parameters"]
    assert outcome["flops_per_token"] == flops.cost(model, 32).flops_per_token
    assert run.name.startswith("fkl-100k-1l-") and outcome["initial"]["val/lm"] > 0
    assert readable(run.name, config).startswith("fkl 100k-1l lr0.001 from 100k")
    shown = axes(config, {})
    assert (shown["student"], shown["start_keep"], shown["teacher_steps"]) == ("100k-1l", "uniform", 2)


def test_first_weights_are_made_once_for_all_runs_that_share_them(root, run):
    path = folder_of(root, "start.layers=1") / "model.safetensors"
    before = path.stat().st_mtime_ns
    here(root, *START, "start.layers=1", "logits=none")
    assert path.stat().st_mtime_ns == before
    assert folder_of(root, "start.layers=1", "loss=rkl", "seed=1") == path.parent


def test_name_of_first_weights_depends_on_what_they_depend_on(root):
    usual = folder_of(root, "start.layers=1")
    influence = folder_of(root, "start.layers=1", "start.keep=influence")
    others = [
        folder_of(root, *words.split())
        for words in (
            "start.layers=2", "start.layers=[1]", "start.layers=1 start.keep=every", "start.layers=1 teacher.steps=3",
            "start.layers=1 teacher.seed=1", "start.layers=1 start.ffn=64", "start.layers=1 start.kv_heads=2",
            "start.layers=1 start.hidden=32", "start.layers=1 start.keep=random",
            "start.layers=1 start.keep=random seed=1", "start.layers=1 start.keep=influence start.sample=2",
            "start.layers=1 start.keep=influence data.val_rows=4",
        )
    ]  # fmt: skip
    assert len({usual, influence, *others}) == 2 + len(others)


def test_first_weights_of_all_widths_are_measured_and_cut(root, run):
    config = small_config(root, *START, *WIDTHS, "start.keep=influence")
    packed, _ = prepare(config)
    folder = folder_of(root, *WIDTHS, "start.keep=influence")
    starts.ensure_start(config, packed, folder, lambda: teacher_of(root))
    shape = starts.student_shape(config, 17)
    assert (shape.intermediate_size, shape.num_key_value_heads, shape.num_attention_heads) == (64, 2, 2)
    assert (shape.hidden_size, shape.head_dim, shape.num_hidden_layers) == (32, 16, 1)
    model = causal_lm.build_model(None, str(folder), 17, 32, "student.name").model
    assert sum(p.numel() for p in model.parameters()) == 17 * 32 + 3 * 32 + 32 * 32 * 4 + 3 * 32 * 64
    influence = json.loads((folder / "manifest.json").read_text())["influence"]
    assert len(influence) == 2 and all(0 < value < 2 for value in influence)


def test_new_weights_have_the_shape_and_come_from_the_seed(root, run):
    config = small_config(root, *START, "start.layers=1", "start.keep=random")
    packed, _ = prepare(config)
    drawn = []
    for name in ("a", "b", "c"):
        seeded = config.derive(seed=int(name == "c"))
        drawn.append(
            weights(Path(starts.ensure_start(seeded, packed, root / "random" / name, lambda: teacher_of(root))))
        )
    given = weights(folder_of(root, "start.layers=1"))
    assert {k: v.shape for k, v in drawn[0].items()} == {k: v.shape for k, v in given.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name]) and not torch.equal(drawn[0][name], given[name])


def test_first_weights_are_whole_whatever_the_dtype_of_the_teacher_is(root, run, tmp_path):
    words = ("start.layers=1", "teacher.dtype=int8")
    new = shutil.copytree(root, tmp_path / "root")
    shutil.rmtree(new / "starts")
    here(new, *START, *words)
    usual, again = weights(folder_of(root, "start.layers=1")), weights(folder_of(new, *words))
    assert usual.keys() == again.keys() and all(torch.equal(usual[name], again[name]) for name in usual)


def test_damaged_first_weights_are_refused_with_the_command_that_removes_them(root, run, tmp_path):
    config = small_config(tmp_path, *START, "start.layers=1")
    packed, _ = prepare(config)
    folder = tmp_path / "starts" / "key"
    starts.ensure_start(config, packed, folder, lambda: teacher_of(root))
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with refused(option=str(folder / "model.safetensors"), commands=str(folder)):
        starts.ensure_start(config, packed, folder, lambda: teacher_of(root))


def test_padding_of_examples_is_left_out_of_the_sample():
    tokens, spans = np.arange(18, dtype=np.uint16).reshape(3, 6), np.array([[1, 3], [2, 6], [1, 6]])
    packed = packing.Packed(Path(), tokens, tokens, None, None, {}, train_spans=spans)
    batches = list(starts._sample(packed, 2, 1, torch.device("cpu")))
    assert [rows.ids.tolist() for rows in batches] == [[[0, 1, 2, 3, 4]], [[6, 7, 8, 9, 10]]]
    assert [rows.mask.sum().item() for rows in batches] == [3, 5]
    full = packing.Packed(Path(), tokens, tokens, None, None, {})
    (rows,) = starts._sample(full, 99, 4, torch.device("cpu"))
    assert rows.ids.shape == rows.mask.shape == (3, 5) and rows.mask.all() and rows.positions is None
    marks = np.array([[FIRST, NOT_LEARNED, 0, FIRST, 0, NOT_LEARNED], [FIRST, 0, 0, 0, 0, 0]], np.uint8)
    several = packing.Packed(Path(), tokens[:2], tokens, None, None, {}, train_marks=marks)
    (rows,) = starts._sample(several, 2, 4, torch.device("cpu"))
    assert rows.mask.sum(1).tolist() == [5, 5] and rows.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("start.layers=3", "start.layers"), ("start.layers=[0,2]", "start.layers"), ("start.ffn=177", "start.ffn"),
        ("start.kv_heads=5", "start.kv_heads"), ("start.hidden=65", "start.hidden"),
        ("start.hidden=30", "start.hidden"), ("start.kv_heads=3", "start.kv_heads"),
    ],
)  # fmt: skip
def test_parts_that_the_teacher_does_not_have_are_refused_before_it_is_trained(tmp_path, words, option):
    with refused(option=option):
        here(tmp_path, *START, words)
    assert not list(tmp_path.glob("lm-*"))


def test_plan_has_the_students_parameters_and_both_copies_of_its_weights(tmp_path):
    words = [word for word in WIDTHS if "sample" not in word]
    estimates = planner.estimate(small_config(tmp_path, *START, *words))
    (estimate,) = (value for name, value in estimates.items() if name.startswith("fkl-100k-1l-ffn64-kv2-h32-"))
    embedding, norms = 17 * 32, 3 * 32
    expected = embedding + norms + 32 * 32 * 4 + 3 * 32 * 64
    assert estimate.parameters == expected and estimate.disk == 2 * 4 * expected and estimate.seconds


def test_first_weights_that_no_run_uses_can_be_removed(root, run):
    unused = root / "starts" / "unused"
    unused.mkdir(parents=True, exist_ok=True)
    unneeded = {leftover.path.name for leftover in leftovers(Root(root), ("starts",))}
    assert "unused" in unneeded and folder_of(root, "start.layers=1").name not in unneeded
