"""What the runs of a sweep say: read, grouped by what they differ in, and compared seed by seed."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from kd import files
from kd.config import check_sweep
from kd.errors import UserError
from kd.identity import below, part_of_outcome, whole_as_float
from kd.remote import home, latest
from kd.run import EXACCERR, RESPONSES, Run, is_sealed, read_json, read_metrics

TASK = ("data", "student", "trainer.steps", "trainer.batch")  # where these agree, losses can be compared
ALONE, FINE_TUNED, OF_TEACHERS_TEXT = "language modelling alone", "SFT", "SeqKD"
# 97.5% quantile of Student's t for 1 to 30 degrees of freedom; more are given the last one, a little too wide.
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NEEDED = {  # of a result; the rest may be missing
    "config": ("seed", "logits", "data", "student.size", "student.name", "teacher.size", "teacher.name"),
    "final": ("val/lm",),
    "environment": ("git",),
}


class Goal(NamedTuple):
    """The measure that a sweep is judged by."""

    key: str
    title: str
    unit: str  # behind a number
    sign: int  # 1 where more is better, -1 where less is
    better: str

    @property
    def first(self) -> str:
        """What the best one is called that may be best by chance."""
        return "lowest" if self.sign < 0 else "highest"

    @property
    def of_teacher(self) -> str:
        return self.key.replace("val/", "val/teacher_")


LOSS = Goal("val/lm", "loss", "nats per token on held-out text", -1, "a lower loss on held-out text")
ROUGE = Goal("val/rouge_l", "rouge-l", "Rouge-L on held-out prompts", 1, "a higher Rouge-L on held-out prompts")


class Entry(NamedTuple):
    """One line of a sweep's manifest and what became of it."""

    folder: Path
    overrides: list[str]
    state: str  # as Run.state says, or missing, or damaged
    says: str
    result: dict | None
    name: str | None = None  # of the line of the sweep that it is from

    @property
    def command(self) -> str:
        return shlex.join(["python", "train.py", *self.overrides])


def a_path(text: str) -> str:
    """A path on a command line, for argparse."""
    try:
        return files.expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser(program: str, description: str, name: str | None = None) -> argparse.ArgumentParser:
    """The arguments that all programs here take: a sweep's name ("?" where it may be left out) and the root."""
    made = argparse.ArgumentParser(prog=f"python -m sweeps.{program}", description=description)
    made.add_argument("name", nargs=name, help="of the sweep, as in python train.py sweeps=NAME")
    root = os.environ.get("KD_ROOT") or "runs"
    made.add_argument(
        "--root", default=root, type=a_path, help="folder or URL where runs are kept (default: $KD_ROOT, or runs)"
    )
    return made


def manifest(root: str | Path, name: str) -> list[dict]:
    """The runs of a sweep as kd.sweep wrote them; raises UserError where there is no such sweep."""
    check_sweep(name)
    path, again = latest(root, f"sweeps/{name}.json"), f"To run it, type: python train.py sweeps={name}"
    try:
        runs = json.loads(path.read_text())["runs"]
        if not all(files.is_name(line["run"]) for line in runs):
            raise ValueError("a run that is no folder of this root")
        return [line | {"overrides": [str(word) for word in line["overrides"]]} for line in runs]
    except FileNotFoundError:
        there = listed(sorted(p.stem for p in path.parent.glob("*.json"))) or "none yet"
        raise UserError(f"No sweep {name} in {path.parent.resolve()}. There: {there}. {again}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged. {again} (finished runs are not run again)") from None


def read(root: str | Path, line: dict) -> Entry:
    """What became of a run, whatever is in its folder."""
    folder = home(root) / line["run"]
    result, going_on = None, "still running, or stopped: the same command goes on with it"
    try:
        run = Run(root, line["run"])
        result, found = run.result(), run.state()
        if result is not None:
            state, says, result = "done", "", sound(result)
            names = ("metrics.jsonl", *((RESPONSES, EXACCERR) if ROUGE.key in result["final"] else ()))
            for name in names:
                run.copy(name)
            if is_sealed(result):
                run.check(result, *names)
        elif found["state"] == "not begun":
            state, says = "missing", "not started yet"
        else:
            state, says = str(found["state"]), str(found["reason"]) or going_on
    except UserError as error:
        state, says, result = "damaged", str(error), None
    except (KeyError, TypeError, AttributeError):
        state, says, result = "damaged", f"not what a run writes; to run it anew, first {run.removal()}", None
    return Entry(folder, line["overrides"], state, says, result, line.get("name"))


