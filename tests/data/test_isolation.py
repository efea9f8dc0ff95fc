"""data.isolate=true: marks of documents in rows, positions that restart, and first tokens that are not learned."""

import numpy as np
import pytest
import torch

from kd.data import packing
from kd.data.batches import FIRST, IGNORE, NOT_LEARNED, Batches, ValidationBatches, to_batch
from kd.experiment.dependencies import Plan, corpus
from kd.models.causal_lm import CausalLM, from_size
from kd.objective.chunked import log_probabilities
from tests.data.test_mixture import mixed
from tests.data.texts import SETTINGS, documents
from tests.data.texts import corpus as text
from tests.refusals import refused
from tests.small import here, result, small_config


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Some documents, packed twice: not isolated, and isolated."""
    cache = tmp_path_factory.mktemp("data")
    return [packing.pack(text(documents()), cache, **SETTINGS, isolate=isolate) for isolate in (False, True)]


def test_positions_and_labels_by_hand():
    rows = np.array([[5, 6, 9, 7, 9, 8, 8], [5, 6, 7, 8, 9, 4, 3]])
    marks = np.array([[0, 0, 0, FIRST, 0, FIRST, 0], [FIRST, NOT_LEARNED, 0, 0, 0, FIRST, FIRST]], np.uint8)
    batch = to_batch(rows, np.arange(2), np.zeros((2, 6), np.int64), marks=marks)
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 0]]
    assert batch.labels.tolist() == [[6, 9, IGNORE, 9, IGNORE, 8], [IGNORE, 7, 8, 9, IGNORE, IGNORE]]
    assert [part.positions.tolist() for part in batch.split(1)] == [batch.positions[:1].tolist(), [[0, 1, 2, 3, 4, 0]]]


def test_rows_are_the_same_and_documents_are_marked(pair):
    plain, isolated = pair
    end = 0  # of a tokenizer that is trained here
    assert plain.train_marks is None and plain.folder != isolated.folder
    for side in ("train", "val"):
        rows, marks = getattr(isolated, side), getattr(isolated, f"{side}_marks")
        assert (rows == getattr(plain, side)).all() and marks.shape == rows.shape
        assert ((marks[:, 1:] == FIRST) == (rows[:, :-1] == end)).all()
    assert isolated.mean_target_tokens == pytest.approx(16 - (isolated.train[:, :-1] == end).mean() * 16)


def test_batches_have_positions_for_training_and_validation(pair):
    plain, isolated = pair
    (batch,) = Batches(isolated.train, 7, seed=3, start=5, steps=6, marks=isolated.train_marks)
    assert ((batch.positions[:, 1:] == 0) == (batch.ids[:, :-1] == 0)).all()
    assert (batch.labels[batch.ids == 0] == IGNORE).all() and (batch.labels[batch.ids != 0] != IGNORE).all()
    assert next(iter(ValidationBatches(isolated.val, 2, marks=isolated.val_marks))).positions is not None
    assert next(iter(Batches(plain.train, 7, seed=3, start=5, steps=6))).inputs[1:] == ()


def test_bytes_of_first_tokens_are_not_measured(pair):
    from transformers import AutoTokenizer

    isolated = pair[1]
    tokenizer = AutoTokenizer.from_pretrained(isolated.tokenizer)
    batch = to_batch(isolated.val, np.arange(5), np.zeros((5, 16), int), marks=isolated.val_marks)
    learned = batch.labels[batch.labels != IGNORE].tolist()
    size = sum(len(tokenizer.decode([token]).encode()) for token in learned if token)
    assert isolated.bytes_per_token == pytest.approx(size / len(learned))


def test_the_loss_of_a_row_is_that_of_its_documents_alone(pair):
    isolated = pair[1]
    torch.manual_seed(0)
    model = CausalLM(from_size("100k", 280, 16), 280).double()
    batch = to_batch(isolated.train[:4], np.arange(4), np.zeros((4, 16), int), marks=isolated.train_marks[:4])
    mask = batch.labels != IGNORE

    def summed(hidden, labels):
        return -log_probabilities(model.head, hidden).gather(-1, labels[:, None]).sum()

    whole, alone = summed(model.hidden_states(*batch.inputs)[mask], batch.labels[mask]), 0.0
    for row, marks in zip(isolated.train[:4].astype(int), isolated.train_marks[:4], strict=True):
        for part in np.split(row, np.flatnonzero(marks[1:]) + 1):
            if len(part) > 1:
                ids = torch.from_numpy(part)
                alone += summed(model.hidden_states(ids[None, :-1])[0], ids[1:])
    assert whole.item() == pytest.approx(alone.item(), rel=1e-6)


def test_the_neutral_value_moves_no_name(pair):
    plain, isolated = pair
    assert packing.folder_name(text(documents()), **SETTINGS, isolate=False) == plain.folder.name
    assert packing.folder_name(text(documents()), **SETTINGS, isolate=True) == isolated.folder.name


def test_a_mixture_is_isolated_too(tmp_path):
    packed = packing.pack(mixed({"a": 300, "b": 200}, {"a": 0.7, "b": 0.3}), tmp_path, **SETTINGS, isolate=True)
    for rows, marks in ((packed.train, packed.train_marks), (packed.val, packed.val_marks)):
        assert ((marks[:, 1:] == FIRST) == (rows[:, :-1] == 0)).all()


@pytest.mark.parametrize(("words", "why"), [("data=markov", "one document"), ("data=instructions", "a prompt")])
def test_isolation_of_rows_that_hold_one_text_is_refused(words, why, tmp_path):
    with refused(option="data.isolate", got=True, why=why):
        corpus(small_config(tmp_path, words, "data.isolate=true"))


@pytest.mark.parametrize("words", [("data=python", "data.isolate=true"), ("data=instructions", "data.pack=true")])
def test_flash_attention_is_refused(words, tmp_path):
    with refused(option=words[1].partition("=")[0], conflict="trainer.attention=flash_attention_2"):
        small_config(tmp_path, *words, "trainer.attention=flash_attention_2")


def test_runs_and_stores_depend_on_isolation(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(documents()))
    words = ("data=text", f"data.files={tmp_path}/a.txt", "logits=offline", "truncation=top_k")
    plans = [Plan.from_config(small_config(tmp_path, *words, *more)) for more in ((), ("data.isolate=true",))]
    assert plans[0].store.key != plans[1].store.key and plans[0].run.name != plans[1].run.name
    assert plans[0].teacher.data.isolate is False and plans[1].teacher.data.isolate is True


@pytest.mark.slow
def test_a_store_holds_what_the_teacher_says_of_isolated_documents(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(documents()))
    words = ("data=text", f"data.files={tmp_path}/a.txt", "data.vocab=280", "data.seq_len=32", "data.val_rows=8",
             "data.isolate=true")  # fmt: skip
    final = [
        result(here(tmp_path, *words, *more))["final"]
        for more in (("logits=online",), ("logits=offline", "record=full"), ("logits=offline", "truncation=top_k"))
    ]
    for other in final[1:]:
        assert other["val/teacher_lm"] == pytest.approx(final[0]["val/teacher_lm"], rel=1e-5)
    assert final[1]["val/lm"] == pytest.approx(final[0]["val/lm"], rel=1e-4)
    path = next((tmp_path / "stores").glob("*/manifest.json")).parent
    with refused(why="its data is"):
        here(tmp_path, *words[:-1], "logits=offline", "truncation=top_k", f"logits.path={path}")
