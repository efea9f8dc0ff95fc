"""Verdict on scaling fits: the irreducible loss, errors on held-out runs, and where distillation wins."""

from __future__ import annotations

from sweeps.fit.fits import Fit, ScalingFits
from sweeps.fit.tradeoff import SCENARIOS, ComputeTradeoff, tradeoffs_of
from sweeps.report.wording import format_amount


def verdict(fits: ScalingFits) -> str:
    """Return the verdict as one line, with its caveats."""
    parts = [irreducible_loss(fits.supervised, fits.entropy)] if fits.supervised else []
    for fit in fits.main:
        if fit.held_out_text:
            test = f", and {fit.lack_of_fit_text}" if fit.lack_of_fit else ""
            parts.append(f"the {fit.law.name} law is {fit.held_out_text}{test}")
    if tradeoffs := tradeoffs_of(fits):
        free, *_, both = tradeoffs[: len(SCENARIOS)]
        parts.append(
            f"distillation of the student of {format_amount(free.parameters)} beats language modelling at "
            f"{ranges_text(free)} FLOPs († beyond the {free.measured_up_to:.1e} measured), at {ranges_text(both)} if "
            "all of the teacher's cost counts"
        )
    parts += [f"but {limit[0].lower()}{limit[1:].rstrip('.')}" for fit in fits.main for limit in fit.limits]
    return "; ".join(parts) or "only power laws could be fitted"


def irreducible_loss(fit: Fit, entropy: float | None) -> str:
    """Return E of the supervised law with its interval, beside the entropy of the data if that is known."""
    entropy_note = f", entropy of the data {entropy:.3f}" if entropy else ""
    if "E" in fit.undetermined:
        return f"the irreducible loss of language modelling cannot be told from these runs{entropy_note}"
    interval = f" ({fit.interval_text('E')})" if fit.bootstrap else ""
    return f"the irreducible loss of language modelling is {fit.coefficients['E']:.3f}{interval}{entropy_note}"


def ranges_text(tradeoff: ComputeTradeoff) -> str:
    """Return where distillation wins, and where beyond noise if that differs."""
    likely, sure = tradeoff.ranges_text(), tradeoff.ranges_text(beyond_noise=True)
    return likely if likely == sure else f"{likely} (beyond noise: {sure})"
