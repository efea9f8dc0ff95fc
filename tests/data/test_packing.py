"""Path from documents to batches: each row depends on content, seed and step alone, and is the same each time."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kd.config import argument_types
from kd.data import corpora, packing, tokenizer
from kd.data.batches import (
    IGNORE,
    Batch,
    Batches,
    Packed,
    ValidationBatches,
    _permutation,
    prefetch,
    rows_of_step,
    to_batch,
)
from kd.data.corpora import Corpus, Pairs, markov
from kd.data.split import TrainValSplit, ordered
from kd.data.tokenizer import END
from kd.errors import UserError
from tests.refusals import refused

SETTINGS = dict(seq_len=16, vocab=280, val_rows=5, val_share=0.2)
NO_VOCAB = {k: v for k, v in SETTINGS.items() if k != "vocab"}  # for a pretrained tokenizer
FORK = multiprocessing.get_context("fork")
BOS = pytest.mark.parametrize("bos", [("<s>",), ("[gMASK]", "<sop>"), (END,)], ids=["one", "two", "end"])


def documents(count: int = 300, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.integers(0, 90, rng.integers(5, 40))) for _ in range(count)]


def corpus(texts: list[str], **options) -> Corpus:
    return Corpus(lambda: texts, {"texts": sorted(texts)}, **options)


def rows_of_words(texts: list[str], **options) -> Corpus:
    """Documents that are rows as they stand, of words that are tokens."""
    return corpus(texts, words=sorted({w for t in texts for w in t.split()}), **options)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Packed:
    return packing.pack(corpus(documents()), tmp_path_factory.mktemp("data"), **SETTINGS)


@pytest.fixture
def cache(packed, tmp_path) -> Path:
    """A copy of the packed data, to be damaged."""
    shutil.copytree(packed.folder.parent, tmp_path / "data")
    return tmp_path / "data"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


# Batches


def test_label_is_the_next_token_of_the_row(packed):
    (batch,) = Batches(packed.train, batch=7, seed=3, start=5, steps=6)
    rows = torch.from_numpy(packed.train[batch.row_ids].astype(np.int64))
    assert torch.equal(batch.ids, rows[:, :-1]) and torch.equal(batch.labels, rows[:, 1:])
    assert torch.equal(batch.ids[:, 1:], batch.labels[:, :-1])
    assert (
        batch.ids.shape == batch.labels.shape == batch.position_seeds.shape == (7, 16)
        and batch.ids.dtype == torch.int64
    )


def test_starting_at_a_step_is_skipping_those_before(packed):
    rows = packed.train[:100]  # step 3 and 6 go from one epoch to the next
    whole = list(Batches(rows, batch=30, seed=1, start=0, steps=12))
    for start in (0, 1, 3, 4, 6, 11, 12):
        rest = list(Batches(rows, batch=30, seed=1, start=start, steps=12))
        assert len(rest) == 12 - start and all(map(same, rest, whole[start:]))


def test_iterating_again_begins_again(packed):
    batches = Batches(packed.train, batch=4, seed=1, start=2, steps=5)
    assert all(map(same, batches, batches)) and len(list(batches)) == 3


@pytest.mark.parametrize("batch", [1, 4, 7, 10, 23])
def test_every_epoch_has_every_row_once_in_a_new_order(batch):
    count, epochs = 10, 7
    steps = -(-count * epochs // batch)
    rows = np.concatenate([rows_of_step(count, batch, seed=5, step=s) for s in range(steps)])
    orders = rows[: count * epochs].reshape(epochs, count)
    assert (np.sort(orders, 1) == np.arange(count)).all()
    assert len({tuple(order) for order in orders}) == epochs
    # Steps in another order, as on resume, are the same steps.
    again = [rows_of_step(count, batch, seed=5, step=s) for s in reversed(range(steps))]
    assert (np.concatenate(again[::-1]) == rows).all()


def test_an_order_is_made_once_for_the_data_and_once_for_the_text_beside_it(packed):
    _permutation.cache_clear()
    plain = Batches(packed.train[:50], batch=4, seed=1, start=0, steps=5)
    assert len(list(Batches(packed.train[:60], batch=4, seed=1, start=0, steps=5, lm_batches=plain))) == 5
    assert _permutation.cache_info().misses == 2


def test_another_seed_is_another_order_and_other_random_numbers(packed):
    orders = {tuple(rows_of_step(100, 100, seed, 0)) for seed in range(20)}
    assert len(orders) == 20
    a, b = (next(iter(Batches(packed.train, 8, seed, 0, 1))) for seed in (0, 1))
    assert not torch.equal(a.row_ids, b.row_ids) and not (a.position_seeds == b.position_seeds).any()


def test_random_numbers_of_positions_do_not_repeat(packed):
    seeds = torch.cat([b.position_seeds.flatten() for b in Batches(packed.train, 8, 0, 0, 50)])
    assert len(seeds.unique()) == len(seeds) and seeds.min() >= 0


def test_split_covers_all_rows_in_order(packed):
    (batch,) = Batches(packed.train, batch=7, seed=0, start=0, steps=1)
    for rows, sizes in ((1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])):
        parts = list(batch.split(rows))
        assert [len(p.ids) for p in parts] == sizes
        assert same(Batch(*(torch.cat(x) for x in list(zip(*parts, strict=True))[:4])), batch)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_validation_is_every_row_once_in_order(packed, size):
    batches = ValidationBatches(packed.val, size)
    assert len(batches) == len(list(batches)) and all(map(same, batches, batches))
    assert torch.cat([b.row_ids for b in batches]).tolist() == list(range(5))
    rows = torch.from_numpy(packed.val.astype(np.int64))
    assert torch.equal(torch.cat([b.ids for b in batches]), rows[:, :-1])
    assert torch.equal(torch.cat([b.labels for b in batches]), rows[:, 1:])


# Split and rows


def test_same_text_is_never_on_both_sides(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.permutation(9))) for _ in range(1000)]
    packed = packing.pack(rows_of_words(texts * 3), tmp_path, seq_len=8, val_rows=10_000, val_share=0.1)
    train, val = ({tuple(row) for row in part} for part in (packed.train, packed.val))
    assert not train & val
    assert train | val == {tuple(map(int, t.split())) for t in texts}
    assert len(packed.train) + len(packed.val) == 3000
    assert len(packed.val) == pytest.approx(300, abs=90)  # 3 copies of 100, 3 standard deviations


def test_side_does_not_depend_on_the_other_documents(tmp_path):
    texts = [" ".join(t) for t in np.random.default_rng(0).permuted(np.tile(list("abcdefgh"), (400, 1)), axis=1)]
    few, many = (packing.pack(rows_of_words(t), tmp_path, seq_len=7, val_rows=1000) for t in (texts[:200], texts))
    assert {tuple(r) for r in few.val} < {tuple(r) for r in many.val}
    assert {tuple(r) for r in few.train} < {tuple(r) for r in many.train}


def test_rows_are_the_documents_joined_with_an_end_each(packed):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(packed.tokenizer)
    end = tokenizer.eos_token_id
    text = tokenizer.decode(packed.train.flatten())
    documents_read = text.split(END)[:-1]  # the last one may be cut
    assert len(documents_read) > 200 and set(documents_read) < set(documents())
    assert end is not None and (packed.train == end).sum() >= len(documents_read)
    assert len(tokenizer) == SETTINGS["vocab"] > packed.train.max()


def test_text_of_the_end_token_stays_text(tmp_path):
    """A document that speaks of it would else end there."""
    texts = documents()
    texts[::3] = [f"{text} {END}{END} and on" for text in texts[::3]]
    packed = packing.pack(corpus(texts), tmp_path, **SETTINGS)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(packed.tokenizer)
    rows = packed.train.flatten()
    whole = [tokenizer.decode(part[1:]) for part in np.split(rows, np.flatnonzero(rows == tokenizer.eos_token_id))]
    assert set(whole[1:-1]) < set(texts) and sum(END in text for text in whole) > 50


def test_empty_documents_are_left_out_and_equal_ones_apart(tmp_path, capfd):
    """Lines of an encyclopedia as rows: four in ten are empty, and headings come again and again."""
    heading = next(f" = {n} = \n" for n in range(99) if TrainValSplit(0.2)(f" = {n} = \n") == "train")
    texts = [x for n in range(100) for x in ("", f" text {n} of its own \n", heading, " \n")]
    packed = packing.pack(corpus(texts), tmp_path, **SETTINGS | {"seq_len": 8})
    assert packed.counts["read"] == 400 and packed.counts["left_out"] == {"empty": 200}
    assert sum(packed.counts["used"].values()) == 200 and not packed.counts["special_as_text"]
    assert "400 documents read" in (line := capfd.readouterr().err) and "left out: 200 empty" in line
    fast = PreTrainedTokenizerFast.from_pretrained(packed.tokenizer)
    rows, end = packed.train.flatten(), fast.eos_token_id
    assert not ((rows[1:] == end) & (rows[:-1] == end)).any()
    documents_read = fast.decode(rows).split(END)
    same = np.array([text == heading for text in documents_read])
    assert same.sum() >= 99 and (same[1:] & same[:-1]).sum() < 0.4 * same.sum()  # they are more than the others
    again = packing.pack(corpus(texts[::-1]), tmp_path / "other", **SETTINGS | {"seq_len": 8})
    assert (again.train == packed.train).all() and (again.val == packed.val).all()


@pytest.mark.parametrize("equal", [10, 50, 99])
def test_equal_documents_are_never_neighbours_where_others_can_be_between_them(equal):
    split = TrainValSplit(0.3)
    distinct = [text for n in range(999) if split(text := f"text {n}") == "train"][:100]
    heading = next(f"= {n} =" for n in range(99) if split(f"= {n} =") == "train")
    others = [text for n in range(999) if split(text := f"other {n}") == "val"][:60]
    texts = [*distinct, *others, *[heading] * equal, *[" "] * 50]
    order = [*ordered(corpus(texts), split)]
    train = [text for text in order if text.strip() and split(text) == "train"]
    assert sorted(order) == sorted(texts)
    assert not any(a == b for a, b in pairwise(train))
    assert [*ordered(corpus(distinct), split)] == [text for text in train if text != heading]


def test_the_standard_library_has_another_name_where_its_rows_are_others(monkeypatch):
    monkeypatch.setattr(corpora, "standard_library", lambda: ["a = 1", "b = 2"])
    assert set(corpora.python().fingerprint) == {"name", "content"}
    for texts in (["a = 1", "a = 1"], ["a = 1", " "]):
        monkeypatch.setattr(corpora, "standard_library", lambda texts=texts: texts)
        assert corpora.python().fingerprint["version"] == corpora.ROWS


def test_the_usual_value_of_a_new_option_is_no_part_of_a_name(packed):
    assert packing.key(corpus(documents()), **SETTINGS, tokens=None, tokenizer_of=None) == packed.folder.name
    assert packing.key(corpus(documents()), **SETTINGS, tokens=None, special="text") == packed.folder.name
    assert packing.key(corpus(documents()), **SETTINGS, tokens=None, special="tokens") != packed.folder.name


def test_special_tokens_in_text_are_counted_or_read(tmp_path, capfd):
    texts = [f"{text}{END}more" for text in documents(200)] + documents(100, 1)
    packed = packing.pack(corpus(texts), tmp_path, **SETTINGS)
    assert packed.counts["special_as_text"] == 200
    assert "200 documents hold special tokens" in (line := capfd.readouterr().err) and "data.special=tokens" in line
    other = packing.pack(corpus(texts), tmp_path, **SETTINGS, special="tokens")
    end = PreTrainedTokenizerFast.from_pretrained(other.tokenizer).eos_token_id
    ends = [int((packed.flatten() == end).sum()) for packed in (packed.train, other.train)]
    assert ends[1] > 1.4 * ends[0] and other.counts["special_as_text"] == 0 and other.folder != packed.folder
    texts = [f"<|im_start|>user {text}<|im_end|>" for text in documents(200)]
    for special in ("text", "tokens"):  # of another tokenizer
        assert packing.pack(corpus(texts), tmp_path, **SETTINGS, special=special).counts["special_as_text"] == 200
    with refused(option="data.special", got="tokens", why="this data has a vocabulary of its own"):
        packing.pack(markov(16, 9999, 8, 3), tmp_path, seq_len=16, special="tokens")


def test_rows_of_plain_text_are_named_and_made_as_ever(packed, tmp_path):
    """Digests of what was packed before there were prompts and responses: folders of users go on to be theirs."""
    chain = packing.pack(markov(16, 40_000, 8, 3), tmp_path, seq_len=16, val_rows=8)
    assert packed.folder.name == "2c33507334ec738c" and chain.folder.name == "4cd2f2f1a54e41b7"
    assert packed.digests["train.npy"] == "80fcc3b98fee6870c8499502aa55010b"
    assert packed.digests["val.npy"] == "7ad5a6d3f52a5d730f78199f838fa265"
    assert chain.digests["train.npy"] == "a46e08307e2e1ff49a8197ad51b9054e"
    assert chain.digests["val.npy"] == "3e868b3b24e65b843ce84f4b6c342be1"
    assert packed.train_spans is packed.val_spans is packed.eos_token_id is None and packed.mean_target_tokens == 16
    assert packed.digests.keys() >= {"train.npy", "val.npy"} and len(packed.digests) == 4


def test_tokenizer_is_trained_without_the_validation_text(tmp_path):
    side = TrainValSplit(0.2)
    texts = [f"{i} zq zq zq" if side(f"{i} zq zq zq") == "val" else f"{i} pw pw pw" for i in range(400)]
    packed = packing.pack(corpus(texts), tmp_path, **SETTINGS)
    vocabulary = PreTrainedTokenizerFast.from_pretrained(packed.tokenizer).get_vocab()
    assert "pw" in vocabulary and "zq" not in vocabulary


def test_documents_are_shuffled_and_a_stream_is_not(tmp_path):
    texts = [f"{a} {b}" for a in range(20) for b in range(20)]
    for streaming in (True, False):
        packed = packing.pack(rows_of_words(texts, streaming=streaming), tmp_path / str(streaming), seq_len=1)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(packed.tokenizer)
        order = [texts.index(tokenizer.decode(row)) for row in packed.train]
        assert (order == sorted(order)) == streaming


@pytest.mark.parametrize("streaming", [True, False])
def test_a_set_of_the_hub_is_packed_with_its_length_unknown_too(tmp_path, streaming):
    (tmp_path / "set").mkdir()
    lines = (json.dumps({"text": text}) for text in documents())
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
    packed = packing.pack(corpora.hub(str(tmp_path / "set"), streaming=streaming), tmp_path / "packed", **SETTINGS)
    assert len(packed.train) > 0 and len(packed.val) > 0


@pytest.mark.parametrize("tokens", [17, 100, 1000, 5000])
def test_fewer_tokens_are_the_first_of_more(packed, tmp_path, tokens):
    few = packing.pack(corpus(documents()), tmp_path, tokens=tokens, **SETTINGS)
    assert len(few.train) == tokens // 17
    assert (few.train == packed.train[: len(few.train)]).all()
    assert content(few.tokenizer) == content(packed.tokenizer)


def test_validation_is_the_same_for_any_amount_of_training_text(tmp_path):
    texts = documents(3000)
    settings = SETTINGS | {"val_share": 0.05}
    few, many = (packing.pack(corpus(texts), tmp_path, tokens=t, **settings) for t in (1000, None))
    assert (few.val == many.val).all() and few.bytes_per_token == many.bytes_per_token


def test_fewer_tokens_of_a_markov_chain_are_a_part_of_more(tmp_path):
    def pack_chain(tokens: int) -> Packed:
        """Pack like train.py: each function takes the settings that it has parameters for."""
        node = {"seq_len": 16, "states": 8, "branching": 3, "size": 40_000, "tokens": tokens, "val_rows": 8}
        source = markov(**argument_types.checked(markov, node, "data"))
        return packing.pack(source, tmp_path, **argument_types.checked(packing.pack, node, "data"))

    few, many = pack_chain(10_000), pack_chain(20_000)
    assert {tuple(r) for r in few.train} < {tuple(r) for r in many.train}
    assert (few.val == many.val).all()


def test_rows_of_a_markov_chain_are_its_documents(tmp_path):
    chain = markov(16, 5000, 8, 3)
    packed = packing.pack(chain, tmp_path, 16, tokens=5000, val_rows=10_000)
    rows = sorted(map(tuple, np.concatenate([packed.train, packed.val]).tolist()))
    assert rows == sorted(tuple(int(w[1:]) for w in text.split()) for text in chain.load())
    assert packed.entropy == chain.entropy and packed.bytes_per_token is None


def test_ids_above_65535_do_not_overflow(tmp_path):
    words = [f"w{i}" for i in range(70_000)]
    texts = [" ".join(words[i * 100 : (i + 1) * 100]) for i in range(700)]
    packed = packing.pack(corpus(texts, words=words), tmp_path, seq_len=99, val_rows=1000)
    assert sorted(np.concatenate([packed.train, packed.val]).flatten().tolist()) == list(range(70_000))


def measured(packed: Packed) -> float:
    """Bytes per learned token of the validation rows, by the bytes that the tokens of a byte-level tokenizer are."""
    fast = PreTrainedTokenizerFast.from_pretrained(packed.tokenizer)
    size = {id: len(token) for token, id in fast.get_vocab().items()} | {id: 0 for id in fast.all_special_ids}
    labels = [t for b in ValidationBatches(packed.val, 1, boundary=packed.boundary) for t in b.labels[0].tolist()]
    labels = [label for label in labels if label != IGNORE]
    return sum(size[label] for label in labels) / len(labels)


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("text", ["{:04} plain ascii", "{:04} é€😀 \n\n  x  ", "日本語 {:04}"])
def test_bytes_per_token_are_of_the_rows_that_are_measured(tmp_path, text, rows):
    # A vocabulary of 257 is one token per byte, and one for the end of each document; rows cut characters in two.
    texts = [text.format(i) + "z" * (i % 7) for i in range(400)]
    packed = packing.pack(corpus(texts), tmp_path, seq_len=8, vocab=257, val_share=0.2, val_rows=rows)
    assert packed.bytes_per_token == pytest.approx(measured(packed))
    ends = (packed.val[:, 1:] == 0).mean()
    assert packed.bytes_per_token == pytest.approx(1 - ends)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_bytes_per_token_of_longer_tokens(packed, tmp_path, rows, streaming):
    options = dict(seq_len=16, vocab=400, val_share=0.2, val_rows=rows)
    packed_data = packing.pack(corpus(documents(), streaming=streaming), tmp_path, **options)
    assert packed_data.bytes_per_token == pytest.approx(measured(packed_data), rel=1e-6)


@BOS
def test_bytes_per_token_with_a_bos(packed, tmp_path, bos):
    name = tokenizer_with(tmp_path / "tokenizer", packed, *bos)
    packed_data = packing.pack(corpus(documents()), tmp_path, tokenizer=name, **NO_VOCAB)
    assert packed_data.bytes_per_token == pytest.approx(measured(packed_data), rel=1e-6)


def test_data_from_before_bytes_were_counted_is_said_to_be(cache, packed, capsys):
    packing.pack(corpus(documents()), cache, **SETTINGS)
    assert "Bits per byte" not in capsys.readouterr().err
    manifest = json.loads((cache / packed.folder.name / "manifest.json").read_text())
    packing.write_manifest(
        cache / packed.folder.name, {k: v for k, v in manifest.items() if k not in ("measured_bytes", "digest")}
    )
    packing.pack(corpus(documents()), cache, **SETTINGS)
    assert f"packed anew:\n  rm -r {cache / packed.folder.name}" in capsys.readouterr().err


def test_bytes_per_token_of_a_text_that_is_normalised(packed, tmp_path):
    """Count all bytes: also those that a tokenizer drops, or whose place it does not report."""
    fast = PreTrainedTokenizerFast.from_pretrained(packed.tokenizer)
    text = "  A  b \n"
    counts = tokenizer.byte_counts(text, fast(text)["input_ids"], fast)
    assert counts.sum() == len(text) and counts.tolist() == [1] * len(text)
    assert tokenizer.byte_counts(text, [1, 2], fast).tolist() == [4, 4]  # ids that are not its own
    assert tokenizer.byte_counts("", [], fast).tolist() == []


# On disk


def test_same_documents_give_the_same_bytes_in_any_order(packed, tmp_path):
    again = packing.pack(corpus(documents()[::-1]), tmp_path, **SETTINGS)
    assert again.folder.name == packed.folder.name and content(again.folder) == content(packed.folder)


def test_packed_data_is_not_made_again(packed, tmp_path):
    def never():
        raise AssertionError("was read again")

    packed_data = packing.pack(Corpus(never, {"texts": sorted(documents())}), packed.folder.parent, **SETTINGS)
    assert (
        packed_data.folder == packed.folder
        and (packed_data.train == packed.train).all()
        and (packed_data.val == packed.val).all()
    )


def test_whatever_changes_the_rows_changes_the_folder(packed, tmp_path):
    texts = documents()
    folders = [
        packed.folder.name,
        packing.pack(corpus([*texts[:-1], texts[-1] + "x"]), tmp_path, **SETTINGS).folder.name,
    ]
    for change in ({"seq_len": 15}, {"vocab": 281}, {"val_rows": 4}, {"val_share": 0.3}, {"tokens": 2000}):
        folders.append(packing.pack(corpus(texts), tmp_path, **SETTINGS | change).folder.name)
    assert len(set(folders)) == len(folders) == 7


def tokenizer_with(folder: Path, packed: Packed, *bos: str) -> str:
    """The folder of the trained tokenizer, with `bos` in front of every text; the end is the last new token."""
    fast = PreTrainedTokenizerFast.from_pretrained(packed.tokenizer)
    fast.add_special_tokens({"additional_special_tokens": [t for t in bos if t != END]})
    if bos:
        special = [(t, fast.convert_tokens_to_ids(t)) for t in bos]
        fast.backend_tokenizer.post_processor = TemplateProcessing(single=f"{' '.join(bos)} $A", special_tokens=special)
    fast.save_pretrained(folder)
    assert len(fast("a")["input_ids"]) == 1 + len(bos)
    return str(folder)


def test_pretrained_tokenizer_without_a_bos_adds_nothing_but_ends(packed, tmp_path, capsys):
    name = tokenizer_with(tmp_path / "tokenizer", packed)
    packed_data = packing.pack(corpus(documents()), tmp_path, tokenizer=name, **NO_VOCAB)
    assert (
        (packed_data.train == packed.train).all()
        and (packed_data.val == packed.val).all()
        and packed_data.boundary == ()
    )
    assert packed_data.folder.name != packed.folder.name and "in front of a text" not in capsys.readouterr().err


@BOS
def test_every_text_and_every_row_begins_as_the_tokenizer_has_it_and_that_is_not_learned(packed, tmp_path, capsys, bos):
    name = tokenizer_with(tmp_path / "tokenizer", packed, *bos)
    packed_data = packing.pack(corpus(documents()), tmp_path, tokenizer=name, **NO_VOCAB)
    output = " ".join(capsys.readouterr().err.split())
    assert f"puts {' '.join(bos)} in front of a text" in output and "not learned" in output
    fast = PreTrainedTokenizerFast.from_pretrained(name)
    ids, end = fast.convert_tokens_to_ids(list(bos)), fast.eos_token_id
    learned, texts = [], set(documents())
    for row in packed_data.train.tolist():
        batch = to_batch(np.array([row]), np.zeros(1, int), np.zeros((1, 16), int), boundary=packed_data.boundary)
        assert row[: len(ids)] == ids  # as a text of its own
        expected, place = [IGNORE] * (len(ids) - 1) + row[len(ids) :], len(ids)
        while end in row[place:]:  # by hand: behind an end is what is put in front of the next text
            place = row.index(end, place) + 1
            assert row[place : place + len(ids)] == ids[: len(row) - place]
            for put in range(place, min(place + len(ids), len(row))):
                expected[put - 1] = IGNORE
            place += len(ids)
        assert batch.labels[0].tolist() == expected
        learned += [label for label in expected if label != IGNORE]
    # Without what is put in front, the text is whole and ends as ever.
    documents_read = fast.decode(learned).split(END)[1:-1]
    assert len(documents_read) > 200 and set(documents_read) <= texts
    assert packed_data.mean_target_tokens == pytest.approx(len(learned) / len(packed_data.train))


def test_batches_leave_out_what_stands_in_front_of_a_text():
    rows = np.array(
        [[8, 5, 9, 8, 6, 7], [8, 9, 5, 8, 6, 9]]
    )  # 9 ends, 8 begins; the second 8 of the last row is a text's
    expected = [[5, 9, IGNORE, 6, 7], [9, 5, 8, 6, 9]]
    for batches in (Batches(rows, 2, 0, 0, 1, boundary=(9, 8)), ValidationBatches(rows, 2, boundary=(9, 8))):
        (batch,) = batches
        assert batch.labels.tolist() == [expected[row] for row in batch.row_ids]
    (twice,) = ValidationBatches(np.array([[8, 7, 9, 8, 7, 5]]), 1, boundary=(9, 8, 7))
    assert twice.labels.tolist() == [[IGNORE, 9, IGNORE, IGNORE, 5]]
    assert Packed(Path(), rows, rows, None, None, {}, boundary=(9, 8)).mean_target_tokens == 4.5


def test_only_a_tokenizer_with_a_bos_names_its_data_anew(packed, tmp_path, monkeypatch):
    from kd.data import tokenizer as module

    source, chat = corpus(documents()), replace(corpus(documents()), pairs=Pairs("chat", 4))
    for bos, same in (((), True), (("<s>",), False)):
        name = tokenizer_with(tmp_path / str(len(bos)), packed, *bos)
        names = [packing.key(source, tokenizer=name), packing.key(chat, tokenizer=name)]
        with monkeypatch.context() as patch:
            patch.setattr(packing, "bos_by_name", lambda name: [])
            before = [packing.key(source, tokenizer=name), packing.key(chat, tokenizer=name)]
        assert (names[0] == before[0]) == same and names[1] == before[1]
    assert module.bos_by_name("/no/folder") == []


def test_a_row_that_a_bos_fills_is_refused(packed, tmp_path):
    name = tokenizer_with(tmp_path / "tokenizer", packed, "[gMASK]", "<sop>")
    with refused(option="data.seq_len", got=1, why="the tokenizer puts 2 tokens", need="at least 2"):
        packing.pack(corpus(documents()), tmp_path, tokenizer=name, **NO_VOCAB | {"seq_len": 1})


def test_ids_with_holes_are_no_smaller_vocabulary(packed, tmp_path):
    """Leave ids unused, as a tokenizer with removed tokens: the largest id counts, not the number of tokens."""
    fast = PreTrainedTokenizerFast.from_pretrained(packed.tokenizer)
    state = json.loads(fast.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["w"] = 70_000
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END)
    changed.save_pretrained(tmp_path / "tokenizer")
    packed_data = packing.pack(corpus(documents()), tmp_path, tokenizer=str(tmp_path / "tokenizer"), **NO_VOCAB)
    assert tokenizer.vocabulary_size(changed) == 70_001 > len(changed)
    assert json.loads((packed_data.folder / "manifest.json").read_text())["vocab"] == 70_001
    assert packed_data.train.dtype == np.uint32 and packed_data.train.max() == 70_000


def test_changed_tokenizer_of_a_folder_gives_another_folder(packed, tmp_path):
    settings = {k: v for k, v in SETTINGS.items() if k != "vocab"} | {"tokenizer": str(tmp_path / "tokenizer")}
    other = packing.pack(corpus(documents(seed=1)), tmp_path, **SETTINGS)
    shutil.copytree(packed.tokenizer, tmp_path / "tokenizer")
    before = packing.pack(corpus(documents()), tmp_path, **settings)
    shutil.copytree(other.tokenizer, tmp_path / "tokenizer", dirs_exist_ok=True)
    assert packing.pack(corpus(documents()), tmp_path, **settings).folder != before.folder


def test_two_processes_at_once_make_it_once_and_agree(packed, tmp_path):
    def slow():
        with open(tmp_path / "made", "a") as file:
            file.write("x")
        time.sleep(0.5)
        return documents()

    def work(name: str):
        packed_data = packing.pack(Corpus(slow, {"texts": sorted(documents())}), tmp_path / "data", **SETTINGS)
        (tmp_path / name).write_text(str(packed_data.train.sum()))

    processes = [FORK.Process(target=work, args=(name,)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "made").read_text() == "x"
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == str(packed.train.sum())
    assert content(tmp_path / "data" / packed.folder.name) == content(packed.folder)


@pytest.mark.parametrize("name", ["train.npy", "val.npy", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["first", "middle", "last", "shorter", "longer", "gone"])
def test_damaged_file_is_named(packed, cache, name, damage):
    file = cache / packed.folder.name / name
    whole = file.read_bytes()
    place = {"first": 0, "middle": len(whole) // 2, "last": len(whole) - 1}.get(damage, 0)
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    file.write_bytes({"shorter": whole[:-34], "longer": whole + whole[-34:]}.get(damage, flipped))
    if damage == "gone":
        file.unlink()
    with refused(option=file, why="is damaged", commands=f"rm -r {file.parents[name.count('/')]}"):
        packing.pack(corpus(documents()), cache, **SETTINGS)
    file.write_bytes(whole)
    packing.pack(corpus(documents()), cache, **SETTINGS)


def test_folder_without_a_manifest_is_made_anew(packed, cache):
    folder = cache / packed.folder.name
    (folder / "manifest.json").unlink()
    (folder / "val.npy").write_bytes(b"half")
    packing.pack(corpus(documents()), cache, **SETTINGS)
    assert content(folder) == content(packed.folder)


@pytest.mark.parametrize("damage", ["shorter", "digit", "no key", "empty"])
def test_damaged_manifest_is_named(packed, cache, damage):
    file = cache / packed.folder.name / "manifest.json"
    text = file.read_text()
    cut = {"shorter": text[:-20], "digit": text.replace('per_token": ', 'per_token": 1'), "empty": ""}
    entries = {k: v for k, v in json.loads(text).items() if k != "entropy"}
    file.write_text(cut.get(damage, json.dumps(entries)))
    with refused(option=file, why="is damaged", commands=f"rm -r {file.parent}"):
        packing.pack(corpus(documents()), cache, **SETTINGS)


WHERE = pytest.mark.parametrize(
    "where", ["packing._tokenizer", "text_rows.in_batches", "row_files.np.save", "packing.files.write_json"]
)


def killed(*args, **more):
    os.kill(os.getpid(), signal.SIGKILL)


@WHERE
def test_killed_packing_is_made_again_whole(packed, tmp_path, monkeypatch, where):
    with monkeypatch.context() as patch:
        patch.setattr(f"kd.data.{where}", killed)
        process = FORK.Process(target=packing.pack, args=(corpus(documents()), tmp_path), kwargs=SETTINGS)
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / packed.folder.name).exists()
    assert content(packing.pack(corpus(documents()), tmp_path, **SETTINGS).folder) == content(packed.folder)


def test_killed_packing_leaves_nothing_for_ever(packed, tmp_path, monkeypatch):
    test_killed_packing_is_made_again_whole(packed, tmp_path, monkeypatch, "packing.files.write_json")
    assert {p.name for p in tmp_path.iterdir()} == {packed.folder.name, f"{packed.folder.name}.lock"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@WHERE
def test_packing_that_fails_leaves_nothing(packed, tmp_path, monkeypatch, where, error):
    def fail(*args, **more):
        raise error

    monkeypatch.setattr(f"kd.data.{where}", fail)
    with pytest.raises(error):
        packing.pack(corpus(documents()), tmp_path, **SETTINGS)
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".lock"]


# What cannot be packed


@pytest.mark.parametrize(
    "setting",
    [{"seq_len": 0}, {"seq_len": -1}, {"val_rows": 0}, {"tokens": -1}, {"vocab": 256}, {"val_share": 0.0},
     {"val_share": 1.0}, {"val_share": -0.1}, {"val_share": float("nan")}],
)  # fmt: skip
def test_setting_without_meaning_is_refused_by_name(tmp_path, setting):
    ((name, value),) = setting.items()
    with refused(option=f"data.{name}", got=value):
        packing.pack(corpus(documents()), tmp_path, **SETTINGS | setting)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [0, 1, 16])
def test_fewer_tokens_than_a_row_are_refused_by_name(tmp_path, tokens):
    with refused(option="data.tokens", got=tokens, need="at least 17, one row"):
        packing.pack(corpus(documents()), tmp_path, tokens=tokens, **SETTINGS)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("texts", [[], ["short"], documents(1)])
def test_text_too_short_for_a_row_on_each_side_is_refused(tmp_path, texts, streaming):
    with refused(need="17 tokens of each, one row", hint="data.seq_len=64"):
        packing.pack(corpus(texts, streaming=streaming), tmp_path, **SETTINGS)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


# Ahead of their use


def test_items_come_in_order_and_at_most_two_ahead():
    items_made = []

    def items():
        for number in range(20):
            items_made.append(number)
            yield number

    for number in (coming := prefetch(items())):
        time.sleep(0.002)
        assert items_made[-1] <= number + 3
        if number == 9:
            break
    coming.close()
    assert items_made == list(range(len(items_made))) and len(items_made) <= 13
    assert list(prefetch(iter(range(50)))) == list(range(50)) and list(prefetch(iter([]))) == []


def test_items_are_made_while_others_are_used():
    def items():
        for number in range(8):
            time.sleep(0.02)
            yield number

    began = time.monotonic()
    for _ in prefetch(items()):
        time.sleep(0.02)
    assert time.monotonic() - began < 0.28  # one after the other: 0.32


def test_an_error_comes_where_its_item_would_and_ends_the_thread():
    def items():
        yield 1
        yield 2
        raise UserError("no third")

    got = []
    with pytest.raises(UserError, match="no third"):
        for item in prefetch(items()):
            got.append(item)
    assert got == [1, 2]
    coming = prefetch(iter(range(100)))
    next(coming)
    assert any(t.name.startswith("ahead") for t in threading.enumerate())
    coming.close()
    assert not any(t.name.startswith("ahead") for t in threading.enumerate())
