"""The blobs that a generation needs: pure, from the manifest's rows."""

from app.core.stores.manifest.records import BlobRef
from app.core.stores.manifest.view import ManifestView


def blobs_of(view: ManifestView, db_id: int, generation: int) -> list[BlobRef]:
    """Bases, deltas and the bases that deltas are encoded against, each once, by key. A fork's
    are its parent's where it has none of its own.
    """
    bases = view.chunk_view(db_id, generation)
    deltas = view.delta_view(db_id, generation)
    found = {row.blob.key: row.blob for row in bases if row.blob is not None}
    for delta in deltas:
        found[delta.blob.key] = delta.blob
        if delta.base_key and delta.base_key not in found:
            for row in view.chunk_history(db_id, delta.chunk_id).bases:
                if row.blob is not None and row.blob.key == delta.base_key:
                    found[row.blob.key] = row.blob
    return [found[key] for key in sorted(found)]
