"""Progress of training in [0, 1] -> value: the same functions drive the learning rate and alpha.

Each is pure, so a resumed run needs no scheduler state. `warmup` and `decay` are shares of the whole run.
"""

import math

from kd.errors import UserError


def constant(progress: float, peak: float = 1.0, warmup: float = 0.0) -> float:
    """peak, after a linear warm-up from 0."""
    _shares(warmup)
    return _warm(progress, warmup) * peak


def linear(progress: float, start: float = 1.0, end: float = 0.0, warmup: float = 0.0) -> float:
    """From start to end in a straight line: rising if end > start, falling if not; after a warm-up from 0."""
    _shares(warmup)
    if progress < warmup:
        return _warm(progress, warmup) * start
    return start + (end - start) * (progress - warmup) / (1 - warmup)


def cosine(progress: float, peak: float = 1.0, end: float = 0.0, warmup: float = 0.0) -> float:
    """From peak to end along half a cosine, after a warm-up from 0. Loshchilov & Hutter 2016, arXiv 1608.03983."""
    _shares(warmup)
    if progress < warmup:
        return _warm(progress, warmup) * peak
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def wsd(progress: float, peak: float = 1.0, end: float = 0.0, warmup: float = 0.1, decay: float = 0.1) -> float:
    """Warm-up, stable, decay: linear to peak, constant, then a cosine to end. Hu et al. 2024, arXiv 2404.06395.

    As alpha it is the best schedule of Peng et al. 2024, arXiv 2410.16215, table 5.
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
            f"warmup={warmup}, decay={decay}: these are shares of the run, so need numbers from 0 to 1 that do not "
            "add up to more than 1, e.g. lr.warmup=0.05 alpha.decay=0.2."
        )
