"""Runs that depend on others: what a student starts from, its teacher's responses, plain text beside instructions."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kd.config import components
from kd.config.schema import ExperimentConfig
from kd.data import packing
from kd.experiment import planner, step_timing, summary
from kd.experiment.components import FUNCTIONS
from kd.experiment.dependencies import Plan
from kd.experiment.prerequisites import prepare
from kd.experiment.results import read_run
from kd.models.flops import Cost
from kd.rollout import teacher_text
from kd.system import console
from kd.system.files import read_metrics
from sweeps.report.curves import learning_curve
from tests.refusals import refused
from tests.small import TINY, TRAIN, here, listed, python, small_config, small_words

SFT = ("start=sft", "start.steps=3", "start.batch=2", "start.sft_steps=3")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Fifty sums as instructions, some plain text, and a root of runs."""
    folder = tmp_path_factory.mktemp("stages")
    rows = [{"prompt": f"{a} plus {b} is", "response": f" {a + b}."} for a in range(10) for b in range(5)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "plain.txt").write_text("\n\n".join(f"Line {i} is about the sum of {i} and {i + 1}." for i in range(400)))
    return folder


@pytest.fixture(scope="module")
def words(root):
    common = ("data=instructions", "data.seq_len=48", "data.val_rows=6", f"data.files={root / 'sums.jsonl'}")
    common += (
        "data.template=plain",
        "data.vocab=300",
        "data.val_share=0.2",
        "plain=text",
        f"plain.files={root / 'plain.txt'}",
    )
    return (*common, "trainer.steps=4", "trainer.val_every=4")


@pytest.fixture(scope="module")
def finished(root, words):
    """A student distilled after all stages, and a teacher."""
    return here(root, *words, *SFT)


def before(config: ExperimentConfig) -> ExperimentConfig | None:
    return Plan.from_config(config).start


def test_stages_are_runs_that_are_made_once(root, words, finished):
    """Language modelling on plain text, fine-tuning on instructions, distillation: each from the weights before."""
    config = small_config(root, *words, *SFT)
    sft = before(config)
    pretrained = before(sft)
    assert before(pretrained) is None
    assert (
        Plan.from_config(sft).run.result()["config"]["data"] == "instructions"
        and Plan.from_config(sft).run.result()["config"]["logits"] == "none"
    )
    assert Plan.from_config(pretrained).run.result()["config"]["data"] == "text"
    assert Plan.from_config(Plan.from_config(config).teacher).start is not None  # the teacher was pretrained as well
    tokenizers = {(run / "student" / "tokenizer.json").read_bytes() for run in root.glob("*-100k-*")}
    assert len(tokenizers) == 1  # that of the plain text
    times = {p: p.stat().st_mtime_ns for p in root.rglob("model.safetensors")}
    here(root, *words, *SFT, "loss=rkl")
    assert {p: p.stat().st_mtime_ns for p in times} == times and finished != here(root, *words, *SFT, "loss=rkl")


def test_a_student_starts_from_the_weights_of_its_stage(root, words):
    """Train at a learning rate of 0: the student keeps the weights of its start."""
    still = here(root, *words, *SFT, "lr.peak=0")
    sft = Plan.from_config(before(small_config(root, *words, *SFT))).run.folder
    a, b = (load_file(run / "student" / "model.safetensors") for run in (still, sft))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_student_that_is_not_random_is_validated_before_its_first_step(root, words, finished):
    stage = Plan.from_config(before(small_config(root, *words, *SFT))).run
    outcome, rows = json.loads((finished / "result.json").read_text()), read_metrics(finished / "metrics.jsonl")
    (first,) = (row for row in rows if row["step"] == 0)
    assert rows[0] == first == outcome["initial"] | {"step": 0}
    assert (first["tokens"], first["flops"]) == (0, 0) and first["val/teacher_lm"] == outcome["final"]["val/teacher_lm"]
    assert first["val/lm"] == pytest.approx(stage.result()["final"]["val/lm"], abs=1e-5) != outcome["final"]["val/lm"]
    entry = read_run(root, {"run": finished.name, "overrides": []})
    assert learning_curve([entry])[0] == (0, 0, first["val/lm"])
    text = io.StringIO()
    console.Terminal(file=text, width=200).print(summary.measures(outcome))
    assert f"before training {first['val/lm']:.4f}" in text.getvalue()


