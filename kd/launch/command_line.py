"""Entry of train.py: registrations for Hydra before it composes, and the commands of ranks and sweeps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial

from kd.config import compose, overrides, search_path, security
from kd.config.secrets import check_secrets
from kd.errors import UserError
from kd.launch import hydra_plugins, warm
from kd.runs import wandb_agent
from kd.system import files
from kd.system.console import exit_with_error
from kd.system.forking import exit_after
from kd.system.signals import Preempted, end_with_parent


@cache
def register() -> None:
    """Make sizes, sweeps, sweepers and launchers known to Hydra. A sweep file that is no YAML ends the program."""
    try:
        compose.register()
    except UserError as error:
        exit_with_error(error)
    hydra_plugins.register()


def enter(main: Callable[[], None]) -> None:
    """Run main() on the checked words of the command line.

    If kd.launch.rank_launcher started this process, work as a rank instead.
    """
    if sys.argv[1:2] == ["--rank"]:
        from kd.launch import ranks

        return ranks.work(sys.argv[2])
    if sys.argv[1:2] == [warm.WORD]:  # a process that goes on here as each of a sweep's runs
        sys.argv[1:] = warm.serve(sys.argv[2])
        exit_after(partial(_enter, main))
    _enter(main)


def _enter(main: Callable[[], None]) -> None:
    """Run main() on the checked words of the command line."""
    end_with_parent()
    try:
        words = files.expanded_words(sys.argv[1:])
        check_secrets(words)
        sys.argv[1:] = search_path.take(words)
        compose.register_folders()
        sys.argv[1:] = overrides.deferred(security.check_command_line(sys.argv[1:]))
    except UserError as error:
        exit_with_error(error)
    try:
        main()
    except Preempted:
        wandb_agent.end()
        raise
