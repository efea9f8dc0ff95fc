"""Groups of runs that differ in the seed alone, and their labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from kd.evaluation.catalog import LOSS, ROUGE_L, Metric
from kd.experiment.results import Entry
from kd.runs.identity import identity_settings, is_under, model_name, whole_as_float
from sweeps.report.statistics import Interval, interval
from sweeps.report.wording import format_amount

TASK = ("data", "student", "trainer.steps", "trainer.batch")  # where these agree, losses can be compared
EVALUATION_TASK = ("data", "trainer.steps")  # models that are measured as they are
SUPERVISED, FINE_TUNED, SEQUENCE_LEVEL, EVALUATED = "language modelling alone", "SFT", "SeqKD", "evaluation"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed."""

    label: str
    config: dict
    runs: dict[int, Entry]  # by seed

    @property
    def results(self) -> list[dict]:
        return [entry.finished for entry in self.runs.values()]

    @property
    def supervised(self) -> bool:
        return is_supervised(self.config)

    @property
    def distilled(self) -> bool:
        """True if the runs learn a teacher's distributions, so that all axes have a meaning."""
        return name_without_loss(self.config) is None

    @cached_property
    def task(self) -> str:
        """Student, data and steps, and so, with full rows, the tokens; of an evaluation the data."""
        return subset(self.config, *(EVALUATION_TASK if is_evaluation(self.config) else TASK))

    @property
    def seconds(self) -> float:
        return fmean(result.get("seconds", 0) for result in self.results)

    def values(self, key: str) -> dict[int, float]:
        """Return a metric of the final validation, by seed."""
        finals = {seed: entry.finished["final"] for seed, entry in self.runs.items()}
        return {seed: final[key] for seed, final in finals.items() if key in final}

    def mean(self, key: str) -> Interval | None:
        """Return the mean of a metric, None if no run has it."""
        return interval(self.values(key).values())

    def required_mean(self, key: str = LOSS.key) -> Interval:
        """Return the mean of a metric that every run has, such as the loss."""
        mean = self.mean(key)
        assert mean is not None, f"no run of {self.label} has {key}"
        return mean


def is_evaluation(config: dict) -> bool:
    """Return True if a run measures a model without training it."""
    return config.get("trainer.steps") == 0


def is_supervised(config: dict) -> bool:
    """Return True if a run learns, and neither a teacher's distributions nor its text."""
    return not is_evaluation(config) and config["logits"] == "none" and config.get("rollout", "none") == "none"


def name_without_loss(config: dict) -> str | None:
    """Return the name of a run that compares no distributions; None if it does."""
    if is_evaluation(config):
        return EVALUATED
    if is_supervised(config):
        return FINE_TUNED if config["data"] == "instructions" else SUPERVISED
    return SEQUENCE_LEVEL if config["logits"] == "none" else None


def baseline_name(groups: list[Group]) -> str:
    """Return the name of language modelling alone in a sweep."""
    return next((name_without_loss(g.config) for g in groups if g.supervised), None) or SUPERVISED


def primary_metric(groups: list[Group]) -> Metric:
    """Return Rouge-L if all runs generated responses, as in papers on instructions; else the loss."""
    return ROUGE_L if groups and all(ROUGE_L.key in r["final"] for g in groups for r in g.results) else LOSS


def group_runs(entries: list[Entry]) -> list[Group]:
    """Return the finished runs grouped by their settings, the best first, labelled by the settings that vary."""
    by_settings: dict[str, tuple[dict, dict[int, Entry]]] = {}  # settings and runs by seed, by the settings as text
    for entry in entries:
        if entry.result is not None:
            config = outcome_settings(entry.result["config"])
            _, seeds = by_settings.setdefault(json.dumps(config, sort_keys=True), (config, {}))
            seeds[entry.result["config"]["seed"]] = entry
    pairs = list(by_settings.values())
    names = [next(iter(seeds.values())).name or name_without_loss(config) for config, seeds in pairs]
    by_name: dict[str | None, list[dict]] = {}
    for (config, _), name in zip(pairs, names):
        by_name.setdefault(name, []).append(config)
    keys = {name: varying(configs) for name, configs in by_name.items()}
    labels = distinct_labels([(config, keys[name]) for (config, _), name in zip(pairs, names)], names)
    groups = []
    for (config, seeds), text in zip(pairs, labels):
        line = {"line": next(iter(seeds.values())).name} if all(names) else {}
        groups.append(Group(text or str(config.get("loss")), config | line, seeds))
    metric = primary_metric(groups)
    return sorted(groups, key=lambda g: -metric.sign * g.required_mean(metric.key).mean)


