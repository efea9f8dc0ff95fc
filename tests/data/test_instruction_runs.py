"""Runs on instructions: losses, stores and estimates count responses alone."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from kd.config import components
from kd.config.compose import config_of
from kd.config.schema import ExperimentConfig
from kd.data import packing
from kd.data.batches import IGNORE, Batches, ValidationBatches
from kd.experiment import planner, prerequisites, stores, summary
from kd.experiment.dependencies import Plan
from kd.runs.run import Run
from kd.store import __main__ as store_program
from tests import small
from tests.data.examples import cache as cache
from tests.data.examples import write
from tests.refusals import refused
from tests.small import outcome

OFFLINE = ("logits=offline", "truncation=top_k", "truncation.k=5")
SHORT = ("start=pretrained", "start.steps=6")  # what a teacher was before, too


def words_of(root: Path, *words: str) -> list[str]:
    plain = root / "tokenizer.txt"  # for the tokenizer; the standard library takes ten times as long
    if not plain.exists():
        plain.write_text("\n\n".join(f"{'abcdefg'[n % 7] * (n % 5 + 1)} text without digits" for n in range(2000)))
    common = [
        "plain=text",
        f"plain.files={plain}",
        "data=instructions",
        "data.seq_len=32",
        "data.vocab=300",
        "data.val_rows=8",
        "data.val_share=0.2",
    ]
    return [*common, "data.template=plain", f"data.files={root / 'examples.jsonl'}", *words]


def config(root: Path, *words: str) -> ExperimentConfig:
    return small.small_config(root, *words_of(root, *started(words)))


def run(root: Path, *words: str) -> Path:
    return small.here(root, *words_of(root, *started(words)))


def started(words: tuple[str, ...]) -> tuple[str, ...]:
    starts = "teacher=none" not in words and not any(word.startswith("start=") for word in words)
    return (*words, *SHORT) if starts else words


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Sums, with answers of several lengths, and a run of each source of logits on them."""
    path = tmp_path_factory.mktemp("root")
    rows = [{"prompt": f"{n}+{n % 7}=", "response": " ".join([str(n + n % 7)] * (1 + n % 9))} for n in range(150)]
    write(path / "examples.jsonl", *rows)
    return path


def test_only_what_counts_is_counted(root):
    folder = run(root, "logits=none", "teacher=none")
    record, (packed,) = json.loads((folder / "result.json").read_text()), root.glob("data/*/train_spans.npy")
    data = packing.open_packed(packed.parent)
    steps = Batches(data.train, 4, 0, 0, 12, response_spans=data.train_spans)
    assert record["tokens"] == sum((b.labels != IGNORE).sum().item() for b in steps) < 12 * 4 * 32
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    (rows,) = ValidationBatches(data.val, 8, response_spans=data.val_spans)
    with torch.no_grad():
        lm = cross_entropy(student(rows.ids).logits.flatten(0, 1), rows.labels.flatten(), ignore_index=IGNORE).item()
    assert record["final"]["val/lm"] == pytest.approx(lm, rel=1e-5)
    bpb = lm / np.log(2) / data.bytes_per_token
    assert record["final"]["val/bpb"] == pytest.approx(bpb) and 0.4 < data.bytes_per_token < 1.5


def test_what_is_not_counted_teaches_nothing(root, monkeypatch):
    """Other tokens behind the end, which nothing counted looks back on, and the run is the same, bit for bit."""
    before = outcome(run(root, "logits=none", "teacher=none", "seed=7"))
    (packed,) = (packing.open_packed(p.parent) for p in root.glob("data/*/train_spans.npy"))
    changed = packed.train.copy()
    for row, (_, total) in zip(changed, packed.train_spans, strict=True):
        row[total:] = np.arange(5, 5 + len(row) - total)
    assert (changed != packed.train).mean() > 0.2
    monkeypatch.setattr(packing, "open_packed", lambda folder: replace(packed, train=changed))
    (root / "other").mkdir()
    shutil.copy(root / "examples.jsonl", root / "other")
    after = outcome(run(root / "other", "logits=none", "teacher=none", "seed=7"))
    assert before[1] == after[1]


