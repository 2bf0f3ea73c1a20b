"""An application's database: customers' orders with text, identifiers, JSON and two indexes.

Everything is drawn from a seeded source, so that two copies given the same changes stay equal.
Words come as often as in a language, a few of them very often.
"""

import random
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

PAGE_BYTES = 4096
ROWS_PER_COMMIT = 20_000
_WORDS = 8_000
_STATES = ("pending", "paid    ", "packed  ", "shipped ", "returned")
_COLUMNS = "customer, token, email, state, cents, updated_at, attributes, note"
_SCHEMA = """
CREATE TABLE orders (
    id INTEGER PRIMARY KEY, customer INTEGER NOT NULL, token TEXT NOT NULL, email TEXT NOT NULL,
    state TEXT NOT NULL, cents INTEGER NOT NULL, updated_at TEXT NOT NULL,
    attributes TEXT NOT NULL, note TEXT NOT NULL
);
CREATE INDEX orders_by_customer ON orders (customer);
CREATE UNIQUE INDEX orders_by_token ON orders (token);
"""


class OrderSource:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        weights = list(accumulate(1 / (n + 1) for n in range(len(letters))))
        vocabulary = random.Random(1)
        self._words = [
            "".join(vocabulary.choices(letters, cum_weights=weights, k=vocabulary.randint(2, 10)))
            for _ in range(_WORDS)
        ]
        self._word_weights = list(accumulate(1 / (n + 2) for n in range(_WORDS)))

    def row(self) -> tuple[object, ...]:
        draw = self._random
        words = self._text(draw.randint(12, 40))
        name, domain = words[:2]
        country = draw.choice(("DE", "FR", "US"))
        attributes = (
            f'{{"source":"{draw.choice(("web", "app", "partner"))}","items":{draw.randint(1, 9)},'
            f'"weight_grams":{draw.randint(50, 9000)},"country":"{country}",'
            f'"discount":{draw.random():.4f},"warehouse":"{words[2]}"}}'
        )
        return (
            draw.randint(1, 200_000),
            f"{draw.getrandbits(128):032x}",
            f"{name}.{draw.randint(1, 9999)}@{domain}.example",
            draw.choice(_STATES),
            draw.randint(100_00, 999_99),
            self.moment(),
            attributes,
            " ".join(words),
        )

    def moment(self) -> str:
        second = self._random.randrange(86_400)
        day = f"2026-{self._random.randint(1, 12):02}-{self._random.randint(1, 28):02}"
        return f"{day}T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}.000Z"

    def update(self, last_id: int) -> tuple[object, ...]:
        """As many bytes as before: SQLite writes the row where it is."""
        draw = self._random
        cents = draw.randint(100_00, 999_99)
        return (draw.choice(_STATES), cents, self.moment(), draw.randint(1, last_id))

    def ids(self, last_id: int, count: int) -> list[int]:
        return self._random.sample(range(1, last_id + 1), count)

    def _text(self, count: int) -> list[str]:
        return self._random.choices(self._words, cum_weights=self._word_weights, k=count)


def make_database_blocking(
    path: Path, *, size_bytes: int, rows_per_commit: int = ROWS_PER_COMMIT
) -> None:
    """In WAL mode, everything in the file itself."""
    source = OrderSource(7)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA cache_size = -300000")
        connection.executescript(_SCHEMA)
        while path.stat().st_size < size_bytes:
            connection.execute("BEGIN")
            insert(connection, source, rows_per_commit)
            connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


@contextmanager
def application(path: Path) -> Iterator[sqlite3.Connection]:
    """The application's own connection, open as long as it runs; whoever replicates checkpoints."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=30)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        yield connection
    finally:
        connection.close()


def insert(connection: sqlite3.Connection, source: OrderSource, count: int) -> None:
    connection.executemany(
        f"INSERT INTO orders ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (source.row() for _ in range(count)),
    )


def update_in_place(connection: sqlite3.Connection, *, count: int, per_commit: int = 100) -> None:
    """Of rows anywhere in the table, no index touched."""
    source = OrderSource(11)
    last_id = _last_id(connection)
    for _ in range(count // per_commit):
        connection.execute("BEGIN")
        connection.executemany(
            "UPDATE orders SET state = ?, cents = ?, updated_at = ? WHERE id = ?",
            [source.update(last_id) for _ in range(per_commit)],
        )
        connection.execute("COMMIT")


def insert_and_delete(connection: sqlite3.Connection, *, count: int, per_commit: int = 100) -> None:
    """Half of each; what is deleted is anywhere in the table, and both indexes change."""
    source = OrderSource(13)
    half = per_commit // 2
    doomed = source.ids(_last_id(connection), count // 2)
    for at in range(0, len(doomed), half):
        connection.execute("BEGIN")
        insert(connection, source, half)
        connection.executemany(
            "DELETE FROM orders WHERE id = ?", [(each,) for each in doomed[at : at + half]]
        )
        connection.execute("COMMIT")


def contents(path: Path) -> tuple[int, int]:
    """Of a restored database: how many rows, and a sum over all of them."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(
            "SELECT count(*), sum(id * 31 + cents + length(note) + unicode(token)) FROM orders"
        ).fetchone()
    finally:
        connection.close()


def _last_id(connection: sqlite3.Connection) -> int:
    return connection.execute("SELECT max(id) FROM orders").fetchone()[0]
