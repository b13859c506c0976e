"""A Google Cloud Storage in this process: as much of its JSON API as gcsfs, google-cloud-storage and TensorStore use.

Objects are atomic, as there: one appears when its upload is complete. There are no folders, only names.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import socketserver
import sys
import threading
from collections.abc import Iterator
from email.message import Message
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"


class FakeGcs:
    """The objects of one bucket, and the server that hands them out.

    Attributes:
      objects: content by name.
      url: of the server, for ``environment``.
      prefix: of the names of a run.
      down: while it is, every request is answered with 503.
      broken: while set, every upload to a name that it matches is refused with 403, which nobody tries again.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.broken: str | None = None
        self.down = False
        self.prefix = "runs/0/"
        self._uploads: dict[str, tuple[str, bytes]] = {}
        self._lock = threading.RLock()
        self._count = 0
        handler = type("Handler", (_Handler,), {"gcs": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send the three libraries here, and nowhere else."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # TensorStore looks for no other credentials
            "GOOGLE_CLOUD_PROJECT": "project",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of bucket by gRPC
            "EPATH_USE_TF": "false",
            "NO_GCE_CHECK": "true",  # nobody asks the network for credentials
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def names(self, prefix: str = "") -> list[str]:
        """Returns the sorted names below ``prefix``, without it."""
        with self._lock:
            return sorted(name.removeprefix(prefix) for name in self.objects if name.startswith(prefix))

    def clear(self) -> None:
        """Begins another bucket, with another place for a run: TensorStore does not expect objects that are gone."""
        self.objects.clear()
        self.broken, self.down = None, False
        self._count += 1
        self.prefix = f"runs/{self._count}/"

    @property
    def run(self) -> str:
        """The place of a run."""
        return f"gs://{BUCKET}/{self.prefix.rstrip('/')}"

    def steps(self) -> list[int]:
        """Returns the steps of the run that Orbax has marked as complete."""
        done = [re.fullmatch(r"checkpoints/(\d+)/commit_success.txt", name) for name in self.names(self.prefix)]
        return sorted(int(found[1]) for found in done if found)

    def put(self, name: str, content: bytes) -> dict[str, Any]:
        with self._lock:
            self._count += 1
            self.objects[name], self.generations[name] = content, self._count
            return self.describe(name)

    def describe(self, name: str) -> dict[str, Any]:
        return {
            "kind": "storage#object", "bucket": BUCKET, "name": name, "size": str(len(self.objects[name])),
            "generation": str(self.generations[name]), "metageneration": "1", "contentType": "text/plain",
            "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip

    # Each of these returns a status and a JSON document, bytes, or nothing.

    def answer(self, method: str, path: str, query: dict[str, str], headers: Message, body: bytes) -> tuple[int, Any]:
        if self.down:
            return 503, {"error": {"code": 503, "message": "try again later"}}
        with self._lock:
            if path == f"/storage/v1/b/{BUCKET}":
                return 200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET}
            if path == f"/storage/v1/b/{BUCKET}/o":
                return self._list(query)
            if path == f"/upload/storage/v1/b/{BUCKET}/o":
                return self._upload(query, headers, body)
            if copied := re.fullmatch(rf"/storage/v1/b/{BUCKET}/o/(.+)/(?:rewriteTo|copyTo)/b/{BUCKET}/o/(.+)", path):
                return self._copy(unquote(copied[1]), unquote(copied[2]))
            if found := re.fullmatch(rf"(?:/download)?/storage/v1/b/{BUCKET}/o/(.+)", path):
                return self._object(method, unquote(found[1]), query, headers)
            if path == "/batch/storage/v1":
                return self._batch(body)
        return 404, {"error": {"code": 404, "message": f"nothing at {method} {path}"}}

    def _list(self, query: dict[str, str]) -> tuple[int, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, most = query.get("pageToken", ""), int(query.get("maxResults", 5))  # small: there are always more pages
        items, prefixes, last = [], [], ""
        for name in self.names():
            if not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            entry = prefix + rest[: rest.index(delimiter) + 1] if delimiter and delimiter in rest else name
            if entry <= start or entry in prefixes:
                continue
            if len(items) + len(prefixes) == most:
                return 200, {"items": items, "prefixes": prefixes, "nextPageToken": last}
            last = entry
            if entry == name:
                items.append(self.describe(name))
            else:
                prefixes.append(entry)
        return 200, {"items": items, "prefixes": prefixes}

    def _upload(self, query: dict[str, str], headers: Message, body: bytes) -> tuple[int, Any]:
        kind, content = query["uploadType"], body
        if kind == "resumable" and "upload_id" not in query:
            self._count += 1
            self._uploads[str(self._count)] = query["name"], b""
            place = f"{self.url}/upload/storage/v1/b/{BUCKET}/o"
            return 200, {"location": f"{place}?uploadType=resumable&upload_id={self._count}"}
        if kind == "resumable":
            name, before = self._uploads[query["upload_id"]]
            content = before + body
            self._uploads[query["upload_id"]] = name, content
            if headers["Content-Range"].endswith("/*"):
                return 308, {"range": f"bytes=0-{len(content) - 1}"}
        elif kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", headers["Content-Type"])
            assert boundary is not None
            _, first, second, _ = re.split(rb"(?:\r?\n)?--" + re.escape(boundary[1].encode()), body)
            name = json.loads(_payload(first))["name"]
            content = _payload(second)
        else:
            name = query["name"]
        if self.broken is not None and re.search(self.broken, name):
            return 403, {"error": {"code": 403, "message": "uploads are broken"}}
        if not self._matches(name, query):
            return 412, {"error": {"code": 412, "message": "the condition is not met"}}
        return 200, self.put(name, content)

    def _matches(self, name: str, query: dict[str, str]) -> bool:
        wanted = query.get("ifGenerationMatch")
        return wanted is None or int(wanted) == self.generations.get(name, 0)

    def _object(self, method: str, name: str, query: dict[str, str], headers: Message) -> tuple[int, Any]:
        if name not in self.objects:
            return 404, {"error": {"code": 404, "message": f"No such object: {BUCKET}/{name}"}}
        if not self._matches(name, query):
            return 412, {"error": {"code": 412, "message": "the condition is not met"}}
        if query.get("ifGenerationNotMatch") == str(self.generations[name]):
            return 304, None
        if method == "DELETE":
            del self.objects[name], self.generations[name]
            return 204, None
        if query.get("alt") != "media":
            return 200, self.describe(name)
        content = self.objects[name]
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", "")):
            first = int(asked[1]) if asked[1] else max(0, len(content) - int(asked[2]))
            last = min(int(asked[2]) if asked[1] and asked[2] else len(content) - 1, len(content) - 1)
            if first >= len(content):
                return 416, None
            return 206, (content[first : last + 1], f"bytes {first}-{last}/{len(content)}", self.generations[name])
        return 200, (content, None, self.generations[name])

    def _copy(self, source: str, target: str) -> tuple[int, Any]:
        if source not in self.objects:
            return 404, {"error": {"code": 404, "message": f"No such object: {BUCKET}/{source}"}}
        copy = self.put(target, self.objects[source])
        return 200, {"kind": "storage#rewriteResponse", "done": True, "resource": copy}

    def _batch(self, body: bytes) -> tuple[int, Any]:
        """Deletes what gcsfs wants deleted in one request."""
        parts = []
        for number, path in enumerate(re.findall(rb"DELETE (\S+) HTTP/1.1", body), 1):
            split = urlsplit(path.decode())
            status, _ = self.answer("DELETE", split.path, _query(split.query), Message(), b"")
            parts.append(
                f"--part\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status} Done\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        return 207, "".join(parts) + "--part--\r\n"


def _payload(part: bytes) -> bytes:
    """Returns what comes after the empty line below the headers."""
    return re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]


def _query(text: str) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(text, keep_blank_values=True).items()}


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may leave in the middle; anything else is a fault of this file."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    request_queue_size = 128


class _Handler(http.server.BaseHTTPRequestHandler):
    gcs: FakeGcs
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        body = self._body()
        status, answer = self.gcs.answer(self.command, split.path, _query(split.query), self.headers, body)
        headers = {"Content-Type": "application/json"}
        content = b""
        if isinstance(answer, tuple):
            content, content_range, generation = answer
            headers = {"Content-Type": "application/octet-stream", "x-goog-generation": str(generation)}
            if content_range is not None:
                headers["Content-Range"] = content_range
        elif isinstance(answer, str):
            headers, content, status = {"Content-Type": "multipart/mixed; boundary=part"}, answer.encode(), 200
        elif answer is not None and "location" in answer:
            headers["Location"] = answer["location"]
        elif answer is not None and "range" in answer:
            headers["Range"] = answer["range"]
        elif answer is not None:
            content = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def served() -> Iterator[FakeGcs]:
    """An empty bucket, to which the libraries of this process and of its children turn."""
    gcs = FakeGcs()
    before = {name: os.environ.get(name) for name in gcs.environment}
    os.environ.update(gcs.environment)
    try:
        yield gcs
    finally:
        gcs.close()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
