"""Many databases followed by one process.

Invariants: no file is followed twice, and no two files go to one database.
Concurrency: a task for each database, a small pool for all that blocks, one inotify descriptor.
Cancellation: followers are asked to end; those that do not in time are cancelled and joined.
Crash: see `follower`.
"""

import asyncio
import contextlib
import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from app.client import BopClient
from app.replication.events import Event, Status, Tell
from app.replication.follower import Follower
from app.replication.notify import Changed, Notifier
from app.replication.open_files import FileId, file_id
from app.replication.plan import Limits
from app.replication.replica import Refused, Target
from app.replication.shares import Shares
from app.replication.source import SIDE_FILES
from app.replication.targets import DirectoryRule, Found, Rule, find_targets_blocking

POOL_THREADS = 8
STOP_SECONDS = 5.0
RESCAN_SECONDS = 10.0
SCAN_PAUSE_SECONDS = 0.2
"""Between two looks at directories in which names come and go without a pause."""
RETRY_REFUSED_SECONDS = 60.0
OPEN_FILES_WANTED = 65_536
FILES_PER_DATABASE = 12
FILES_KEPT_FREE = 160
"""For connections to the service and all that is opened for a moment."""


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
        self._shares = Shares(self._limits.carried_bytes_all)
        self._notifier = Notifier()
        self._followers: dict[Path, Follower] = {}
        self._tasks: dict[Path, asyncio.Task[None]] = {}
        """Of the followers but those that were refused by this side."""
        self._listeners: dict[Path, Changed] = {}
        self._directory_listeners: dict[Path, Changed] = {}
        self._stopping = asyncio.Event()
        self._names_changed = asyncio.Event()
        self.unnamed: dict[Path, str] = {}
        """Databases that have no name to go by, and why."""
        self.unreadable: dict[Path, str] = {}
        """Directories, and why they are."""
        self._databases_max = sys.maxsize
        self._is_lasting = False

    @property
    def statuses(self) -> dict[str, Status]:
        """By the databases' names; of two files that would go to one, that of the one that does."""
        statuses = {each.target.name: each.status for each in self._followers.values()}
        return statuses | {
            self._followers[path].target.name: self._followers[path].status for path in self._tasks
        }

    @property
    def followers(self) -> list[Follower]:
        return list(self._followers.values())

    def stop(self) -> None:
        self._stopping.set()
        self._names_changed.set()
        for follower in self._followers.values():
            follower.stop()

    async def run(self, *, once: bool) -> None:
        """Until `stop`, or, with `once`, until all is sent; also when the one file that there is
        was refused. The followers' statuses say what was refused.
        """
        self._databases_max = max(1, (_allow_open_files() - FILES_KEPT_FREE) // FILES_PER_DATABASE)
        self._is_lasting = not once and any(isinstance(rule, DirectoryRule) for rule in self._rules)
        try:
            with self._notifier:
                async with asyncio.TaskGroup() as group:
                    await self._run(group, once=once)
        finally:
            self._pool.shutdown(wait=True)

    async def _run(self, group: asyncio.TaskGroup, *, once: bool) -> None:
        try:
            while not self._stopping.is_set():
                for follower in await self._new_followers():
                    self._tasks[follower.target.path] = group.create_task(
                        self._follow(follower, once=once)
                    )
                if not self._is_lasting:
                    if self._tasks:
                        await asyncio.wait(self._tasks.values())
                    return
                await self._rest(RESCAN_SECONDS)
        finally:
            await _ended(set(self._tasks.values()))

    # --- which there are

    async def _new_followers(self) -> list[Follower]:
        """Followers of the files that have come. Those whose files went end; where a file is listed
        by its name, its follower waits for it instead.
        """
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._pool, find_targets_blocking, self._rules)
        for directory in found.directories:
            self._watch_names(directory)
        self._tell_left_out(found)
        if not found.unreadable:  # else what is there is not known
            await self._forget(self._followers.keys() - {each.path for each in found.targets})
        known = list(self._followers)
        ids = await loop.run_in_executor(
            self._pool, _ids_blocking, [*known, *(each.path for each in found.targets)]
        )
        followed = {self._followers[path].target.name: path for path in self._tasks}
        followed_ids = {ids[path]: path for path in self._tasks if ids[path] is not None}
        made: list[Follower] = []
        for target in found.targets:
            if target.path in self._tasks:
                continue
            follower = self._followers.get(target.path) or self._follower(target)
            self._followers[target.path] = follower
            file = ids[target.path]
            if (other := followed.get(target.name)) is not None:
                self._clash(follower, f"{target.path} and {other} would go to the same database")
            elif file is not None and (other := followed_ids.get(file)) is not None:
                self._clash(follower, f"{target.path} and {other} are the same file")
            elif len(followed) >= self._databases_max:
                self._clash(
                    follower,
                    f"{len(followed)} databases are as many as the limit of open files allows; "
                    "raise it (ulimit -n, LimitNOFILE) and start again",
                )
            else:
                follower.status.refusal = None
                followed[target.name] = target.path
                if file is not None:
                    followed_ids[file] = target.path
                self._watch(follower)
                made.append(follower)
        return made

    def _follower(self, target: Target) -> Follower:
        return Follower(
            target,
            self._client,
            self._pool,
            tell=self._tell,
            limits=self._limits,
            set_wal=self._set_wal,
            watch=self._watch,
            shares=self._shares,
        )

    async def _forget(self, paths: set[Path]) -> None:
        tasks = {self._tasks.pop(path) for path in paths if path in self._tasks}
        for path in paths:
            self._followers.pop(path).stop()
            if (changed := self._listeners.pop(path, None)) is not None:
                self._notifier.forget(changed)
        await _ended(tasks)

    def _tell_left_out(self, found: Found) -> None:
        for path, reason in found.unnamed:
            if path not in self.unnamed:
                self._tell(Event(event="refused", database=str(path), detail=f"{reason}."))
        for path, reason in set(found.unreadable) - self.unreadable.items():
            self._tell(
                Event(
                    event="waiting",
                    database=str(path),
                    detail=f"{path} cannot be read: {reason}.",
                )
            )
        self.unnamed, self.unreadable = dict(found.unnamed), dict(found.unreadable)

    # --- what wakes them

    def _watch(self, follower: Follower) -> None:
        given = follower.target.path.absolute()
        path = Path(os.path.realpath(given))
        changed = self._listeners.get(follower.target.path)
        if changed is None:

            def changed(_name: str, _names_changed: bool) -> None:
                follower.wake()

            self._listeners[follower.target.path] = changed
        names = {given.name, path.name, f"{path.name}-wal"}
        if given.parent != path.parent:
            self._notifier.watch(given.parent, changed, names)
        if self._notifier.watch(path.parent, changed, names):
            follower.watched = path

    def _watch_names(self, directory: Path) -> None:
        """New names, and new content of what is not followed: perhaps it is a database now."""
        changed = self._directory_listeners.get(directory)
        if changed is None:

            def changed(name: str, names_changed: bool) -> None:
                is_followed = directory / name in self._tasks
                if not name.endswith(SIDE_FILES) and (names_changed or not is_followed):
                    self._names_changed.set()

            self._directory_listeners[directory] = changed
        self._notifier.watch(directory, changed)

    # --- follow

    async def _follow(self, follower: Follower, *, once: bool) -> None:
        """A refused database is tried again now and then, where others keep the process."""
        while not follower.is_stopped:
            try:
                await follower.run(once=once)
            except Refused as refusal:
                self._refuse(follower, refusal)
                if once or not (self._is_lasting or len(self._followers) > 1):
                    return
                await follower.pause(RETRY_REFUSED_SECONDS)
                follower.status.refusal = None
            else:
                return

    def _clash(self, follower: Follower, reason: str) -> None:
        self._refuse(follower, Refused(f"{reason}.", code="configuration"))

    def _refuse(self, follower: Follower, refusal: Refused) -> None:
        status = follower.status
        is_told = status.refusal_code == refusal.code
        status.refusal, status.refusal_code = str(refusal), refusal.code
        follower.refused = refusal
        if not is_told:
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
            async with asyncio.timeout(SCAN_PAUSE_SECONDS):
                await self._stopping.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._names_changed.wait()
        self._names_changed.clear()


def _ids_blocking(paths: list[Path]) -> dict[Path, FileId | None]:
    return {path: file_id(path) for path in paths}


async def _ended(tasks: set[asyncio.Task[None]]) -> None:
    if not tasks:
        return
    _, left = await asyncio.wait(tasks, timeout=STOP_SECONDS)
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left)


def _allow_open_files() -> int:
    """How many may be open, after asking for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return OPEN_FILES_WANTED if soft == resource.RLIM_INFINITY else soft
