"""Prompts and responses as rows: one example to a row, and only responses are learned."""

import itertools
import json
import re

import numpy as np
import pytest
import xxhash
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from kd.data import packing
from kd.data.batches import IGNORE, Batches, Packed, ValidationBatches, to_batch
from kd.data.examples import Example
from kd.data.templates import alpaca, encode
from kd.data.tokenizer import tokenize
from tests.data.examples import cache as cache
from tests.data.examples import many, pack, text_rows, tokenizer
from tests.refusals import refused


def test_labels_of_a_row_by_hand():
    """Prompt 5 6, response 7 0 8, end 0, padding 0; then a row that is full, and one that is cut."""
    rows = np.array([[5, 6, 7, 0, 8, 0, 0, 0], [5, 1, 2, 3, 4, 5, 6, 0], [5, 6, 1, 2, 3, 4, 5, 6]], np.uint16)
    spans = np.array([[2, 6], [1, 8], [2, 8]], np.int32)
    batch = to_batch(rows, np.arange(3), np.zeros((3, 7), np.int64), spans)
    assert batch.ids.tolist() == rows[:, :-1].tolist()
    x = IGNORE
    assert batch.labels.tolist() == [[x, 7, 0, 8, 0, x, x], [1, 2, 3, 4, 5, 6, 0], [x, 1, 2, 3, 4, 5, 6]]
    for part, one in zip(batch.split(1), range(3), strict=True):
        assert part.labels.tolist() == [batch.labels[one].tolist()]


def test_a_single_row_has_labels_of_its_own():
    """Memory that inputs and labels share would put the mask into the inputs."""
    rows = np.arange(9)[None]
    batch = to_batch(rows, np.zeros(1, np.int64), np.zeros((1, 8), np.int64), np.array([[3, 5]]))
    assert batch.ids.tolist() == [list(range(8))] and batch.labels[0, 2:4].tolist() == [3, 4]
    (_, _, idle) = ValidationBatches(np.arange(18).reshape(2, 9), 1, passes=3)
    assert idle.ids.tolist() == [list(range(8))] and (idle.labels == IGNORE).all()


def test_rows_by_hand(tmp_path):
    """seq_len 12, so rows of 13 tokens, and prompts of up to 6."""
    texts = [
        ("ask", "yes"),
        ("empty", ""),
        ("full", "12345678"),  # 4 + 8 + the end = 13
        ("fuller", "1234567"),  # 6 + 7 = 13, and no room for the end
        ("cut", "1234567890ab"),
        ("too long", "x"),
        ("", "nothing was asked"),
        ("é€", "😀"),  # 5 bytes and 4
        ("a\r\nb", "c\r\nd"),
    ]
    packed = pack(tmp_path, *texts, *many())
    rows = [row for row in text_rows(packed) if not row[0].startswith("q")]
    assert rows == sorted([
        ("ask", "yes", 1, 4), ("full", "12345678", 1, 9), ("fuller", "1234567", 0, 7),
        ("cut", "1234567890", 0, 10), ("é€", "😀", 1, 5), ("a\r\nb", "c\r\nd", 1, 5),
    ])  # fmt: skip
    manifest = json.loads((packed.folder / "manifest.json").read_text())
    assert manifest["counts"] == packed.counts and packed.counts["read"] == 49 and packed.counts["cut"] == 2
    assert packed.counts["left_out"] == {"prompt_too_long": 1, "no_prompt": 1, "no_response": 1}
    assert packed.counts["used"] == {"train": len(packed.train), "val": len(packed.val)}
    assert len(packed.train) + len(packed.val) == 46 and min(len(packed.train), len(packed.val)) > 5
    assert packed.train.shape[1] == 13 and packed.train_spans.shape == (len(packed.train), 2)
    assert packed.train_spans.dtype == packed.val_spans.dtype == np.int32
    for rows, spans in ((packed.train, packed.train_spans), (packed.val, packed.val_spans)):
        assert all((row[total:] == packed.eos_token_id).all() for row, (_, total) in zip(rows, spans, strict=True))
    counted = (packed.train_spans[:, 1] - packed.train_spans[:, 0]).mean()
    assert packed.mean_target_tokens == pytest.approx(counted)
    assert manifest["train_tokens"] == packed.train_spans[:, 1].sum()


