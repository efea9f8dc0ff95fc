"""What a command line may not hold: secrets, and words that have Hydra itself call something or read a foreign config.

Hydra acts on its own settings (callbacks, logging, plugins) before train.py is asked, so its words are checked before
Hydra sees them: only those that kd has a use for get through.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from hydra._internal.utils import get_args_parser

from kd.config import overrides
from kd.config.components import GROUPS
from kd.errors import UserError

HYDRA = re.compile(r"hydra/(launcher|sweeper)|hydra\.(mode|verbose|(launcher|sweeper)(\.[A-Za-z]\w*)+)")
ELSEWHERE = ("config_dir", "config_path", "config_name", "experimental_rerun")  # Hydra's switches that read other files
# A URL with a password or a signature, and what well-known services begin their keys with.
SECRETS = re.compile(
    r"://[^/\s@]*:[^/\s@]+@|https?://[^/\s@]+@|[?&][\w.-]*(?i:token|key|secret|passw|credential|sig)[\w.-]*=|"
    r"\bhf_[A-Za-z0-9]{30}|\bgh[po]_\w{30}|\bgithub_pat_\w{30}|\bglpat-[\w-]{20}|\bsk-[\w-]{40}|\bA[KS]IA[0-9A-Z]{16}"
)


def check_command_line(words: list[str]) -> None:
    """check_words() of a whole command line, with Hydra's switches; raises UserError."""
    check_secrets(words)
    given = get_args_parser().parse_args(words)
    for switch in ELSEWHERE:
        if getattr(given, switch) is not None:
            raise UserError(f"--{switch.replace('_', '-')}={getattr(given, switch)}: kd reads no config but its own.")
    check_words(given.overrides)
    several = ("sweeps=", "hydra.mode=")
    if not given.multirun and not any(word.startswith(several) for word in given.overrides):
        overrides.check_single(given.overrides)


def check_words(words: Iterable[str]) -> None:
    """Raise UserError for an override that holds a secret, that has Hydra call or read what is not kd's, or that
    names no option of its group."""
    words = list(words)
    check_secrets(words)
    for word in words:
        override = overrides.parsed(word)
        if override is None:
            continue  # it gets no further, and Hydra says best what is wrong with it
        key, value = override.key_or_group, word.partition("=")[2]
        if override.package is not None or (key.startswith("hydra") and not HYDRA.fullmatch(key)):
            raise UserError(f"{word}: not something a config may set.")
        if re.search(r"\$\{.*:", value):  # the environment's, which would then be in files
            raise UserError(f"{word}: a value may refer to other settings, not to anything outside of them.")
        if key.startswith("hydra") and "{" in value:
            raise UserError(f"{word}: not something a config may call.")
        if (key in GROUPS or "/" in key) and re.search(r"[/\\{]|\.\.", value):
            raise UserError(f"{word}: need the name of an option, and no path; type --help to see them.")
    overrides.check_groups(words)


def check_secrets(words: Iterable[str]) -> None:
    """Raise UserError, without showing it, for a secret: known by its name, its looks, or from the environment."""
    known = [v for k, v in os.environ.items() if SECRET.search(k) and len(v) >= 8 and not os.path.exists(v)]
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        name = SECRET.search(key.rpartition(".")[2]) and value not in ("", "null")
        if name or SECRETS.search(word) or any(secret in word for secret in known):
            hidden = not value or SECRETS.search(key) or any(s in key for s in known)
            raise UserError(
                f"{'the command line' if hidden else key}: there seems to be a secret in it, and settings are kept in "
                "files. Give it to the library that needs it in the environment, e.g. as WANDB_API_KEY, HF_TOKEN or "
                "AWS_SECRET_ACCESS_KEY."
            )


SECRET = re.compile(r"key|token$|secret|passw|credential|jwt", re.IGNORECASE)


def redacted(config: dict) -> dict:
    """config without the values of settings that look like secrets."""
    return {
        k: redacted(v) if isinstance(v, dict) else "***" if v and isinstance(v, str) and SECRET.search(str(k)) else v
        for k, v in config.items()
    }
