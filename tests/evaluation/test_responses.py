"""Responses of trained models and their metrics: by hand, against plain loops, and in runs that are killed."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import Strategy

from kd.config.schema import ExperimentConfig
from kd.data import packing
from kd.evaluation import responses
from kd.evaluation.responses import ResponseEvaluation
from kd.evaluation.text_scores import distinct, rouge_l
from kd.parallel import collectives
from kd.rollout import generate
from kd.runs import identity, run
from kd.system.signals import Preempted
from kd.teachers.none import NoTeacher
from tests import small
from tests.evaluation.written import written
from tests.refusals import refused
from tests.rollout.test_generate import END, batch, model
from tests.small import ENVIRONMENT, SMALL, TRAIN, result


@dataclass
class Prompts:
    """Packed data, as far as the callback reads it."""

    val: np.ndarray
    val_spans: np.ndarray
    eos_token_id: int = END


def evaluation(**options) -> ResponseEvaluation:
    (text, _) = written()
    return ResponseEvaluation(Path("nowhere"), Prompts(*text), None, NoTeacher(), None, None, **options)


def test_samples_are_drawn_row_by_row_with_seeds_of_their_own():
    writes, prompts = evaluation(samples=2, seed=7)._write(model(), "test", False), batch([3, 1, 9, 5, 12])
    seed = [np.random.default_rng([7, sample, row]).integers(2**62) for sample in range(2) for row in range(5)]
    for sample in range(2):
        generated = generate.sample(prompts, END, torch.tensor(seed[5 * sample : 5 * sample + 5]), model())
        rows = responses.as_rows(generated)
        assert (writes.tokens[5 * sample : 5 * sample + 5] == rows["tokens"].numpy()).all()
        assert (writes.span[5 * sample : 5 * sample + 5] == rows["span"].numpy()).all()
    assert (writes.tokens[:5] != writes.tokens[5:]).any()
    assert (evaluation(samples=1, seed=8)._write(model(), "test", False).tokens != writes.tokens[:5]).any()


def test_where_memory_runs_out_fewer_rows_are_written_at_once_and_the_same(monkeypatch):
    one = evaluation(samples=3)
    expected, write, tried = one._write(model(), "test", False), generate.sample, []

    def small(given, *args, **options):
        tried.append(len(given.ids))
        if len(given.ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return write(given, *args, **options)

    monkeypatch.setattr(generate, "sample", small)
    monkeypatch.setattr(responses, "AT_ONCE", 5)
    got = evaluation(samples=3)._write(model(), "test", False)
    assert (got.tokens == expected.tokens).all() and (got.span == expected.span).all()
    assert tried[:3] == [5, 3, 2] and 3 not in tried[2:] and 5 not in tried[1:]
    monkeypatch.setattr(generate, "sample", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("of another kind")))
    with pytest.raises(RuntimeError, match="another kind"):
        evaluation()._write(model(), "test", False)


def test_ranks_share_the_rows_and_those_without_one_take_part(monkeypatch):
    """Give every rank of a sharded model as many batches as any other, so some batches hold no target."""
    expected, parts = evaluation(samples=3)._write(model(), "test", False), []
    for rank in range(4):
        monkeypatch.setattr(collectives, "world_size", lambda: 4)
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(collectives, "any_rank", lambda here: here)
        monkeypatch.setattr(collectives, "all_gather", lambda value: [value])
        one = evaluation(samples=3)
        one.at_once = 1
        assert len(one._batches(one.packed.val, one.packed.val_spans, 1, True, 3)) == 4
        parts.append(one._write(model(), "test", True))
    assert [len(part.tokens) for part in parts] == [4, 4, 4, 3]
    assert (np.concatenate([part.tokens for part in parts]) == expected.tokens).all()


# Runs


def words_of(root: Path, *words: str) -> list[str]:
    """Return the words, after the small settings, for a run on the examples of a root."""
    return ["data=instructions", f"data.files={root / 'examples.jsonl'}", "data.seq_len=32", "data.vocab=300",
            "data.val_rows=6", "data.val_share=0.2", "data.template=plain", "plain=text",
            f"plain.files={root / 'plain.txt'}", "start=pretrained", "start.steps=4", *words]  # fmt: skip


def config(root: Path, *words: str) -> ExperimentConfig:
    return small.small_config(root, *words_of(root, *words))


def here(root: Path, *words: str) -> Path:
    return small.here(root, *words_of(root, *words))


def lines(folder: Path, name: str = "responses.jsonl") -> list[dict]:
    with open(folder / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("root")
    rows = [{"prompt": f"{n}+{n % 7}=", "response": " ".join([str(n + n % 7)] * (1 + n % 9))} for n in range(150)]
    (path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "plain.txt").write_text("\n\n".join(" ".join(map(str, range(n, n + 40))) for n in range(60)))
    return path


@pytest.fixture(scope="module")
def student(root) -> Path:
    return here(root)


def test_measures_of_a_run_are_those_of_its_file(root, student):
    final, rows = result(student)["final"], lines(student)
    (packed,) = (
        p
        for p in map(packing.open_packed, (p.parent for p in root.glob("data/*/manifest.json")))
        if p.eos_token_id is not None
    )
    examples = {row["prompt"]: row["response"] for row in lines(root, "examples.jsonl")}
    assert [row["row"] for row in rows] == list(range(6)) == list(range(len(packed.val)))
    for row in rows:
        assert examples[row["prompt"]].startswith(row["reference"]) and row["reference"]
        assert row["rouge_l"] == rouge_l(row["response"], row["reference"])
        assert row["tokens"] <= 32 and (row["ended"] or row["tokens"] > 0)
    for name, column in (("rouge_l", "rouge_l"), ("exact_match", "exact_match"), ("eos_rate", "ended")):
        assert final[f"val/{name}"] == pytest.approx(fmean(row[column] for row in rows))
    assert final["val/response_length"] == pytest.approx(fmean(row["tokens"] for row in rows))
    assert final["val/distinct_4"] == pytest.approx(distinct([row["response"] for row in rows], 4))
    assert final["val/teacher_rouge_l"] == pytest.approx(fmean(row["teacher_rouge_l"] for row in rows))
    assert final["val/perplexity"] == pytest.approx(np.exp(final["val/lm"]))
    curve = json.loads((student / "exaccerr.json").read_text())
    assert final["val/exaccerr"] == curve["exaccerr"][15]
    kl, oracle = (np.array(curve[who]["fkl"]).cumsum() for who in ("student", "teacher"))
    assert curve["exaccerr"] == pytest.approx((kl - oracle) / oracle) and curve["exaccerr"][0] == 0


def test_a_teachers_responses_are_those_of_its_own_run_and_written_once(root, student, monkeypatch):
    """Compare the teacher's responses in a student's run with those of its own run: draws and weights are the same."""
    (teacher_run,) = (p.parent for p in root.glob("lm-*/responses.jsonl"))
    assert [row["response"] for row in lines(teacher_run)] == [row["teacher"] for row in lines(student)]
    assert "teacher" not in lines(teacher_run)[0] and not (teacher_run / "exaccerr.json").exists()
    assert "val/exaccerr" not in result(teacher_run)["final"]
    write, calls = generate.sample, []

    def watched(*args, **options):
        calls.append(args[3])
        return write(*args, **options)

    monkeypatch.setattr(generate, "sample", watched)
    again = here(root, "seed=1")
    assert len(calls) == 1
    assert [row["teacher"] for row in lines(again)] == [row["teacher"] for row in lines(student)]
    assert [row["response"] for row in lines(again)] != [row["response"] for row in lines(student)]
    (stored,) = root.glob("responses/*.npz")
    damaged = bytearray(stored.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    stored.write_bytes(damaged)
    assert [row["teacher"] for row in lines(here(root, "seed=2"))] == [row["teacher"] for row in lines(student)]
    assert len(calls) == 3


def test_other_settings_are_other_runs_and_have_responses_of_their_own(root, student):
    folder = here(root, "responses.samples=2", "responses.seed=3")
    rows = lines(folder)
    assert folder != student and [(row["sample"], row["row"]) for row in rows] == [
        (s, r) for s in (0, 1) for r in range(6)
    ]
    assert [row["reference"] for row in rows] == 2 * [row["reference"] for row in lines(student)]
    assert len(list(root.glob("responses/*.npz"))) == 2 and len(list(root.glob("lm-*"))) == 2  # the same teacher
    greedy = lines(here(root, "responses.temperature=0"))
    assert [r["response"] for r in greedy] != [r["response"] for r in lines(student)]


def test_a_run_that_is_ended_while_it_writes_goes_on_and_writes_the_same(root, student, monkeypatch, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    other = tmp_path / "root" / student.name
    shutil.rmtree(other)
    words = (f"data.files={root / 'examples.jsonl'}", f"plain.files={root / 'plain.txt'}")
    write = generate.sample

    def ended(*args, watch, **options):
        watch(0, 1)
        raise Preempted

    monkeypatch.setattr(generate, "sample", ended)
    with pytest.raises(Preempted):
        here(tmp_path / "root", *words)
    assert run.Run(tmp_path / "root", student.name).state()["state"] == "preempted"
    assert not (other / "result.json").exists() and not list(other.glob("*responses*")) and list(
        other.glob("checkpoints/*"))  # fmt: skip
    monkeypatch.setattr(generate, "sample", write)
    assert here(tmp_path / "root", *words) == other
    for name in ("responses.jsonl", "exaccerr.json", "metrics.jsonl"):
        assert (other / name).read_bytes() == (student / name).read_bytes(), name


def test_responses_are_written_before_the_student_leaves_its_device(root, student, monkeypatch, tmp_path):
    """Lightning moves the student to the CPU when fit ends, where a teacher on a GPU would not be beside it."""
    shutil.copytree(root, tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / student.name)
    order, write, teardown = [], ResponseEvaluation._write, Strategy.teardown
    monkeypatch.setattr(ResponseEvaluation, "_write", lambda *given: (order.append("write"), write(*given))[1])
    monkeypatch.setattr(Strategy, "teardown", lambda self: (order.append("teardown"), teardown(self))[1])
    here(tmp_path / "root", f"data.files={root / 'examples.jsonl'}", f"plain.files={root / 'plain.txt'}")
    assert order == ["write", "teardown"]


def test_a_signal_is_heeded_while_a_model_writes(monkeypatch):
    monkeypatch.setattr(responses.requests, "pending", True)
    with pytest.raises(Preempted):
        evaluation()._write(model(), "test", False)


def test_without_a_teacher_at_hand_the_text_alone_is_measured(root):
    folder = here(root, "logits=offline", "truncation=top_k", "truncation.k=5")
    final = result(folder)["final"]
    assert "val/rouge_l" in final and "val/fkl" in final and "val/on_policy_tvd" not in final
    assert "teacher" not in lines(folder)[0] and not (folder / "exaccerr.json").exists()


def test_a_teacher_that_learns_writes_for_its_own_run_alone(root):
    before = set(root.glob("responses/*.npz"))
    folder = here(root, "logits=cotrained")
    assert "val/exaccerr" in result(folder)["final"] and "teacher" in lines(folder)[0]
    assert set(root.glob("responses/*.npz")) == before


def test_plain_text_asks_for_no_responses_and_settings_of_them_are_refused(tmp_path):
    from tests import small

    folder = small.here(tmp_path, "teacher=none", "logits=none")
    assert not (folder / "responses.jsonl").exists() and "val/rouge_l" not in result(folder)["final"]
    config = result(folder)["config"]
    assert "responses.seed" in config and not any(k.startswith("responses") for k in identity.identity_settings(config))
    with refused(option="responses.samples", got="2", why="would do nothing", hint="data=instructions"):
        small.small_config(tmp_path, "responses.samples=2")


@pytest.mark.parametrize(
    ("words", "option", "fields"),
    [(("responses.samples=2", "responses.temperature=0"), ".samples", {"conflict": "responses.temperature=0"}),
     (("responses.samples=0",), ".samples", {"need": "at least 1"}),
     (("responses.temperature=-1",), ".temperature", {"need": "at least 0"}),
     (("++responses.greedy=true",), ".greedy", {"why": "no such option"}),
     (("~responses",), "", {"need": "settings of this group"})],
)  # fmt: skip
def test_settings_without_a_meaning_are_refused(root, words, option, fields):
    with refused(option=f"responses{option}", **fields):
        config(root, *words)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_ranks_write_what_one_would(root, student, strategy, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    other = tmp_path / "root" / student.name
    shutil.rmtree(other)
    base = [w for w in SMALL if not w.startswith("data")]
    command = [sys.executable, str(TRAIN), *base, *words_of(root), f"root={tmp_path / 'root'}", f"trainer={strategy}"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = lines(student), lines(other)
    assert [row["prompt"] for row in one] == [row["prompt"] for row in two]
    assert [row["response"] for row in one] == [row["response"] for row in two]
    assert result(student)["final"] == pytest.approx(result(other)["final"], rel=1e-2, abs=1e-4)