def test_what_was_left_out_is_said_in_a_line(tmp_path, capfd):
    packed = pack(tmp_path, ("much too long", "x"), ("cut", "1234567890ab"), *many())
    line = capfd.readouterr().err.strip().replace("\n", "")
    assert line == (
        f"42 examples read, {len(packed.train)} rows for training and {len(packed.val)} for validation; left out: 1 "
        "with a prompt beyond data.prompt_len; cut: 1 responses that are longer than their row"
    )


def test_bytes_per_token_are_those_of_what_counts_in_validation(tmp_path):
    """A response of 4 bytes and 5 tokens with its end; one of 4 bytes in a row that has room for 3 of them."""
    whole, cut = [(f"w{n}", "abcd") for n in range(30)], [(f"prompt{n:03}", "abcd") for n in range(30)]
    packed = pack(tmp_path, *whole, val_rows=7)
    assert packed.bytes_per_token == pytest.approx(4 / 5) and len(packed.val) == 7
    assert pack(tmp_path, *cut, prompt_len=12, seq_len=11, val_rows=3).bytes_per_token == pytest.approx(1)
    packed = pack(tmp_path, *whole, *cut, prompt_len=12, seq_len=11, val_rows=40)
    lengths = packed.val_spans[:, 1] - packed.val_spans[:, 0]
    assert set(lengths) == {5, 3}
    assert packed.bytes_per_token == pytest.approx(np.where(lengths == 5, 4, 3).sum() / lengths.sum())


def test_bytes_of_a_response_that_is_cut_are_those_of_its_part(tmp_path):
    """Tokens of 1 byte first, of 3 bytes then: an even share would count 2 for each."""
    packed = pack(tmp_path, *[(f"p{n:02}", "aaaa" + 4 * "é") for n in range(30)], seq_len=8)
    assert {tuple(span) for span in packed.val_spans} == {(3, 9)}
    assert packed.bytes_per_token == pytest.approx(1)  # 4 letters, and one é of two tokens
    fast = tokenizer()
    fast.add_tokens(["wwwwwwww"])
    fast.save_pretrained(tmp_path / "own")
    options = dict(seq_len=8, tokenizer=str(tmp_path / "own"), vocab=None)
    packed = pack(tmp_path, *[(f"p{n:02}", "wwwwwwww" + 8 * "a") for n in range(30)], **options)
    assert packed.bytes_per_token == pytest.approx((8 + 5) / 6)


@pytest.mark.parametrize(("bos", "before"), [(None, []), ("<s>", ["<s>"]), ("[gMASK]<sop>", ["[gMASK]", "<sop>"])])
def test_prompts_of_text_begin_as_the_tokenizer_has_it_and_chats_as_their_template(tmp_path, bos, before):
    fast = tokenizer()
    fast.add_special_tokens({"additional_special_tokens": before})
    if before:
        special = [(token, fast.convert_tokens_to_ids(token)) for token in before]
        single = f"{' '.join(before)} $A"
        fast.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    ids, example = fast.convert_tokens_to_ids(before), Example.from_texts(("user", "ask"), response="say")
    for template, text in (("plain", "ask"), ("alpaca", alpaca(example.turns[:-1]))):
        (((prompt, response, *_),),) = encode([example], template, fast)
        assert prompt == ids + tokenize([text], fast)[0] == fast(text)["input_ids"]
        assert response == tokenize(["say"], fast)[0]
    (((prompt, *_),),) = encode([example], "chat", fast)
    assert fast.decode(prompt) == "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n"
    fast.save_pretrained(tmp_path / "own")
    packed = pack(tmp_path, *many(), prompt_len=3 + len(ids), tokenizer=str(tmp_path / "own"), vocab=None)
    assert {tuple(row[: len(ids)]) for row in packed.train.tolist()} == {tuple(ids)}
    # The prompt has them, so that they are read and not learned, and count to its length.
    assert set(packed.train_spans[:, 0] - len(ids)) == {2, 3}
    batch = to_batch(
        packed.train, np.arange(len(packed.train)), np.zeros(packed.train[:, 1:].shape, int), packed.train_spans
    )
    assert not np.isin(batch.labels, ids).any()
    if ids:
        few = pack(tmp_path / "few", *many(), prompt_len=2 + len(ids), tokenizer=str(tmp_path / "own"), vocab=None)
        assert set(few.train_spans[:, 0] - len(ids)) == {2}


