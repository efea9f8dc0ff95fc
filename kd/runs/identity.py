"""Run names: a readable prefix and a hash of the settings that affect the result. Also the metadata sent to W&B."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field

import xxhash

from kd import former_names
from kd.config import declarations
from kd.config.declarations import Declaration
from kd.config.fields import UNSET
from kd.config.schema import NO_SIGNAL, TRAITS

# Options that are newer than the names of existing runs: with this value they are left out of the name, so that adding
# one renames no run. A default that changes must rename: it does not belong here. Here are those of components, whose
# schema is a function's signature; others have it in kd/config/schema.py.
NEUTRAL: dict[str, object] = {"data.turns": "last", "data.date": None}

# Settings that people filter, group and plot by, with the settings below them (alpha.peak).
AXES = ("seed", "data.tokens", "logits", *NO_SIGNAL, "rollout", "lr", "optim", "adapter")
# More of them, and what dashboards call them. The history of a run has a number `lr` and a number `alpha`, so the names
# of their schedules are called otherwise.
CALLED = {
    "trainer.steps": "steps", "trainer.batch": "batch", "trainer.micro_batch": "micro_batch",
    "trainer.precision": "precision", "data.seq_len": "seq_len", "data.name": "data_name", "data.files": "data_files",
    "teacher.dtype": "teacher_dtype",
    "lr": "lr_schedule", "alpha": "alpha_schedule",
}  # fmt: skip
TEACHING = {f"teacher.{name}": f"teacher_{name}" for name in ("steps", "batch", "lr", "seed", "precision")}


def identity_settings(config: dict) -> dict:
    """Return the settings of a flat config (kd.config.components.flat) that its result depends on.

    The settings that make the teacher belong to the teacher's own run. Without a signal in training, the settings that
    treat a signal belong to no run.
    """
    # Of what is not part of the name but has an effect, what is made of it is part.
    without = [name for name, traits in TRAITS.items() if not traits.effect or not traits.identity]
    without += NO_SIGNAL if config["logits"] == "none" else ()
    if config["data"] != "instructions":
        without += ("responses",)
    if config["logits"] not in ("offline", "recorded"):  # recording has no effect on the student
        without += ("record",)
    neutral = NEUTRAL | {k: traits.neutral for k, traits in TRAITS.items() if traits.neutral is not UNSET}
    part = {k: v for k, v in config.items() if not is_under(k, without) and not (k in neutral and v == neutral[k])}
    seeded = config["logits"] == "cotrained" or written_by_teacher(config)  # the teacher draws with its seed
    teacher_keys = ("teacher.size", "teacher.name", "teacher.dtype", *(["teacher.seed"] if seeded else []))
    part = {k: v for k, v in part.items() if not k.startswith("teacher.") or k in teacher_keys}
    part["trainer.compile"] = part.get("trainer.compile") is True  # auto, whatever it compiles, is named as false
    return whole_as_float(part)


def whole_as_float(config: dict) -> dict:
    """Return a flat config with floats for whole numbers: tau=1 is tau=1.0."""
    return {k: float(v) if type(v) is int else v for k, v in config.items()}


def is_under(key: str, prefixes: Collection[str]) -> bool:
    """Return True if a setting is one of `prefixes` or below one: lr.peak is below lr."""
    while key and key not in prefixes:
        key = key.rpartition(".")[0]
    return bool(key)


def identity(config: dict, **digests) -> str:
    """Return the name of a run's folder: a readable prefix, and a digest of all settings that change its result.

    digests: those of the data, of plain text beside it, of local models and of the store. They also include the names
    of the runs that make the teacher and the student's start.
    """
    part = former_names.former_options(identity_settings(config))
    digest = xxhash.xxh3_128_hexdigest(json.dumps([part, digests], sort_keys=True).encode())[:12]
    label = f"{loss_name(config)}-{model_name(config, 'student')}"
    return f"{evaluated(config) or label}-{digest}"


def loss_name(config: dict) -> str:
    """Return the loss of a flat config; lm if there is no signal from a teacher."""
    return "lm" if config["logits"] == "none" else config["loss"]


def evaluated(config: dict) -> str | None:
    """Return a name of the model that an evaluation measures, of a run the run's: eval-MODEL; None for training."""
    if config.get("trainer.steps") != 0:
        return None
    parts = str(config["student.name"]).rstrip("/").split("/")
    return f"eval-{parts[-2 if parts[-1] == 'student' and len(parts) > 1 else -1]}"


def model_name(config: dict, role: str) -> str | None:
    """Return the size of the student or teacher in a flat config, or the last part of its name.

    A student that is made of its teacher has the teacher's name and what it has of it: 1m-1l-ffn256.
    """
    if role == "student" and config.get("start.stage") == "teacher":
        layers = config["start.layers"]
        counts = {"{}l": len(layers) if isinstance(layers, list) else layers}
        counts |= {"ffn{}": config["start.ffn"], "kv{}": config["start.kv_heads"], "h{}": config["start.hidden"]}
        parts = [text.format(int(count)) for text, count in counts.items() if count is not None]
        return "-".join([str(model_name(config, "teacher")), *parts])
    name = config[f"{role}.size"] or config[f"{role}.name"]
    return str(name).rstrip("/").rpartition("/")[2] if name else None


