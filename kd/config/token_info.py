"""Rules for per-token information: a loss gets the fields that it needs, and no field is computed in vain.

Losses declare their needs, rollouts and token selections what they provide, by decorators (kd/objective/token_info.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kd.config import declarations
from kd.config.declarations import Declaration
from kd.errors import UserError

if TYPE_CHECKING:
    from kd.config.schema import ExperimentConfig

PROVIDERS = ("rollout", "routing")  # config groups


def needs(loss: str) -> tuple[str, ...]:
    """Return the fields of TokenInfo that a loss needs."""
    return declarations.of_group("loss", "needs").get(loss, Declaration()).names


def providers() -> dict[str, tuple[str, ...]]:
    """Return the fields that each rollout and routing provides: `rollout=mixed` -> fields."""
    declared = {group: declarations.of_group(group, "provides") for group in PROVIDERS}
    return {f"{group}={name}": d.names for group, functions in declared.items() for name, d in functions.items()}


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
    losses = declarations.of_group("loss", "needs")
    return [loss for loss, declaration in losses.items() if set(fields) & set(declaration.names)]


def _list(words: Sequence[str], last: str) -> str:
    """Join words: a, b and c."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