@pytest.mark.slow
def test_a_run_from_a_whole_store_is_one_online(root):
    online = run(root, "seed=3")
    stored = run(root, "seed=3", "logits=offline", "record=full")
    assert outcome(online)[1] == outcome(stored)[1]


def test_a_store_holds_responses_and_no_more(root):
    offline = config(root, *OFFLINE)
    run(root, *OFFLINE)
    packed, _ = prerequisites.prepare(offline)
    store = stores.opened(offline, packed)
    counted = int((packed.train_spans @ [-1, 1]).sum())
    assert store.manifest["positions"] == counted and store.manifest["entries"] == 5 * counted
    assert counted < 0.5 * packed.train[:, 1:].size
    batch = next(iter(Batches(packed.train, 4, 0, 0, 1, read_teacher=store.read, response_spans=packed.train_spans)))
    mask = batch.labels != IGNORE
    assert torch.equal(batch.teacher_rows.count > 0, mask)
    target = store.signal(batch, mask)(slice(0, int(mask.sum())))
    assert (target.logp > -torch.inf).all() and (target.logp.exp().sum(-1) <= 1 + 1e-5).all()
    assert torch.equal(target.label, batch.labels[mask])
    assert "KL from what it says now to what is stored" in store_program.compare_with_teacher(store, str(root))


@pytest.mark.parametrize("start", [("start=scratch",), ("start=pretrained",), ("start=sft", "start.sft_steps=2")])
def test_the_words_of_a_store_describe_that_store(root, start):
    """Read the store's words again: they name the settings of the tokenizer and of the teacher's pre-training."""
    (root / "plain.txt").write_text("A line of text.\n\n" * 9)
    more = (*start, *(["start.steps=7", "start.lr=1e-3"] if "start=scratch" not in start else []))
    offline = config(root, *OFFLINE, *more, "plain=text", f"plain.files={root / 'plain.txt'}")
    words = ["logits=offline", *shlex.split(stores.write_command(offline)), f"root={root}"]
    again = config_of(words)
    assert Plan.from_config(again).store.key == Plan.from_config(offline).store.key


def test_a_store_of_other_prompts_is_another(root):
    """Change the targets of the same rows: the store may lack their new target tokens."""
    offline = config(root, *OFFLINE)
    packed, _ = prerequisites.prepare(offline)
    for part in ("train_spans.npy", "val_spans.npy"):
        other = replace(packed, digests=packed.digests | {part: "another"})
        assert stores.store_spec(offline, other)["data"] != stores.store_spec(offline, packed)["data"]


@pytest.mark.slow
def test_what_a_teacher_says_in_training_is_recorded_of_responses(root):
    folder = run(root, "logits=recorded", "truncation=top_k", "truncation.k=5")
    assert (folder / "result.json").exists()
    (held,) = root.glob("recorded/stores/*/manifest.json")
    manifest = json.loads(held.read_text())
    assert manifest["entries"] == 5 * manifest["positions"] < 5 * 0.7 * manifest["count"] * manifest["seq_len"]


@pytest.mark.parametrize("words", [("logits=cotrained",), ("routing=entropy", "loss=srkl"), ("trainer.micro_batch=1",)])
def test_runs_of_all_kinds_take_responses_alone(root, words):
    assert json.loads((run(root, *words) / "result.json").read_text())["state"] == "done"


def test_micro_batches_of_any_size_learn_the_same(root):
    """Sums over what counts are divided once: rows have from 2 to some 20 tokens that do."""
    a, b = (json.loads((run(root, f"trainer.micro_batch={n}", "seed=5") / "result.json").read_text()) for n in (1, 4))
    assert a["final"]["val/lm"] == pytest.approx(b["final"]["val/lm"], abs=1e-5) and a["tokens"] == b["tokens"]


def test_an_estimate_counts_what_counts(root):
    planned = config(root, "logits=none", "teacher=none", "seed=99", "trainer.steps=50")
    estimates = planner.estimate(planned)
    (packed,) = (packing.open_packed(p.parent) for p in root.glob("data/*/train_spans.npy"))
    assert [estimate.tokens for estimate in estimates.values()] == [round(50 * 4 * packed.mean_target_tokens)]


