"""Who owns the remote prefix: an object taken by conditional write, with node identity and epoch.

Invariants: I17: epochs of a prefix only grow, and each is held by one process; who finds a higher
epoch, or someone else's name, before it publishes or deletes, ends. The owner object is never
deleted: a restart of the same node takes the next epoch, so a predecessor that still runs is told
apart from its successor.
Concurrency: confined to the event loop; `claim` and `confirm` may run beside each other.
Cancellation: a cancelled claim may have taken effect; the next one takes a higher epoch.
Crash: as cancellation.
"""

from dataclasses import dataclass

import msgspec

from app.core.base import failpoints
from app.core.base.clock import Clock, rfc3339, wall_us
from app.core.base.errors import OwnershipLost, RemoteUnavailable
from app.core.formats.crc64 import crc64
from app.core.stores.remote.keys import OWNER_KEY
from app.core.stores.remote.protocol import BlobMissing, BytesBody, RemoteMisconfigured, RemoteStore

CLAIM_ROUNDS_MAX = 16


class OwnerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`owner.json`. Fields may be added, never renamed: other versions read it."""

    node_id: str
    epoch: int
    process_id: str
    host: str
    claimed_at: str


_decode = msgspec.json.Decoder(OwnerRecord).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimant:
    node_id: str
    process_id: str
    host: str
    take_over: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeEpoch:
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    reason: str


def decide_claim(found: OwnerRecord | None, claimant: Claimant) -> TakeEpoch | Refuse:
    """What a claimant may do about the owner object as it stands."""
    if found is None:
        return TakeEpoch(epoch=1)
    if found.node_id == claimant.node_id or claimant.take_over:
        return TakeEpoch(epoch=found.epoch + 1)
    return Refuse(
        reason=(
            f"The remote prefix belongs to node {found.node_id} on host {found.host!r} (epoch "
            f"{found.epoch}, claimed {found.claimed_at}). Stop that node and start with "
            "--take-over, or choose another prefix with BOP_REMOTE_URL."
        )
    )


def is_still_owner(found: OwnerRecord | None, ours: OwnerRecord) -> bool:
    """The record must be ours to the letter: the same epoch under another name is a usurper's."""
    return found is not None and (found.epoch, found.node_id, found.process_id) == (
        ours.epoch,
        ours.node_id,
        ours.process_id,
    )


class PrefixOwnership:
    def __init__(
        self,
        remote: RemoteStore,
        *,
        node_id: str,
        process_id: str,
        host: str,
        take_over: bool,
        clock: Clock,
    ) -> None:
        self._remote = remote
        self._claimant = Claimant(
            node_id=node_id, process_id=process_id, host=host, take_over=take_over
        )
        self._clock = clock
        self._ours: OwnerRecord | None = None

    @property
    def epoch(self) -> int:
        """0 until claimed."""
        return 0 if self._ours is None else self._ours.epoch

    async def claim(self) -> int:
        """The epoch, durably ours. Raises OwnershipLost where the prefix belongs to another node,
        RemoteUnavailable (OutcomeUnknown, too: simply claim again).
        """
        for _ in range(CLAIM_ROUNDS_MAX):
            found, etag = await self._read()
            decision = decide_claim(found, self._claimant)
            if isinstance(decision, Refuse):
                raise OwnershipLost(decision.reason)
            record = self._record(max(decision.epoch, self.epoch + 1))
            failpoints.fp("ownership.before_claim")
            if await self._write(record, etag=etag):
                failpoints.fp("ownership.after_claim")
                self._ours = record
                return record.epoch
        raise RemoteUnavailable("The remote prefix changes hands too often to be claimed.")

    async def confirm(self) -> None:
        """Returns while the prefix is ours. Raises OwnershipLost if it is not (any more)."""
        if self._ours is None:
            raise OwnershipLost("The remote prefix was never claimed.")
        ours = self._ours
        found = await self._read_record()
        if not is_still_owner(found, ours):
            holder = "nobody" if found is None else f"node {found.node_id}, epoch {found.epoch}"
            raise OwnershipLost(
                f"The remote prefix was ours at epoch {ours.epoch}; now it is held by {holder}."
            )

    async def _read(self) -> tuple[OwnerRecord | None, str]:
        """The record and the ETag to replace it by. An ETag read before the content can only be
        too old, and then the conditional write fails.
        """
        info = await self._remote.head_blob(OWNER_KEY)
        if info is None:
            return None, ""
        return await self._read_record(), info.etag

    async def _read_record(self) -> OwnerRecord | None:
        try:
            data = await self._remote.get_blob(OWNER_KEY)
        except BlobMissing:
            return None
        try:
            return _decode(data)
        except msgspec.DecodeError as error:
            raise RemoteMisconfigured(
                f"{OWNER_KEY} under the remote prefix is no owner record; the prefix may be in "
                "other use. Choose another with BOP_REMOTE_URL."
            ) from error

    async def _write(self, record: OwnerRecord, *, etag: str) -> bool:
        data = msgspec.json.format(msgspec.json.encode(record), indent=2)
        body = BytesBody(data=data, crc64=crc64(data))
        if etag:
            info = await self._remote.put_if_match(OWNER_KEY, body, etag=etag)
        else:
            info = await self._remote.put_if_absent(OWNER_KEY, body)
        return info is not None or await self._is_written(record)

    async def _is_written(self, record: OwnerRecord) -> bool:
        """A conditional write whose answer was lost meets its own object (I15)."""
        return await self._read_record() == record

    def _record(self, epoch: int) -> OwnerRecord:
        return OwnerRecord(
            node_id=self._claimant.node_id,
            epoch=epoch,
            process_id=self._claimant.process_id,
            host=self._claimant.host,
            claimed_at=rfc3339(wall_us(self._clock)),
        )