def sound(result: dict) -> dict:
    """A result with its finite measures and the acceptance rate; raises KeyError where something is missing."""
    final = {k: v for k, v in result["final"].items() if isinstance(v, int | float) and math.isfinite(v)}
    if "val/tvd" in final:
        final["val/acceptance"] = 1 - final["val/tvd"]
    # A setting that is no part of a run's name, and that earlier versions did not have.
    result = result | {"final": final, "config": {"teacher.sft": False} | result["config"]}
    for part, keys in NEEDED.items():
        if missing := set(keys) - set(result[part]):
            raise KeyError(*missing)
    return result


def curve(group: Group) -> list[tuple[float, ...]]:
    """Tokens, FLOPs and mean loss on held-out text, at the steps that all seeds have."""
    axes, found = ("tokens", "flops", "val/lm"), []
    for entry in group.runs.values():
        lines = read_metrics(entry.folder / "metrics.jsonl")
        found += [{x["step"]: [x[axis] for axis in axes] for x in lines if "val/lm" in x}]
    common = sorted(set.intersection(*map(set, found))) if found else []
    return [tuple(map(fmean, zip(*(steps[s] for steps in found)))) for s in common]


def excess(group: Group) -> list[float]:
    """The mean ExAccErr over length, as far as all seeds have one; nothing where a file is missing or damaged."""
    found = []
    for entry in group.runs.values():
        try:
            found.append([float(x) for x in (read_json(entry.folder / EXACCERR) or {})["exaccerr"]])
        except (UserError, KeyError, TypeError, ValueError):
            return []
    return [mean for mean in map(fmean, zip(*found)) if math.isfinite(mean)]


class Interval(NamedTuple):
    """Mean over n seeds and half the width of its 95% interval, None where one seed gives none."""

    mean: float
    half: float | None
    n: int

    @property
    def noise(self) -> bool:
        """Whether 0 is inside."""
        return self.half is not None and abs(self.mean) <= self.half

    @property
    def sure(self) -> bool:
        """Whether 0 is outside, which one seed cannot tell."""
        return self.half is not None and not self.noise


def interval(values: Iterable[float]) -> Interval | None:
    """Mean and 95% t interval; None of nothing."""
    x = list(values)
    half = T[min(len(x) - 1, len(T)) - 1] * stdev(x) / math.sqrt(len(x)) if len(x) > 1 else None
    return Interval(fmean(x), half, len(x)) if x else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    label: str
    config: dict
    runs: dict[int, Entry]  # by seed

    @property
    def results(self) -> list[dict]:
        return [entry.result for entry in self.runs.values()]

    @property
    def alone(self) -> bool:
        return is_alone(self.config)

    @property
    def distilled(self) -> bool:
        """Whether distributions of a teacher are learned, so that all axes have a meaning."""
        return without_loss(self.config) is None

    @property
    def task(self) -> str:
        """Student, data and steps, so of full rows the tokens."""
        return subset(self.config, *TASK)

    @property
    def seconds(self) -> float:
        return fmean(result.get("seconds", 0) for result in self.results)

    def of(self, measure: str) -> dict[int, float]:
        """A measure of the final validation, by seed."""
        finals = {seed: entry.result["final"] for seed, entry in self.runs.items()}
        return {seed: final[measure] for seed, final in finals.items() if measure in final}

    def mean(self, measure: str = "val/lm") -> Interval | None:
        return interval(self.of(measure).values())


def is_alone(config: dict) -> bool:
    """Whether a run learns nothing from a teacher, neither its distributions nor text that it wrote."""
    return config["logits"] == "none" and config.get("rollout", "none") == "none"


def task_of(groups: list[Group]) -> str:
    """What rows of one task share, in words; rows of instructions are not full, so that tokens may differ."""
    return f"student, data and {'steps' if any(g.config['data'] == 'instructions' for g in groups) else 'tokens'}"


def without_loss(config: dict) -> str | None:
    """What a run is called that compares no distributions; None where it does."""
    if is_alone(config):
        return FINE_TUNED if config["data"] == "instructions" else ALONE
    return OF_TEACHERS_TEXT if config["logits"] == "none" else None


def goal(groups: list[Group]) -> Goal:
    """Rouge-L where all runs wrote responses, as papers on instructions have it; else the loss."""
    return ROUGE if groups and all(ROUGE.key in r["final"] for g in groups for r in g.results) else LOSS


