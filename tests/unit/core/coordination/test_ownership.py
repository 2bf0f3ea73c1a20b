"""Who owns the prefix: the decision as values, the claim on a real store."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from app.core.base.errors import OwnershipLost
from app.core.coordination.ownership import (
    Claimant,
    OwnerRecord,
    PrefixOwnership,
    Refuse,
    TakeEpoch,
    decide_claim,
    is_still_owner,
)
from app.core.stores.remote.keys import OWNER_KEY
from app.core.stores.remote.protocol import RemoteMisconfigured, RemoteStore
from tests.helpers.fake_clock import FakeClock
from tests.helpers.remote import bytes_body, opened_remote


def record(**changed: object) -> OwnerRecord:
    fields: dict[str, object] = {
        "node_id": "node-a", "epoch": 7, "process_id": "p1", "host": "h", "claimed_at": "then",
    }  # fmt: skip
    return OwnerRecord(**{**fields, **changed})


def claimant(node_id: str, *, take_over: bool = False) -> Claimant:
    return Claimant(node_id=node_id, process_id="p2", host="h2", take_over=take_over)


def test_an_empty_prefix_is_taken() -> None:
    assert decide_claim(None, claimant("node-a")) == TakeEpoch(epoch=1)


def test_the_same_node_takes_the_next_epoch_at_once() -> None:
    assert decide_claim(record(), claimant("node-a")) == TakeEpoch(epoch=8)


def test_another_node_is_refused_unless_it_takes_over() -> None:
    decision = decide_claim(record(), claimant("node-b"))
    assert isinstance(decision, Refuse)
    for told in ("node-a", "--take-over", "BOP_REMOTE_URL", "epoch 7"):
        assert told in decision.reason
    assert decide_claim(record(), claimant("node-b", take_over=True)) == TakeEpoch(epoch=8)


@pytest.mark.parametrize(
    ("found", "still"),
    [
        (record(), True), (record(host="other", claimed_at="later"), True), (None, False),
        (record(epoch=8), False), (record(epoch=6), False),
        (record(process_id="p2"), False), (record(node_id="node-b"), False),
    ],
)  # fmt: skip
def test_who_is_still_owner(found: OwnerRecord | None, still: bool) -> None:
    assert is_still_owner(found, record()) is still


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[RemoteStore]:
    async with opened_remote(f"file://{tmp_path / 'remote'}") as opened:
        yield opened


def owner(
    store: RemoteStore, node_id: str, process_id: str = "p", *, take_over: bool = False
) -> PrefixOwnership:
    return PrefixOwnership(
        store,
        node_id=node_id,
        process_id=process_id,
        host="host",
        take_over=take_over,
        clock=FakeClock(),
    )


async def test_claim_then_confirm(store: RemoteStore) -> None:
    claim = owner(store, "node-a", "p1")
    assert claim.epoch == 0
    with pytest.raises(OwnershipLost):
        await claim.confirm()
    assert await claim.claim() == 1
    assert claim.epoch == 1
    await claim.confirm()
    written = msgspec.json.decode(await store.get_blob(OWNER_KEY), type=OwnerRecord)
    assert (written.node_id, written.epoch, written.process_id) == ("node-a", 1, "p1")
    assert written.claimed_at.endswith("Z")


async def test_a_restart_fences_its_predecessor(store: RemoteStore) -> None:
    before, after = owner(store, "node-a", "p1"), owner(store, "node-a", "p2")
    await before.claim()
    assert await after.claim() == 2
    with pytest.raises(OwnershipLost, match="epoch 2"):
        await before.confirm()
    await after.confirm()


async def test_another_node_must_say_that_it_takes_over(store: RemoteStore) -> None:
    first = owner(store, "node-a")
    await first.claim()
    with pytest.raises(OwnershipLost, match="--take-over"):
        await owner(store, "node-b").claim()
    await first.confirm()
    assert await owner(store, "node-b", take_over=True).claim() == 2
    with pytest.raises(OwnershipLost, match="node-b"):
        await first.confirm()


async def test_claiming_again_raises_the_epoch(store: RemoteStore) -> None:
    claim = owner(store, "node-a")
    assert [await claim.claim() for _ in range(3)] == [1, 2, 3]
    await claim.confirm()


async def test_an_owner_object_that_is_gone_is_a_loss_and_never_lowers_the_epoch(
    store: RemoteStore,
) -> None:
    claim = owner(store, "node-a")
    await claim.claim()
    await claim.claim()
    await store.delete_blobs([OWNER_KEY])
    with pytest.raises(OwnershipLost, match="nobody"):
        await claim.confirm()
    assert await claim.claim() == 3


async def test_a_foreign_object_in_the_owner_s_place_is_not_overwritten(
    store: RemoteStore,
) -> None:
    await store.put_blob(OWNER_KEY, bytes_body(b"not ours"))
    with pytest.raises(RemoteMisconfigured):
        await owner(store, "node-a").claim()
    assert await store.get_blob(OWNER_KEY) == b"not ours"


async def test_a_newer_version_s_record_is_understood(store: RemoteStore) -> None:
    raw = msgspec.json.encode({**msgspec.to_builtins(record()), "added_later": [1]})
    await store.put_blob(OWNER_KEY, bytes_body(raw))
    assert await owner(store, "node-a").claim() == 8


async def test_a_race_gives_each_claim_its_own_epoch(store: RemoteStore) -> None:
    claims = [owner(store, "node-a", f"p{number}") for number in range(8)]
    epochs = await asyncio.gather(*(claim.claim() for claim in claims))
    assert sorted(epochs) == list(range(1, 9))
    still = []
    for claim in claims:
        with contextlib.suppress(OwnershipLost):
            await claim.confirm()
            still.append(claim.epoch)
    assert still == [8]