def test_a_random_student_is_not_validated_before_its_first_step(root, words, finished):
    stage = Plan.from_config(before(before(small_config(root, *words, *SFT)))).run
    assert stage.result()["initial"] is None and min(row["step"] for row in read_metrics(stage / "metrics.jsonl")) > 0


def test_a_named_teacher_is_fine_tuned_first_where_that_is_asked(root, words, finished):
    name = (
        Plan.from_config(before(before(small_config(root, *words, *SFT)))).run.folder / "student"
    )  # pretrained on plain text
    common = [word for word in words if not word.startswith("data.vocab")]  # a model has a tokenizer of its own
    named = (*common, "student=hub", f"student.name={name}", "teacher=hub", f"teacher.name={name}")
    plain, tuned = here(root, *named), here(root, *named, "teacher.sft=true", "teacher.steps=5")
    assert Plan.from_config(small_config(root, *named)).teacher is None and plain != tuned
    teacher = Plan.from_config(small_config(root, *named, "teacher.sft=true", "teacher.steps=5")).teacher
    stage = Plan.from_config(teacher).run
    settings = stage.result()["config"]
    assert (settings["data"], settings["logits"], settings["trainer.steps"], settings["student.name"]) == (
        "instructions",
        "none",
        5,
        str(name),
    )
    assert (settings["optim"], settings["lr.peak"]) == ("AdamW", 1e-4)
    a, b = (load_file(folder / "model.safetensors") for folder in (name, stage.folder / "student"))
    assert not torch.equal(a["model.embed_tokens.weight"], b["model.embed_tokens.weight"])
    finals = [json.loads((run / "result.json").read_text())["final"] for run in (plain, tuned, stage.folder)]
    assert (
        finals[1]["val/teacher_lm"] == pytest.approx(finals[2]["val/lm"]) != pytest.approx(finals[0]["val/teacher_lm"])
    )
    # A sweep over both takes teacher.steps, for the one that is fine-tuned.
    base = [word for word in small_words(TINY, named) if not word.startswith("data")]
    both = ("teacher.sft=false,true", "teacher.steps=5")
    process = python([sys.executable, str(TRAIN), "-m", *base, f"root={root}", *named, *both], root)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    runs = json.loads(listed(root).read_text())["runs"]
    assert [run["run"] for run in runs] == [plain.name, tuned.name]
    assert ["teacher.steps=5" in run["overrides"] for run in runs] == [False, True]


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ("teacher=100k", {"need": "a teacher by name"}),
        ("teacher=hub teacher.name=x logits=cotrained optim=adamw", {"conflict": "logits=cotrained"}),
        ("teacher=hub teacher.name=x data=markov", {"why": "this data is plain text"}),
    ],
)
def test_a_teacher_that_cannot_be_fine_tuned_is_refused(more, fields, root, words):
    with refused(option="teacher.sft", got=True, **fields):
        given = [word for word in words if not word.startswith("data.vocab") and "data=markov" not in more]
        Plan.from_config(small_config(root, *given, *more.split(), "teacher.sft=true"))


def test_stages_are_part_of_what_a_run_is(root, words):
    names = {
        Plan.from_config(small_config(root, *words, *more)).run.name
        for more in ((), SFT, (*SFT, "start.sft_lr=1e-5"), (*SFT, "start.seed=1"), (*SFT, "lm=plain"))
    }
    assert len(names) == 5


def estimated(root, *more) -> planner.Estimate:
    """Return the estimate of plan=true for the run itself."""
    config = small_config(root, *more)
    return list(planner.estimate(config).values())[-1]


