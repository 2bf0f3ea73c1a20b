"""Two people, one act, on the manifest itself."""

import asyncio

import pytest

from app.core.base.clock import SeededRandomness
from app.core.base.errors import (
    ApprovalNotFound,
    DatabaseNotFound,
    LeaseNotFound,
    ManifestFull,
    SelfApproval,
)
from app.core.base.events import Events
from app.core.services.approvals import Approvals
from app.core.services.audit import ActionEnd, AdminAction, Audit
from app.core.stores.manifest.conditions import ExpectLeases
from app.core.stores.manifest.errors import LeaseLost
from app.core.stores.manifest.ops import (
    AcquireLease,
    CreateDatabase,
    ManifestBatch,
    PutMeta,
    ReleaseLeases,
    RenewLeases,
)
from app.core.stores.manifest.store import ManifestStore
from migrations.runner import load_steps
from tests.helpers.fake_clock import FakeClock


def sees(tenant: str) -> bool:
    return tenant == "acme"


class Directory:
    """Names to rows, straight from the manifest."""

    def __init__(self, manifest: ManifestStore) -> None:
        self._manifest = manifest

    def read(self, tenant, name):
        with self._manifest.read() as view:
            db_id = view.database_id(tenant, name)
            if db_id is None:
                raise DatabaseNotFound
            return view.database(db_id)


class Setting:
    def __init__(self, manifest: ManifestStore, clock: FakeClock, *, needed: bool = True) -> None:
        self.manifest, self.clock = manifest, clock
        self.told: list[str] = []
        self.events = Events(lambda name, level, fields: self.told.append(name))
        self.approvals = Approvals(
            manifest, Directory(manifest), clock=clock, randomness=SeededRandomness(5),
            events=self.events, needed=needed, valid_seconds=3600,
        )  # fmt: skip

    async def commit(self, *ops, expect=()):
        return await self.manifest.commit(
            ManifestBatch(ops=ops, preconditions=tuple(expect), reason="test")
        )

    async def lease(self, job_id: str = "J1", chunk_id: int = 0) -> int:
        receipt = await self.commit(
            AcquireLease(db_id=1, chunk_id=chunk_id, generation=1, job_id=job_id, ttl_seconds=60.0)
        )
        return receipt.results[0]

    async def ask(self, principal: str = "ann", chunk_id: int = 0):
        return await self.approvals.release_lease(
            "acme", "db", chunk_id, reason="it hangs", principal=principal
        )

    def held(self) -> list[str]:
        with self.manifest.read() as view:
            return [lease.job_id for lease in view.leases()]


async def opened(path, clock):
    return await ManifestStore.open(
        path, clock=clock, events=Events(), process_id="p", map_bytes=1 << 26, max_readers=8,
        migrations=load_steps(), on_fatal=pytest.fail,
    )  # fmt: skip


@pytest.fixture
async def setting(tmp_path):
    clock = FakeClock()
    manifest = await opened(tmp_path / "manifest", clock)
    setting = Setting(manifest, clock)
    await setting.commit(
        CreateDatabase(
            tenant="acme", name="db", engine="libsql", page_size=4096, chunk_bytes=1 << 26,
            compression="none", created_at_us=1,
        )
    )  # fmt: skip
    yield setting
    await manifest.aclose()


async def test_the_holder_is_fenced(setting):
    """Its publication and its renewals are refused, and whoever comes next has a higher token."""
    token, other = await setting.lease(), await setting.lease(chunk_id=1)
    asked = await setting.ask()
    assert setting.held() == ["J1", "J1"]
    await setting.approvals.approve(asked.approval_id, principal="bob", sees=sees)
    assert setting.held() == ["J1"]
    with pytest.raises(LeaseLost):
        await setting.commit(
            PutMeta(name="published", value=b""),
            expect=[ExpectLeases(db_id=1, job_id="J1", tokens=((0, token), (1, other)))],
        )
    with pytest.raises(LeaseLost):
        await setting.commit(RenewLeases(job_id="J1", ttl_seconds=60.0, count_min=2))
    assert await setting.lease("J2") > other + 1
    assert "lease.released_by_force" in setting.told


async def test_nobody_approves_what_they_asked_for(setting):
    await setting.lease()
    asked = await setting.ask()
    with pytest.raises(SelfApproval):
        await setting.approvals.approve(asked.approval_id, principal="ann", sees=sees)
    assert setting.held() == ["J1"]
    taken_back = await setting.approvals.reject(asked.approval_id, principal="ann", sees=sees)
    assert (taken_back.state, taken_back.decided_by) == ("rejected", "ann")
    with pytest.raises(ApprovalNotFound):
        await setting.approvals.approve(asked.approval_id, principal="bob", sees=sees)
    assert setting.held() == ["J1"]


