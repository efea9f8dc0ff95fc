"""plan=true: what it says before is what comes out after, and nothing is done."""

import shutil

import numpy as np
import pytest
import torch

from kd.config.sizes import SIZES
from kd.data.tokenizer import vocabulary_size
from kd.experiment import planner, step_timing
from kd.experiment.prerequisites import prepare
from kd.models.flops import Cost
from kd.system import console
from kd.system.console import Terminal, silence_libraries
from tests.small import here, result, small_config, train, write


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(step_timing, "PROBE", 0.0)


def estimates(root, *words):
    silence_libraries()
    config = small_config(root, *words)
    return planner.estimate(config)


@pytest.mark.parametrize("words", ["logits=none", "logits=online", "logits=cotrained", "logits=online routing=entropy"])
def test_counts_before_are_those_of_the_result(words, trained_root, tmp_path):
    shutil.copytree(trained_root, tmp_path / "root")
    (estimate,) = estimates(tmp_path / "root", *words.split()).values()
    record = result(here(tmp_path / "root", *words.split()))
    assert estimate.tokens == record["tokens"] and estimate.parameters == record["parameters"]
    assert estimate.flops == pytest.approx(record["flops"], rel=1e-9)


def test_disk_before_is_that_of_the_model_and_the_store(trained_root, tmp_path):
    shutil.copytree(trained_root, tmp_path / "root")
    words = ("logits=offline", "truncation=top_k", "truncation.k=4")
    stored, run = estimates(tmp_path / "root", *words).values()
    store = write(tmp_path / "root", *words)
    size = sum(p.stat().st_size for p in store.folder.glob("*.safetensors"))
    assert stored.disk == pytest.approx(size, rel=0.2) and stored.tokens == 60 * 32
    with_teacher, alone = (estimates(tmp_path / "root", f"logits={source}") for source in ("online", "none"))
    (per_token,) = (
        (a.flops - b.flops) / run.tokens for a, b in zip(with_teacher.values(), alone.values(), strict=True)
    )
    assert stored.flops == pytest.approx(60 * 32 * per_token)
    weights = here(tmp_path / "root", *words) / "student" / "model.safetensors"
    assert run.disk == pytest.approx(weights.stat().st_size, rel=0.05)
    assert estimates(tmp_path / "root", *words) == {}


@pytest.mark.parametrize("words", [("truncation=top_k", "truncation.k=1"), ("truncation=full",)], ids=lambda w: w[0])
def test_disk_of_a_store_is_that_of_its_output_layer_too(tmp_path, words):
    """Compare with the files, in the precision of the store, for every truncation."""
    words = ("data.states=400", "teacher.steps=1", "trainer.precision=bf16", *words)
    stored = next(
        estimate for name, estimate in estimates(tmp_path, "logits=offline", *words).items() if name.startswith("store")
    )
    size = sum(p.stat().st_size for p in write(tmp_path, *words).folder.glob("*.safetensors"))
    assert stored.disk == pytest.approx(size, rel=0.05)


def test_a_sample_of_much_text_tells_as_much(tmp_path, monkeypatch):
    words = ("logits=offline", "truncation=top_k", "truncation.k=4", "teacher.steps=1", "data.tokens=20000")
    *_, stored, run = estimates(tmp_path / "whole", *words).values()
    monkeypatch.setattr(planner, "SAMPLE", 2000)
    *_, less, same = estimates(tmp_path / "sample", *words).values()
    assert less.tokens == pytest.approx(stored.tokens, rel=0.02) and less.disk == pytest.approx(stored.disk, rel=0.1)
    assert same.tokens == run.tokens and same.flops == run.flops
    rows = [len(np.load(file)) for file in (tmp_path / "sample" / "data").glob("*/train.npy")]
    assert max(rows) < 70


def test_what_is_kept_for_the_backward_pass_grows_with_rows_and_the_rest_does_not(tmp_path):
    words = ("logits=none", "teacher=none", "trainer.batch=8")
    ((few,), (many,)) = (estimates(tmp_path, *words, f"trainer.micro_batch={n}").values() for n in (2, 8))
    assert few.flops == many.flops and few.memory < many.memory


def test_layers_that_are_computed_again_keep_less(tmp_path):
    """Compare with inputs of the layers and the tensors of one of them, which the backward pass has at a time."""
    words = ("logits=none", "teacher=none", "student=500k", "trainer.batch=8", "trainer.micro_batch=8")
    step_timing_of = []
    for on in ("false", "true"):
        config = small_config(tmp_path, *words, f"trainer.gradient_checkpointing={on}")
        packed, components = prepare(config)
        vocab = vocabulary_size(components.tokenizer)
        step_timing_of.append(step_timing.measure(config, packed, components, vocab).saved_bytes)
    plain, again = step_timing_of
    row = SIZES["500k"]
    inputs = 8 * 32 * row.hidden * 4  # bytes of a layer's input
    assert plain / row.layers < again < plain / row.layers + (row.layers + 4) * inputs + 2**20
    (estimate,), (less,) = (
        estimates(tmp_path, *words, f"trainer.gradient_checkpointing={on}").values() for on in ("false", "true")
    )
    assert estimate.memory > less.memory and estimate.flops == less.flops