@pytest.mark.parametrize(
    ("rollout", "written"),
    # Micro-batches of 2 rows that are written: half of 10 steps of 4 rows, every other step, all, the 46 rows once.
    [
        ("none", 0),
        ("student", 10),
        ("mixed rollout.epochs=2 loss=minillm", 10),
        ("pairs", 20),
        ("teacher logits=none", 23),
    ],
)
def test_plan_counts_the_time_of_writing(rollout, written, root, words, monkeypatch):
    costs = {role: Cost(10, 8, 0.001) for role in ("student", "teacher")}
    step = step_timing.Step(costs, trainable=10, rows=2, micro_batch=0.0, writing=7.0, answering=5.0)
    monkeypatch.setattr(step_timing, "_measure", lambda *_: step)
    monkeypatch.setattr(planner, "_measured", {})
    more = f"rollout={rollout} trainer.steps=10 trainer.batch=4 trainer.micro_batch=2 responses.samples=3 seed=7"
    estimate = estimated(root, *words[:-2], *more.split())
    # Four held-out prompts are answered three times, two at once.
    assert estimate.seconds == pytest.approx(planner.STARTS + 7 * written + 5 * 3 * 4 / 2)


def test_plan_names_all_that_is_made_first_for_recorded_logits(root, words, monkeypatch):
    """The teacher's recorded run in place of the teacher, and what the student starts from beside it."""
    step = step_timing.Step({role: Cost(10, 8, 0.001) for role in ("student", "teacher")}, 10, micro_batch=0.0)
    monkeypatch.setattr(step_timing, "_measure", lambda *_: step)
    monkeypatch.setattr(planner, "_measured", {})
    recorded = small_config(root, *words, *SFT, "start.seed=5", "teacher.seed=5", "logits=recorded", "truncation=top_k")
    start, record = before(recorded), Plan.from_config(recorded).recording
    run_names = {
        Plan.from_config(config).run.name for config in (before(record), before(start), record, start, recorded)
    }
    assert planner.estimate(recorded).keys() == run_names


def test_plan_measures_writing_and_the_rows_it_makes(root, words, monkeypatch):
    monkeypatch.setattr(planner, "_measured", {})
    monkeypatch.setattr(step_timing, "PROBE", 0.0)
    one = estimated(root, *words, "seed=7")
    both = estimated(root, *words, "seed=7", "rollout=pairs", "loss=distillm2", "alpha.peak=1")
    steps = [step for step in planner._measured.values() if step.wider == 2]
    assert len(steps) == 1 and steps[0].writing > 0 and steps[0].answering > 0
    assert both.flops == pytest.approx(2 * one.flops) and abs(both.tokens - 2 * one.tokens) <= 1


@pytest.mark.parametrize(
    ("more", "option", "fields"),
    [
        (("rollout=student", "logits=none"), "rollout", {"conflict": "logits=none", "why": "would do nothing"}),
        (("rollout=student", "logits=offline"), "rollout", {"conflict": "logits=offline", "why": "new text"}),
        (("rollout=teacher", "logits=none", "teacher=none"), "rollout", {"need": "a teacher"}),
        (("rollout=student", "rollout.share=2"), "rollout.share", {"need": "a share"}),
        (("rollout=adaptive", "rollout.capacity=3"), "rollout.capacity", {"need": "at least a batch, 4 rows"}),
        (
            ("student=hub", "student.name=some", "start=sft", "start.steps=3"),
            "start.steps",
            {"conflict": "student.name=some", "hint": "start.sft_steps"},
        ),
        (("rollout=student", "routing=entropy"), "rollout", {"conflict": "routing=entropy"}),
        (
            ("rollout=student", "rollout.engine=vllm", "trainer.devices=2"),
            "rollout.engine",
            {"conflict": "trainer.devices=2"},
        ),
        (("lm=plain", "logits=none"), "lm", {"why": "nothing of the instructions"}),
        (("lm=plain", "alpha.peak=1"), "lm", {"why": "alpha is 1 in all steps"}),
        (("lm=plain", "logits=cotrained"), "lm", {"why": "learns from one text"}),
        (("rollout=mixed", "loss=minillm", "temperature.tau=2"), "loss", {"why": "temperature 1"}),
        (("loss=minillm",), "loss", {"hint": "rollout=mixed"}),
    ],
)
def test_rollouts_that_cannot_be(root, words, more, option, fields):
    named = "student=hub" in more  # has a tokenizer, so that data.vocab would be refused first
    words = [word for word in words if not (named and word.startswith("data.vocab"))]
    with refused(option=option, **fields):
        here(root, *words, *more)


