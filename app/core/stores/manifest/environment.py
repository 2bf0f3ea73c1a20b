"""The LMDB environment on disk: made, opened, copied, and judged when it fails.

Invariants: default durability flags only, so that an acknowledged commit survives a power cut
(I1, I3); the map's size is set once, at opening; one owner per directory, by flock (I17).
Concurrency: opening, copying and closing block and happen off the event loop; a read transaction
may be used on any thread (py-lmdb opens without thread-local readers), one at a time; a write
transaction begins and ends on one thread.
Crash: the environment is made beside its place, synced and renamed; a crash leaves all of it or
none, and the next start removes the remains.
"""

import errno
import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import lmdb

from app.core.base import failpoints
from app.core.base.clock import Clock, Randomness, wall_us
from app.core.base.errors import DiskFull, InternalError, StartRefused, StorageFailure
from app.core.base.ids import new_ulid
from app.core.stores.manifest.rows import CommittedRows, Handles
from app.core.stores.manifest.tables import SCHEMA, TABLES, meta_key

DATABASES_MAX = 64
_ROOM_BYTES_MIN = 4 * 1024 * 1024
"""With less free than this, an EIO is LMDB's word for a short write on a full disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    path: Path
    bytes: int


class ManifestEnvironment:
    """An open environment and its tables' handles."""

    def __init__(self, path: Path, environment: lmdb.Environment, lock_fd: int) -> None:
        self.path = path
        self._environment = environment
        self._lock_fd = lock_fd
        self.handles: Handles = {}
        self.is_new = False

    def open_tables_blocking(self, transaction: lmdb.Transaction) -> None:
        """Opens every table, making those that are missing, in the given write transaction."""
        self.handles = {
            table: self._environment.open_db(table.stored_name, txn=transaction) for table in TABLES
        }

    def open_schema_blocking(self) -> None:
        """Opens the one table that says what else is to be expected."""
        try:
            handle = self._environment.open_db(SCHEMA.stored_name, create=False)
        except lmdb.NotFoundError as error:
            raise StartRefused(f"{self.path} is an LMDB environment, but no manifest.") from error
        self.handles = {SCHEMA: handle}

    def begin(self, *, write: bool = False) -> lmdb.Transaction:
        return self._environment.begin(write=write)

    def clear_stale_readers(self) -> int:
        """Frees the slots of dead processes; gives how many."""
        return self._environment.reader_check()

    def last_transaction_id(self) -> int:
        """Of the newest commit; a reader that begins at once may still see the one before."""
        return int(self._environment.info()["last_txnid"])

    def map_use(self) -> dict[str, int]:
        info = self._environment.info()
        page_bytes = self._environment.stat()["psize"]
        slots = self._environment.readers().strip().splitlines()
        return {
            "map_bytes": info["map_size"],
            "page_bytes": page_bytes,
            "high_water_bytes": (info["last_pgno"] + 1) * page_bytes,
            "last_transaction_id": info["last_txnid"],
            "readers": sum(1 for line in slots if line.split()[:1] and line.split()[0].isdigit()),
            "readers_max": info["max_readers"],
        }

    def backup_blocking(self, target: Path) -> Backup:
        """A compacted copy of the newest committed state, durable on return. `target` must not
        exist; it appears whole or not at all. Writers and readers go on meanwhile.
        """
        if target.exists():
            raise InternalError("The backup's directory exists already.", path=str(target))
        partial = target.with_name(f".{target.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self._environment.copy(str(partial), compact=True)
            data = partial / "data.mdb"
            fsync_path_blocking(data)
            fsync_path_blocking(partial)
            partial.rename(target)
            fsync_path_blocking(target.parent)
        except (lmdb.Error, OSError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if is_disk_full(error, target.parent):
                raise DiskFull("No room for the manifest's backup.") from error
            raise InternalError(f"The manifest's backup failed: {error}.") from error
        return Backup(path=target, bytes=(target / "data.mdb").stat().st_size)

    def close_blocking(self) -> None:
        """No transaction may be open."""
        self._environment.close()
        os.close(self._lock_fd)


def open_environment_blocking(
    path: Path, *, map_bytes: int, max_readers: int, clock: Clock, randomness: Randomness
) -> ManifestEnvironment:
    """Opens the environment in the directory `path`, making it where there is none.

    Raises `StartRefused` if another process owns it or it is no environment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_fd = _lock_blocking(path.with_name(f"{path.name}.lock"))
    try:
        is_new = not (path / "data.mdb").exists()
        if is_new:
            _create_blocking(
                path,
                map_bytes=map_bytes,
                max_readers=max_readers,
                clock=clock,
                randomness=randomness,
            )
        environment = lmdb.open(
            str(path),
            map_size=map_bytes,
            max_dbs=DATABASES_MAX,
            max_readers=max_readers,
            create=False,
        )
    except lmdb.Error as error:
        os.close(lock_fd)
        raise StartRefused(f"The manifest in {path} cannot be opened: {error}") from error
    except BaseException:
        os.close(lock_fd)
        raise
    opened = ManifestEnvironment(path, environment, lock_fd)
    opened.is_new = is_new
    try:
        opened.clear_stale_readers()
        opened.open_schema_blocking()
    except lmdb.Error as error:
        opened.close_blocking()
        raise StartRefused(f"The manifest in {path} is damaged: {error}") from error
    except BaseException:
        opened.close_blocking()
        raise
    return opened


def storage_error(error: lmdb.Error | OSError, path: Path) -> DiskFull | StorageFailure:
    """A full disk, proven, costs a request; everything else ends the process (I16)."""
    if is_disk_full(error, path):
        return DiskFull("The disk under the manifest is full; nothing of the batch was kept.")
    return StorageFailure(f"The manifest's LMDB failed: {error}")


def is_disk_full(error: lmdb.Error | OSError, path: Path) -> bool:
    """LMDB reports a short write as EIO: then the file system is asked for its room."""
    code = error.errno if isinstance(error, OSError) else getattr(error, "code", 0)
    if code in {errno.ENOSPC, errno.EDQUOT}:
        return True
    if code != errno.EIO:
        return False
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize < _ROOM_BYTES_MIN


def fsync_path_blocking(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock_blocking(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise StartRefused(
            f"Another process owns this manifest ({path} is locked): stop it first."
        ) from error
    return fd


def _create_blocking(
    path: Path, *, map_bytes: int, max_readers: int, clock: Clock, randomness: Randomness
) -> None:
    if path.exists() and any(path.iterdir()):
        raise StartRefused(f"{path} is not empty, and holds no manifest (data.mdb is missing).")
    being_made = path.with_name(f".{path.name}.new")
    shutil.rmtree(being_made, ignore_errors=True)
    being_made.mkdir(mode=0o700)
    # Engine 0.9: its files stay readable by other tools, and no environment variable has a say.
    # The reader table is sized here; LMDB grows it later, but never shrinks it.
    environment = lmdb.open(
        str(being_made),
        map_size=map_bytes,
        max_dbs=DATABASES_MAX,
        max_readers=max_readers,
        lib_version=0,
    )
    try:
        handle = environment.open_db(SCHEMA.stored_name)
        transaction = environment.begin(write=True)
        try:
            rows = CommittedRows(transaction, {SCHEMA: handle})
            rows.put_raw(SCHEMA, meta_key("node_id"), new_ulid(clock, randomness).encode())
            rows.put_raw(SCHEMA, meta_key("created_at"), str(wall_us(clock)).encode())
            transaction.commit()
        except BaseException:
            transaction.abort()
            raise
    finally:
        environment.close()
    fsync_path_blocking(being_made / "data.mdb")
    fsync_path_blocking(being_made)
    failpoints.fp("manifest.before_create_rename")
    being_made.rename(path)
    fsync_path_blocking(path.parent)
    failpoints.fp("manifest.after_create_rename")