def axes(config: dict, sizes: dict[str, tuple[int, int]]) -> dict[str, str | int | float | bool]:
    """Return the settings of a flat config that dashboards show, as one level of scalars: alpha_peak for alpha.peak.

    W&B does not find keys with a dot in filters and panels. sizes: role -> parameters, and those without embeddings.
    Language modelling alone has the loss lm and an alpha_peak of 0, so that it has a place on both axes.
    """
    called = CALLED | (TEACHING if trains_teacher(config) else {})
    part = identity_settings(config)
    keys = [k for k in config if (k in part and (is_under(k, AXES) or k in CALLED)) or (k in called and k in TEACHING)]
    shown = {called.get(k, k): config[k] for k in keys}
    shown |= {"data": config["data"], "loss": loss_name(config)}
    for key in ("data_files", "adapter.targets"):
        if isinstance(shown.get(key), list):
            shown[key] = " ".join(map(str, shown[key]))
    shown |= {role: model_name(config, role) for role in ("student", "teacher")}
    if config.get("start.stage") == "teacher":
        shown["start_keep"] = config["start.keep"]
    for role, (parameters, non_embedding) in sizes.items():
        shown |= {f"{role}_params": parameters, f"{role}_params_non_embedding": non_embedding}
    shown["tokens"] = config["trainer.steps"] * config["trainer.batch"] * config["data.seq_len"]
    if shown["loss"] == "lm":
        shown["alpha_peak"] = 0.0
    return {k.replace(".", "_"): v for k, v in shown.items() if isinstance(v, str | int | float)}


def trains_teacher(config: dict) -> bool:
    """Return True if the teacher's own training settings have an effect."""
    learns_from = config["logits"] not in ("none", "cotrained") or written_by_teacher(config)
    learns_from = learns_from or config.get("start.stage") == "teacher"
    return learns_from and bool(config["teacher.size"] or config.get("teacher.sft"))


def written_by_teacher(config: dict) -> bool:
    """Return True if the teacher writes the responses before training (the trait by_teacher of kd.rollout.base)."""
    declared = declarations.of_group("rollout", "traits").get(config.get("rollout", ""), Declaration())
    settings = {key.removeprefix("rollout."): value for key, value in config.items() if key.startswith("rollout.")}
    return declared.holds("by_teacher", settings)


def nested(config: dict) -> dict:
    """Return a flat config as settings of groups, the option of a group as its `option`: {"lr": {"peak": …}}."""
    groups = {key.partition(".")[0] for key in config if "." in key}
    out: dict = {group: {} for group in groups}
    for key, value in config.items():
        group, _, name = key.partition(".")
        if group in groups:
            out[group][name.replace(".", "_") or "option"] = value
        else:
            out[key] = value
    return out


def sizes_of(result: dict) -> dict[str, tuple[int, int]]:
    """Return the sizes of models that axes() needs, from the result of a run."""
    roles = {"student": "", "teacher": "teacher_"}
    counts = {
        role: (result.get(f"{prefix}parameters"), result.get(f"{prefix}non_embedding"))
        for role, prefix in roles.items()
    }
    return {role: (count, inner) for role, (count, inner) in counts.items() if count is not None and inner is not None}


def size_text(parameters: int, active: int | None, trainable: int | None = None, unit: str = " parameters") -> str:
    """Return a number of parameters as text, with the number that a token uses if that is lower.

    trainable: number of those that learn, which is named if an adapter learns in place of the parameters.
    """
    text = f"{parameters:,}{unit}" + (f", {active:,} of them active" if active not in (None, parameters) else "")
    return text + (f" + {trainable:,} trainable" if trainable not in (None, parameters) else "")


def wandb_metadata(name: str, config: dict, sizes: dict[str, tuple[int, int]], git: str | None = None) -> WandbMetadata:
    """Return the metadata of a run for W&B and TensorBoard: a readable name, group, axes and all settings.

    git: revision of the code, from kd.runs.export.environment().
    """
    loss = loss_name(config)
    kind = "distil" if loss != "lm" else "lm" if model_name(config, "teacher") else "teacher"
    kind = "evaluation" if evaluated(config) else kind
    tags = [loss, kind, str(config["data"])]
    shown = axes(config, sizes) | ({"git": git} if git else {})
    return WandbMetadata(name, readable(name, config), config.get("sweep"), kind, tags, shown, nested(config))


def readable(name: str, config: dict) -> str:
    """Return a name for tables and legends: the settings that vary most, then the unique part of the run name."""
    if label := evaluated(config):
        return f"{label} {name.rpartition('-')[2][:4]}"
    parts = [
        loss_name(config),
        model_name(config, "student"),
        config["start.keep"] if config.get("start.keep") not in (None, "uniform") else None,
        f"{config['adapter']}{config['adapter.rank']}" if "adapter.rank" in config else None,
        f"lr{config['lr.peak']:g}" if "lr.peak" in config else None,
    ]
    if config["logits"] != "none":
        tau, truncation = config.get("temperature.tau"), config["truncation"]
        parts += [
            f"from {model_name(config, 'teacher')}" if model_name(config, "teacher") else None,
            f"alpha{config['alpha.peak']:g}" if "alpha.peak" in config else None,
            f"tau{tau:g}" if tau not in (None, 1) else None,
            truncation if truncation != "full" else None,
            config["rollout"] if config["rollout"] != "none" else None,
        ]
    parts += [f"seed{config['seed']}", name.rpartition("-")[2][:4]]
    return " ".join(str(part) for part in parts if part)


@dataclass(frozen=True)
class WandbMetadata:
    """Description of a run for W&B and TensorBoard: all settings, and one-level axes to filter by."""

    id: str
    name: str
    group: str | None
    job_type: str
    tags: list[str]
    config: dict
    settings: dict = field(default_factory=dict)
