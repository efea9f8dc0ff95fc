"""Batches depend on seed and step alone, and are read ahead of their use."""

import threading
import time

import numpy as np
import pytest
import torch

from kd.data.batches import Batch, Batches, ValidationBatches, _permutation, prefetch, rows_of_step
from kd.errors import UserError


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


# Batches


def test_label_is_the_next_token_of_the_row(packed):
    (batch,) = Batches(packed.train, batch=7, seed=3, start=5, steps=6)
    rows = torch.from_numpy(packed.train[batch.row_ids].astype(np.int64))
    assert torch.equal(batch.ids, rows[:, :-1]) and torch.equal(batch.labels, rows[:, 1:])
    assert torch.equal(batch.ids[:, 1:], batch.labels[:, :-1])
    assert (
        batch.ids.shape == batch.labels.shape == batch.position_seeds.shape == (7, 16)
        and batch.ids.dtype == torch.int64
    )


def test_starting_at_a_step_is_skipping_those_before(packed):
    rows = packed.train[:100]  # step 3 and 6 go from one epoch to the next
    whole = list(Batches(rows, batch=30, seed=1, start=0, steps=12))
    for start in (0, 1, 3, 4, 6, 11, 12):
        rest = list(Batches(rows, batch=30, seed=1, start=start, steps=12))
        assert len(rest) == 12 - start and all(map(same, rest, whole[start:]))


def test_iterating_again_begins_again(packed):
    batches = Batches(packed.train, batch=4, seed=1, start=2, steps=5)
    assert all(map(same, batches, batches)) and len(list(batches)) == 3


@pytest.mark.parametrize("batch", [1, 4, 7, 10, 23])
def test_every_epoch_has_every_row_once_in_a_new_order(batch):
    count, epochs = 10, 7
    steps = -(-count * epochs // batch)
    rows = np.concatenate([rows_of_step(count, batch, seed=5, step=s) for s in range(steps)])
    orders = rows[: count * epochs].reshape(epochs, count)
    assert (np.sort(orders, 1) == np.arange(count)).all()
    assert len({tuple(order) for order in orders}) == epochs
    # Steps in another order, as on resume, are the same steps.
    again = [rows_of_step(count, batch, seed=5, step=s) for s in reversed(range(steps))]
    assert (np.concatenate(again[::-1]) == rows).all()


def test_an_order_is_made_once_for_the_data_and_once_for_the_text_beside_it(packed):
    _permutation.cache_clear()
    plain = Batches(packed.train[:50], batch=4, seed=1, start=0, steps=5)
    assert len(list(Batches(packed.train[:60], batch=4, seed=1, start=0, steps=5, lm_batches=plain))) == 5
    assert _permutation.cache_info().misses == 2


def test_another_seed_is_another_order_and_other_random_numbers(packed):
    orders = {tuple(rows_of_step(100, 100, seed, 0)) for seed in range(20)}
    assert len(orders) == 20
    a, b = (next(iter(Batches(packed.train, 8, seed, 0, 1))) for seed in (0, 1))
    assert not torch.equal(a.row_ids, b.row_ids) and not (a.position_seeds == b.position_seeds).any()


def test_random_numbers_of_positions_do_not_repeat(packed):
    seeds = torch.cat([b.position_seeds.flatten() for b in Batches(packed.train, 8, 0, 0, 50)])
    assert len(seeds.unique()) == len(seeds) and seeds.min() >= 0


def test_split_covers_all_rows_in_order(packed):
    (batch,) = Batches(packed.train, batch=7, seed=0, start=0, steps=1)
    for rows, sizes in ((1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])):
        parts = list(batch.split(rows))
        assert [len(p.ids) for p in parts] == sizes
        assert same(Batch(*(torch.cat(x) for x in list(zip(*parts, strict=True))[:4])), batch)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_validation_is_every_row_once_in_order(packed, size):
    batches = ValidationBatches(packed.val, size)
    assert len(batches) == len(list(batches)) and all(map(same, batches, batches))
    assert torch.cat([b.row_ids for b in batches]).tolist() == list(range(5))
    rows = torch.from_numpy(packed.val.astype(np.int64))
    assert torch.equal(torch.cat([b.ids for b in batches]), rows[:, :-1])
    assert torch.equal(torch.cat([b.labels for b in batches]), rows[:, 1:])


# Ahead of their use


def test_items_come_in_order_and_at_most_two_ahead():
    items_made = []

    def items():
        for number in range(20):
            items_made.append(number)
            yield number

    for number in (coming := prefetch(items())):
        time.sleep(0.002)
        assert items_made[-1] <= number + 3
        if number == 9:
            break
    coming.close()
    assert items_made == list(range(len(items_made))) and len(items_made) <= 13
    assert list(prefetch(iter(range(50)))) == list(range(50)) and list(prefetch(iter([]))) == []


def test_items_are_made_while_others_are_used():
    def items():
        for number in range(8):
            time.sleep(0.02)
            yield number

    began = time.monotonic()
    for _ in prefetch(items()):
        time.sleep(0.02)
    assert time.monotonic() - began < 0.28  # one after the other: 0.32


def test_an_error_comes_where_its_item_would_and_ends_the_thread():
    def items():
        yield 1
        yield 2
        raise UserError("no third")

    got = []
    with pytest.raises(UserError, match="no third"):
        for item in prefetch(items()):
            got.append(item)
    assert got == [1, 2]
    coming = prefetch(iter(range(100)))
    next(coming)
    assert any(t.name.startswith("ahead") for t in threading.enumerate())
    coming.close()
    assert not any(t.name.startswith("ahead") for t in threading.enumerate())
