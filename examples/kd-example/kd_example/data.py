"""Data: functions that return a Corpus."""

import random

from kd.data.corpora import Corpus


def sums(count: int = 20_000, digits: int = 2, seed: int = 0) -> Corpus:
    """Sums of two random numbers as text, such as 17+25=42: a document each."""

    def documents() -> list[str]:
        rng = random.Random(seed)
        pairs = [(rng.randrange(10**digits), rng.randrange(10**digits)) for _ in range(count)]
        return [f"{a}+{b}={a + b}" for a, b in pairs]

    return Corpus(documents, {"name": "sums", "count": count, "digits": digits, "seed": seed})