ON_POLICY = ("rollout=student", "rollout.share=1", "alpha.peak=1", "loss=rkl")


@pytest.mark.parametrize("kind", ["text", "messages"])
@pytest.mark.parametrize("words", [ON_POLICY, ("rollout=teacher", "logits=none")], ids=["student", "teacher"])
def test_prompts_alone_are_for_rollouts_that_write_all_responses(root, tmp_path, words, kind):
    teacher = run(root, "logits=none", "teacher=none") / "student"
    texts = [f"{n}+{n % 7}=" for n in range(60)]
    prompts = texts if kind == "text" else [[{"role": "user", "content": text}] for text in texts]
    file = write(tmp_path / "prompts.jsonl", *({"prompt": prompt} for prompt in prompts))
    named = (f"data.files={file}", "teacher=hub", f"teacher.name={teacher}", "data.val_rows=4")
    common = [word for word in words_of(root) if not word.startswith(("data.vocab", "data.files"))]
    folder = small.here(tmp_path, *common, *named, *words, "trainer.steps=2", "trainer.val_every=2")
    result = json.loads((folder / "result.json").read_text())
    assert result["data"]["prompts_only"] == 60 and "left_out" in result["data"]
    assert 0 < result["final"]["val/lm"] < 20
    (written,) = (packing.open_packed(p.parent) for p in tmp_path.glob("rollouts/*/manifest.json"))
    lengths = written.val_spans[:, 1] - written.val_spans[:, 0]
    assert len(written.val) == 4 and lengths.max() > 1  # the teacher's responses are the references
    assert ((written.train_spans @ [-1, 1]).max() > 1) == ("rollout=teacher" in words)


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ((), {"option": "rollout", "got": "none", "why": "prompts and no responses", "hint": "rollout.share=1"}),
        (("rollout=student",), {"option": "rollout.share", "got": 0.5, "why": "learns from the data"}),
        (("rollout=adaptive",), {"option": "rollout", "got": "adaptive", "why": "learns from the data"}),
        (("rollout=student", "rollout.share=1"), {"option": "alpha", "hint": "alpha.peak=1, or lm=plain"}),
        (ON_POLICY, {"option": "teacher.size", "got": "100k", "hint": "teacher.name=NAME"}),
    ],
)
def test_prompts_alone_are_refused_where_responses_are_learned(tmp_path, words, fields):
    file = write(tmp_path / "prompts.jsonl", *({"prompt": f"{n}="} for n in range(60)))
    common = [word for word in words_of(tmp_path) if not word.startswith("data.files")]
    config = small.small_config(tmp_path, *common, f"data.files={file}", *words)
    with refused(**fields):
        prerequisites.prepare(config)


def test_a_result_has_what_became_of_all_rows(root, tmp_path, capsys):
    rows = [json.loads(line) for line in (root / "examples.jsonl").read_text().splitlines()]
    rows = [row | {"response": "", "tag": "t"} if n % 5 == 0 else row for n, row in enumerate(rows)]
    write(tmp_path / "examples.jsonl", *rows)
    folder = run(tmp_path, "logits=none", "teacher=none", "trainer.steps=1")
    result = json.loads((folder / "result.json").read_text())
    counts = result["data"]
    assert counts["read"] == 150 == sum(counts["used"].values()) + sum(counts["left_out"].values())
    assert counts["left_out"]["no_response"] == 30 and counts["unused"] == {"column tag": 30}
    summary.show(prerequisites.FinishedRun(Run(str(tmp_path), folder.name), result, before=False))
    shown = " ".join(capsys.readouterr().err.split())
    assert "Data: 150 examples read" in shown and "30 without a response" in shown and "column tag in 30" in shown


def test_a_config_may_call_instructions_and_nothing_else_there():
    assert components.locate("kd.data.instructions.instructions", "data") == ("kd.data.instructions", "instructions")
    for name in ("functions", "tokens", "corpora.hub", "alpaca"):
        with refused(option="data._target_", need=("kd.data.corpora.hub, ", "kd.data.instructions.instructions")):
            components.locate(f"kd.data.instructions.{name}", "data")
