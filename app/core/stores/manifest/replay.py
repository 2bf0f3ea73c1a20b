"""The change log read back: replaying all of it in order gives the catalogue (I14)."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from app.core.base.errors import InvariantViolation
from app.core.stores.manifest.apply_catalogue import apply_catalogue
from app.core.stores.manifest.ops import decode_op
from app.core.stores.manifest.records import ChangeRecord
from app.core.stores.manifest.rows import MemoryRows
from app.core.stores.manifest.tables import CATALOGUE_TABLES

Catalogue: TypeAlias = Mapping[str, Mapping[bytes, Any]]
"""Table name to key to row, for each of `CATALOGUE_TABLES`; `ManifestView.catalogue` is one."""


def replay(
    changes: Iterable[ChangeRecord], *, base: Catalogue | None = None, behind: int = 0
) -> Catalogue:
    """Pure. `base` is the catalogue behind the change `behind`, up to which the log was trimmed.

    Raises `InvariantViolation` where the sequence has a hole.
    """
    rows = MemoryRows()
    for table in CATALOGUE_TABLES:
        rows.tables[table.name] = {} if base is None else dict(base.get(table.name, {}))
    last = behind
    for change in changes:
        if change.sequence != last + 1:
            raise InvariantViolation(
                "The change log is not dense.", sequence=change.sequence, newest=last
            )
        last = change.sequence
        for raw in change.ops:
            apply_catalogue(rows, decode_op(raw))
    return rows.tables
