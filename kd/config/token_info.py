"""Rules for per-token information: a loss gets the fields that it needs, and no field is computed in vain.

Losses declare their needs, rollouts and token selections what they provide, by decorators (kd/objective/token_info.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from kd.config import plugins
from kd.config.components import MODULES, declared, takes_group
from kd.errors import UserError

if TYPE_CHECKING:
    from kd.config.schema import ExperimentConfig

PROVIDERS = ("rollout", "routing")  # config groups


def needs(loss: str) -> tuple[str, ...]:
    """Return the fields of TokenInfo that a loss needs."""
    return _declared("loss", "needs", tuple(plugins.allowed())).get(loss, ())


@cache
def _declared(group: str, decorator: str, packages: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return the arguments of a decorator on a group's functions, of kd and of the allowed packages."""
    others = {
        target.rpartition(".")[2]: names
        for target, function, (names, _) in plugins.decorated(decorator)
        if takes_group(function, group)
    }
    return declared(MODULES[group], decorator) | others


def providers() -> dict[str, tuple[str, ...]]:
    """Return the fields that each rollout and routing provides: `rollout=mixed` -> fields."""
    declarations = {group: _declared(group, "provides", tuple(plugins.allowed())) for group in PROVIDERS}
    return {f"{group}={name}": names for group, functions in declarations.items() for name, names in functions.items()}


def unique_fields(provider: str) -> list[str]:
    """Return the fields that only this provider provides."""
    elsewhere = {name for other, names in providers().items() if other != provider for name in names}
    return [name for name in providers()[provider] if name not in elsewhere]


def is_useful(provider: str, loss: str) -> bool:
    """Return False if only this provider computes some fields and the loss needs none of them."""
    return not unique_fields(provider) or loss in losses_for(provider)


def check_token_info(config: ExperimentConfig) -> None:
    """Refuse a loss without the information that it needs, and a provider of information for another loss."""
    loss = config.loss.name
    chosen = [f"{group}={getattr(config, group).name}" for group in PROVIDERS]
    for provider in filter(providers().get, chosen):
        if not is_useful(provider, loss):
            group, _, name = provider.partition("=")
            others, fields = [f"loss={other}" for other in losses_for(provider)], _list(unique_fields(provider), "and")
            raise UserError(
                option=group,
                got=name,
                conflict=f"loss={loss}",
                why=f"computes {fields}, which only {_list(others, 'or')} needs",
                hint=f"type {_list(others, 'or')}, or {group}=none",
            )
    if not config.logits.source.distils:
        return
    given = {name for option in chosen for name in providers().get(option, ())}
    if missing := [name for name in needs(loss) if name not in given]:
        sources = " and ".join(dict.fromkeys(_list(providers_of(name, loss), "or") for name in missing))
        raise UserError(
            option="loss",
            got=loss,
            why=f"needs {_list(missing, 'and')} of each token, which only {sources} computes",
            hint=f"type {sources} too, or choose another loss",
        )


def providers_of(name: str, loss: str) -> list[str]:
    """Return the providers of a field that this loss accepts."""
    return [provider for provider, names in providers().items() if name in names and is_useful(provider, loss)]


def losses_for(provider: str) -> list[str]:
    """Return the losses that need a field which only this provider computes."""
    fields = unique_fields(provider)
    losses = _declared("loss", "needs", tuple(plugins.allowed()))
    return [loss for loss, names in losses.items() if set(fields) & set(names)]


def _list(words: Sequence[str], last: str) -> str:
    """Join words: a, b and c."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
