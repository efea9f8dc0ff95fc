"""Reaching the Hugging Face Hub."""

from __future__ import annotations

import os
import socket
import sys
import urllib.parse
import urllib.request
from functools import cache


@cache
def offline_unless_reachable() -> None:
    """Put the Hugging Face libraries offline if there is no network, since their retries would take a minute.

    Files that they downloaded before still load.
    """
    if urllib.request.getproxies():
        return
    url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((url.hostname, url.port or {"http": 80}.get(url.scheme, 443)), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        for module, name in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE")):
            if module in sys.modules:
                setattr(sys.modules[module], name, True)