def test_time_is_that_of_the_steps_measured(tmp_path, monkeypatch):
    step = step_timing.Step({"student": Cost(10, 8, 100.0)}, 10, rows=2, micro_batch=2.0, optimizer=0.5)
    monkeypatch.setattr(step_timing, "_measure", lambda *_: step)
    words = ("logits=none", "teacher=none", "trainer.steps=10", "trainer.batch=4", "trainer.micro_batch=2")
    (estimate,) = estimates(tmp_path, *words, "trainer.val_every=5", "seed=9").values()
    # 10 steps of two parts and an optimizer; 2 validations of 8 rows, of which 2 take a third of a part.
    assert estimate.seconds == pytest.approx(planner.STARTS + 10 * (2 * 2.0 + 0.5) + 2 * 8 / 2 * 2.0 / 3)


def test_rows_that_do_not_fit_are_halved_as_in_a_run(tmp_path, monkeypatch):
    step = step_timing.Step({"student": Cost(10, 8, 100.0)}, 10, rows=1, micro_batch=2.0)
    tried = []

    def measure(config, *_):
        tried.append(config.trainer.micro_batch)
        if len(tried) < 3:
            raise torch.OutOfMemoryError
        return step

    monkeypatch.setattr(step_timing, "_measure", measure)
    words = ("logits=none", "teacher=none", "trainer.steps=10", "trainer.batch=4", "trainer.micro_batch=4", "seed=8")
    (estimate,) = estimates(tmp_path, *words, "trainer.val_every=10").values()
    assert tried == [4, 2, 1] and estimate.seconds == pytest.approx(planner.STARTS + 10 * 4 * 2.0 + 8 / 3 * 2.0)


def test_a_teacher_that_is_loaded_is_counted(tmp_path):
    """Count the teacher's memory for language modelling too, where it serves as a reference."""
    alone, with_reference, distilled = (
        list(estimates(tmp_path, *words, "trainer.steps=3").values())[-1].memory
        for words in (("logits=none", "teacher=none"), ("logits=none", "teacher=10m"), ("logits=online", "teacher=10m"))
    )
    assert alone + 4 * 10_000_000 < with_reference < alone + 4 * 12_000_000 and with_reference <= distilled


def test_models_larger_than_memory_are_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr(step_timing, "capacity", lambda device: 10**6)
    (estimate,) = estimates(tmp_path, "logits=none", "teacher=none", "student=6.8b").values()
    assert estimate.seconds is None and estimate.memory > 16 * 5.5e9 and estimate.flops > 1e12


def test_sweep_says_what_is_missing_and_starts_nothing(tmp_path):
    train(tmp_path, "logits=none", "teacher=none", "trainer.steps=3")
    done = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"}
    words = ("logits=none", "teacher=none", "trainer.steps=3", "seed=0,1", "plan=true")
    output = train(tmp_path, "-m", *words)
    assert "1 to do, 1 done before" in output and "seed=1" in output and "Nothing was started" in output
    assert done == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"}
    assert not (tmp_path / "sweeps").exists() and len(list(tmp_path.glob("lm*/state.json"))) == 1
    assert "Nothing is left to do" in train(tmp_path, *words[:3], "plan=true")


ROWS = {
    **{f"logits=none teacher=none student={n} trainer.steps=800": ["319,968", "409,600", "9.1e+11", "1:20", "834 MB",
                                                                   "1.3 MB"] for n in ("100k", "200k")},
    **{f"alpha.peak=1 student=500k teacher={n} teacher.steps=400 trainer.steps={k}": ["715,648", "204,800", "1.5e+12",
       "12:50:00", "853 MB", "2.9 MB"] for n in ("500k", "1m") for k in (100, 200)},
    "lm-200k-e33c05c6f406": ["319,968", "204,800", "4.5e+11", "0:50", "834 MB", "1.3 MB"],
}  # fmt: skip


@pytest.mark.parametrize("width", [72, 80, 200, None])
def test_a_plan_has_one_line_for_each_run_however_narrow_the_terminal(width, monkeypatch, capsys):
    if width:
        terminal = Terminal(force_terminal=True, width=width, color_system=None, highlight=False)
        monkeypatch.setattr(planner, "console", terminal)
    rows = dict(zip(planner.shortened(list(ROWS)), ROWS.values(), strict=True))
    planner.print_rows(rows)
    printed = capsys.readouterr()
    lines = (printed.out if width else printed.err).rstrip().splitlines()
    assert len(lines) == 1 + len(ROWS)
    for line, (name, amounts) in zip(lines[1:], rows.items(), strict=True):
        assert amounts[2] in line and amounts[3] in line  # FLOPs and time
        assert width in (72, 80) or (name in line and all(amount in line for amount in amounts))
    assert len({line.split("  ")[0] for line in lines}) == len(lines)


def test_names_are_shortened_where_they_stay_different():
    names = ["a=1 b=1 c=1", "a=1 b=2 c=1", "b=1 d=1"]
    assert planner.shortened(names) == names  # the first and the last would both be b=1
    assert planner.shortened(["a=1 b=1 c=1", "a=1 b=2 c=2"]) == ["b=1 c=1", "b=2 c=2"]
    assert planner.shortened(["a=1"]) == ["a=1"] and planner.shortened(["lm-1", "lm-2 a=1"]) == ["lm-1", "lm-2"]


@pytest.mark.parametrize("items", [[1, 2, 3], iter([1, 2, 3])], ids=["counted", "not counted"])
def test_long_work_says_where_it_is_where_there_is_no_terminal(items, monkeypatch, capsys):
    ticks = iter(range(0, 1000, 6))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(ticks)))
    assert list(console.track(items, "measuring")) == [1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("measuring  ") for line in lines)
    assert ("/3" in lines[0]) is isinstance(items, list)
