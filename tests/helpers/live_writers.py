"""Applications that write to a SQLite database through different libraries until they are killed.

What transaction `tx` does follows from the seed and `tx` alone, and its last statement puts `tx`
into `ledger`: whatever was killed when, a database whose ledger ends at `tx` must hold exactly the
rows of `Model.at(tx)`. As a program: KIND PATH_OR_URL PAGE_SIZE SEED; it makes the tables where
they are missing, goes on behind the last transaction there is, and prints each one's number once
it has committed.
"""

import random
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

KINDS = ("sqlite3", "apsw", "libsql", "sqld")
PAGE_SIZES = (512, 4096, 65536)
BUSY_SECONDS = 30
PACE_SECONDS = {512: 0.004, 4096: 0.005, 65536: 0.03}
"""By page size: small changes of large pages are long logs."""
BLOB_BYTES = 400_000
VACUUM_EVERY = 23
_AUTO_VACUUM = {512: 1, 4096: 0, 65536: 2}

Row = tuple[int, bytes]


# --- what is written


@dataclass(frozen=True, slots=True)
class Insert:
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """Of the rows whose id leaves `residue` divided by `modulus`, those above `above`."""

    modulus: int
    residue: int
    above: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Delete:
    modulus: int
    residue: int


Change = Insert | Update | Delete


