"""The names of objects on the remote store: built from validated parts, and read back.

Every key is ASCII segments of letters, digits, `.`, `_` and `-` joined by `/`, none beginning with
a dot: safe as an S3 key, as a path below a directory, and in a log line.
"""

import re
from dataclasses import dataclass
from typing import Literal

from app.core.base.errors import InvalidRequest
from app.core.base.ids import is_name

OWNER_KEY = "owner.json"
CHECKPOINTS_PREFIX = "checkpoints/"
DOCUMENTS_PREFIX = "generations/"
SNAPSHOTS_PREFIX = "snapshots/"
PROBE_PREFIX = "probe/"

KEY_BYTES_MAX = 1024  # S3's own limit

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")  # 255 bytes: what file systems take
_CHECKPOINT_ID = re.compile(r"[0-9]{10,}-[0-9]{6,}-[0-7][0-9A-HJKMNP-TV-Z]{25}(-[1-9][0-9]*)?")
_SHA256_HEX = re.compile(r"[0-9a-f]{64}")
_CHUNK = re.compile(r"chunk-([0-9]+)-([0-9]+)-([0-9a-f]{64})\.blob")
_DELTA = re.compile(r"delta-([0-9]+)-([0-9]+)-([0-9]+)-([0-9a-f]{64})\.blob")
_META = re.compile(r"meta-([0-9a-f]{64})\.json")
_PROBE = re.compile(r"[0-9a-f]{20}")
_DOCUMENT = re.compile(r"([0-9]{10,})\.json\.zst")


ProbeName = Literal["object", "absent"]


