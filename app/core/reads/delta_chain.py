"""Which blob holds the newest version of a page of a chunk: pure.

A chunk at a generation is a base and the deltas over it, newest page wins. A page of which no
blob knows was never written: it reads as zeros. A delta's page may be stored as a difference to
the page of the base blob that the delta names, which is the chain's own base or an older one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap

from app.core.base.errors import InvariantViolation
from app.core.stores.manifest.lineage import is_valid_at
from app.core.stores.manifest.records import BlobRef, ChunkDeltaRecord, ChunkRecord

NO_LAYER = -1

LayerNumbers = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseLayer:
    row: ChunkRecord
    blob: BlobRef

    def has(self, page_no: int) -> bool:
        """Whether it may hold the page; pages that were never written are missing in it."""
        return self.row.first <= page_no <= self.row.visible_last


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaLayer:
    row: ChunkDeltaRecord
    blob: BlobRef
    pages: BitMap
    encoded_against: BaseLayer | None
    """None: its pages are complete."""

    def has(self, page_no: int) -> bool:
        return page_no in self.pages


Layer = BaseLayer | DeltaLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaChain:
    """`layers` newest first; the base, if there is one, is the last."""

    chunk_id: int
    layers: tuple[Layer, ...]
    memory_bytes: int = field(default=0)

    def layer_of(self, page_no: int) -> Layer | None:
        """The newest that holds the page; None: it was never written."""
        for layer in self.layers:
            if layer.has(page_no):
                return layer
        return None

    def layers_of(self, first_page: int, count: int) -> LayerNumbers:
        """For each page of [first_page, first_page + count) the position of its layer in
        `layers`, NO_LAYER where there is none.
        """
        numbers = np.full(count, NO_LAYER, dtype=np.int8)
        end = first_page + count
        for number in range(len(self.layers) - 1, -1, -1):  # newer ones overwrite
            layer = self.layers[number]
            match layer:
                case BaseLayer(row=row):
                    first, stop = max(row.first, first_page), min(row.visible_last + 1, end)
                    if first < stop:
                        numbers[first - first_page : stop - first_page] = number
                case DeltaLayer(pages=pages):
                    here = pages & BitMap(range(first_page, end))
                    numbers[np.array(here.to_array()) - first_page] = number
        return numbers


def delta_chain(
    chunk_id: int,
    bases: Iterable[ChunkRecord],
    deltas: Sequence[ChunkDeltaRecord],
    *,
    generation: int,
) -> DeltaChain:
    """The chunk as it was at `generation`, from all of its rows, whatever their validity.
    Raises InvariantViolation if a delta's base is not among them.
    """
    rows = list(bases)
    by_key = {row.blob.key: BaseLayer(row=row, blob=row.blob) for row in rows if row.blob}
    chain: list[Layer] = [
        DeltaLayer(
            row=row,
            blob=row.blob,
            pages=BitMap.deserialize(row.pages),
            encoded_against=_base_of(row, by_key),
        )
        for row in sorted(deltas, key=lambda row: (row.generation, row.delta_id), reverse=True)
        if is_valid_at(row, generation)
    ]
    chain += [
        BaseLayer(row=row, blob=row.blob)
        for row in rows
        if row.blob is not None and is_valid_at(row, generation)
    ]
    if sum(isinstance(layer, BaseLayer) for layer in chain) > 1:
        raise InvariantViolation("a chunk has two bases at once", chunk_id=chunk_id)
    memory_bytes = 256 + sum(
        1024 + (len(layer.row.pages) if isinstance(layer, DeltaLayer) else 0) for layer in chain
    )
    return DeltaChain(chunk_id=chunk_id, layers=tuple(chain), memory_bytes=memory_bytes)


def _base_of(row: ChunkDeltaRecord, by_key: dict[str, BaseLayer]) -> BaseLayer | None:
    if not row.base_key:
        return None
    base = by_key.get(row.base_key)
    if base is None:
        raise InvariantViolation(
            "a delta's base is not in the catalogue", chunk_id=row.chunk_id, key=row.base_key
        )
    return base
