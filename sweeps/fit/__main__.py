"""Scaling laws of a sweep: python -m sweeps.fit NAME writes ROOT/sweeps/NAME.fit.html, .fit.json and .points.csv."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kd.system.launchers import forget_ranks

if __name__ == "__main__":  # before a library that reads them is loaded
    forget_ranks(os.environ)

from rich.table import Table

from kd.errors import MISTAKES, UserError, for_people
from kd.system import files
from kd.system.console import Terminal, counted, harmless, styled
from kd.system.remote import home, publish
from sweeps import curves
from sweeps.answers import Answers, Fit, answers, published
from sweeps.compare import a_path, amount, manifest, parser, read
from sweeps.contest import SCENARIOS, Contest, contests
from sweeps.points import Point, from_csv, of_sweep, to_csv
from sweeps.report import question


def table(fit: Fit, entropy: float | None) -> Table:
    """Coefficients with their intervals."""
    made = Table(box=None, pad_edge=False)
    for name in ("", "value", "95% interval", "published", ""):
        made.add_column(name, justify="left" if not name else "right")
    for name in fit.coefficients:
        known = published(fit).get(name)
        says = "not known from these runs" if name in fit.loose else ""
        if name == "E" and entropy:
            says = "; ".join(filter(None, [says, f"known: {entropy:.4f}, the entropy of the data"]))
        paper = f"{known:g}" if known else ""
        made.add_row(name, fit.says(name), fit.spans(name), paper, styled(says, "dim"))
    return made


def show(found: Answers, out: Terminal) -> None:
    """Print every law: what it is, its coefficients, and how well it holds."""
    for fit in found.fits:
        title = (
            f"{fit.law.name} law {fit.of}".rstrip()
            + f": {fit.law.formula}  ({counted(len(fit.points), 'run', 'runs')})"
        )
        off = f"off on the {fit.held.sum()} largest runs, held out, by {fit.beside}" if fit.error is not None else ""
        out.print(title, style="bold", soft_wrap=True)
        out.print(table(fit, found.entropy))
        out.print("\n".join(filter(None, [off, fit.test])), "", soft_wrap=True, sep="\n")
    for line in [*found.cannot, *(d for fit in found.fits for d in fit.doubts), *found.notes]:
        out.print(f"- {line}", soft_wrap=True)


def as_json(found: Answers) -> dict:
    """All of it, for other programs."""

    def one(fit: Fit) -> dict:
        values = {
            k: {
                "value": v,
                "interval": fit.interval(k),
                "published": published(fit).get(k),
                "known": k not in fit.loose,
            }
            for k, v in fit.coefficients.items()
        }
        held = [p.run for p, out in zip(fit.points, fit.held) if out]
        return {"law": fit.law.name, "formula": fit.law.formula, "of": fit.of, "runs": len(fit.points),
                "coefficients": values, "held_out": {"runs": held, "mean_error": fit.error,
                "mean_error_of_a_straight_line": fit.straight, "coefficients": fit.part},
                "lack_of_fit": fit.lack and fit.lack._asdict(),
                "doubts": fit.doubts}  # fmt: skip

    return {
        "name": found.name, "entropy": found.entropy, "fits": [one(fit) for fit in found.fits],
        "cannot": found.cannot, "notes": found.notes,
        "distillation_wins": [
            {"parameters": c.parameters, "teacher": c.scenario.label, "flops": c.ranges(False), "sure": c.ranges(True),
             "measured_up_to": c.measured} for c in contests(found)
        ],
    }  # fmt: skip


def finding(found: Answers) -> str:
    """What the fits say, in one line."""
    says = []
    if fit := found.supervised:
        known = found.entropy
        sure = f"is {fit.coefficients['E']:.3f}" if "E" not in fit.loose else "cannot be told from these runs"
        says.append(f"the irreducible loss of language modelling {sure}")
        says[-1] += f" ({fit.spans('E')})" if fit.samples and "E" not in fit.loose else ""
        says[-1] += f", where the entropy of the data is {known:.3f}" if known else ""
    for fit in (found.supervised, found.distillation):
        if fit and fit.error is not None:
            unseen = f"the {fit.held.sum()} largest runs, which it had not seen"
            says.append(f"the {fit.law.name} law is off on {unseen}, by {fit.beside}")
            says[-1] += f", and {fit.holds}" if fit.holds else ""
    if made := contests(found):
        free, *_, both = made[: len(SCENARIOS)]
        says.append(
            f"at equal FLOPs, {free.compute[0]:.1e} to {free.compute[-1]:.1e}, distillation from a free teacher beats "
            f"language modelling for the smallest student, of {amount(free.parameters)} parameters, {wins(free)}"
        )
        says.append(f"where all that the teacher cost counts, it does so {wins(both)}")
    limits = [limit for fit in (found.supervised, found.distillation) if fit for limit in fit.limits]
    says += [f"but {limit[0].lower()}{limit[1:].rstrip('.')}" for limit in limits]
    return "; ".join(says) or "nothing could be fitted: " + " ".join(found.cannot)


def wins(contest: Contest) -> str:
    """Where distillation wins, and where beyond noise, in one breath."""
    likely, sure = contest.says(), contest.says(sure=True)
    return likely if likely == sure else f"{likely} (beyond noise: {sure})"


def write(folder: Path, found: Answers, asks: str = "") -> Path:
    """The page, the numbers and the points; where the page is."""
    page = folder / f"{found.name}.fit.html"
    to_csv(folder / f"{found.name}.points.csv", found.points)
    files.write_json(folder / f"{found.name}.fit.json", as_json(found))
    with files.atomic(page) as temporary:
        temporary.write_text(curves.page(found, finding(found), asks), encoding="utf-8")
    return page


def main(arguments: list[str] | None = None) -> int:
    words = parser("fit", "Scaling laws of a sweep or a CSV file.", "?")
    words.add_argument("--bootstrap", type=int, default=200, help="resamples to make intervals from (default: 200)")
    words.add_argument("--seed", type=int, default=0, help="of the resamples (default: 0)")
    columns = (
        f"fit these points instead of a sweep; the answers are written beside it. Columns: {', '.join(Point._fields)}. "
        "Only parameters (without embeddings), tokens and loss (nats per token) are needed. FLOPs are of a forward "
        "pass, 2 per parameter where there are none; lines without a teacher are language modelling alone."
    )
    words.add_argument("--csv", type=lambda text: Path(a_path(text)), metavar="FILE", help=columns)
    words.add_argument("--wandb", action="store_true", help="also keep it in Weights & Biases, with the runs")
    given = words.parse_args(arguments)
    if (given.name is None) is (given.csv is None):
        words.error("need the name of a sweep, or --csv FILE")
    if given.bootstrap < 0:
        words.error(f"--bootstrap {given.bootstrap}: need 0 (no intervals) or more")
    try:
        if given.csv:
            folder, name, entries, points, notes = given.csv.parent, given.csv.stem, [], from_csv(given.csv), []
        else:
            folder, name = home(given.root) / "sweeps", given.name
            entries = [read(given.root, line) for line in manifest(given.root, name)]
            points, notes = of_sweep(entries)
        if not points:
            raise UserError(" ".join([f"No run of {name} can be used.", *notes]))
        found = answers(name, points, notes, given.bootstrap, given.seed)
        path = write(folder, found, question(name) if given.name else "")
        for kind in ("html", "json") if given.name else ():
            publish(given.root, f"sweeps/{name}.fit.{kind}")
        show(found, Terminal(highlight=False))
        print(harmless(f"{path}: {finding(found)}"))
        if given.wandb:
            from sweeps import dashboard

            written = [path, path.with_suffix(".json"), folder / f"{name}.points.csv"]
            print(harmless(f"W&B: {dashboard.keep(written, name, 'fit', finding(found), dashboard.place(entries))}"))
    except MISTAKES as error:
        print(harmless(str(for_people(error))), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
