"""The ledger of schema steps: which have run on this manifest, and running those that have not.

Invariants: all pending steps run in one transaction, after a durable backup; a manifest on which
an unknown step ran was written by a newer version and is left alone.
Crash: none of the steps, or all of them and their ledger entries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lmdb
import msgspec

from app.core.base import failpoints
from app.core.base.clock import Clock, wall_us
from app.core.base.errors import FormatFromFuture, StartRefused
from app.core.base.events import Events
from app.core.stores.manifest.encoding import BytesCodec
from app.core.stores.manifest.environment import ManifestEnvironment
from app.core.stores.manifest.rows import CommittedRows
from app.core.stores.manifest.tables import LEDGER_PREFIX, SCHEMA, TABLES, Table, ledger_key


class MigrationTransaction:
    """What a step may do: raw rows of the tables, by table name."""

    def __init__(self, transaction: lmdb.Transaction, handles: Mapping[Table[Any], Any]) -> None:
        raw_tables = {table.name: Table(table.name, BytesCodec()) for table in TABLES}
        self._tables = raw_tables
        self._rows = CommittedRows(
            transaction, {raw_tables[table.name]: handle for table, handle in handles.items()}
        )

    def get(self, table: str, key: bytes) -> bytes | None:
        return self._rows.get(self._tables[table], key)

    def put(self, table: str, key: bytes, raw: bytes) -> None:
        self._rows.put_raw(self._tables[table], key, raw)

    def delete(self, table: str, key: bytes) -> None:
        self._rows.delete_raw(self._tables[table], key)

    def scan(self, table: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Copied out first: the step may write while it goes through them."""
        return iter(list(self._rows.scan(self._tables[table], prefix)))


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationStep:
    number: int
    name: str
    apply: Callable[[MigrationTransaction], None]


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    applied_at_us: int


_decode_entry = msgspec.msgpack.Decoder(LedgerEntry).decode


def migrate_blocking(
    environment: ManifestEnvironment,
    steps: Sequence[MigrationStep],
    *,
    clock: Clock,
    events: Events,
) -> None:
    """Runs the pending steps and opens every table.

    Raises `FormatFromFuture`, having changed nothing, or `StartRefused` if a step fails or the
    ledger cannot be read.
    """
    known = {step.number: step for step in steps}
    if len(known) != len(steps):
        raise StartRefused("Two schema steps have the same number.")
    ledger = _read_ledger(environment)
    _refuse_unknown(ledger, known)
    pending = [step for number, step in sorted(known.items()) if number not in ledger]
    if pending and not environment.is_new:
        path = environment.path
        target = path.with_name(f"{path.name}-before-{pending[0].number:04d}-{wall_us(clock)}")
        backup = environment.backup_blocking(target)
        events.info("manifest.backed_up", path=str(backup.path), bytes=backup.bytes)
    transaction = environment.begin(write=True)
    try:
        environment.open_tables_blocking(transaction)
        _run_steps(transaction, environment, pending, clock)
        failpoints.fp("manifest.before_migration_commit")
        transaction.commit()
    except BaseException:
        transaction.abort()
        raise
    if pending:
        events.info("manifest.migrated", steps=[step.number for step in pending])


def _run_steps(
    transaction: lmdb.Transaction,
    environment: ManifestEnvironment,
    pending: Sequence[MigrationStep],
    clock: Clock,
) -> None:
    migration = MigrationTransaction(transaction, environment.handles)
    for step in pending:
        try:
            step.apply(migration)
        except Exception as error:
            raise StartRefused(
                f"Schema step {step.number:04d} ({step.name}) failed and was rolled back: {error}"
            ) from error
        entry = LedgerEntry(name=step.name, applied_at_us=wall_us(clock))
        migration.put(SCHEMA.name, ledger_key(step.number), msgspec.msgpack.encode(entry))


def _read_ledger(environment: ManifestEnvironment) -> dict[int, LedgerEntry]:
    transaction = environment.begin()
    try:
        rows = CommittedRows(transaction, environment.handles)
        return {
            int(key.removeprefix(LEDGER_PREFIX)): _decode_entry(raw)
            for key, raw in rows.scan(SCHEMA, LEDGER_PREFIX)
        }
    except (msgspec.MsgspecError, ValueError) as error:
        raise StartRefused(
            f"The ledger of schema steps in {environment.path} cannot be read: {error}. Restore "
            "the newest backup of the manifest, or run `bop-checkpoint recover`."
        ) from error
    finally:
        transaction.abort()


def _refuse_unknown(ledger: Mapping[int, LedgerEntry], known: Mapping[int, MigrationStep]) -> None:
    for number, entry in ledger.items():
        step = known.get(number)
        if step is None or step.name != entry.name:
            raise FormatFromFuture(
                f"The manifest went through schema step {number:04d} ({entry.name}), "
                "which this version does not know.",
                step=number,
            )
