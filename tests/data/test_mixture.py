"""Mixtures: rows by weight, each part's own validation, and refusals that name the part."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kd.config.components import typed
from kd.data import packing
from kd.data.batches import PackedPart, ValidationBatches
from kd.data.corpora import Corpus
from kd.data.mixture import Mixture, Part, mixture
from kd.data.mixture_rows import in_words, interleaved, rows_by_weight
from kd.evaluation import catalog
from kd.evaluation.validation import Validation
from kd.experiment import stores
from tests.data.texts import NO_VOCAB, SETTINGS, corpus, documents
from tests.refusals import refused
from tests.small import here, result, small_config

WORDS = ("data.seq_len=32", "data.val_rows=8", "data.vocab=280")


def mixed(counts: dict[str, int], shares: dict[str, float]) -> Mixture:
    """A mixture of generated documents; each part has documents of its own."""
    texts = {name: corpus(documents(count, seed=i)) for i, (name, count) in enumerate(counts.items())}
    parts = tuple(Part(name, text, shares[name]) for name, text in texts.items())
    return Mixture(list, {"mixture": [[p.name, p.share, p.corpus.fingerprint] for p in parts]}, parts=parts)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return packing.pack(mixed({"a": 300, "b": 200}, {"a": 0.75, "b": 0.25}), tmp_path_factory.mktemp("d"), **SETTINGS)


def parts_of(*shares: float) -> list[Part]:
    return [Part(f"p{i}", Corpus(list, {}), share) for i, share in enumerate(shares)]


# Weights


def test_rows_by_weight_by_hand():
    assert rows_by_weight([700, 300], parts_of(0.7, 0.3)) == [700, 300]
    assert rows_by_weight([10_000, 300], parts_of(0.7, 0.3)) == [700, 300]  # the second is used up first
    assert rows_by_weight([10, 10, 10], parts_of(0.5, 0.25, 0.25)) == [10, 5, 5]
    assert rows_by_weight([7, 1000], parts_of(2 / 3, 1 / 3)) == [7, 3]
    with refused(option="data.parts.p1.weight", why="less than one row"):
        rows_by_weight([10, 10], parts_of(0.99, 0.01))


def test_any_stretch_of_rows_has_the_proportions_of_the_weights():
    order = interleaved([700, 200, 100])
    assert np.bincount(order).tolist() == [700, 200, 100]
    for start in range(0, 1000, 100):
        assert abs(np.bincount(order[start : start + 100], minlength=3) - [70, 20, 10]).max() <= 1


def test_a_line_tells_which_part_ends_the_mixture():
    line = in_words(parts_of(0.5, 0.5), [40, 10], [10, 10], is_limited=False)
    assert "p0 50.0% (10 of 40 rows)" in line and "p1 is used up first" in line and "30 rows" in line
    assert "used up" not in in_words(parts_of(0.5, 0.5), [10, 10], [10, 10], is_limited=False)
    assert "used up" not in in_words(parts_of(0.5, 0.5), [11, 10], [10, 10], is_limited=True)


# Packed rows


def test_rows_are_those_of_the_parts_alone_with_one_tokenizer(packed, tmp_path):
    alone = [
        packing.pack(corpus(documents(count, seed=seed)), tmp_path, tokenizer=str(packed.tokenizer), **NO_VOCAB)
        for seed, count in ((0, 300), (1, 200))
    ]
    counts = [part.train_rows for part in packed.parts]
    order = interleaved(counts)
    for number, part in enumerate(alone):
        assert (packed.train[order == number] == part.train[: counts[number]]).all()
        assert packed.parts[number].bytes_per_token == pytest.approx(part.bytes_per_token)
    assert (packed.val == np.concatenate([part.val for part in alone])).all()
    assert counts[0] == pytest.approx(3 * counts[1], abs=3) and counts[0] == len(alone[0].train)
    assert packed.counts["rows"] == {"train": sum(counts), "val": 10}
    assert packed.counts["read"] == 500 and sum(packed.counts["used"].values()) == 500
    shares = [0.75 * packed.parts[0].bytes_per_token, 0.25 * packed.parts[1].bytes_per_token]
    assert packed.bytes_per_token == pytest.approx(sum(shares))
    assert not list(packed.folder.glob("part-*"))


def test_tokens_are_shared_by_weight(tmp_path, capsys):
    limited = packing.pack(mixed({"a": 300, "b": 200}, {"a": 0.75, "b": 0.25}), tmp_path, tokens=1700, **SETTINGS)
    assert [part.train_rows for part in limited.parts] == [75, 25]  # of 17 tokens each
    assert "used up" not in capsys.readouterr().out
    with refused(option="data.tokens", why="part b"):
        packing.pack(mixed({"a": 300, "b": 200}, {"a": 0.99, "b": 0.01}), tmp_path, tokens=1600, **SETTINGS)


def test_the_name_is_a_digest_of_all_parts():
    source = mixed({"a": 300, "b": 200}, {"a": 0.75, "b": 0.25})
    names = {
        packing.key(source, **SETTINGS),
        packing.key(mixed({"a": 300, "b": 200}, {"a": 0.5, "b": 0.5}), **SETTINGS),
        packing.key(mixed({"a": 301, "b": 200}, {"a": 0.75, "b": 0.25}), **SETTINGS),
        packing.key(mixed({"c": 300, "b": 200}, {"c": 0.75, "b": 0.25}), **SETTINGS),
    }
    assert len(names) == 4 and packing.key(source, **SETTINGS) in names


# Settings


PYTHON = {"source": "python", "weight": 1}


@pytest.mark.parametrize(("part", "option", "piece"), [
    ({"source": "mixture", "weight": 1}, "data.parts.web.source", "cannot be a mixture itself"),
    ({"source": "instructions", "weight": 1}, "data.parts.web.source", "plain text"),
    ({"source": "markov", "weight": 1}, "data.parts.web.source", "vocabulary of its own"),
    ({"source": "os.system", "weight": 1}, "data.parts.web.source", ""),
    ({"weight": 1}, "data.parts.web.source", "is needed"),
    (PYTHON | {"feild": "x"}, "data.parts.web.feild", "no such option"),
    (PYTHON | {"tokens": 3}, "data.parts.web.tokens", "no such option"),
    ({"source": "text", "weight": 1}, "data.parts.web.files", "is needed"),
    ({"source": "text", "weight": 1, "files": "none.txt"}, "data.parts.web.files", "no such file"),
    ({"source": "text", "weight": 1, "files": 3}, "data.parts.web.files", "a whole number"),
    ({"source": "hub", "weight": 1, "name": ""}, "data.parts.web.name", "is not set"),
])  # fmt: skip
def test_refusals_name_the_part(part, option, piece):
    with refused(option=option, why=piece):
        mixture({"code": PYTHON, "web": part})


@pytest.mark.parametrize("weight", [0, -1, True, "much", None, float("inf"), float("nan")])
def test_a_weight_is_a_positive_number(weight):
    with refused(option="data.parts.web.weight"):
        mixture({"web": PYTHON | {"weight": weight}})


@pytest.mark.parametrize("parts", [{}, {"a b": PYTHON}, {"a/b": PYTHON}, {"web": "python"}])
def test_a_mixture_has_parts_with_names(parts):
    with refused():
        mixture(parts)


def test_weights_are_relative():
    shares = [part.share for part in mixture({"a": PYTHON | {"weight": 7}, "b": PYTHON | {"weight": 3}}).parts]
    assert shares == pytest.approx([0.7, 0.3])


def test_an_error_about_the_text_of_a_part_names_it(tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "code.txt").write_text("\n\n".join(documents()))
    code = {"source": "text", "files": str(tmp_path / "code.txt"), "weight": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "text"}) + "\n")
    for file, piece in (("short.txt", "part web of the mixture"), ("rows.jsonl", "no column")):
        part = {"source": "text", "files": str(tmp_path / file), "weight": 1}
        with refused(why=piece) as caught:
            packing.pack(mixture({"code": code, "web": part}), tmp_path / "data", **SETTINGS)
        assert "web" in str(caught.value)
    assert "data.parts.web.field" in str(caught.value)


# Validation


class Student(torch.nn.Module):
    """Student whose hidden states are one-hot tokens."""

    def __init__(self, vocab: int):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.vocab = torch.nn.Linear(vocab, vocab), vocab

    def hidden_states(self, ids):
        return torch.nn.functional.one_hot(ids, self.vocab).float()


def validated(rows: np.ndarray, parts: tuple, bytes_per_token: float, batch: int = 3) -> dict[str, float]:
    """Metrics of a student on rows, beside a teacher of another seed."""
    student, teacher = Student(16), torch.nn.Linear(16, 16)
    module = SimpleNamespace(
        student=student, objective=SimpleNamespace(chunk=4), device=torch.device("cpu"), rollout=None,
        eval=lambda: None, train=lambda: None, check_finite=lambda *_: None,
    )  # fmt: skip

    def reference(given, mask):
        from kd.objective.signals import ProjectedSignal

        features = student.hidden_states(given.ids)[mask]
        return ProjectedSignal(teacher, features, given.labels[mask], given.position_seeds[mask])

    trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(val_step_context=torch.no_grad), loggers=[], global_step=0
    )
    batches = ValidationBatches(rows, batch)
    validation = Validation(
        1, SimpleNamespace(reference=reference), batches, dict, bytes_per_token=bytes_per_token, parts=parts
    )
    validation.validate(trainer, module)
    return validation.metrics


def test_the_validation_of_a_mixture_is_the_weighted_mean_of_its_parts():
    """Batches of three rows go from one part to the next; the parts have other numbers of rows."""
    rows = np.random.default_rng(0).integers(0, 16, (12, 9))
    parts = (PackedPart("a", 0.7, 70, 7, 2.0), PackedPart("b", 0.3, 30, 5, 4.0))
    whole = validated(rows, parts, bytes_per_token=0.7 * 2 + 0.3 * 4)
    a, b = validated(rows[:7], (), 2.0), validated(rows[7:], (), 4.0)
    for name in ("lm", "fkl", "teacher_lm", "accuracy"):
        assert whole[f"val/{name}/a"] == pytest.approx(a[f"val/{name}"], rel=1e-6)
        assert whole[f"val/{name}/b"] == pytest.approx(b[f"val/{name}"], rel=1e-6)
        assert whole[f"val/{name}"] == pytest.approx(0.7 * a[f"val/{name}"] + 0.3 * b[f"val/{name}"], rel=1e-6)
    assert whole["val/bpb/b"] == pytest.approx(b["val/lm"] / np.log(2) / 4)
    assert whole["val/bpb"] == pytest.approx(whole["val/lm"] / np.log(2) / 2.6)


def test_the_loss_of_each_part_is_a_metric_of_tables():
    keys = ["val/lm", "val/lm/web", "val/lm/code", "val/fkl/web"]
    assert [metric.key for metric in catalog.with_parts(keys)][:3] == keys[:3]
    assert catalog.with_parts(["val/lm"]) == catalog.metrics()


# Runs


def mixture_words(folder: Path) -> tuple[str, ...]:
    for name, seed in (("a", 0), ("b", 1)):
        (folder / f"{name}.txt").write_text("\n\n".join(documents(300, seed)))
    parts = {
        name: {"source": "text", "files": str(folder / f"{name}.txt"), "weight": weight}
        for name, weight in (("a", 0.6), ("b", 0.4))
    }
    return ("data=mixture", f"data.parts={typed(parts)}", *WORDS)


def test_a_store_is_written_by_the_words_that_it_advises(tmp_path):
    words = mixture_words(tmp_path)
    config = small_config(tmp_path, *words, "logits=offline", "truncation=top_k")
    again = small_config(tmp_path, *shlex.split(stores.write_command(config)), "logits=offline")
    assert again.data.to_dict() == config.data.to_dict()


@pytest.mark.slow
def test_a_run_on_a_mixture_has_the_loss_of_each_part(tmp_path):
    words = mixture_words(tmp_path)
    done = result(here(tmp_path, *words, "logits=offline", "truncation=top_k", "truncation.k=5"))
    final = done["final"]
    assert final["val/lm"] == pytest.approx(0.6 * final["val/lm/a"] + 0.4 * final["val/lm/b"])
    assert [part["name"] for part in done["parts"]] == ["a", "b"]
