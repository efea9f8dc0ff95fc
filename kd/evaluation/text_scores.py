"""Scores of generated responses against references: Rouge-L, exact match, distinct n-grams."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from statistics import fmean
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import regex

NGRAMS = (1, 2, 3, 4)

# Measures of text


def rouge_l(response: str, reference: str) -> float:
    """Return Rouge-L F1 on the words of rouge_words(). Lin 2004; for Latin letters it is the metric of MiniLLM."""
    return _rouge().score(reference, response)["rougeL"].fmeasure


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer  # takes a second

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=rouge_words))


# Scripts that put no space between words, and the prolonged sound mark of Japanese, which belongs to none.
UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Javanese}\p{Balinese}"
    r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}]\p{M}*"
)
SPACED = r"[[\p{L}\p{M}\p{Nd}]--[\p{Latin}\p{Common}\p{Inherited}]]"  # of all other scripts than Latin
PART = regex.compile(rf"{UNSPACED}|(?:(?!{UNSPACED}).)+", regex.DOTALL)
WORD = regex.compile(
    rf"[a-z0-9]+|{UNSPACED}|(?:{SPACED}|(?<={SPACED}\p{{M}}*)\p{{M}})+|[[\p{{Nd}}--[0-9]]Ａ-Ｚａ-ｚ]+", regex.V1
)


def rouge_words(text: str) -> list[str]:
    """Return the tokens that Rouge counts: of letters a-z and digits as rouge_score makes and stems them.

    rouge_score drops all other characters, so that text of another script would score 0. Here a word of such a script
    is a token too, and where a script puts no space between words, each of its characters is. In a text without any
    such word, as "+" or "👍", each character is a token.
    """
    text = text.lower()
    words = WORD.findall(text) or "".join(text.split())
    return [_stemmer().stem(word) if len(word) > 3 and word.isascii() else word for word in words]


@cache
def _stemmer():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def exact_match(response: str, reference: str) -> bool:
    """Return True if two texts are equal apart from white space."""
    return response.split() == reference.split()


def distinct(responses: Iterable[str], n: int) -> float:
    """Return the share of distinct n-grams of words among all n-grams of all responses; 0 if there are none.

    Words are separated by white space. In a script without spaces between words, each character is a word.

    Li et al. 2016, arXiv 1510.03055; with n = 4 the diversity of MiniLLM. Fewer responses have a larger share.
    """
    grams = [
        tuple(words[i : i + n]) for text in responses for words in [_words(text)] for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def _words(text: str) -> list[str]:
    return [part for word in text.split() for part in PART.findall(word)]


class Response(NamedTuple):
    """Response as text, with its length, its end and its scores."""

    response: str
    tokens: int  # without the one that ends it
    ended: bool  # by itself, and not because its row was full
    rouge_l: float
    exact_match: bool


def summary(responses: list[Response], samples: int) -> dict[str, float]:
    """Return means over all responses. Distinct n-grams are those within a sample of all prompts, averaged."""
    of_sample = np.array_split([r.response for r in responses], samples)
    means = {
        "rouge_l": fmean(r.rouge_l for r in responses),
        "exact_match": fmean(r.exact_match for r in responses),
        "response_length": fmean(r.tokens for r in responses),
        "eos_rate": fmean(r.ended for r in responses),
    }
    return means | {f"distinct_{n}": fmean(distinct(texts, n) for texts in of_sample) for n in NGRAMS}