def grouped(entries: list[Entry]) -> list[Group]:
    """Finished runs by what they differ in, the best first, called what the sweep calls them and what it varies."""
    runs: dict[str, dict[int, Entry]] = {}
    for entry in entries:
        if entry.result is not None:
            config = entry.result["config"]
            runs.setdefault(json.dumps(settings(config), sort_keys=True), {})[config["seed"]] = entry
    found = [(settings(next(iter(by_seed.values())).result["config"]), by_seed) for by_seed in runs.values()]
    called = [next(iter(by_seed.values())).name or without_loss(config) for config, by_seed in found]
    kinds = {k: varying([c for (c, _), of in zip(found, called) if of == k]) for k in called}
    groups = []
    for (config, by_seed), kind in zip(found, called):
        said = " ".join(filter(None, [kind, label(config, kinds[kind])]))
        name = {"line": next(iter(by_seed.values())).name} if all(called) else {}
        groups.append(Group(said or str(config.get("loss")), config | name, by_seed))
    of = goal(groups)
    return sorted(groups, key=lambda g: -of.sign * g.mean(of.key).mean)


def settings(config: dict) -> dict:
    """What the outcome of a run depends on, but for the seed; of a teacher and a start also how they were made."""
    made = ("teacher",) if config["logits"] != "none" and (config["teacher.size"] or config.get("teacher.sft")) else ()
    made += ("start", "plain") if config["data"] == "instructions" else ()  # which has the tokenizer of the plain text
    part = part_of_outcome(config)
    own = whole_as_float({k: v for k, v in config.items() if below(k, made)})
    return {k: v for k, v in (own | part).items() if k != "seed"}


def subset(config: dict, *prefixes: str) -> str:
    """The settings below prefixes, as text that can be compared."""
    return json.dumps({k: v for k, v in config.items() if below(k, prefixes)}, sort_keys=True)


def varying(configs: list[dict]) -> list[str]:
    """Settings that tell configs apart, the name of their line or the loss first; loss.mu only within one loss."""
    keys = []
    for key in dict.fromkeys(k for c in configs for k in c):
        axis = key.partition(".")[0]
        values = {(c.get(axis) if axis != key else None, json.dumps(c.get(key), sort_keys=True)) for c in configs}
        if len(values) > len({choice for choice, _ in values}):
            keys.append(key)
    return sorted(keys, key=lambda key: (key != "line", key != "loss"))


def label(config: dict, keys: list[str]) -> str:
    """akl, fkl tau=2, student=1m lr.peak=0.002: what a person would type, made short; of steps, the tokens."""
    words = []
    for key in keys:
        axis, _, name = key.rpartition(".")
        value, sized = config.get(key), name in ("size", "name")
        if key in config and not (value is None and (sized or axis in keys)):
            said = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
            brief = axis if sized else name if axis in ("loss", "truncation", "temperature", "rollout") else key
            if key == "trainer.steps" and config["data"] != "instructions":  # whose rows are not full
                brief, said = "tokens", amount(value * config["trainer.batch"] * config["data.seq_len"])
            words.append(said if key in ("loss", "truncation", "line") else f"{brief}={said}")
    return " ".join(words)


def amount(value: float) -> str:
    """85k, 1.2M, 3B, 4.5e+12"""
    for bound, unit in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "B")):
        if value < 0.9995 * bound:
            return f"{value / bound * 1e3:.3g}{unit}"
    return f"{value:.2g}"


def difference(group: Group, other: Group | None, measure: str = LOSS.key) -> Interval | None:
    """Measure of group - other, seed by seed; None where they share no seed."""
    a, b = group.of(measure), other.of(measure) if other else {}
    return interval(a[seed] - b[seed] for seed in a if seed in b)


def baseline(group: Group, groups: list[Group]) -> Group | None:
    """Language modelling alone on the same task, at its best; it shares a seed with group."""
    return next((g for g in groups if g.alone and g.task == group.task and g.runs.keys() & group.runs.keys()), None)


def shared(group: Group, other: Group | None, measure: str = LOSS.key) -> float:
    """Mean of a measure of group, over the seeds that other has too if there is one."""
    return fmean(value for seed, value in group.of(measure).items() if other is None or seed in other.runs)


def closed(group: Group, base: Group | None, of: Goal = LOSS) -> Interval | None:
    """Share of the gap between language modelling alone and its teacher that group closes, over the seeds of all three.

    A ratio of means, with the interval of a ratio: that of change - share * gap, seed by seed, over the mean gap
    (Cochran, Sampling Techniques, chapter 6).
    """
    if base is None or group is base:
        return None
    own, alone, teacher = group.of(of.key), base.of(of.key), group.of(of.of_teacher)
    seeds = own.keys() & alone.keys() & teacher.keys()
    changes, gaps = [own[s] - alone[s] for s in seeds], [teacher[s] - alone[s] for s in seeds]
    if not seeds or of.sign * fmean(gaps) <= 0:
        return None
    share = fmean(changes) / fmean(gaps)
    spread = interval((change - share * gap) / fmean(gaps) for change, gap in zip(changes, gaps))
    return spread._replace(mean=share)


def listed(words: list[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