def tasks_of(groups: list[Group]) -> list[list[Group]]:
    """Return the groups by task. Losses can be compared within a task."""
    tasks: dict[str, list[Group]] = {}
    for group in groups:
        tasks.setdefault(group.task, []).append(group)
    return list(tasks.values())


def describe_task(groups: list[Group]) -> str:
    """Return the common part of a task's rows as text.

    Rows of instructions are not full, so their tokens may differ.
    """
    if groups and all(is_evaluation(group.config) for group in groups):
        return "data"
    return f"student, data and {'steps' if any(g.config['data'] == 'instructions' for g in groups) else 'tokens'}"


def outcome_settings(config: dict) -> dict:
    """Return the settings that the result depends on, without the seed, and those of its teacher and start."""
    prefixes: tuple[str, ...] = ()
    pruned = config.get("start.stage") == "teacher"
    if (config["logits"] != "none" or pruned) and (config["teacher.size"] or config.get("teacher.sft")):
        prefixes += ("teacher",)
    if config["data"] == "instructions":  # it has the tokenizer of the plain text
        prefixes += ("start", "plain")
    if pruned:
        config = with_student(config)
        prefixes += ("start.keep", "start.stage", "start.sample")
    prerequisites = whole_as_float({k: v for k, v in config.items() if is_under(k, prefixes)})
    return {k: v for k, v in (prerequisites | identity_settings(config)).items() if k != "seed"}


def with_student(config: dict) -> dict:
    """Return a flat config in which a student that is made of its teacher has a name as its size: 1m-1l."""
    if config.get("start.stage") != "teacher":
        return config
    return config | {"student.size": model_name(config, "student")}


def subset(config: dict, *prefixes: str) -> str:
    """Return the settings below prefixes, as text that can be compared."""
    return json.dumps({k: v for k, v in config.items() if is_under(k, prefixes)}, sort_keys=True)


def varying(configs: list[dict]) -> list[str]:
    """Return the settings in which configs differ, the name of their line or the loss first.

    A setting of one option, such as loss.mu, counts if it varies within that option.
    """
    keys = []
    for key in dict.fromkeys(k for c in configs for k in c):
        values = [comparable(c.get(key)) for c in configs]
        if values.count(values[0]) == len(values):  # most settings
            continue
        axis = key.partition(".")[0]
        pairs = set(zip((c.get(axis) if axis != key else None for c in configs), values))
        if len(pairs) > len({choice for choice, _ in pairs}):
            keys.append(key)
    return sorted(keys, key=lambda key: (key != "line", key != "loss"))


def comparable(value: object) -> Hashable:
    """Return a setting as a value that equals another only if both are the same as JSON: 1, 1.0 and true differ."""
    if value is None or isinstance(value, str | int | float):
        return type(value), value
    return json.dumps(value, sort_keys=True)


def distinct_labels(rows: list[tuple[dict, list[str]]], names: Sequence[str | None]) -> list[str]:
    """Return names and labels of configs; numbers are written in full where short ones would give two the same.

    rows: config of each, and the keys that its label has.
    """
    short, full = (
        [" ".join(filter(None, [name, label(*row, exact)])) for row, name in zip(rows, names, strict=True)]
        for exact in (False, True)
    )
    counts = Counter(short)
    return [full[i] if counts[text] > 1 else text for i, text in enumerate(short)]


def label(config: dict, keys: list[str], exact: bool = False) -> str:
    """Return the words that a person would type, shortened: akl, fkl tau=2, student=1m lr.peak=0.002.

    Steps are given as tokens. exact: write numbers with all their digits.
    """
    words = []
    for key in keys:
        axis, _, name = key.rpartition(".")
        value, sized = config.get(key), name in ("size", "name")
        if key in config and not (value is None and (sized or axis in keys)):
            text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
            if exact and isinstance(value, float) and float(text) != value:
                text = json.dumps(value)
            short = axis if sized else name if axis in ("loss", "truncation", "temperature", "rollout") else key
            if key == "trainer.steps" and config["data"] != "instructions":  # whose rows are not full
                tokens = value * config["trainer.batch"] * config["data.seq_len"]
                short, text = "tokens", f"{tokens:.0f}" if exact else format_amount(tokens)
            words.append(text if key in ("loss", "truncation", "line") else f"{short}={text}")
    return " ".join(words)
