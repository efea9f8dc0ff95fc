"""What a sweep says in one line, and how sure that is."""

from __future__ import annotations

from kd.identity import below
from sweeps.compare import (
    ALONE,
    TASK,
    Goal,
    Group,
    Interval,
    baseline,
    closed,
    difference,
    goal,
    label,
    listed,
    shared,
    task_of,
    varying,
    without_loss,
)

ONE_SEED = "1 seed: no error bar, so a small difference may be chance"
NOUNS = {
    "loss": "losses", "student.size": "students", "teacher.size": "teachers", "truncation": "truncations",
    "temperature.tau": "temperatures", "alpha.peak": "shares of distillation", "lr.peak": "learning rates",
}  # fmt: skip


def finding(groups: list[Group]) -> str:
    """What the sweep says, in one line, and how sure that is."""
    of, rivals = goal(groups), [g for g in groups if not g.alone] or groups
    tasks = by_task(groups)
    if not rivals[0].alone and len(tasks) > 1:
        return over_tasks(groups, of)
    if len(tasks) > 1 and (firsts := between(tasks, of)):
        return firsts
    changes = {g.label: difference(g, baseline(g, groups), of.key) for g in rivals if not g.alone}
    gains = {name: of.sign * change.mean for name, change in changes.items() if change}
    best = leader(rivals, of)
    base, change = None if best.alone else baseline(best, groups), changes.get(best.label)
    digits = 4 if change and abs(change.mean) < 0.005 else 3
    behind = {g.label: d for g in rivals if g is not best and (d := difference(g, best, of.key))}
    tied = [name for name, d in behind.items() if d.noise]
    unsure = tied or any(not c.sure for c in (change, *behind.values()) if c)
    word = of.first if unsure or (change and gains[best.label] <= 0) else "best"
    says = f"{best.label}: " if len(rivals) == 1 else f"of {count(rivals)}, {best.label} is {word}: "
    says += f"{shared(best, base, of.key):.{digits}f} {of.unit}"
    if base is None:
        mean = best.mean(of.key)
        missing = f"with its seed, {task_of(groups)}" if len(rivals) < len(groups) else ""
        says += f" ({ONE_SEED})" if mean.half is None else f" ± {mean.half:.{digits}f} ({mean.n} seeds, 95% interval)"
        says += (
            "" if best.alone else f"; there is no run by {ALONE} {missing}".rstrip() + " to compare with (logits=none)"
        )
    else:
        beside = f"{shared(base, best, of.key):.{digits}f} for {base.label}"
        says += f" against {beside}{verdict(change, closed(best, base, of), digits, of, without_loss(base.config))}"
    sure = [name for name, c in changes.items() if c and gains[name] > 0 and c.sure]
    ahead = [name for name, d in behind.items() if of.sign * d.mean > 0 and d.half is None]
    tied = tied if len(tied) <= 3 else [*tied[:2], f"{len(tied) - 2} more"]
    says += f"; better beyond noise: {listed(sure)}" if sure and best.label not in sure else ""
    says += f"; {listed(tied)} cannot be told apart from {best.label}" if tied else ""
    return says + (f"; ahead of it on 1 seed, which may be chance: {listed(ahead)}" if ahead else "")


def leader(rivals: list[Group], of: Goal) -> Group:
    """The one that no other is ahead of on the seeds that both have; those with most seeds are asked first.

    One of fewer seeds has to be ahead beyond noise, since a seed alone may be a lucky one.
    """
    best, *others = sorted(rivals, key=lambda g: -len(g.runs))
    for group in others:
        change = difference(group, best, of.key)
        if change and of.sign * change.mean > 0 and (len(group.runs) == len(best.runs) or change.sure):
            best = group
    return best


