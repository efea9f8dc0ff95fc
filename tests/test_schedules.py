import math
from itertools import pairwise

import pytest

from kd.errors import UserError
from tests.cases import each, every, option, settings

SCHEDULES = {f"{group}-{name}": s for group in ("alpha", "lr") for name, s in every(group).items()}
SHARES = [
    (name, change)
    for name, node in settings("lr").items()
    for change in ({"warmup": -0.1}, {"warmup": 1.0}, {"warmup": math.nan}, {"decay": -0.1}, {"decay": 1.1},
                   {"warmup": 0.6, "decay": 0.5})
    if change.keys() <= node.keys()
]  # fmt: skip
GRID = [i / 1000 for i in range(1001)]


@pytest.mark.parametrize(
    ("name", "change", "values"),
    [
        ("constant", {"peak": 2.0, "warmup": 0.0}, {0: 2, 0.5: 2, 1: 2}),
        ("constant", {"peak": 2.0, "warmup": 0.5}, {0: 0, 0.25: 1, 0.5: 2, 0.75: 2, 1: 2}),
        ("linear", {"start": 1.0, "end": 0.0, "warmup": 0.0}, {0: 1, 0.25: 0.75, 0.5: 0.5, 1: 0}),
        ("linear", {"start": 0.2, "end": 0.8, "warmup": 0.0}, {0: 0.2, 0.5: 0.5, 1: 0.8}),
        ("linear", {"start": 4.0, "end": 2.0, "warmup": 0.2}, {0: 0, 0.1: 2, 0.2: 4, 0.6: 3, 1: 2}),
        ("cosine", {"peak": 3.0, "end": 1.0, "warmup": 0.0}, {0: 3, 1 / 3: 2.5, 0.5: 2, 2 / 3: 1.5, 1: 1}),
        ("cosine", {"peak": 3.0, "end": 1.0, "warmup": 0.2}, {0: 0, 0.1: 1.5, 0.2: 3, 0.6: 2, 1: 1}),
        ("wsd", {"peak": 3.0, "end": 1.0, "warmup": 0.1, "decay": 0.4},
         {0: 0, 0.05: 1.5, 0.1: 3, 0.3: 3, 0.6: 3, 0.6 + 0.4 / 3: 2.5, 0.8: 2, 1: 1}),
        ("wsd", {"peak": 3.0, "end": 1.0, "warmup": 0.0, "decay": 0.0}, {0: 3, 0.5: 3, 1: 3}),
        ("wsd", {"peak": 3.0, "end": 1.0, "warmup": 0.0, "decay": 1.0}, {0: 3, 0.5: 2, 1: 1}),
        ("wsd", {"peak": 3.0, "end": 1.0, "warmup": 0.5, "decay": 0.5}, {0.25: 1.5, 0.5: 3, 0.75: 2, 1: 1}),
    ],
)  # fmt: skip
def test_values_by_hand(name, change, values):
    schedule = option("lr", name, **change)
    assert {x: schedule(x) for x in values} == pytest.approx(values)


@each("schedule", SCHEDULES)
def test_is_continuous(schedule):
    top = max(map(schedule, GRID))
    steps = [abs(schedule(a) - schedule(b)) for a, b in pairwise(GRID)]
    shares = [schedule.keywords[x] for x in ("warmup", "decay") if schedule.keywords.get(x)]
    assert max(steps) <= 1.6 * top / 1000 / min([1, *shares])  # a half cosine is at most pi / 2 as steep as a line


@each("schedule", SCHEDULES)
def test_rises_from_0_and_then_stays_between_its_ends(schedule):
    given = schedule.keywords
    peak = given.get("peak", given.get("start"))
    end = given.get("end", peak)
    low, high = sorted([peak, end])
    assert schedule(given["warmup"]) == pytest.approx(peak)
    assert schedule(1.0) == pytest.approx(end)
    assert all(low - 1e-12 <= schedule(x) <= high + 1e-12 for x in GRID if x >= given["warmup"])
    if given["warmup"]:
        assert schedule(0.0) == 0
        assert schedule(given["warmup"] / 4) == pytest.approx(peak / 4)


@pytest.mark.parametrize(("name", "change"), SHARES)
def test_shares_without_meaning_are_refused_by_name(name, change):
    schedule = option("lr", name, **change)
    for progress in (0.0, 0.5, 1.0):
        with pytest.raises(UserError, match=", ".join(f"{k}={v}" for k, v in change.items())):
            schedule(progress)
