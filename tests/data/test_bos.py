"""Tokens that a tokenizer puts in front of a text: in every row, and not learned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from kd.data import packing
from kd.data.batches import IGNORE, Batches, Packed, ValidationBatches, to_batch
from kd.data.corpora import Pairs
from kd.data.tokenizer import END
from tests.data.texts import BOS, NO_VOCAB, corpus, documents, measured, tokenizer_with
from tests.refusals import refused


@BOS
def test_bytes_per_token_with_a_bos(packed, tmp_path, bos):
    name = tokenizer_with(tmp_path / "tokenizer", packed, *bos)
    packed_data = packing.pack(corpus(documents()), tmp_path, tokenizer=name, **NO_VOCAB)
    assert packed_data.bytes_per_token == pytest.approx(measured(packed_data), rel=1e-6)


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
