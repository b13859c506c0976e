"""A server of Weights & Biases in this process: as much of it as the `wandb` package uses, and its failures."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any


class FakeWandbServer:
    """Remembers what it was sent.

    Attributes:
      url: of the server. As a proxy it refuses everything, and remembers what was asked of other servers.
      failure: while set, every request is answered with this status; 0 answers nothing.
      entries: variables of the requests that make or change an entry.
      history: records of steps, in their order.
      foreign: what was asked of other servers.
    """

    def __init__(self) -> None:
        self.failure: int | None = None
        self.entries: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.foreign: list[str] = []
        self.received = threading.Event()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send a process here and nowhere else."""
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), self.url)
        return proxies | {
            "WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0123456789" * 4, "WANDB_ERROR_REPORTING": "false",
            "WANDB_MODE": "online", "NO_PROXY": "", "no_proxy": "",
        }  # fmt: skip

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            files = json.loads(body).get("files", {})
            lines = files.get("wandb-history.jsonl", {}).get("content", [])
            self.history += [json.loads(line) for line in lines]
            if lines:
                self.received.set()
            return {}
        if path != "/graphql":
            return {}
        request = json.loads(body)
        return {"data": self._query(request["query"], request.get("variables") or {})}

    def _query(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)
        assert name is not None
        if name[1] == "Viewer":
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if name[1] == "UpsertBucket":
            self.entries.append(variables)
            project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "me"}}
            kept = {key: variables.get(key) for key in ("name", "displayName", "config")}
            bucket = kept | {"id": "b", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name[1] == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}


class _Handler(http.server.BaseHTTPRequestHandler):
    fake: FakeWandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.startswith("http") and not self.path.startswith(self.fake.url):
            self.fake.foreign.append(self.path)
            self._reply(502, {})
        elif self.fake.failure == 0:
            time.sleep(120)  # longer than anybody waits
        elif self.fake.failure is not None:
            self._reply(self.fake.failure, {"errors": [{"message": "not now"}]})
        else:
            self._reply(200, self.fake.answer(self.path.removeprefix(self.fake.url), body))

    do_GET = do_PUT = do_POST

    def do_CONNECT(self) -> None:
        self.fake.foreign.append(self.path)
        self._reply(502, {})

    def _reply(self, status: int, document: dict[str, Any]) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client may leave in the middle
            super().handle()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def served() -> Iterator[FakeWandbServer]:
    """A server, and the end of it."""
    server = FakeWandbServer()
    try:
        yield server
    finally:
        server.close()
