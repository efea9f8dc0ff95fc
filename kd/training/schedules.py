"""Schedules: functions from the progress of training in [0, 1] to a value, for the learning rate and for alpha.

Each is pure, so a resumed run needs no scheduler state, and each reaches `peak`. `warmup` and `decay` are shares of the
whole run. Two schedules of alpha with one peak may differ in their mean, and so in how much they distil. To compare
shapes alone, choose peaks that give one mean. The mean is named below. A warm-up from 0 takes the share w of a run, and
shortens the rest to 1 - w. The mean is then (1 - w) times that, plus w * peak / 2.
"""

import math

from kd.errors import UserError


def constant(progress: float, peak: float = 1.0, warmup: float = 0.0) -> float:
    """peak, after a linear warm-up from 0. The mean without it: peak."""
    _shares(warmup)
    return _warm(progress, warmup) * peak


def linear_increasing(progress: float, start: float = 0.0, peak: float = 1.0) -> float:
    """Straight line from start to peak. Its mean: (start + peak) / 2.

    As alpha: language modelling first, then distillation, "Linear Inc" of Peng et al. 2024, arXiv 2410.16215, table 5.
    """
    return start + (peak - start) * progress


def linear_decreasing(progress: float, peak: float = 1.0, end: float = 0.0, warmup: float = 0.0) -> float:
    """Straight line from peak to end, after a warm-up from 0. The mean without it: (peak + end) / 2.

    As alpha: distillation first, then language modelling, "Linear Dec" of Peng et al. 2024, arXiv 2410.16215, table 5.
    """
    _shares(warmup)
    if progress < warmup:
        return _warm(progress, warmup) * peak
    return peak + (end - peak) * (progress - warmup) / (1 - warmup)


def cosine(progress: float, peak: float = 1.0, end: float = 0.0, warmup: float = 0.0) -> float:
    """Half a cosine from peak to end, after a warm-up from 0. Loshchilov & Hutter 2016, arXiv 1608.03983.

    The mean without the warm-up: (peak + end) / 2.
    """
    _shares(warmup)
    if progress < warmup:
        return _warm(progress, warmup) * peak
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def period(progress: float, peak: float = 1.0, end: float = 0.0, cycles: int = 4, warmup: float = 0.0) -> float:
    """Straight lines from peak down to end and up again, `cycles` times down, after a warm-up from 0.

    The triangular wave of Smith 2015, arXiv 1506.01186, begun at its peak and ended at its foot; cycles=1 is
    linear_decreasing. Peng et al. 2024, arXiv 2410.16215, table 5, have a row "Period" for alpha. Its shape and number
    of periods are not known here, so this is no copy of it. The mean without the warm-up: (peak + end) / 2. Raises
    UserError for cycles below 1.
    """
    _shares(warmup)
    if cycles < 1:
        raise UserError(option="cycles", got=cycles, need="at least 1", hint="type e.g. alpha.cycles=4")
    if progress < warmup:
        return _warm(progress, warmup) * peak
    place = (2 * cycles - 1) * (progress - warmup) / (1 - warmup)  # even numbers: peaks; odd numbers: feet
    return peak + (end - peak) * abs((place + 1) % 2 - 1)


def wsd(progress: float, peak: float = 1.0, end: float = 0.0, warmup: float = 0.1, decay: float = 0.1) -> float:
    """Warm-up, stable, decay: linear to peak, constant, then a cosine to end. Hu et al. 2024, arXiv 2404.06395.

    As alpha, with wsd as the learning rate, it is the best of Peng et al. 2024, arXiv 2410.16215, table 5; the shares
    of warm-up and decay there are not known first-hand. Its mean: peak * (1 - warmup / 2) - (peak - end) * decay / 2.
    """
    _shares(warmup, decay)
    if progress < warmup:
        return _warm(progress, warmup) * peak
    if progress <= 1 - decay:
        return peak
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (progress - 1 + decay) / decay))


def _warm(progress: float, warmup: float) -> float:
    return 1.0 if progress >= warmup else progress / warmup


def _shares(warmup: float, decay: float = 0.0) -> None:
    if not (0 <= warmup < 1 and 0 <= decay <= 1 and warmup + decay <= 1):
        raise UserError(
            option="warmup",
            got=warmup,
            conflict=f"decay={decay}",
            why="each of them is a share of the run",
            need="numbers from 0 to 1 that do not add up to more than 1",
            hint="type e.g. lr.warmup=0.05 alpha.decay=0.2",
        )
