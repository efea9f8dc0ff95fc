"""Check of a store against its teacher."""

from __future__ import annotations

from pathlib import Path

from kd.config import components as conf
from kd.errors import UserError
from kd.experiment.dependencies import plan
from kd.experiment.prerequisites import Train, prepare, teacher_model
from kd.experiment.stores import compare
from kd.store.reader import Store


def compare_with_teacher(store: Store, root: str, train: Train) -> str:
    """Recompute some rows of a store with its teacher, if that is at hand; needs an initialised Hydra."""
    if "steps" in store.manifest:
        return "It was recorded from a teacher in training, so no row can be computed again."
    settings = conf.renamed(store.manifest["settings"]) | {"root": root}
    settings["logits"] = settings["logits"] | {"path": store.path}  # it may have been moved
    try:
        conf.check_targets(settings)
        conf.check_plain(settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{store.path}: its settings are not those of a run ({error!r}).") from None
    teacher, name = plan(settings).teacher, settings["teacher"]["name"]
    if (teacher and not plan(teacher).run.result()) or (name and not teacher and not Path(name).is_dir()):
        return f"Its teacher {store.of['teacher']} is not in {root}, so no row was computed again."
    packed, components = prepare(settings)
    return compare(
        store, packed, components.keep, teacher_model(settings, components, train), settings["trainer"]["accelerator"]
    )
