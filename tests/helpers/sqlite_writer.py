"""A process that writes to a SQLite database until it is told to stop, or killed.

Each transaction has rows (tx, n) with n counting from 0 to `width` - 1, so that a reader can tell
whole transactions from parts, and `checked` that none is missing. Arguments: path, page size,
kinds (comma-separated: rows, blobs, vacuum, delete, truncate), transactions (0: endless), seed,
milliseconds between two transactions.
It prints the number of each transaction once it has committed.
"""

import random
import sqlite3
import sys
import time


def checked(connection: sqlite3.Connection) -> None:
    """The rows are those of whole transactions, none missing in between."""
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'done'").fetchall():
        return
    count, last = connection.execute("SELECT count(*), coalesce(max(tx), 0) FROM done").fetchone()
    assert count == last, f"{count} transactions of {last}"
    parts = connection.execute(
        "SELECT d.tx FROM done d LEFT JOIN (SELECT tx, count(*) AS c FROM row GROUP BY tx) r"
        " ON r.tx = d.tx WHERE d.width != coalesce(r.c, 0)"
    ).fetchall()
    assert not parts, f"parts of transactions {parts}"


def prepare(path: str, page_size: int) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA page_size={page_size}")
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE done (tx INTEGER PRIMARY KEY, width)")
        connection.execute("CREATE TABLE row (tx, n, body, PRIMARY KEY (tx, n))")
    connection.close()


def write(connection: sqlite3.Connection, tx: int, kinds: list[str], source: random.Random) -> None:
    kind = source.choice(kinds)
    width = source.randrange(1, 20)
    size = source.choice([10, 200, 5000]) if kind != "blobs" else 300_000
    connection.execute("BEGIN IMMEDIATE")
    if kind == "delete" and tx > 10:
        connection.execute("UPDATE done SET width = 0 WHERE tx % 3 = ?", (tx % 3,))
        connection.execute("DELETE FROM row WHERE tx % 3 = ?", (tx % 3,))
        connection.execute("PRAGMA incremental_vacuum(20)")
    rows = [(tx, n, source.randbytes(size)) for n in range(width)]
    connection.executemany("INSERT INTO row VALUES (?, ?, ?)", rows)
    connection.execute("INSERT INTO done VALUES (?, ?)", (tx, width))
    connection.execute("COMMIT")
    if kind == "vacuum" and tx % 50 == 0:
        connection.execute("VACUUM")
    if kind == "truncate" and tx % 20 == 0:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def main() -> None:
    path, page_size, kinds, count, seed, pause_ms = sys.argv[1:]
    connection = sqlite3.connect(path, timeout=30, isolation_level=None)
    connection.execute(f"PRAGMA page_size={page_size}")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA busy_timeout=100" if "truncate" in kinds else "SELECT 1")
    source = random.Random(int(seed))
    tx = connection.execute("SELECT coalesce(max(tx), 0) FROM done").fetchone()[0]
    end = tx + int(count) if int(count) else None
    while end is None or tx < end:
        try:
            write(connection, tx + 1, kinds.split(","), source)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            tx = connection.execute("SELECT coalesce(max(tx), 0) FROM done").fetchone()[0]
            continue
        tx += 1
        print(tx, flush=True)
        time.sleep(int(pause_ms) / 1000)  # a pace, which nothing waits for


if __name__ == "__main__":
    main()
