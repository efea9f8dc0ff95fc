"""Tokenizers: load one by name or train one, and get the properties that packing and models need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from kd.errors import UserError
from kd.system import files

END = "<|endoftext|>"  # of tokenizers that are trained here
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # files that hold a whole vocabulary


def load_tokenizer(name: str, label: str):
    """Return the tokenizer of a Hub name or a folder; `label` names it in errors.

    An adapter without a tokenizer has that of its model.
    """
    from transformers import AutoTokenizer

    from kd.models.hub import adapter_base, from_hub

    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in FILES):
        name = adapter_base(name, label) or name
    try:
        return from_hub(AutoTokenizer, name, label)
    except UserError as error:
        if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
            raise UserError(
                option=label,
                why=f"could not be loaded: {name} has a tokenizer.model and no tokenizer.json",
                need="the packages sentencepiece and protobuf for that format",
                hint="type pip install sentencepiece protobuf, and the same command again",
            ) from error
        if Path(name).is_dir() and not any((Path(name) / file).exists() for file in VOCABULARIES):
            raise UserError(
                option=label,
                why=f"could not be loaded: {name} has no {', no '.join(VOCABULARIES)}",
                need="the files of a tokenizer",
                hint="copy the tokenizer that this model was trained with into that folder",
            ) from error
        raise


def word_tokenizer(words: Sequence[str]):
    """Return a tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    word_level = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*words, END])}, unk_token=END))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token=END)


def train_tokenizer(texts: Iterable[str], vocab: int | None):
    """Return a byte-level BPE with `vocab` tokens, trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


def vocabulary_size(tokenizer) -> int:
    """Return the largest id + 1. Ids may have holes, so there can be fewer tokens than that."""
    return max(tokenizer.get_vocab().values()) + 1


def bos_of(tokenizer) -> list[int]:
    """Return the ids that a tokenizer puts in front of every text: none, one, or several as GLM-4 does."""
    whole, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    if not text:  # no token for this letter
        return whole[:1] if whole[:1] == [tokenizer.bos_token_id] else []
    starts = (i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    return whole[: next(starts, 0)]


def bos_by_name(name: str) -> list[int]:
    """Return bos_of() for a Hub name or a folder; nothing if that cannot be loaded, which packing then reports."""
    try:
        return _bos_by_name(name, files.folder_fingerprint(name))
    except UserError:  # not cached, so that a network that comes back counts
        return []


@cache
def _bos_by_name(name: str, stamp: str | None) -> list[int]:
    return bos_of(load_tokenizer(name, f"The tokenizer of {name}"))


def tokenize(texts: list[str], tokenizer, special: bool = False) -> list[list[int]]:
    """Return the tokens of plain texts. None is added, and none is special unless `special` is true."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=not special, verbose=False)["input_ids"]


def byte_counts(text: str, ids: list[int], tokenizer) -> np.ndarray:
    """Return the number of bytes that each token of a text stands for; the sum is the size of the text.

    White space that no token covers counts to the next token. Tokens that share a character share its bytes evenly, and
    so do all tokens of a text where the tokenizer does not tell which characters they cover.
    """
    total = len(text.encode())
    if not ids:
        return np.zeros(0)
    offsets = _offsets(text, ids, tokenizer)
    if offsets is None:
        return np.full(len(ids), total / len(ids))
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (code > 0x7F).astype(np.int64) + (code > 0x7FF) + (code > 0xFFFF)
    place = np.concatenate([[0], width.cumsum()])  # of each character, bytes
    ends = np.maximum.accumulate(place[[end for _, end in offsets]])
    ends[ends == ends[-1]] = total
    edges, token, sharing = np.unique(ends, return_inverse=True, return_counts=True)
    return (np.diff(edges, prepend=0) / sharing)[token]


def _offsets(text: str, ids: list[int], tokenizer) -> list[tuple[int, int]] | None:
    for split in (True, False) if tokenizer.is_fast else ():
        encoding = tokenizer(
            text, add_special_tokens=False, split_special_tokens=split, return_offsets_mapping=True, verbose=False
        )
        if encoding["input_ids"] == ids:
            return encoding["offset_mapping"]
    return None
