"""Round trip of distributions through a store: ids exactly, probabilities to a rounding, in few bytes."""

import math
from functools import cache

import numpy as np
import pytest
import torch

from kd.objective.chunked import chunks
from kd.objective.target import Target
from kd.store.format import MOST_DRAWS, QUANTIZATION_STEP, EncodedRows, encode, from_bytes
from kd.store.rows import Rows
from tests.cases import option

ROWS, SIZE = 4, 8  # of the data: 4 rows of 8 positions
VOCABULARIES = (17, 151_936, 256_000)


@cache
def heavy(count: int, vocabulary: int, slope: float = 1.25) -> Target:
    """A whole distribution as a language model's: probabilities fall like a power of the rank, with noise."""
    noise = torch.Generator().manual_seed(vocabulary)
    rank = torch.rand(count, vocabulary, generator=noise).argsort(-1) + 1
    logits = -slope * rank.double().log() + 0.3 * torch.randn(count, vocabulary, generator=noise).double()
    position = torch.arange(count)
    return Target(position % vocabulary, logits.log_softmax(-1).float(), seed=7919 * position)


def sparse(vocabulary: int, least: int = 1, most: int = 17) -> Target:
    """`least` to `most` entries per position, the first and the last id among them, in no order, some dropped."""
    generator = torch.Generator().manual_seed(0)
    count = ROWS * SIZE
    ids = torch.stack([torch.randperm(vocabulary, generator=generator)[:most] for _ in range(count)])
    for row, id_ in enumerate((0, vocabulary - 1)):
        ids[row][ids[row] == id_] = ids[row, 0]
        ids[row, 0] = id_
    logp = (3 * torch.randn(count, most, generator=generator)).log_softmax(-1) - 0.01
    mask = torch.arange(most) < torch.randint(least, most + 1, (count, 1), generator=generator)
    return Target(torch.zeros(count, dtype=torch.long), logp.masked_fill(~mask, -math.inf), ids)


def written(target: Target, draws: int | None = None, size: int = 5) -> Rows:
    """A target of ROWS x SIZE positions as rows of a shard, encoded `size` positions at a time."""
    out = Rows()
    pieces = [encode(target[rows], draws) for rows in chunks(ROWS * SIZE, size)]
    out.add_entries(np.zeros((ROWS, SIZE), np.int64), pieces, np.ones((ROWS, SIZE), bool))
    return out


def read(entries: EncodedRows, draws: int | None = None, size: int = ROWS * SIZE) -> list[Target]:
    """The targets of all positions, `size` of them at a time."""
    count = entries.count.numel()
    zeros = torch.zeros(count, dtype=torch.long)
    positions = entries.at(torch.ones_like(entries.count, dtype=torch.bool))
    return [positions.target(rows, zeros[rows], zeros[rows], draws) for rows in chunks(count, size)]


def tables(targets: list[Target]) -> list[dict[int, float]]:
    """Return the log-probabilities of each position by id."""
    pairs = [(ids, logp) for t in targets for ids, logp in zip(t.ids.tolist(), t.logp.tolist(), strict=True)]
    return [{i: x for i, x in zip(*pair, strict=True) if x > -math.inf} for pair in pairs]


def same(some: list[dict[int, float]], others: list[dict[int, float]]) -> bool:
    """Compare up to float rounding: a target is as wide as its widest position, and sums are over its width."""
    return all(a.keys() == b.keys() and list(a.values()) == pytest.approx(list(b.values()), abs=1e-5)
               for a, b in zip(some, others, strict=True))  # fmt: skip


def divergence(computed: dict[int, float], stored: dict[int, float]) -> float:
    """KL in nats, all that is not kept taken as one more token."""
    p, q = (np.exp(np.array([table[i] for i in sorted(table)])) for table in (computed, stored))
    rest = max(1 - p.sum(), 0), max(1 - q.sum(), 1e-12)
    tail = rest[0] * math.log(rest[0] / rest[1]) if rest[0] > 1e-6 else 0.0
    return float((p * np.log(p / q)).sum()) + tail


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_ids_come_back_exactly_and_probabilities_to_half_a_step(vocabulary):
    target = sparse(vocabulary)
    for before, after in zip(tables([target]), tables(read(from_bytes(written(target).bodies))), strict=True):
        assert before.keys() == after.keys()
        difference = np.array([after[i] - before[i] for i in before])
        # Each is off by half a step at most, and all of them together by what makes their sum right again.
        assert np.ptp(difference) <= QUANTIZATION_STEP + 1e-5 and abs(difference).max() <= QUANTIZATION_STEP + 1e-5
        assert sum(map(math.exp, after.values())) == pytest.approx(sum(map(math.exp, before.values())), rel=5e-3)