def test_validation_rows_keep_their_spans(tmp_path):
    texts = [(f"q{n}" * (1 + n % 2), "a" * (1 + n % 6)) for n in range(60)]
    packed, few = pack(tmp_path, *texts), pack(tmp_path, *texts, val_rows=4)
    assert len(few.val) == 4 < len(packed.val) and set(text_rows(few)) < set(text_rows(packed))
    assert len({*map(tuple, few.val_spans)}) > 2


def test_same_prompt_is_never_on_both_sides(tmp_path):
    texts = [(f"q {n}", str(answer)) for n in range(60) for answer in range(3)]
    texts += [(f"q\r\n{n}", "crlf") for n in range(60)] + [(f" q  {n} ", "space") for n in range(60)]
    packed = pack(tmp_path, *texts, prompt_len=9)
    fast, sides = AutoTokenizer.from_pretrained(packed.tokenizer), []
    for rows, spans in ((packed.train, packed.train_spans), (packed.val, packed.val_spans)):
        sides.append([" ".join(fast.decode(row[:n]).split()) for row, (n, _) in zip(rows, spans, strict=True)])
    assert not set(sides[0]) & set(sides[1]) and set(sides[0]) | set(sides[1]) == {f"q {n}" for n in range(60)}
    assert len(sides[0]) + len(sides[1]) == 5 * 60 and len(set(sides[1])) > 8


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_the_split_is_that_of_any_template_and_order(tmp_path, template):
    options = dict(seq_len=400, prompt_len=300)
    packed = pack(tmp_path, *many(), template="plain", **options)
    other = pack(tmp_path / "other", *many()[::-1], template=template, **options)
    assert [row[1] for row in text_rows(packed)] == [row[1] for row in text_rows(other)]
    assert (len(packed.train), len(packed.val)) == (len(other.train), len(other.val))
    if template == "plain":
        assert (packed.train == other.train).all() and (packed.val_spans == other.val_spans).all()


def test_fewer_tokens_are_the_first_of_more(tmp_path):
    whole = pack(tmp_path, *many(200))
    total = whole.train_spans[:, 1].sum()
    for count in (20, 100, int(total)):
        few = pack(tmp_path, *many(200), tokens=count)
        read = few.train_spans[:, 1].sum()
        assert count - 13 < read <= count and (few.val == whole.val).all()
        assert (few.train == whole.train[: len(few.train)]).all()
        assert (few.train_spans == whole.train_spans[: len(few.train)]).all()


def test_packed_examples_are_opened_as_they_were_written(tmp_path):
    packed = pack(tmp_path, *many())
    again = packing.open_packed(packed.folder)
    assert (again.train_spans == packed.train_spans).all() and (again.val_spans == packed.val_spans).all()
    assert again.eos_token_id == packed.eos_token_id == AutoTokenizer.from_pretrained(packed.tokenizer).eos_token_id
    (packed.folder / "val_spans.npy").write_bytes(b"")
    with refused(option=packed.folder / "val_spans.npy", why="is damaged"):
        packing.open_packed(packed.folder)


def test_examples_that_leave_a_side_empty_are_refused(tmp_path):
    with refused(option="data", why="2 examples read, 2 rows for training and 0", hint="data.val_share=0.2"):
        pack(tmp_path, *many(2), val_share=0.001)
    assert not [p for p in (tmp_path / "packed").iterdir() if p.is_dir()]
    with refused(option="data", why="0 rows for training and 2", hint="give more examples") as caught:
        pack(tmp_path, *many(2), val_share=0.999)
    assert "val_share" not in str(caught.value)


