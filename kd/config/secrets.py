"""Detection of secrets. A config must have none, since it is written to files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from kd.errors import UserError

SECRET = re.compile(r"key|token$|secret|passw|credential|jwt", re.IGNORECASE)
# A URL with a password or a signature, and the first characters of the keys of well-known services.
SECRETS = re.compile(
    r"://[^/\s@]*:[^/\s@]+@|https?://[^/\s@]+@|[?&][\w.-]*(?i:token|key|secret|passw|credential|sig)[\w.-]*=|"
    r"\bhf_[A-Za-z0-9]{30}|\bgh[po]_\w{30}|\bgithub_pat_\w{30}|\bglpat-[\w-]{20}|\bsk-[\w-]{40}|\bA[KS]IA[0-9A-Z]{16}"
)


def check_secrets(words: Iterable[str]) -> None:
    """Raise UserError for a secret, known by its name, its form, or the environment. The error does not show it."""
    secrets = [v for k, v in os.environ.items() if SECRET.search(k) and len(v) >= 8 and not os.path.exists(v)]
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        name = SECRET.search(key.rpartition(".")[2]) and value not in ("", "null")
        if name or SECRETS.search(word) or any(secret in word for secret in secrets):
            hidden = not value or SECRETS.search(key) or any(s in key for s in secrets)
            raise UserError(
                option="the command line" if hidden else key,
                why="there seems to be a secret in it, and settings are kept in files",
                hint="give the secret in the environment to the library that needs it, e.g. as WANDB_API_KEY, HF_TOKEN "
                "or AWS_SECRET_ACCESS_KEY",
            )


def redacted(config: dict) -> dict:
    """Return a config without the values of settings that look like secrets."""
    return {
        k: redacted(v) if isinstance(v, dict) else "***" if v and isinstance(v, str) and SECRET.search(str(k)) else v
        for k, v in config.items()
    }