def test_ids_of_a_position_ascend():
    for table in read(from_bytes(written(sparse(256_000)).bodies)):
        for ids, logp in zip(table.ids, table.logp, strict=True):
            assert (ids[logp > -math.inf].diff() > 0).all()


@pytest.mark.parametrize("draws", [1, 50, 1000])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_counts_of_a_sample_come_back_exactly(vocabulary, draws):
    target = option("truncation", "random", draws=draws)(heavy(ROWS * SIZE, vocabulary))
    before, after = tables([target]), tables(read(from_bytes(written(target, draws).bodies), draws))
    assert [t.keys() for t in before] == [t.keys() for t in after]
    for a, b in zip(before, after, strict=True):
        assert [round(draws * math.exp(a[i])) for i in a] == [round(draws * math.exp(b[i])) for i in a]
        assert sum(map(math.exp, b.values())) == pytest.approx(1, abs=1e-6)


def test_as_many_draws_as_a_count_can_hold():
    count = ROWS * SIZE
    logp = torch.tensor([[1.0, 0.0]]).log().expand(count, 2)
    certain = Target(torch.zeros(count, dtype=torch.long), logp, seed=torch.arange(count))
    entries = from_bytes(written(option("truncation", "random", draws=MOST_DRAWS)(certain), MOST_DRAWS).bodies)
    assert (entries.quantized_logp == MOST_DRAWS).all() and tables(read(entries, MOST_DRAWS)) == [{0: 0.0}] * count


@pytest.mark.parametrize("mass", [1e-6, 1e-3, 0.5, 0.999, 1 - 1e-6])
def test_mass_is_right_at_both_ends(mass):
    """Compare to half a percent of the smaller of the kept mass and the dropped mass."""
    count = ROWS * SIZE
    logp = torch.randn(count, 3, generator=torch.Generator().manual_seed(1)).double().log_softmax(-1) + math.log(mass)
    target = Target(torch.zeros(count, dtype=torch.long), logp, torch.tensor([[5, 3, 4]]).expand(count, 3))
    log_odds = from_bytes(written(target).bodies).log_odds.double()
    assert log_odds.sigmoid().numpy() == pytest.approx(mass, rel=0.005)
    assert (-log_odds).sigmoid().numpy() == pytest.approx(1 - mass, rel=0.005)
    assert read(from_bytes(written(target).bodies))[0].logp.double().exp().sum(-1).numpy() == pytest.approx(
        mass, rel=0.005
    )


@pytest.mark.parametrize("vocabulary", [17, 5_000])
def test_whole_support_has_all_the_mass(vocabulary):
    target = option("truncation", "top_k", k=vocabulary)(heavy(ROWS * SIZE, vocabulary))
    (stored,) = read(from_bytes(written(target).bodies))
    assert stored.logp.double().exp().sum(-1).numpy() == pytest.approx(1, abs=1e-5)
    assert (stored.ids.sort(-1).values == torch.arange(vocabulary)).all()


def test_one_entry_in_a_position():
    target = option("truncation", "top_k", k=1)(heavy(ROWS * SIZE, 151_936))
    (stored,) = read(from_bytes(written(target).bodies))
    assert (stored.ids == target.ids).all() and stored.ids.shape == (ROWS * SIZE, 1)
    assert stored.logp.exp().numpy() == pytest.approx(target.logp.exp().numpy(), rel=2e-3)


