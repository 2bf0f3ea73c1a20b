"""Keys: what they look like, that they read back, and that no hostile name gets into one."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from app.core.base.ids import is_name
from app.core.stores.remote.keys import (
    OWNER_KEY,
    ChunkKey,
    DeltaKey,
    GenerationDocumentKey,
    InvalidKey,
    ProbeKey,
    SnapshotMetaKey,
    check_key,
    check_prefix,
    chunk_key,
    delta_key,
    generation_document_key,
    parse_key,
    probe_key,
    snapshot_meta_key,
)

HASH = "0f" * 32
CHECKPOINT = "0000000007-000003-01ARZ3NDEKTSV4RRFFQ69G5FAV"

names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True)
numbers = st.integers(0, 2**63)
hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)


def test_as_the_design_writes_them() -> None:
    assert (
        chunk_key(
            tenant="acme", database="log", checkpoint_id=CHECKPOINT, chunk_id=4, generation=7,
            sha256_hex=HASH,
        )
        == f"checkpoints/acme/log/{CHECKPOINT}/chunk-4-7-{HASH}.blob"
    )  # fmt: skip
    assert (
        delta_key(
            tenant="acme", database="log", checkpoint_id=CHECKPOINT, chunk_id=4, delta_id=2,
            generation=7, sha256_hex=HASH,
        )
        == f"checkpoints/acme/log/{CHECKPOINT}/delta-4-2-7-{HASH}.blob"
    )  # fmt: skip
    assert (
        snapshot_meta_key(tenant="acme", database="log", name="before.v2", sha256_hex=HASH)
        == f"snapshots/acme/log/before.v2/meta-{HASH}.json"
    )
    assert (
        generation_document_key(tenant="acme", database="log", db_id=9, generation=12)
        == "generations/acme/log/9/0000000012.json.zst"
    )


def test_keys_of_probes_read_back() -> None:
    key = ProbeKey(probe="0f" * 10, name="absent")
    assert str(key) == f"probe/{'0f' * 10}/absent"
    assert parse_key(str(key)) == key
    for text in ("probe/0f/object", f"probe/{'0F' * 10}/object", f"probe/{'0f' * 10}/other"):
        assert parse_key(text) is None
    with pytest.raises(InvalidKey):
        probe_key(probe="../etc", name="object")


@given(names, names, numbers, numbers, numbers, hashes)
def test_keys_read_back(
    tenant: str, database: str, one: int, two: int, three: int, sha256_hex: str
) -> None:
    where = {"tenant": tenant, "database": database}
    keys = [
        ChunkKey(
            **where, checkpoint_id=CHECKPOINT, chunk_id=one, generation=two, sha256_hex=sha256_hex
        ),
        DeltaKey(
            **where, checkpoint_id=f"{CHECKPOINT}-2", chunk_id=one, delta_id=three, generation=two,
            sha256_hex=sha256_hex,
        ),
        SnapshotMetaKey(**where, name=database, sha256_hex=sha256_hex),
        GenerationDocumentKey(**where, db_id=one, generation=two),
    ]  # fmt: skip
    for key in keys:
        assert check_key(str(key)) == str(key)
        assert parse_key(str(key)) == key


@given(st.text())
@example("..")
@example("a/../b")
@example("a\0")
@example("a\n")
@example("A")
@example("")
def test_hostile_names_are_refused(name: str) -> None:
    assume(not is_name(name))
    for tenant, database in ((name, "log"), ("acme", name)):
        with pytest.raises(InvalidKey):
            generation_document_key(tenant=tenant, database=database, db_id=1, generation=1)
        with pytest.raises(InvalidKey):
            snapshot_meta_key(tenant=tenant, database=database, name="s", sha256_hex=HASH)
        with pytest.raises(InvalidKey):
            chunk_key(
                tenant=tenant, database=database, checkpoint_id=CHECKPOINT, chunk_id=1,
                generation=1, sha256_hex=HASH,
            )  # fmt: skip
        with pytest.raises(InvalidKey):
            delta_key(
                tenant=tenant, database=database, checkpoint_id=CHECKPOINT, chunk_id=1, delta_id=1,
                generation=1, sha256_hex=HASH,
            )  # fmt: skip
    with pytest.raises(InvalidKey):
        snapshot_meta_key(tenant="acme", database="log", name=name, sha256_hex=HASH)


@pytest.mark.parametrize(
    "changed",
    [
        {"checkpoint_id": "../../x"}, {"checkpoint_id": ""}, {"checkpoint_id": f"{CHECKPOINT}\n"},
        {"chunk_id": -1}, {"generation": -1}, {"sha256_hex": "0F" * 32}, {"sha256_hex": "0f" * 31},
    ],
)  # fmt: skip
def test_hostile_parts_are_refused(changed: dict[str, object]) -> None:
    parts = {
        "tenant": "acme", "database": "log", "checkpoint_id": CHECKPOINT, "chunk_id": 1,
        "generation": 1, "sha256_hex": HASH,
    }  # fmt: skip
    with pytest.raises(InvalidKey):
        chunk_key(**{**parts, **changed})


@given(st.text())
@example("a/b")
@example("a/./b")
def test_a_checked_key_stays_below_its_root(text: str) -> None:
    try:
        check_key(text)
    except InvalidKey:
        return
    segments = text.split("/")
    assert all(segments)
    assert not any(segment.startswith(".") for segment in segments)
    assert text.isascii()
    assert text.isprintable()


@given(st.text())
@example(OWNER_KEY)
@example("generations/acme/log/9/12.json.zst")
@example("generations/acme/log/09/0000000012.json.zst")
@example("generations/acme/log/٣/0000000012.json.zst")
@example(f"checkpoints/acme/log/{CHECKPOINT}/chunk-04-7-{HASH}.blob")
def test_other_objects_are_no_keys_of_ours(text: str) -> None:
    assert parse_key(text) is None


@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/b", "checkpoints/acme/"])
def test_prefixes(prefix: str) -> None:
    assert check_prefix(prefix) == prefix


@pytest.mark.parametrize("prefix", ["/", "/a", "../", "a//", "a/.", ".tmp", "a/../b", "a b", "a\0"])
def test_hostile_prefixes_are_refused(prefix: str) -> None:
    with pytest.raises(InvalidKey):
        check_prefix(prefix)
