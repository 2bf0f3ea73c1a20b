"""The first schema: the tables as they are, every counter at zero."""

from app.core.stores.manifest.ledger import MigrationTransaction

_COUNTERS = ("change_sequence", "database_id", "gc_sequence", "lease_token")


def apply(transaction: MigrationTransaction) -> None:
    for counter in _COUNTERS:
        key = b"counter/" + counter.encode()
        if transaction.get("schema", key) is None:
            transaction.put("schema", key, bytes(8))