def test_improbable_entries_stay_apart_from_dropped_ones():
    logp = torch.tensor([[-1e-9, -1000.0, -5000.0, -math.inf]]).expand(ROWS * SIZE, 4)
    target = Target(torch.zeros(ROWS * SIZE, dtype=torch.long), logp, torch.tensor([[9, 1, 5, 2]]).expand(logp.shape))
    for table in tables(read(from_bytes(written(target).bodies))):
        assert table.keys() == {1, 5, 9}
        assert table[1] == pytest.approx(-1000, abs=QUANTIZATION_STEP) and table[5] < table[1]


@pytest.mark.parametrize("draws", [None, 20])
def test_chunks_of_writing_and_reading_change_nothing(draws):
    target = sparse(300, 1, 17)
    if draws:
        target = option("truncation", "random", draws=draws)(heavy(ROWS * SIZE, 300))
    whole = written(target, draws, ROWS * SIZE)
    for size in (1, 3, SIZE, 31):
        assert written(target, draws, size).bodies == whole.bodies
        assert same(tables(read(from_bytes(whole.bodies), draws, size)), tables(read(from_bytes(whole.bodies), draws)))


@pytest.mark.parametrize("rows", [1, 3, ROWS, 9])
def test_split_is_the_same_rows(rows):
    entries = from_bytes(written(sparse(300)).bodies)
    parts = entries.split(rows)
    assert [len(p.count) for p in parts] == [len(p) for p in torch.arange(ROWS).split(rows)]
    assert same([t for p in parts for t in tables(read(p))], tables(read(entries)))


def test_positions_are_picked_in_order():
    entries = from_bytes(written(sparse(300)).bodies)
    mask = torch.rand(ROWS, SIZE, generator=torch.Generator().manual_seed(2)) < 0.4
    zeros = torch.zeros(int(mask.sum()), dtype=torch.long)
    picked = entries.at(mask).target(slice(None), zeros, zeros, None)
    everything = tables(read(entries))
    assert same(tables([picked]), [everything[i] for i in mask.flatten().nonzero().flatten()])


def test_rows_are_read_one_by_one_as_all_at_once():
    out = written(sparse(256_000))
    assert same(
        [t for body in out.bodies for t in tables(read(from_bytes([body])))], tables(read(from_bytes(out.bodies)))
    )


TRUNCATIONS = {
    "top_k-50": ("top_k", {"k": 50}),
    "top_k-5": ("top_k", {"k": 5}),
    "top_p_k": ("top_p_k", {"p": 0.95, "k": 50}),
    "top_p": ("top_p", {"p": 0.5}),
}


@pytest.mark.parametrize("slope", [0.8, 1.25, 3.0], ids=["flat", "usual", "sharp"])
@pytest.mark.parametrize("name", TRUNCATIONS)
def test_what_is_stored_is_what_was_computed_to_a_ten_thousandth_of_a_nat(name, slope):
    kind, settings = TRUNCATIONS[name]
    target = option("truncation", kind, **settings)(heavy(ROWS * SIZE, 32_768, slope))
    pairs = list(zip(tables([target]), tables(read(from_bytes(written(target).bodies))), strict=True))
    divergences = np.array([divergence(*pair) for pair in pairs])
    assert divergences.mean() < 1e-4 and divergences.max() < 2e-4
    shifted = [divergence(a, {i: x - 0.02 for i, x in b.items()}) for a, b in pairs]
    assert np.mean(shifted) > np.mean(divergences)  # it would show


@pytest.mark.parametrize("vocabulary", [1_024, 32_768, 151_936])
@pytest.mark.parametrize(("name", "most"), [("random", 40), ("top_k", 130)])
def test_bytes_per_token(name, most, vocabulary):
    """Store a teacher whose 50 draws are about 12 distinct tokens, with ids anywhere in the vocabulary."""
    rows, size = 1, 128
    target = heavy(rows * size, vocabulary, 1.7)
    draws = 50 if name == "random" else None
    truncated = option("truncation", name)(target) if draws else option("truncation", name, k=50)(target)
    out = Rows()
    out.add_entries(np.zeros((rows, size), np.int64), [encode(truncated, draws)], np.ones((rows, size), bool))
    entries = out.entries / (rows * size)
    assert 10 < entries < 14 if draws else entries == 50
    assert out.bytes / (rows * size) <= most
