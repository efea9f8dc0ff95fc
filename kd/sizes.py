"""Model sizes: one row each. Named by parameters without embeddings, which scaling laws count."""

from typing import NamedTuple


class Size(NamedTuple):
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int

    @property
    def parameters(self) -> int:
        """Weights without embeddings: attention, gated feed-forward, norms."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * head * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn + 2 * self.hidden) + self.hidden


# Below 10m wide and shallow, which a CPU likes.
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