@pytest.mark.parametrize(
    "word",
    ["rollout=student", "start=sft", "lm=plain"],
)
def test_what_plain_text_cannot_have(tmp_path, word):
    option, _, got = word.partition("=")
    with refused(option=option, got=got, why="this data is plain text", hint="data=instructions"):
        here(tmp_path, word)


def test_what_a_teacher_wrote_is_written_once_and_learned_from(root, words, finished):
    """SeqKD: prompts as they are, responses of the teacher; a kill in between costs the part that was being written."""
    words = (*words, *SFT)
    here(root, *words, "logits=none", "rollout=teacher")
    (folder,) = (p.parent for p in (root / "rollouts").glob("*/manifest.json"))
    packed = packing.open_packed(next(p.parent for p in (root / "data").glob("*/train_spans.npy")))
    written = packing.open_packed(folder)
    assert np.array_equal(written.val, packed.val) and written.train.shape == packed.train.shape
    prompt_ends = packed.train_spans[:, 0]
    assert np.array_equal(written.train_spans[:, 0], prompt_ends)
    for a, b, n in zip(packed.train, written.train, prompt_ends, strict=True):
        assert np.array_equal(a[:n], b[:n])
    assert not np.array_equal(packed.train, written.train)
    assert not list((root / "rollouts").glob("*.parts"))
    original = (folder / "train.npy").read_bytes()
    here(root, *words, "rollout=teacher")  # distilled on the same text
    assert len(list((root / "rollouts").glob("*/manifest.json"))) == 1
    shutil.rmtree(folder)
    here(root, *words, "rollout=teacher", "loss=rkl")
    assert (folder / "train.npy").read_bytes() == original


