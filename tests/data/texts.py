"""Texts to pack, and tokenizers with and without tokens in front of a text."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kd.data.batches import IGNORE, Packed, ValidationBatches
from kd.data.corpora import Corpus
from kd.data.tokenizer import END

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


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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


def measured(packed: Packed) -> float:
    """Bytes per learned token of the validation rows, by the bytes that the tokens of a byte-level tokenizer are."""
    fast = PreTrainedTokenizerFast.from_pretrained(packed.tokenizer)
    size = {id: len(token) for token, id in fast.get_vocab().items()} | {id: 0 for id in fast.all_special_ids}
    labels = [t for b in ValidationBatches(packed.val, 1, boundary=packed.boundary) for t in b.labels[0].tolist()]
    labels = [label for label in labels if label != IGNORE]
    return sum(size[label] for label in labels) / len(labels)
