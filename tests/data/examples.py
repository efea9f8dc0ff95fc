"""Examples of prompts and responses for tests: in files, as corpora, packed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd.data import corpora, instructions, packing
from kd.data.batches import IGNORE, Packed, to_batch
from kd.data.examples import Example
from kd.data.templates import encode
from kd.data.tokenizer import END


class Short(NamedTuple):
    """Turns and response of a simple example."""

    turns: tuple[tuple[str, str], ...]
    response: str = ""
    conversation: bool = False

    def example(self) -> Example:
        return Example.from_texts(*self.turns, response=self.response, conversation=self.conversation)


def short(given: Example) -> Short:
    if not given.turns:
        return Short(())
    *before, last = given.turns
    assert last.learned and last.role == "assistant"
    return Short(tuple((turn.role, turn.content) for turn in before), last.content, given.conversation)


def encoded(given: Short, template: str, fast, **options) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the response."""
    (((prompt, response, *_),),) = encode([given.example()], template, fast, **options)
    return prompt, response


BYTES = dict(seq_len=12, vocab=257, val_share=0.3, val_rows=1000)  # a token per byte, and the end
CHAT = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('No ' + m.role) }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Give `datasets` an empty cache, since it keeps the files that it has read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tokenizer(pre=None, **changes) -> PreTrainedTokenizerFast:
    """A token per byte, those of chats, and an end of a text that is not the end of a turn."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [END, "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=259, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([], trainer)
    special_options = {"eos_token": END, "extra_special_tokens": special[1:], "chat_template": CHAT} | changes
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special_options)


def pairs(*texts: tuple[str, str], prompt_len: int = 6, template: str | None = "plain") -> corpora.Corpus:
    """Return a corpus of prompts and responses."""
    examples = [Example.from_texts(("user", prompt), response=response) for prompt, response in texts]
    corpus = corpora.Corpus(lambda: examples, {"of": sorted(texts)})
    return replace(corpus, pairs=corpora.Pairs(template, prompt_len))


def many(count: int = 40) -> list[tuple[str, str]]:
    return [(f"q{number}", f"a{number}") for number in range(count)]


def pack(tmp_path: Path, *texts: tuple[str, str], **options) -> Packed:
    """Each example is on both sides of the split in a copy of its own, its prompt followed by some number."""
    pair_options = {k: options.pop(k) for k in ("prompt_len", "template") if k in options}
    return packing.pack(pairs(*texts, **pair_options), tmp_path / "packed", **BYTES | options)


def text_rows(packed: Packed) -> list[tuple[str, str, int, int]]:
    """Return for each row, on both sides: prompt, response, number of end tokens, and number of target tokens."""
    fast, texts = AutoTokenizer.from_pretrained(packed.tokenizer), []
    for rows, spans in ((packed.train, packed.train_spans), (packed.val, packed.val_spans)):
        batch = to_batch(rows, np.arange(len(rows)), np.zeros(rows[:, 1:].shape, np.int64), spans)
        for row, labels, (prompt, total) in zip(rows, batch.labels, spans, strict=True):
            counted = labels[labels != IGNORE]
            assert counted.tolist() == row[prompt:total].tolist()
            response = fast.decode([t for t in counted if t != packed.eos_token_id])
            ends = (counted == packed.eos_token_id).sum().item()
            texts.append((fast.decode(row[:prompt]), response, ends, len(counted)))
    return sorted(texts)


DOLLY = {"instruction": "Sum up.", "context": "A b.", "response": "B.", "category": "x"}
ONE, TWO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
THREE, FOUR = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye"}
SYSTEM = {"role": "system", "content": "Be brief."}
ROWS = {
    "dolly": (DOLLY, Short((("user", "Sum up."), ("input", "A b.")), "B.")),
    "dolly without context": (DOLLY | {"context": ""}, Short((("user", "Sum up."),), "B.")),
    "dolly with none": (DOLLY | {"context": None}, Short((("user", "Sum up."),), "B.")),
    "alpaca": ({"instruction": "I", "input": "X", "output": "O"}, Short((("user", "I"), ("input", "X")), "O")),
    "alpaca without input": ({"instruction": "I", "output": "O", "text": "all"}, Short((("user", "I"),), "O")),
    "response": ({"prompt": "P", "response": "R"}, Short((("user", "P"),), "R")),
    "completion": ({"prompt": "P", "completion": " C\r\n"}, Short((("user", "P"),), " C\r\n")),
    "answer": ({"id": 3, "question": "ä€?", "answer": "😀"}, Short((("user", "ä€?"),), "😀")),
    "empty response": ({"prompt": "P", "response": ""}, Short(())),
    "no response": ({"prompt": "P", "response": None}, Short(())),
    "no completion": ({"prompt": [ONE, TWO, THREE], "completion": None}, Short(())),
    "messages": ({"prompt": "Hi", "messages": [ONE, TWO]}, Short((("user", "Hi"),), "Hello", True)),
    "several turns": (
        {"messages": [SYSTEM, ONE, TWO, THREE, FOUR, ONE]},
        Short((("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And?")), "Bye", True),
    ),
    "no assistant": ({"messages": [SYSTEM, ONE]}, Short(())),
    "assistant first": ({"messages": [TWO, ONE]}, Short(())),
    "messages as prompt and completion": (
        {"prompt": [ONE, TWO, THREE], "completion": [FOUR]},
        Short((("user", "Hi"), ("assistant", "Hello"), ("user", "And?")), "Bye", True),
    ),
}


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, **options) -> list[Short]:
    return [short(e) for e in load(path, **options)]


def load(path: Path, **options) -> list[Example]:
    return list(instructions.instructions(64, files=str(path), **options).load())


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def first(tmp_path, *rows: dict, kind: str = "jsonl", **options) -> Example:
    return load(write(tmp_path / f"a.{kind}", *rows), **options)[0]


def roles(example: Example) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in example.turns]