def verdict(change: Interval, share: Interval | None, digits: int, of: Goal, alone: str) -> str:
    """How the best differs from language modelling alone, with the interval or the lack of one."""
    gap = f", closing {percent(share)} of the gap to the teacher" if share and share.mean > 0 else ""
    nothing = f": nothing here beats {alone}" if of.sign * change.mean <= 0 else ""
    if change.half is None:
        return f"{nothing or gap} ({ONE_SEED})"
    size = f"{abs(change.mean):.{digits}f} ± {change.half:.{digits}f}"
    seeds = f"({change.n} seeds, paired, 95% interval)"
    if change.noise:
        return f", a difference of {size} {seeds}, which is within noise{nothing or ': no gain is shown'}"
    return f", {size} {'higher' if change.mean > 0 else 'lower'} {seeds}{nothing or gap}"


def percent(share: Interval) -> str:
    return f"{share.mean:.0%}" + (f" ± {share.half:.0%}" if share.half is not None else "")


def over_tasks(groups: list[Group], of: Goal) -> str:
    """The finding where student, data or tokens vary, so that losses are compared within each of these."""

    def gain(group: Group) -> Interval | None:
        return None if group.alone else difference(group, baseline(group, groups), of.key)

    tasks = by_task([group for group in groups if gain(group)])
    if not tasks:
        found = f"{len(by_task(groups))} settings of {task_of(groups)}"
        return f"{found}, and in none of them a run by {ALONE} to compare with"
    best = [max(map(gain, some), key=lambda change: of.sign * change.mean) for some in tasks]
    sure = sum(of.sign * c.mean > 0 and c.sure for c in best)
    single = sum(c.half is None for c in best)
    how = f"; beyond noise in {sure} (paired over seeds, 95%)" if single < len(best) else f" ({ONE_SEED})"
    how += f", with 1 seed in {single}" if 0 < single < len(best) else ""
    better = f"in {sum(of.sign * c.mean > 0 for c in best)} of {len(best)} settings of {task_of(groups)}"
    firsts = between(tasks, of, "of those distilled, ")
    return f"{better} the best distilled student has {of.better} than {ALONE}{how}" + (f"; {firsts}" if firsts else "")


def by_task(groups: list[Group]) -> list[list[Group]]:
    """Groups whose losses can be compared, together."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.task, []).append(group)
    return list(found.values())


def between(tasks: list[list[Group]], of: Goal, who: str = "") -> str:
    """Which groups come first on their tasks, and how often that is beyond noise; nothing where none has a rival."""
    tasks = [some for some in tasks if len(some) > 1]
    if not tasks:
        return ""
    groups = [g for some in tasks for g in some]
    keys = [k for k in varying([g.config for g in groups]) if below(k, TASK)]
    alike = set.intersection(*(set(g.label.split(" ")) for g in groups))
    firsts: dict[str, list[str]] = {}
    sure = 0
    for some in tasks:
        best = leader(some, of)
        task = label(best.config, keys)
        own = [word for word in best.label.split(" ") if word not in alike and word not in task.split(" ")]
        firsts.setdefault(" ".join(own), []).append(task)
        sure += all((d := difference(g, best, of.key)) and d.sure for g in some if g is not best)
    every = f"all {len(tasks)} {NOUNS.get(keys[0], 'settings') if len(keys) == 1 else f'settings of {task_of(groups)}'}"
    few = len(tasks) <= 4
    said = [f"{name} for {listed(at) if few else f'{len(at)} of {len(tasks)}'}" for name, at in firsts.items()]
    says = f"{of.first} for {every} is {next(iter(firsts))}" if len(firsts) == 1 else f"{of.first} is {', '.join(said)}"
    return f"{who}{says}; ahead of the next beyond noise in {sure} of {len(tasks)}"


def count(groups: list[Group]) -> str:
    """5 losses, or 8 settings where more than the loss varies."""
    keys = varying([g.config for g in groups])
    return f"{len(groups)} {NOUNS.get(keys[0], 'settings') if len(keys) == 1 else 'settings'}"
