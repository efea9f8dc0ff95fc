"""Table of model sizes. A size is named by its parameters without embeddings, the count that scaling laws use."""

from typing import NamedTuple


class Size(NamedTuple):
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    tied: bool = True  # one matrix is embedding and output layer

    @property
    def parameters(self) -> int:
        """Weights without embeddings: attention, gated feed-forward, norms."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * head * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn + 2 * self.hidden) + self.hidden


# Sizes below 10m are wide and shallow, for speed on a CPU.
SIZES = {
    #             hidden layers heads kv_heads   ffn
    "100k": Size(     64,     2,    4,       4,  176),
    "200k": Size(     96,     2,    4,       4,  256),
    "500k": Size(    128,     3,    4,       4,  336),
    "1m":   Size(    192,     2,    6,       6,  512),
    "3m":   Size(    256,     4,    8,       8,  640),
    "10m":  Size(    384,     6,    6,       6, 1024),
    "30m":  Size(    512,    10,    8,       8, 1376),
    "100m": Size(    768,    14,   12,      12, 2048),
    "300m": Size(   1024,    24,   16,       8, 2816),
    "1b":   Size(   2048,    21,   32,       8, 5632),
}  # fmt: skip
# The students of Peng et al. 2024, arXiv 2410.16215, table 7, named as there: with embeddings of some 150,000 tokens.
STUDENTS = {
    "330m": Size(   1024,    12,   16,       2,  4096, tied=True),
    "670m": Size(   1024,    24,   16,       2,  4096, tied=False),
    "1.9b": Size(   2048,    24,   16,       2,  6912, tied=False),
    "3.8b": Size(   3072,    28,   24,       8,  8192, tied=False),
    "6.8b": Size(   4096,    28,   32,       8, 12800, tied=False),
}  # fmt: skip
SIZES |= STUDENTS