def test_a_teacher_that_was_killed_while_it_wrote_goes_on(root, words, finished, tmp_path, monkeypatch):
    """Continue: complete files stay, a torn file is written again, and the result equals that of an undisturbed run."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        for name in ("data", *(p.name for p in root.glob("lm-100k-*"))):
            shutil.copytree(root / name, folder / name)
    monkeypatch.setattr(teacher_text, "AT_ONCE", 10)
    more, real, saved = (*words, *SFT, "logits=none", "rollout=teacher", "seed=3"), teacher_text.keep, []

    def keep(path, **arrays):
        if len(saved) == 3:
            raise KeyboardInterrupt
        real(path, **arrays)
        saved.append(path)

    monkeypatch.setattr(teacher_text, "keep", keep)
    with pytest.raises(KeyboardInterrupt):
        here(killed, *more)
    whole = [path.read_bytes() for path in saved]
    saved[1].write_bytes(whole[1][:-50])
    again = []
    monkeypatch.setattr(teacher_text, "keep", lambda path, **arrays: (again.append(path), real(path, **arrays)))
    here(killed, *more)
    assert again[0] == saved[1] and len(again) == 3  # of five parts
    monkeypatch.setattr(teacher_text, "keep", real)
    here(undisturbed, *more)
    (a,), (b,) = ([p.parent for p in (place / "rollouts").glob("*/manifest.json")] for place in (undisturbed, killed))
    assert a.name == b.name and (a / "train.npy").read_bytes() == (b / "train.npy").read_bytes()


METHODS = {
    "sft": ("logits=none",),
    "kd": ("alpha.peak=0.5",),
    "seqkd": ("logits=none", "rollout=teacher"),
    "akl": ("loss=akl", "alpha.peak=1"),
    "gkd": ("rollout=student", "rollout.share=0.5", "loss=jsd", "alpha.peak=1"),
    "distillm": (
        "rollout=adaptive",
        "rollout.threshold=0.8",
        "rollout.capacity=6",
        "loss=srkl",
        "lm=plain",
        "alpha.peak=0.5",
    ),
    "minillm": ("rollout=mixed", "rollout.epochs=2", "loss=minillm", "lm=plain", "alpha.peak=0.5"),
    "minillm_code": ("rollout=mixed_code", "loss=minillm", "alpha.peak=1"),
    "distillm2": ("rollout=pairs", "loss=distillm2", "alpha.peak=1"),
    "atkd": ("loss=atkd", "routing=uncertainty", "alpha.peak=1"),
    "on_policy": ("rollout=student", "rollout.share=1", "loss=rkl", "alpha.peak=1"),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_where_it_was_killed(root, words, finished, method, tmp_path):
    """Bit for bit: what is written is a function of seed, step and weights, and of what a checkpoint keeps."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        for name in ("data", *(p.name for p in root.glob("lm-100k-*"))):
            shutil.copytree(root / name, folder / name)
    more = (*words, *SFT, *METHODS[method], "trainer.steps=6", "trainer.checkpoint_every=1")
    a = here(whole, *more)
    b = killed_at(5, cut, *more)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    one, two = (json.loads((run / "result.json").read_text())["initial"] for run in (a, b))
    assert one == two and one["val/lm"]
    by_student = [x.get("train/student_token_share") for x in read_metrics(a / "metrics.jsonl") if "train/loss" in x]
    shares = {"gkd": {0, 1}, "distillm": {0, 1}, "on_policy": {1}, "sft": {None}, "seqkd": {None}}
    assert by_student and set(by_student) <= shares.get(method, set(by_student))
    assert method != "distillm2" or all(0 < share < 1 for share in by_student)
    x, y = (load_file(run / "student" / "model.safetensors") for run in (a, b))
    assert all(torch.equal(x[name], y[name]) for name in x)


def killed_at(step, root, *words):
    """The run, after a first try that ended at `step`."""
    from kd.training import module

    class Killed(BaseException):
        pass

    real = module.DistillationModule.training_step

    def training_step(self, *args):
        if self.global_step == step:
            raise Killed
        return real(self, *args)

    module.DistillationModule.training_step = training_step
    try:
        with pytest.raises(Killed):
            here(root, *words)
    finally:
        module.DistillationModule.training_step = real
    return here(root, *words)


@pytest.mark.parametrize(
    ("word", "option", "need"),
    [
        ("loss.alpha=abc", "loss.alpha", "a number"),
        ("lr.peak=abc", "lr.peak", "a number"),
        ("lr.peak=-1", "lr", "at least 0"),
        ("alpha.peak=1.5", "alpha", "a share from 0 to 1"),
    ],
)
def test_a_wrong_number_is_refused_before_text_is_read(word, option, need, tmp_path):
    with refused(option=option, need=need):
        prepare(small_config(tmp_path / "root", "loss=skl", word))
    assert not (tmp_path / "root").exists()


def test_the_functions_of_a_config_are_built_once(tmp_path, monkeypatch):
    built, build = [], components.build
    monkeypatch.setattr(components, "build", lambda node, group: built.append(group) or build(node, group))
    prepare(small_config(tmp_path / "root"))
    assert sorted(built) == sorted(FUNCTIONS)


def test_runs_that_are_needed_compute_layers_again_too(tmp_path):
    """Compare with the same runs without it, whose names are the same."""
    words = ("data=instructions", "start=sft", "logits=online")
    usual, again = (
        Plan.from_config(small_config(tmp_path, *words, f"trainer.gradient_checkpointing={on}"))
        for on in ("false", "true")
    )
    for role in ("teacher", "start"):
        one, other = getattr(usual, role), getattr(again, role)
        assert not one.trainer.gradient_checkpointing and other.trainer.gradient_checkpointing
        assert Plan.from_config(one).run.name == Plan.from_config(other).run.name
