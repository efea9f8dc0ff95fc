"""Order of the documents of a corpus, and their split into training and validation.

Both depend on content alone: the same text never lands on both sides, with any other documents around it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

import xxhash

from kd.data.corpora import Corpus
from kd.data.examples import Example


class TrainValSplit:
    """Side of a document, by its content: train or val. The side of an example is that of its prompt."""

    def __init__(self, val_share: float):
        self.bound = val_share * 2**64

    def __call__(self, document: str | Example) -> str:
        text = document if isinstance(document, str) else document.split_text
        return "val" if xxhash.xxh3_64_intdigest(text.encode(), seed=1) < self.bound else "train"


def ordered(corpus: Corpus, split: TrainValSplit):
    """Return all documents, shuffled by content; a stream stays as it is."""
    documents = corpus.load()
    if corpus.streaming:
        return documents
    digests, places, sides = [], [], []
    copies: Counter[int] = Counter()
    for document in documents:
        text = (document if isinstance(document, str) else document.content).encode()
        digest = xxhash.xxh3_64_intdigest(text)
        digests.append(digest)
        if not corpus.words:  # whose rows are documents
            copies[digest] += 1
        if not (corpus.words or corpus.pairs):  # whose documents are joined
            sides.append(split(document) if document.strip() else "left out")
        # The first of equal documents where it would be alone, the others elsewhere.
        places.append(xxhash.xxh3_64_intdigest(text, seed=copies[digest] - 1) if copies[digest] > 1 else digest)
    order = sorted(range(len(places)), key=places.__getitem__)
    for side in {*sides} - {"left out"}:
        slots = [place for place, i in enumerate(order) if sides[i] == side]
        for place, i in zip(slots, _separate_duplicates([order[place] for place in slots], digests), strict=True):
            order[place] = i
    return _Reordered(documents, order)


def _separate_duplicates(order: list[int], digests: list[int]) -> list[int]:
    """Return the order with equal documents apart: each comes behind the next other one, if there is one.

    The second pass, backwards, is for those that are left at the end.
    """
    for _ in range(2):
        apart: list[int] = []
        waiting: deque[int] = deque()  # all of the digest of the last
        for i in order:
            if apart and digests[apart[-1]] == digests[i]:
                waiting.append(i)
                continue
            apart.append(i)
            if waiting and digests[waiting[0]] != digests[i]:
                apart.append(waiting.popleft())
        order = [*apart, *waiting][::-1]
    return order


class _Reordered:
    def __init__(self, documents, order: list[int]):
        self.documents, self.order = documents, order

    def __iter__(self) -> Iterator:
        return (self.documents[i] for i in self.order)