def test_one_long_prompt_does_not_hide_that_validation_is_empty(tmp_path):
    why = ("2 rows for training and 0", "left out: 1 with a prompt beyond data.prompt_len")
    with refused(option="data", why=why, hint="data.val_share=0.2"):
        pack(tmp_path, *many(2), ("much too long", "x"), val_share=0.001)


def test_advice_on_the_length_of_prompts_is_not_for_the_longest(tmp_path):
    texts = [("p" * length, f"a{length}") for length in (7, 8, 9, 1000)]
    hint = "type data.prompt_len=8, which keeps half"
    with refused(option="data.prompt_len", got=6, why="have 7 to 1,000 tokens", hint=hint):
        pack(tmp_path, *texts)


def test_prompts_that_are_all_too_long_are_refused_with_their_lengths(tmp_path):
    lengths = "left out for their length have 2 to 3 tokens"
    why = ("left out: 40 with a prompt beyond data.prompt_len", lengths)
    with refused(option="data.prompt_len", got=1, why=why, hint="type data.prompt_len=3, which") as caught:
        pack(tmp_path, *many(), prompt_len=1)
    assert "data.template" not in str(caught.value)
    with refused(option="data.prompt_len", got=1, hint="type data.prompt_len=3 data.seq_len=6, which"):
        pack(tmp_path, *many(), prompt_len=1, seq_len=3)
    tokenizer().save_pretrained(tmp_path / "chat")
    chat = dict(tokenizer=str(tmp_path / "chat"), vocab=None, template="chat")
    with refused(option="data.prompt_len", got=6, why="tokens, with what data.template=chat adds to them") as caught:
        pack(tmp_path, *many(), **chat)
    typed = dict(re.findall(r"data\.(prompt_len|seq_len)=(\d+)", caught.value.hint))
    packed = pack(tmp_path, *many(), **chat, **{name: int(value) for name, value in typed.items()})
    assert packed.counts["left_out"].get("prompt_too_long", 0) <= 20  # the hint keeps half of the 40


def test_batches_are_masked_and_those_of_plain_text_are_not(tmp_path):
    packed = pack(tmp_path, *many())
    for batch in Batches(packed.train, 4, 0, 0, 5, response_spans=packed.train_spans):
        counted = (batch.labels != IGNORE).sum(1)
        assert counted.tolist() == (packed.train_spans[batch.row_ids] @ [-1, 1]).tolist()
    batches = list(ValidationBatches(packed.val, 4, response_spans=packed.val_spans))
    assert sum((b.labels != IGNORE).sum().item() for b in batches) == (packed.val_spans @ [-1, 1]).sum()
    (plain,) = Batches(packed.train, 4, 0, 0, 1)
    assert (plain.labels != IGNORE).all()


def test_rows_of_examples_are_made_as_ever(tmp_path):
    """Digests of what was packed before there were turns and keys."""
    texts = [(f"q {n}\n{'é' * (n % 4)}", f"a{n} " * (n % 5 + 1)) for n in range(60)]
    packed = pack(tmp_path, *texts, prompt_len=200, seq_len=220)
    assert packed.folder.name == "41dd29beccf34bd8"
    parts = (packed.train, packed.val, packed.train_spans, packed.val_spans)
    assert xxhash.xxh3_64_hexdigest(b"".join(part.tobytes() for part in parts)) == "d8cefce7008a0a5e"


def test_equal_examples_are_apart(tmp_path):
    packed = pack(tmp_path, *many(), *[("same", "x")] * 40)
    same = [row[0] == "same" for row in said_in_order(packed)]
    assert sum(same) == 40 and sum(map(all, itertools.pairwise(same))) < 35


def said_in_order(packed: Packed) -> list[tuple[str, str]]:
    fast = AutoTokenizer.from_pretrained(packed.tokenizer)
    return [(fast.decode(row[:p]), fast.decode(row[p:n])) for row, (p, n) in zip(packed.train, packed.train_spans)]
