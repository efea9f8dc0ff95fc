"""Rows of plain text: which documents they hold, on which side, and their bytes."""

import json
from itertools import pairwise

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from kd.config import argument_types
from kd.data import corpora, packing, tokenizer
from kd.data.batches import Packed
from kd.data.corpora import markov
from kd.data.split import TrainValSplit, ordered
from kd.data.tokenizer import END
from tests.data.texts import SETTINGS, content, corpus, documents, measured, rows_of_words
from tests.refusals import refused


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