class InvalidKey(InvalidRequest):
    title = "Not a key of the remote store"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkKey:
    tenant: str
    database: str
    checkpoint_id: str
    chunk_id: int
    generation: int
    sha256_hex: str

    def __str__(self) -> str:
        return chunk_key(
            tenant=self.tenant,
            database=self.database,
            checkpoint_id=self.checkpoint_id,
            chunk_id=self.chunk_id,
            generation=self.generation,
            sha256_hex=self.sha256_hex,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaKey:
    tenant: str
    database: str
    checkpoint_id: str
    chunk_id: int
    delta_id: int
    generation: int
    sha256_hex: str

    def __str__(self) -> str:
        return delta_key(
            tenant=self.tenant,
            database=self.database,
            checkpoint_id=self.checkpoint_id,
            chunk_id=self.chunk_id,
            delta_id=self.delta_id,
            generation=self.generation,
            sha256_hex=self.sha256_hex,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotMetaKey:
    tenant: str
    database: str
    name: str
    sha256_hex: str

    def __str__(self) -> str:
        return snapshot_meta_key(
            tenant=self.tenant, database=self.database, name=self.name, sha256_hex=self.sha256_hex
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDocumentKey:
    tenant: str
    database: str
    db_id: int
    generation: int

    def __str__(self) -> str:
        return generation_document_key(
            tenant=self.tenant,
            database=self.database,
            db_id=self.db_id,
            generation=self.generation,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeKey:
    """What a start-up probe writes, and deletes unless it is cut short. No tenant's."""

    probe: str
    name: ProbeName

    def __str__(self) -> str:
        return probe_key(probe=self.probe, name=self.name)


TenantKey = ChunkKey | DeltaKey | SnapshotMetaKey | GenerationDocumentKey
Key = TenantKey | ProbeKey


def chunk_key(
    *,
    tenant: str,
    database: str,
    checkpoint_id: str,
    chunk_id: int,
    generation: int,
    sha256_hex: str,
) -> str:
    where = _checkpoint_prefix(tenant, database, checkpoint_id)
    numbers = f"{_number(chunk_id)}-{_number(generation)}"
    return f"{where}chunk-{numbers}-{_hash(sha256_hex)}.blob"


def delta_key(
    *,
    tenant: str,
    database: str,
    checkpoint_id: str,
    chunk_id: int,
    delta_id: int,
    generation: int,
    sha256_hex: str,
) -> str:
    where = _checkpoint_prefix(tenant, database, checkpoint_id)
    numbers = f"{_number(chunk_id)}-{_number(delta_id)}-{_number(generation)}"
    return f"{where}delta-{numbers}-{_hash(sha256_hex)}.blob"


def snapshot_meta_key(*, tenant: str, database: str, name: str, sha256_hex: str) -> str:
    where = f"{SNAPSHOTS_PREFIX}{_name(tenant)}/{_name(database)}/{_name(name)}"
    return f"{where}/meta-{_hash(sha256_hex)}.json"


def generation_document_key(*, tenant: str, database: str, db_id: int, generation: int) -> str:
    where = documents_prefix(tenant=tenant, database=database, db_id=db_id)
    return f"{where}{_number(generation):010d}.json.zst"


def documents_prefix(*, tenant: str, database: str, db_id: int) -> str:
    """Of all generation documents of one database."""
    return f"{DOCUMENTS_PREFIX}{_name(tenant)}/{_name(database)}/{_number(db_id)}/"


def probe_key(*, probe: str, name: ProbeName) -> str:
    """`probe` is 20 hexadecimal digits, drawn anew by each."""
    if _PROBE.fullmatch(probe) is None:
        raise InvalidKey(f"{probe[:100]!r} is no probe.")
    return f"{PROBE_PREFIX}{probe}/{name}"


def parse_key(key: str) -> Key | None:
    """The parts of a key that this module built; None for any other object."""
    parts = key.split("/")
    match parts:
        case ["checkpoints", tenant, database, checkpoint_id, file]:
            if found := _CHUNK.fullmatch(file):
                parsed: Key = ChunkKey(
                    tenant=tenant,
                    database=database,
                    checkpoint_id=checkpoint_id,
                    chunk_id=int(found[1]),
                    generation=int(found[2]),
                    sha256_hex=found[3],
                )
            elif found := _DELTA.fullmatch(file):
                parsed = DeltaKey(
                    tenant=tenant,
                    database=database,
                    checkpoint_id=checkpoint_id,
                    chunk_id=int(found[1]),
                    delta_id=int(found[2]),
                    generation=int(found[3]),
                    sha256_hex=found[4],
                )
            else:
                return None
        case ["snapshots", tenant, database, name, file] if found := _META.fullmatch(file):
            parsed = SnapshotMetaKey(
                tenant=tenant, database=database, name=name, sha256_hex=found[1]
            )
        case ["generations", tenant, database, db_id, file] if (
            db_id.isascii() and db_id.isdecimal() and (found := _DOCUMENT.fullmatch(file))
        ):
            parsed = GenerationDocumentKey(
                tenant=tenant, database=database, db_id=int(db_id), generation=int(found[1])
            )
        case ["probe", probe, ("object" | "absent") as name]:
            parsed = ProbeKey(probe=probe, name=name)
        case _:
            return None
    try:
        return parsed if str(parsed) == key else None
    except InvalidKey:
        return None


def check_key(key: str) -> str:
    """The key itself. Raises InvalidKey unless it is safe on every backend."""
    if len(key) > KEY_BYTES_MAX or not all(
        _SEGMENT.fullmatch(segment) for segment in key.split("/")
    ):
        raise InvalidKey(f"{key[:100]!r} is no key of the remote store.")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself: empty, or what some key can begin with. Raises InvalidKey."""
    whole, _, rest = prefix.rpartition("/")
    if whole:
        check_key(whole)
    if rest and _SEGMENT.fullmatch(rest) is None:
        raise InvalidKey(f"{prefix[:100]!r} is no prefix on the remote store.")
    if prefix.startswith("/"):
        raise InvalidKey("A prefix does not begin with '/'.")
    return prefix


def _checkpoint_prefix(tenant: str, database: str, checkpoint_id: str) -> str:
    if _CHECKPOINT_ID.fullmatch(checkpoint_id) is None:
        raise InvalidKey(f"{checkpoint_id[:100]!r} is no checkpoint id.")
    return f"{CHECKPOINTS_PREFIX}{_name(tenant)}/{_name(database)}/{checkpoint_id}/"


def _name(text: str) -> str:
    if not is_name(text):
        raise InvalidKey(f"{text[:100]!r} is no name of a tenant, database or snapshot.")
    return text


def _number(value: int) -> int:
    if value < 0:
        raise InvalidKey(f"{value} cannot stand in a key.")
    return value


def _hash(sha256_hex: str) -> str:
    if _SHA256_HEX.fullmatch(sha256_hex) is None:
        raise InvalidKey(f"{sha256_hex[:100]!r} is no SHA-256 in hexadecimal.")
    return sha256_hex
