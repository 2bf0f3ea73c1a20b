"""Another process at work on a service's leases, with LMDB alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from app.core.stores.manifest.tables import (
    LEASE_TOKENS,
    LEASES,
    LEASES_BY_JOB,
    SCHEMA,
    job_lease_key,
    number_key,
    number_of,
)


def take_lease_blocking(manifest: Path, *, job_id: str) -> int:
    """Gives the only lease there is to another job, as its expiry would. Returns the new token."""
    with _writing(manifest) as (transaction, tables):
        leases, by_job, schema = (tables[one.name] for one in (LEASES, LEASES_BY_JOB, SCHEMA))
        ((key, raw),) = list(transaction.cursor(db=leases))
        lease = LEASES.codec.decode(bytes(raw))
        token = number_of(bytes(transaction.get(LEASE_TOKENS, db=schema))) + 1
        taken = msgspec.structs.replace(lease, job_id=job_id, token=token, process_id="another")
        transaction.put(LEASE_TOKENS, number_key(token), db=schema)
        transaction.put(bytes(key), LEASES.codec.encode(taken), db=leases)
        place = (lease.db_id, lease.chunk_id)
        transaction.delete(job_lease_key(lease.job_id, *place), db=by_job)
        transaction.put(job_lease_key(job_id, *place), b"", db=by_job)
    return token


def lease_expiry_blocking(manifest: Path) -> float:
    """When the only lease there is ends, in seconds since the Unix epoch."""
    with _writing(manifest) as (transaction, tables):
        ((_, raw),) = list(transaction.cursor(db=tables[LEASES.name]))
        return LEASES.codec.decode(bytes(raw)).expires_at_us / 1e6


def lease_tokens_blocking(manifest: Path) -> int:
    """The newest token that was given out."""
    with _writing(manifest) as (transaction, tables):
        return number_of(bytes(transaction.get(LEASE_TOKENS, db=tables[SCHEMA.name])))


@contextmanager
def _writing(manifest: Path) -> Iterator[tuple[lmdb.Transaction, dict[str, Any]]]:
    environment = lmdb.open(str(manifest), max_dbs=64, map_size=1 << 28, create=False)
    try:
        tables = {
            table.name: environment.open_db(table.stored_name, create=False)
            for table in (LEASES, LEASES_BY_JOB, SCHEMA)
        }
        with environment.begin(write=True) as transaction:
            yield transaction, tables
    finally:
        environment.close()
