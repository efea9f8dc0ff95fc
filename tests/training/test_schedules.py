import math
from itertools import pairwise

import pytest

from tests.cases import each, every, option, settings
from tests.refusals import refused

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
        ("linear_increasing", {"start": 0.0, "peak": 1.0}, {0: 0, 0.25: 0.25, 0.5: 0.5, 1: 1}),
        ("linear_increasing", {"start": 0.2, "peak": 0.8}, {0: 0.2, 0.5: 0.5, 1: 0.8}),
        ("linear_decreasing", {"peak": 1.0, "end": 0.0, "warmup": 0.0}, {0: 1, 0.25: 0.75, 0.5: 0.5, 1: 0}),
        ("linear_decreasing", {"peak": 4.0, "end": 2.0, "warmup": 0.2}, {0: 0, 0.1: 2, 0.2: 4, 0.6: 3, 1: 2}),
        ("period", {"peak": 3.0, "end": 1.0, "cycles": 1, "warmup": 0.0}, {0: 3, 0.25: 2.5, 0.5: 2, 1: 1}),
        ("period", {"peak": 3.0, "end": 1.0, "cycles": 2, "warmup": 0.0},
         {0: 3, 1 / 6: 2, 1 / 3: 1, 0.5: 2, 2 / 3: 3, 5 / 6: 2, 1: 1}),
        ("period", {"peak": 3.0, "end": 1.0, "cycles": 2, "warmup": 0.4},
         {0: 0, 0.2: 1.5, 0.4: 3, 0.5: 2, 0.6: 1, 0.7: 2, 0.8: 3, 0.9: 2, 1: 1}),
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
    lines = 2 * schedule.keywords.get("cycles", 1) - 1
    assert max(steps) <= 1.6 * lines * top / 1000 / min([1, *shares])  # a half cosine is pi / 2 as steep as a line


@each("schedule", SCHEDULES)
def test_rises_from_0_and_then_stays_between_its_ends(schedule):
    given = schedule.keywords
    peak, warmup = given["peak"], given.get("warmup", 0.0)
    first, last = given.get("start", peak), given.get("end", peak)
    low, high = min(first, last), peak
    assert schedule(warmup) == pytest.approx(first)
    assert schedule(1.0) == pytest.approx(last)
    assert max(map(schedule, GRID)) == pytest.approx(peak)
    assert all(low - 1e-12 <= schedule(x) <= high + 1e-12 for x in GRID if x >= warmup)
    if warmup:
        assert schedule(0.0) == 0
        assert schedule(warmup / 4) == pytest.approx(peak / 4)


def means() -> list[tuple[str, dict, float]]:
    """Return the means that the docstrings give, with and without a warm-up of the share w."""
    cases = [("linear_increasing", {"start": 0.2, "peak": 0.8}, 0.5), ("constant", {"peak": 0.8, "warmup": 0.0}, 0.8)]
    for w in (0.0, 0.25):
        ends = {"peak": 0.8, "end": 0.2, "warmup": w}
        cases += [(name, ends, (1 - w) * 0.5 + w * 0.4) for name in ("linear_decreasing", "cosine", "period")]
        cases += [("wsd", ends | {"decay": 0.5}, 0.8 * (1 - w / 2) - 0.6 * 0.25)]
    return [*cases, ("constant", {"peak": 0.8, "warmup": 0.25}, 0.75 * 0.8 + 0.25 * 0.4)]


@pytest.mark.parametrize(("name", "change", "mean"), means())
def test_mean_over_a_run(name, change, mean):
    schedule, steps = option("alpha", name, **change), 10_000
    assert sum(schedule((step + 0.5) / steps) for step in range(steps)) / steps == pytest.approx(mean, abs=1e-4)


def test_alpha_and_the_learning_rate_have_the_same_schedules():
    assert settings("alpha").keys() == settings("lr").keys()
    for name, node in settings("alpha").items():
        assert node.keys() == settings("lr")[name].keys() and "peak" in node


@each("schedule", {name: s for name, s in SCHEDULES.items() if name.startswith("alpha")})
def test_alpha_is_a_share(schedule):
    assert all(0 <= schedule(x) <= 1 for x in GRID)


@pytest.mark.parametrize("cycles", [0, -1])
def test_cycles_below_1_are_refused(cycles):
    with refused(option="cycles", got=cycles, need="at least 1"):
        option("alpha", "period", cycles=cycles)(0.5)


@pytest.mark.parametrize(("name", "change"), SHARES)
def test_shares_without_meaning_are_refused_by_name(name, change):
    schedule = option("lr", name, **change)
    for progress in (0.0, 0.5, 1.0):
        with refused(option="warmup", need="numbers from 0 to 1") as caught:
            schedule(progress)
        assert all(f"{name}={value}" in str(caught.value) for name, value in change.items())
        assert all(f"{name}={value}" in str(caught.value) for name, value in change.items())
