"""Check of a store against its teacher."""

from __future__ import annotations

from pathlib import Path

from kd.config.schema import ExperimentConfig
from kd.errors import UserError
from kd.experiment.dependencies import Plan
from kd.experiment.prerequisites import Train, prepare, teacher_model
from kd.experiment.stores import compare
from kd.store.reader import Store


def compare_with_teacher(store: Store, root: str, train: Train) -> str:
    """Recompute some rows of a store with its teacher, if the teacher is available. Return the result as text."""
    if "steps" in store.manifest:
        return "It was recorded from a teacher in training, so no row can be computed again."
    try:
        config = ExperimentConfig.from_dict(store.manifest["settings"] | {"root": root})
    except (KeyError, TypeError) as error:
        why, hint = f"has settings that are not those of a run ({error!r})", "do not use this store"
        raise UserError(option=store.path, why=why, hint=hint) from None
    config = config.derive(logits={"path": store.path})  # the store may have been moved
    teacher, name = Plan.from_config(config).teacher, config.teacher.name
    if (teacher and not Plan.from_config(teacher).run.result()) or (name and not teacher and not Path(name).is_dir()):
        return f"Its teacher {store.spec['teacher']} is not in {root}, so no row was computed again."
    packed, components = prepare(config)
    model = teacher_model(config, packed, components, train)
    return compare(store, packed, components.truncate, model, config.trainer.accelerator)
