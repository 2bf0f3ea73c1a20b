"""A service that knows `/wal` and `/image` alone, by the rules of the contract, in a thread.

Its checksums are computed by an implementation of their own. With `checking`, every accepted commit
is written out and looked at by SQLite.
"""

import json
import re
import sqlite3
import struct
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import numpy as np

_PATH = re.compile(r"/tenants/([^/]+)/databases/([^/]+)(/\w+)?")
Checked = Callable[[sqlite3.Connection], None]


class Refusal(Exception):
    def __init__(self, status: int, code: str, **extras: Any) -> None:
        self.status, self.code = status, code
        wait = extras.pop("retry_after", None)
        self.headers = {} if wait is None else {"Retry-After": str(wait)}
        self.extras = extras


class Sums:
    """SQLite's checksum of runs of a fixed number of bytes: 32-bit words, an affine map."""

    def __init__(self, count: int) -> None:
        pairs = count // 8
        self.rows = np.zeros((2, pairs * 2), dtype=np.uint32)
        a, b, c, d = 1, 0, 0, 1  # M^0, M = [[1, 1], [1, 2]]
        for pair in reversed(range(pairs)):
            # the input of a pair is (x0, x0 + x1)
            self.rows[0, 2 * pair], self.rows[0, 2 * pair + 1] = (a + b) & 0xFFFFFFFF, b
            self.rows[1, 2 * pair], self.rows[1, 2 * pair + 1] = (c + d) & 0xFFFFFFFF, d
            a, b, c, d = (
                (a + b) & 0xFFFFFFFF,
                (a + 2 * b) & 0xFFFFFFFF,
                (c + d) & 0xFFFFFFFF,
                (c + 2 * d) & 0xFFFFFFFF,
            )
        self.power = (a, b, c, d)

    def __call__(self, data: bytes, before: tuple[int, int], order: str) -> tuple[int, int]:
        words = np.frombuffer(data, dtype=f"{order}u4").astype(np.uint32)
        with np.errstate(over="ignore"):
            own = (self.rows * words).sum(axis=1, dtype=np.uint32)
        a, b, c, d = self.power
        return (
            (a * before[0] + b * before[1] + int(own[0])) & 0xFFFFFFFF,
            (c * before[0] + d * before[1] + int(own[1])) & 0xFFFFFFFF,
        )


@dataclass
class StubDatabase:
    page_size: int
    pages: dict[int, bytes] = field(default_factory=dict)
    page_count: int = 0
    last_lsn: int = 0
    salts: tuple[int, int] | None = None
    offset: int = 0
    sums: tuple[int, int] | None = None
    order: str = ">"
    images: int = 0
    logs: int = 0
    commits: int = 0

    def image(self) -> bytes:
        empty = bytes(self.page_size)
        return b"".join(self.pages.get(no, empty) for no in range(1, self.page_count + 1))

    def position(self) -> dict[str, int | None]:
        salt1, salt2 = self.salts or (None, None)
        sum1, sum2 = self.sums or (None, None)
        return {
            "last_lsn": self.last_lsn,
            "offset": self.offset if self.salts else None,
            "salt1": salt1,
            "salt2": salt2,
            "checksum1": sum1,
            "checksum2": sum2,
        }


