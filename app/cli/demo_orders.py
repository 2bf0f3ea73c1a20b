"""The demo's SQLite database: an application's orders, the same for the same seed.

Everything here blocks, and is used in one thread, as the connection wants it.
"""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

ROWS_PER_COMMIT = 20_000
ROW_BYTES = 137
"""What an order takes of the file, its place in the index included."""

_STATES = ("new", "paid", "packed", "shipped", "delivered", "returned", "refunded", "held")
_STREETS = ("Mill Lane", "Station Road", "High Street", "Quay", "Church Hill", "Park View", "Green")
_NOTES = (
    "leave with the neighbour if nobody answers the door",
    "gift: no invoice in the parcel, please, and the card on top",
    "call before delivery, the lift takes no more than 200 kg",
    "deliver to the back entrance between eight and ten in the morning",
)
_SCHEMA = """
    CREATE TABLE orders (
        id INTEGER PRIMARY KEY, customer INTEGER NOT NULL, placed_at INTEGER NOT NULL,
        state TEXT NOT NULL, total_cents INTEGER NOT NULL, item BLOB NOT NULL,
        street TEXT NOT NULL, note TEXT NOT NULL
    );
    CREATE INDEX orders_by_customer ON orders (customer, placed_at);
    CREATE TABLE runs (id INTEGER PRIMARY KEY, what TEXT NOT NULL);
"""

Bits = Callable[[int], int]
"""Gives that many random bits."""
Row = tuple[int, int, int, str, int, bytes, str, str]


def open_blocking(path: Path) -> sqlite3.Connection:
    """In WAL mode, as a server's database is; SQLite's other defaults stay."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.executescript(_SCHEMA)
    return connection


def insert_blocking(connection: sqlite3.Connection, bits: Bits, first: int, stop: int) -> None:
    """Orders [first, stop), in one transaction."""
    connection.execute("BEGIN")
    connection.executemany(
        "INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?, ?, ?)", _rows(first, stop, bits)
    )
    connection.execute("COMMIT")


def settle_blocking(connection: sqlite3.Connection) -> None:
    """As an application is found: its data in the database file, and a short log beside it."""
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    connection.execute("INSERT INTO runs (what) VALUES ('filled')")


def update_blocking(connection: sqlite3.Connection, bits: Bits, rows: int, updates: int) -> None:
    """Changes the total of orders all over the table, in place, in one transaction."""
    connection.execute("BEGIN")
    connection.executemany(
        "UPDATE orders SET total_cents = ? WHERE id = ?",
        ((1_000_000 + bits(20), 1 + bits(64) % rows) for _ in range(updates)),
    )
    connection.execute("COMMIT")


def _rows(first: int, stop: int, bits: Bits) -> Iterator[Row]:
    for number in range(first, stop):
        value = bits(192)
        yield (
            number,
            value & 0xFFFF,
            1_760_000_000 + number * 7,
            _STATES[value >> 16 & 7],
            1_000_000 + (value >> 19 & 0xFFFFF),
            (value >> 64).to_bytes(16, "big"),
            f"{value >> 40 & 255} {_STREETS[(value >> 48 & 255) % 7]}",
            _NOTES[value >> 56 & 3],
        )