async def test_a_lease_that_changed_hands_is_not_released(setting):
    await setting.lease()
    asked = await setting.ask()
    await setting.commit(ReleaseLeases(job_id="J1"))
    await setting.lease("J2")
    with pytest.raises(LeaseNotFound):
        await setting.approvals.approve(asked.approval_id, principal="bob", sees=sees)
    assert setting.held() == ["J2"]
    (row,) = setting.approvals.list(limit=10, after=None)
    assert row.state == "pending"  # the refused batch left nothing behind


async def test_an_approval_expires(setting):
    await setting.lease()
    asked = await setting.ask()
    setting.clock.jump_wall(3600)
    assert setting.approvals.is_expired(asked)
    with pytest.raises(ApprovalNotFound, match="state='expired'"):
        await setting.approvals.approve(asked.approval_id, principal="bob", sees=sees)
    assert (await setting.ask()).approval_id != asked.approval_id


async def test_the_same_question_is_one_approval(setting):
    await setting.lease()
    first, second, other = await setting.ask(), await setting.ask(), await setting.ask("bob")
    assert first.approval_id == second.approval_id != other.approval_id
    done = [
        await setting.approvals.approve(first.approval_id, principal="bob", sees=sees)
        for _ in range(2)
    ]
    assert done[0] == done[1]


async def test_two_decisions_at_once_are_one(setting):
    await setting.lease()
    asked = await setting.ask()
    answers = await asyncio.gather(
        setting.approvals.approve(asked.approval_id, principal="bob", sees=sees),
        setting.approvals.reject(asked.approval_id, principal="cho", sees=sees),
        return_exceptions=True,
    )
    failed = [one for one in answers if isinstance(one, ApprovalNotFound)]
    assert len(failed) == 1
    (row,) = setting.approvals.list(limit=10, after=None)
    assert (row.state == "approved") == (setting.held() == [])


async def test_what_is_not_there(setting):
    with pytest.raises(LeaseNotFound):
        await setting.ask()
    await setting.lease()
    with pytest.raises(DatabaseNotFound):
        await setting.approvals.release_lease("acme", "no", 0, reason="r", principal="ann")
    asked = await setting.ask()
    for wrong_id, sight in (("nothing", sees), (asked.approval_id, lambda tenant: False)):
        with pytest.raises(ApprovalNotFound):
            await setting.approvals.approve(wrong_id, principal="bob", sees=sight)


async def test_switched_off_it_happens_at_once_and_is_kept(setting):
    alone = Setting(setting.manifest, setting.clock, needed=False)
    await alone.lease()
    done = await alone.ask()
    assert (done.state, done.decided_by, alone.held()) == ("approved", "ann", [])
    assert alone.approvals.list(limit=10, after=None) == [done]


async def test_approvals_outlive_the_process(tmp_path):
    clock = FakeClock()
    first = Setting(await opened(tmp_path / "manifest", clock), clock)
    await first.commit(
        CreateDatabase(
            tenant="acme", name="db", engine="libsql", page_size=4096, chunk_bytes=1 << 26,
            compression="none", created_at_us=1,
        )
    )  # fmt: skip
    await first.lease()
    asked = await first.ask()
    await first.manifest.aclose()
    second = Setting(await opened(tmp_path / "manifest", clock), clock)
    await second.approvals.approve(asked.approval_id, principal="bob", sees=sees)
    assert second.held() == []
    await second.manifest.aclose()


ACTION = AdminAction(
    principal="ann", action="POST /admin/queue/drain", path="/admin/queue/drain",
    request_id="r1", tenant=None, reason="deploy", request="{}",
)  # fmt: skip


async def test_an_action_is_in_the_log_before_it_ends(setting):
    audit = Audit(setting.manifest, clock=setting.clock, events=setting.events)
    first = await audit.begin(ACTION)
    second = await audit.begin(ACTION)
    await audit.end(second, ACTION, ActionEnd(outcome="done", status=200, answer="{}"))
    newest, oldest = audit.list(limit=10, after=None)
    assert (newest.sequence, newest.outcome, newest.status) == (second, "done", 200)
    assert (oldest.sequence, oldest.outcome, oldest.status) == (first, "unknown", None)
    assert (oldest.principal, oldest.reason, oldest.request_id) == ("ann", "deploy", "r1")
    assert audit.list(limit=10, after=second) == [oldest]


async def test_with_a_full_map_what_makes_room_stays_possible(setting):
    audit = Audit(setting.manifest, clock=setting.clock, events=setting.events)

    async def full(batch):
        raise ManifestFull

    audit._manifest = type("Full", (), {"commit": staticmethod(full)})()
    sequence = await audit.begin(ACTION)
    await audit.end(sequence, ACTION, ActionEnd(outcome="done"))
    assert sequence is None
    assert setting.told == ["audit.unrecorded", "admin.acted"]
