"""Which published generation a caller means. Reads only."""

from app.core.base.errors import GenerationExpired, NoGeneration, NotFound, SnapshotNotFound
from app.core.stores.manifest.records import DatabaseRecord, GenerationRecord, SnapshotRecord
from app.core.stores.manifest.view import ManifestView


def select_generation(
    view: ManifestView,
    database: DatabaseRecord,
    *,
    generation: int | None = None,
    snapshot: str | None = None,
) -> GenerationRecord:
    """The one named by number or snapshot, else the newest published. Raises NoGeneration,
    GenerationExpired, NotFound for a generation that never was, SnapshotNotFound.
    """
    if snapshot is not None:
        generation = require_snapshot(view, database, snapshot).generation
    number = database.generation if generation is None else generation
    if not database.generation:
        raise NoGeneration("Nothing of the database is published yet.")
    record = view.generation(database.db_id, number)
    if record is None:
        raise missing_generation(database, number)
    return record


def missing_generation(database: DatabaseRecord, number: int) -> GenerationExpired | NotFound:
    """Why there is no row of it: it expired, or it never was. A fork begins with its parent's
    number, and never had those before.
    """
    parent = database.forked_from
    first_ever = 1 if parent is None else parent.generation
    if first_ever <= number <= database.generation:
        return GenerationExpired(f"Generation {number} is no longer retained.", generation=number)
    return NotFound(
        f"There is no generation {number}; the newest is {database.generation}.", generation=number
    )


def require_snapshot(view: ManifestView, database: DatabaseRecord, name: str) -> SnapshotRecord:
    """Raises SnapshotNotFound."""
    found = view.snapshot(database.db_id, name)
    if found is None:
        raise SnapshotNotFound(
            f"There is no snapshot {name} of {database.tenant}/{database.name}.", snapshot=name
        )
    return found
