"""Many databases followed by one process.

Invariants: no file is followed twice, and no two files go to one database.
Concurrency: a task for each database, a small pool for all that blocks, one inotify descriptor.
Cancellation: followers are asked to end; those that do not in time are cancelled and joined.
Crash: see `follower`.
"""

import asyncio
import contextlib
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from app.client import BopClient
from app.replication.events import Event, Status, Tell
from app.replication.follower import Follower
from app.replication.notify import Notifier
from app.replication.open_files import file_id
from app.replication.plan import Limits
from app.replication.replica import Refused, Target
from app.replication.targets import DirectoryRule, Found, Rule, directories, find_targets_blocking

POOL_THREADS = 8
STOP_SECONDS = 5.0
RESCAN_SECONDS = 10.0
RETRY_REFUSED_SECONDS = 60.0
OPEN_FILES_WANTED = 65_536


class Fleet:
    """`run` is called once."""

    def __init__(
        self,
        rules: list[Rule],
        client: BopClient,
        *,
        tell: Tell,
        limits: Limits | None = None,
        set_wal: bool = False,
    ) -> None:
        self._rules = rules
        self._client = client
        self._tell = tell
        self._limits = limits or Limits()
        self._set_wal = set_wal
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="replicate")
        self._notifier = Notifier()
        self._followers: dict[Path, Follower] = {}
        self._stopping = asyncio.Event()
        self._names_changed = asyncio.Event()
        self._unnamed: set[Path] = set()
        self._watches: set[Path] = set()

    @property
    def statuses(self) -> dict[str, Status]:
        """By the databases' names."""
        return {each.target.name: each.status for each in self._followers.values()}

    @property
    def followers(self) -> list[Follower]:
        return list(self._followers.values())

    @property
    def targets(self) -> list[Target]:
        return [each.target for each in self._followers.values()]

    def stop(self) -> None:
        self._stopping.set()
        self._names_changed.set()
        for follower in self._followers.values():
            follower.stop()

    async def run(self, *, once: bool) -> None:
        """Until `stop`, or, with `once`, until all is sent; also when everything was refused and
        no directory can bring more. `statuses` say what was refused.
        """
        _allow_open_files()
        try:
            with self._notifier:
                async with asyncio.TaskGroup() as group:
                    await self._run(group, once=once)
        finally:
            self._pool.shutdown(wait=True)

    async def _run(self, group: asyncio.TaskGroup, *, once: bool) -> None:
        tasks: set[asyncio.Task[None]] = set()
        lasting = not once and any(isinstance(rule, DirectoryRule) for rule in self._rules)
        try:
            while not self._stopping.is_set():
                for follower in await self._new_followers():
                    tasks.add(group.create_task(self._follow(follower, once=once)))
                if once or not lasting:
                    if tasks:
                        await asyncio.wait(tasks)
                    return
                await self._rest(RESCAN_SECONDS)
        finally:
            await _ended(tasks)

    async def _new_followers(self) -> list[Follower]:
        """Followers of the files that have come; those whose files went wait for them."""
        loop = asyncio.get_running_loop()
        found: Found = await loop.run_in_executor(self._pool, find_targets_blocking, self._rules)
        for directory in directories(self._rules) - self._watches:
            if self._notifier.watch(directory, self._on_names):
                self._watches.add(directory)
        for path, reason in found.unnamed:
            if path not in self._unnamed:
                self._unnamed.add(path)
                self._tell(Event(event="refused", database=str(path), detail=f"{reason}."))
        made: list[Follower] = []
        for target in found.targets:
            if target.path in self._followers:
                continue
            follower = Follower(
                target,
                self._client,
                self._pool,
                tell=self._tell,
                limits=self._limits,
                set_wal=self._set_wal,
            )
            if clash := self._clash(target):
                self._refuse(follower, Refused(clash, code="configuration"))
            else:
                made.append(follower)
            self._followers[target.path] = follower
            self._watch(follower)
        return made

    def _clash(self, target: Target) -> str | None:
        mine = file_id(target.path)
        for path, other in self._followers.items():
            if other.status.refusal_code == "configuration":
                continue
            if other.target.name == target.name:
                return f"{target.path} and {path} would go to the same database"
            if mine is not None and file_id(path) == mine:
                return f"{target.path} and {path} are the same file"
        return None

    def _watch(self, follower: Follower) -> None:
        given = follower.target.path.absolute()
        path = given.resolve()
        names = {given.name, path.name, f"{path.name}-wal"}

        def changed(name: str, _names_changed: bool) -> None:
            if name in names or not name:
                follower.wake()

        if given.parent != path.parent:
            self._notifier.watch(given.parent, changed)
        if self._notifier.watch(path.parent, changed):
            follower.watched = path

    def _on_names(self, name: str, names_changed: bool) -> None:
        if names_changed or not name.endswith(("-wal", "-shm", "-journal")):
            self._names_changed.set()

    async def _follow(self, follower: Follower, *, once: bool) -> None:
        """A refused database is tried again now and then, where others keep the process."""
        while not self._stopping.is_set():
            try:
                await follower.run(once=once)
            except Refused as refusal:
                self._refuse(follower, refusal)
                if once or len(self._followers) == 1:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_REFUSED_SECONDS):
                        await self._stopping.wait()
                follower.status.refusal = None
            else:
                return

    def _refuse(self, follower: Follower, refusal: Refused) -> None:
        told = follower.status.refusal_code == refusal.code
        follower.status.refusal, follower.status.refusal_code = str(refusal), refusal.code
        if not told:
            self._tell(
                Event(
                    event="refused",
                    database=follower.target.name,
                    detail=f"{refusal}",
                    members={"code": refusal.code},
                )
            )

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._names_changed.wait()
        self._names_changed.clear()


async def _ended(tasks: set[asyncio.Task[None]]) -> None:
    if not tasks:
        return
    _, left = await asyncio.wait(tasks, timeout=STOP_SECONDS)
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left)


def _allow_open_files() -> None:
    """A followed database takes a dozen descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
