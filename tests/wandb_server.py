"""A server of W&B's protocol, as much of it as views and reports need, on this machine: it keeps what it is told."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VIEWER = {"id": "1", "entity": "me", "username": "me", "email": "me@x", "flags": "{}", "teams": {"edges": []}}
PROJECT = {"id": "1", "name": "mine", "entityName": "me", "createdAt": "2026-01-01", "isBenchmark": False, "user": None}
PROJECTS = {"edges": [{"node": PROJECT, "cursor": "a"}], "pageInfo": {"endCursor": "a", "hasNextPage": False}}


def answer(query: str, variables: dict) -> dict:
    """Return W&B's answer to a query, for the queries of these tests."""
    if "upsertView" in query:
        view = variables | {"id": "VIEW", "project": PROJECT, "updatedAt": "2026-01-01T00:00:00"}
        return {"upsertView": {"view": view, "inserted": True}}
    if "internalId" in query:
        return {"project": {"id": "1", "internalId": "UHJvamVjdA=="}}
    return {"viewer": VIEWER, "models": PROJECTS}


@contextmanager
def serving() -> Iterator[tuple[dict[str, str], list[dict]]]:
    """The environment of those who are to talk to it, and the views and reports that it was given."""
    given: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            request = json.loads(body) if self.path == "/graphql" else {"query": ""}
            if "upsertView" in request["query"]:
                given.append(request["variables"])
            reply = json.dumps({"data": answer(request["query"], request.get("variables") or {})}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}, given
    finally:
        server.shutdown()
        server.server_close()
