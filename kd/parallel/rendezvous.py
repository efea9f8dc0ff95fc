"""Meeting of the ranks of a run: the store that they share before and beside their process group.

torchrun, srun or kd/launch/rank_launcher.py start them. Until training begins only rank 0 works, for hours perhaps: it
makes a teacher, say. The others wait at the store, which has no timeout for that, unlike a process group.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from kd.errors import is_mistake
from kd.parallel.collectives import cpu_group
from kd.parallel.place import Place
from kd.system import launchers
from kd.system.console import console
from kd.system.signals import requests

PAUSE = 0.1  # seconds between looks at the store
CONNECT = timedelta(minutes=30)  # time in which all ranks have to start
PARTING = 60  # seconds for which rank 0 keeps the store up for the others, once the work is done


class Rendezvous:
    """Store that all ranks of a run share. It tells apart the ranks of today and those that an agent started before."""

    def __init__(self, place: Place, store: dist.Store | None = None):
        self.place, self.exchanges = place, 0
        if "TORCHELASTIC_RUN_ID" in launchers.given:
            threading.Thread(target=_end_with, args=(launchers.parent,), daemon=True).start()
        self.base = store or dist.TCPStore(
            place.address, place.port, place.world_size, place.serves, CONNECT, wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
        if self.base.check(["mistake"]):  # of the ranks before these, and it would be made again
            sys.exit(2)
        self.store = self.base
        self.store = dist.PrefixStore(self._session(), self.base)

    def _session(self) -> str:
        """Return the name of this start of the ranks, which rank 0 gives to each that shows itself."""
        store, rank = self.base, self.place.rank
        if rank:
            visitor = uuid.uuid4().hex
            store.set(f"visitor/{rank}", visitor)
            session = self.receive(f"session/{visitor}")
            store.set(f"{session}/is here/{rank}", "")
            return session
        session, missing = uuid.uuid4().hex, set(range(1, self.place.world_size))
        while missing:
            for other in missing:
                if store.check([f"visitor/{other}"]):
                    store.set(f"session/{store.get(f'visitor/{other}').decode()}", json.dumps(session))
            time.sleep(PAUSE)
            missing = {other for other in missing if not store.check([f"{session}/is here/{other}"])}
        return session

    def publish(self, key: str, value) -> None:
        self.store.set(key, json.dumps(value))

    def receive(self, key: str):
        """Return the value that another rank publishes, however long that takes; exit if a rank fails meanwhile."""
        pause = PAUSE
        while not self.store.check([key]):
            if self.store.check(["error"]):
                sys.exit(json.loads(self.store.get("error"))[1])
            time.sleep(pause)
            pause = min(1, 1.1 * pause)
        return json.loads(self.store.get(key))

    def all_gather(self, value) -> list:
        """Return the values of all ranks, in the order of the ranks."""
        self.exchanges += 1
        self.publish(f"{self.exchanges}/{self.place.rank}", value)
        return [self.receive(f"{self.exchanges}/{rank}") for rank in range(self.place.world_size)]

    def is_first(self, key: str, value=None) -> bool:
        """Publish a value unless a rank has published one; return True if this one was stored.

        A store that does not answer is that of a rank or an agent that has ended first.
        """
        entry = json.dumps([self.place.rank, value])
        with suppress(RuntimeError):
            return self.store.compare_set(key, "", entry).decode() == entry
        return False

    @contextmanager
    def one_error(self) -> Iterator[None]:
        """Let the error of one rank pass, the first, and end the others without a word.

        An agent shows errors other than mistakes, since it also knows which rank was killed.
        """
        try:
            yield
        except Exception as error:
            code = 2 if is_mistake(error) else 1
            requests.ignore()  # of an agent, which has seen the end of another rank
            if not self.is_first("error", code):
                sys.exit(code)
            console.quiet = False
            if code == 2:
                self.base.set("mistake", "")
            elif "TORCHELASTIC_ERROR_FILE" in launchers.given:
                from torch.distributed.elastic.multiprocessing.errors import get_error_handler

                os.environ.update(launchers.given)
                get_error_handler().record_exception(error)
                sys.exit(code)
            raise

    def join(self, accelerator: str) -> None:
        """Start the process group of the ranks."""
        os.environ.update(launchers.given)  # Lightning's environments read them
        gc.collect()  # a teacher was made here perhaps
        backend = "gloo"
        if cpu_group(accelerator) == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_device(self.place.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        store, place = dist.PrefixStore("group", self.store), self.place
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size)

    def part(self) -> None:
        """End the work together: the others wait until rank 0 has written the result."""
        if self.place.rank:
            self.receive("end")
            self.publish(f"end/{self.place.rank}", True)
            return
        self.publish("end", True)
        left, deadline = [f"end/{rank}" for rank in range(1, self.place.world_size)], time.monotonic() + PARTING
        while not self.store.check(left) and time.monotonic() < deadline:
            time.sleep(PAUSE)


def _end_with(agent: int) -> None:
    """End this process when the agent that started it is gone, by SIGKILL even."""
    while os.getppid() == agent:
        time.sleep(PAUSE)
    os._exit(1)