def body(source: random.Random, size: int) -> bytes:
    """Half of it compresses."""
    return source.randbytes(size - size // 2) + b"text " * (size // 10)


def changes_of(seed: int, tx: int) -> Iterator[Change]:
    source = random.Random(f"{seed}-{tx}")
    for _ in range(source.randrange(1, 4)):
        match source.choices(("insert", "update", "delete", "blob"), (6, 4, 1, 0.8))[0]:
            case "insert":
                size = source.choice((20, 300, 5000))
                first = tx * 1000 + source.randrange(900)
                rows = tuple(
                    (first + n, body(source, size)) for n in range(source.randrange(1, 12))
                )
                yield Insert(rows)
            case "update":
                yield Update(
                    source.randrange(3, 30), source.randrange(3), tx * 800,
                    body(source, source.choice((10, 300, 4000))),
                )  # fmt: skip
            case "delete":
                yield Delete(source.randrange(5, 12), source.randrange(5))
            case "blob":
                yield Insert(((tx * 1000 + 999, body(source, source.randrange(BLOB_BYTES))),))


class Model:
    """The rows after any transaction, without SQL. Later ones are cheap when asked in order."""

    def __init__(self, seed: int) -> None:
        self.tx = 0
        self._seed = seed
        self._rows: dict[int, bytes] = {}

    def at(self, tx: int) -> list[Row]:
        if tx < self.tx:
            self.tx, self._rows = 0, {}
        while self.tx < tx:
            self.tx += 1
            for change in changes_of(self._seed, self.tx):
                self._apply(change)
        return sorted(self._rows.items())

    def _apply(self, change: Change) -> None:
        match change:
            case Insert(rows):
                self._rows.update(rows)
            case Update(modulus, residue, above, new):
                for one in self._rows:
                    if one % modulus == residue and one > above:
                        self._rows[one] = new
            case Delete(modulus, residue):
                self._rows = {
                    one: old for one, old in self._rows.items() if one % modulus != residue
                }


def check(path: Path, model: Model) -> int:
    """A database file without a log holds whole transactions, all up to the one returned."""
    uri = f"{path.as_uri()}?mode=ro&immutable=1"
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        found = connection.execute("PRAGMA integrity_check").fetchall()
        assert found == [("ok",)], found
        tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        if {("item",), ("ledger",)} - set(tables):
            return 0  # as of before they were made
        ledger = connection.execute("SELECT count(*), coalesce(max(tx), 0) FROM ledger")
        count, last = ledger.fetchone()
        assert count == last, f"{count} transactions of {last}"
        rows = connection.execute("SELECT id, body FROM item ORDER BY id").fetchall()
    wanted = model.at(last)
    if rows != wanted:  # without the bodies, which no one wants to see
        ids, wanted_ids = [one for one, _ in rows], [one for one, _ in wanted]
        other = [a for (a, x), (b, y) in zip(rows, wanted, strict=False) if (a, x) != (b, y)]
        raise AssertionError(
            f"after transaction {last}: {len(ids)} rows instead of {len(wanted_ids)}, "
            f"the first that differs is {other[:1]}"
        )
    return int(last)


# --- who writes


class Application(Protocol):
    def run(self, sql: str, values: Sequence[Any] = ()) -> list[Any]: ...


class Locked(Exception):
    """Another connection is in the way: to be tried again."""


class WithSqlite3:
    def __init__(self, path: str) -> None:
        self._connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)

    def run(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._connection.execute(sql, values).fetchall()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            raise Locked(str(error)) from error


class WithApsw:
    def __init__(self, path: str) -> None:
        import apsw

        self._busy = apsw.BusyError
        self._connection = apsw.Connection(path)
        self._connection.set_busy_timeout(BUSY_SECONDS * 1000)

    def run(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return list(self._connection.execute(sql, tuple(values)))
        except self._busy as error:
            raise Locked(str(error)) from error


class WithLibsql:
    """A file, or by Hrana a URL. Its errors are ValueErrors with SQLite's text."""

    def __init__(self, path: str) -> None:
        import libsql

        self._connection = libsql.connect(path, timeout=BUSY_SECONDS, isolation_level=None)

    def run(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            cursor = self._connection.execute(sql, tuple(values))
            return [] if cursor is None else cursor.fetchall() or []
        except ValueError as error:
            if "locked" not in str(error) and "busy" not in str(error).lower():
                raise
            raise Locked(str(error)) from error


_APPLICATIONS: dict[str, type[Any]] = {
    "sqlite3": WithSqlite3,
    "apsw": WithApsw,
    "libsql": WithLibsql,
    "sqld": WithLibsql,
}


def prepare(application: Application, page_size: int) -> None:
    application.run(f"PRAGMA page_size = {page_size}")
    application.run(f"PRAGMA auto_vacuum = {_AUTO_VACUUM[page_size]}")
    application.run("PRAGMA journal_mode = WAL")
    application.run("PRAGMA synchronous = NORMAL")


def make_tables(application: Application) -> None:
    application.run("CREATE TABLE IF NOT EXISTS item (id INTEGER PRIMARY KEY, body BLOB)")
    application.run("CREATE TABLE IF NOT EXISTS ledger (tx INTEGER PRIMARY KEY)")


def write(application: Application, change: Change) -> None:
    match change:
        case Insert(rows):
            places = ", ".join("(?, ?)" for _ in rows)
            values = [value for row in rows for value in row]
            application.run(f"INSERT OR REPLACE INTO item VALUES {places}", values)
        case Update(modulus, residue, above, new):
            application.run(
                "UPDATE item SET body = ? WHERE id % ? = ? AND id > ?",
                (new, modulus, residue, above),
            )
        case Delete(modulus, residue):
            application.run("DELETE FROM item WHERE id % ? = ?", (modulus, residue))


def last_transaction(application: Application) -> int:
    return int(application.run("SELECT coalesce(max(tx), 0) FROM ledger")[0][0])


def main() -> None:
    kind, path, page_size, seed = sys.argv[1:]
    application: Application = _APPLICATIONS[kind](path)
    if kind != "sqld":  # which has WAL and pages of 4096 bytes, and takes no pragmas
        prepare(application, int(page_size))
    make_tables(application)
    tx = last_transaction(application)
    print(tx, flush=True)
    while True:
        tx += 1
        try:
            application.run("BEGIN IMMEDIATE")
            for change in changes_of(int(seed), tx):
                write(application, change)
            application.run("INSERT INTO ledger VALUES (?)", (tx,))
            application.run("COMMIT")
            print(tx, flush=True)
            if tx % VACUUM_EVERY == 0 and kind != "sqld":  # which refuses to
                application.run("VACUUM")
        except Locked as error:
            print(f"# {error}", flush=True)
            try:
                application.run("ROLLBACK")
            except Exception as refusal:  # noqa: BLE001 - each library has its own: no transaction
                print(f"# {refusal}", flush=True)
            tx = last_transaction(application)
        time.sleep(PACE_SECONDS[int(page_size)])  # a pace, which nothing waits for


if __name__ == "__main__":
    main()