class StubLibsql:
    """Start and stop it as often as wanted: its databases stay."""

    def __init__(self, port: int, *, checked: Checked | None = None) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.databases: dict[str, StubDatabase] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.failures: list[str] = []
        self.image_cut: int | None = None
        """The next image that is read breaks off there, or, with `is_stalling`, stands still until
        `stop`.
        """
        self.is_stalling = False
        self.stalled = threading.Event()
        self._stopped = threading.Event()
        self.drop_answers = 0
        """So many pushes take effect and are not answered."""
        self.refuses: Callable[[str, str, int], Refusal | None] = lambda *_: None
        """Takes method, path and the body's length, before anything is done."""
        self._port = port
        self._checked = checked
        self._lock = threading.RLock()
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self._sums: dict[int, Sums] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        stub = self
        self._stopped.clear()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"  # a connection for each request: stopping is at once

            def log_message(self, *args: object) -> None: ...

            def do_GET(self) -> None:
                stub._handle(self)

            do_PUT = do_POST = do_HEAD = do_GET  # noqa: N815 - the base class's names

        class Server(ThreadingHTTPServer):
            daemon_threads = False
            allow_reuse_address = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None: ...

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        """Waits for the requests under way: not to be called by the loop that sends them."""
        self._stopped.set()
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
        self._server = self._thread = None

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        if len(body) < length:
            return
        try:
            status, answer, headers = self._answer_or_refuse(request, url.path, query, body)
        except Refusal as refusal:
            status, headers = refusal.status, {"Content-Type": "application/problem+json"}
            headers |= refusal.headers
            answer = json.dumps(
                {"code": refusal.code, "status": status, "title": refusal.code, **refusal.extras}
            ).encode()
        except Exception as error:  # noqa: BLE001 - the test is told
            self.failures.append(repr(error))
            status, answer, headers = 500, b"", {}
        self.requests.append((request.command, request.path, status))
        if self.drop_answers and request.command == "POST" and status == 200:
            self.drop_answers -= 1
            return
        request.send_response(status)
        for name, value in {"Content-Length": str(len(answer)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        is_cut = False
        if self.image_cut is not None and url.path.endswith("/image") and request.command == "GET":
            answer, self.image_cut, is_cut = answer[: self.image_cut], None, True
        if request.command != "HEAD":
            request.wfile.write(answer)
        if is_cut and self.is_stalling:
            request.wfile.flush()
            self.stalled.set()
            self._stopped.wait()

    def _answer_or_refuse(
        self, request: BaseHTTPRequestHandler, path: str, query: dict[str, str], body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        if refusal := self.refuses(request.command, path, len(body)):
            raise refusal
        with self._lock:
            return self._answer(request, path, query, body)

    def _answer(
        self, request: BaseHTTPRequestHandler, path: str, query: dict[str, str], body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        if path == "/checkpoints" or path.startswith("/jobs/"):
            return 200, json.dumps(_job(body)).encode(), {}
        match = _PATH.fullmatch(path)
        if match is None:
            raise Refusal(404, "not_found")
        name = f"{match[1]}/{match[2]}"
        if request.command == "PUT" and match[3] is None:
            return self._create(name, json.loads(body))
        database = self.databases.get(name)
        if database is None:
            raise Refusal(404, "database_not_found")
        what = (request.command, match[3])
        if what == ("GET", None):
            return 200, json.dumps(_described(name, database)).encode(), {}
        if what == ("POST", "/wal"):
            after = query.get("after_lsn")
            answer = self._wal(
                database, int(query["offset"]), None if after is None else int(after), body
            )
            return 200, json.dumps(answer).encode(), {}
        if what == ("PUT", "/image"):
            return 200, json.dumps(self._put_image(database, query, body)).encode(), {}
        if what in {("GET", "/image"), ("HEAD", "/image")}:
            return _get_image(request, database)
        raise Refusal(405, "method_not_allowed")

    def _create(self, name: str, asked: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        old = self.databases.get(name)
        if old is not None and asked["page_size"] != old.page_size:
            raise Refusal(409, "database_conflict", detail=f"it has pages of {old.page_size}")
        self.databases[name] = old or StubDatabase(page_size=asked["page_size"])
        described = json.dumps(_described(name, self.databases[name])).encode()
        return 201 if old is None else 200, described, {}

    def _wal(
        self, database: StubDatabase, offset: int, after_lsn: int | None, body: bytes
    ) -> dict[str, Any]:
        frame_bytes = database.page_size + 24
        if offset == 0:
            magic, _, page_size, _, salt1, salt2, sum1, sum2 = struct.unpack_from(">8I", body)
            if page_size != database.page_size:
                raise Refusal(409, "page_size_mismatch")
            order = ">" if magic & 1 else "<"
            if self._sum(body[:24], (0, 0), order) != (sum1, sum2):
                raise Refusal(400, "wal_invalid", frame=0)
            salts, sums, at = (salt1, salt2), (sum1, sum2), 32
            if salts == database.salts and database.offset > 0:
                at = database.offset  # stored already up to there
                sums = database.sums or sums
            elif database.last_lsn != 0 and after_lsn != database.last_lsn:
                raise Refusal(409, "wal_gap", **database.position())
        else:
            known = database.salts is not None and database.sums is not None
            if not known or offset > database.offset or (offset - 32) % frame_bytes:
                raise Refusal(409, "wal_gap", **database.position())
            assert database.salts is not None
            assert database.sums is not None
            salts, sums, order, at = (
                database.salts,
                database.sums,
                database.order,
                database.offset,
            )
            if body[8:16] != struct.pack(">2I", *salts):
                raise Refusal(409, "wal_gap", **database.position())
        first = max(0, at - offset)
        return self._store(database, body[first:], at, salts, sums, order, offset)

    def _store(
        self,
        database: StubDatabase,
        body: bytes,
        at: int,
        salts: tuple[int, int],
        sums: tuple[int, int],
        order: str,
        asked: int,
    ) -> dict[str, Any]:
        size = database.page_size + 24
        pending: list[tuple[int, bytes]] = []
        first_lsn = database.last_lsn + 1
        commits = 0
        for start in range(0, len(body) - size + 1, size):
            frame = body[start : start + size]
            page_no, page_count, salt1, salt2, sum1, sum2 = struct.unpack_from(">6I", frame)
            if (salt1, salt2) != salts:
                break
            sums = self._sum(frame[:8] + frame[24:], sums, order)
            if sums != (sum1, sum2):
                if start == 0 and asked > 0:
                    raise Refusal(409, "wal_gap", **database.position())
                break
            pending.append((page_no, frame[24:]))
            if page_count:
                for no, page in pending:
                    database.pages[no] = page
                for no in range(page_count + 1, 1 + max(database.page_count, max(pending)[0])):
                    database.pages.pop(no, None)
                database.page_count = page_count
                database.last_lsn += len(pending)
                pending.clear()
                if salts != database.salts:
                    database.logs += 1
                database.salts, database.sums, database.order = salts, sums, order
                database.offset = at + start + size
                commits += 1
                database.commits += 1
                self._look(database)
        known = database.salts == salts
        frames = database.last_lsn + 1 - first_lsn
        return {
            "accepted_offset": database.offset if known else 0,
            "salt1": salts[0],
            "salt2": salts[1],
            "first_lsn": first_lsn if frames else None,
            "last_lsn": database.last_lsn if frames else None,
            "frames": frames,
            "commits": commits,
            "page_count": database.page_count,
        }

    def _put_image(
        self, database: StubDatabase, query: dict[str, str], body: bytes
    ) -> dict[str, int]:
        size = database.page_size
        code = int.from_bytes(body[16:18], "big")
        if not body.startswith(b"SQLite format 3\0") or len(body) % size:
            raise Refusal(400, "image_invalid")
        if (65536 if code == 1 else code) != size:
            raise Refusal(409, "page_size_mismatch")
        pages = {at // size + 1: body[at : at + size] for at in range(0, len(body), size)}
        changed = sum(database.pages.get(no) != page for no, page in pages.items())
        database.pages, database.page_count = pages, len(pages)
        database.last_lsn += max(1, changed)
        database.images += 1
        database.salts = database.sums = None
        database.offset = 0
        if "salt1" in query:
            database.salts = (int(query["salt1"]), int(query["salt2"]))
            database.sums = (int(query["checksum1"]), int(query["checksum2"]))
            database.offset = int(query["offset"])
            database.order = "<"  # as SQLite writes on little-endian machines
        self._look(database)
        return {"lsn": database.last_lsn, "page_count": len(pages), "changed_pages": changed}

    def _look(self, database: StubDatabase) -> None:
        if self._checked is None:
            return
        try:
            look_into(database.image(), self._checked)
        except Exception as error:  # noqa: BLE001 - the test is told
            self.failures.append(f"at LSN {database.last_lsn}: {error!r}")

    def _sum(self, data: bytes, before: tuple[int, int], order: str) -> tuple[int, int]:
        if len(data) not in self._sums:
            self._sums[len(data)] = Sums(len(data))
        return self._sums[len(data)](data, before, order)


def look_into(image: bytes, checked: Checked) -> None:
    with tempfile.NamedTemporaryFile(suffix=".db") as file:
        Path(file.name).write_bytes(image)
        connection = sqlite3.connect(f"file:{file.name}?immutable=1", uri=True)
        try:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            checked(connection)
        finally:
            connection.close()


def _get_image(
    request: BaseHTTPRequestHandler, database: StubDatabase
) -> tuple[int, bytes, dict[str, str]]:
    image, etag = database.image(), f'"{database.last_lsn}"'
    headers = {"ETag": etag, "Bop-Generation": "1", "Bop-Lsn": str(database.last_lsn)}
    if request.headers.get("If-Match") not in {None, etag}:
        raise Refusal(412, "precondition_failed")
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
    if wanted and request.command == "GET":
        first, last = int(wanted[1]), min(int(wanted[2]), len(image) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(image)}"
        return 206, image[first : last + 1], headers
    return 200, image, headers


def _described(name: str, database: StubDatabase) -> dict[str, Any]:
    tenant, _, own = name.partition("/")
    return {
        "tenant": tenant,
        "database": own,
        "db_id": 1,
        "engine": "libsql",
        "page_size": database.page_size,
        "chunk_bytes": 67108864,
        "compression": "zstd",
        "state": "active",
        "generation": 0,
        "first_lsn": 1,
        "next_lsn": database.last_lsn + 1,
        "checkpointed_lsn": 0,
        "page_count": database.page_count,
        "wal_bytes": 0,
        "created_at": "2026-01-01T00:00:00Z",
        "forked_from": None,
        "health": {"state": "ok", "lost_from_lsn": None},
    }


def _job(body: bytes) -> dict[str, Any]:
    asked = json.loads(body) if body else {}
    return {
        "id": "j1",
        "kind": "create_checkpoint",
        "tenant": asked.get("tenant", "acme"),
        "database": asked.get("database", "main"),
        "state": "completed",
        "stage": None,
        "progress": dict.fromkeys(
            ("staged_chunks", "uploaded_blobs", "total_chunks", "uploaded_bytes", "total_bytes"), 0
        ),
        "attempts": 1,
        "reason": asked.get("reason"),
        "created_at": "2026-01-01T00:00:00Z",
        "started_at": None,
        "finished_at": None,
        "error": None,
        "result": {"outcome": "published", "generation": 1, "last_lsn": 1},
    }
