"""Writes a log's files: groups of appends, then seals.

Invariants: I1: a group counts once its entries, its new files' names and their rows are durable,
in this order: a file without a row therefore holds nothing acknowledged, and a row says that all
of the file before it was made durable. I13: a group that fails is taken back to the byte, durably.
I16: a failed sync or truncation is never tried again.
Concurrency: one thread at a time per log.
Crash: at any point recovery finds the last acknowledged group, or that and the one being written.
"""

from collections.abc import Sequence
from pathlib import Path

from app.core.base import failpoints
from app.core.base.errors import BopError, NotReady, StorageFailure
from app.core.formats.segment import EngineCode, SegmentHeader, pack_directory
from app.core.stores.wal.disk import Disk
from app.core.stores.wal.draft import Draft
from app.core.stores.wal.failure import judge_directory_sync, judge_write
from app.core.stores.wal.planning import GroupPlan, Run
from app.core.stores.wal.run_writer import RunWriter, write_all
from app.core.stores.wal.segments import (
    NewSegment,
    Segment,
    SegmentCatalog,
    SegmentInfo,
    SegmentMarks,
    segment_name,
)

Written = tuple[tuple[Segment, SegmentMarks], ...]


class LogWriter:
    def __init__(
        self,
        disk: Disk,
        *,
        directory: Path,
        db_id: int,
        engine: EngineCode,
        chunk_bytes: int,
        catalog: SegmentCatalog,
    ) -> None:
        self._disk = disk
        self._directory = directory
        self._db_id = db_id
        self._engine = engine
        self._chunk_bytes = chunk_bytes
        self._catalog = catalog
        self._directory_durable = False

    def draft(self, plan: GroupPlan, *, now_us: int) -> Draft:
        """`plan` gives one request segments of its own."""
        return Draft(
            self._disk, plan, root=self._directory.parent, db_id=self._db_id,
            engine=self._engine, chunk_bytes=self._chunk_bytes, now_us=now_us,
        )  # fmt: skip

    def write_group_blocking(
        self,
        plan: GroupPlan,
        *,
        tail: Segment | None,
        durable_lsn: int,
        now_us: int,
        draft: Draft | None = None,
    ) -> Written:
        """Durable on return: each segment written to, with its new marks. With a draft of the plan
        its files become the segments. Raises DiskFull, NotReady or what the catalogue refused with,
        and nothing of the group is left; StorageFailure when that cannot be known.
        """
        if draft is not None:
            draft.check()
        targets: list[tuple[Segment, Run]] = []
        try:
            failpoints.fp("wal.before_write")
            for run in plan.runs:
                segment = self._target(run, tail, draft)
                targets.append((segment, run))
                if run.creates:
                    segment.identity = self._disk.identify(segment.path)
                if draft is None:
                    self._write_run(segment, run, durable_lsn=durable_lsn, now_us=now_us)
                else:
                    failpoints.fp("wal.mid_link")
            failpoints.fp("wal.after_write")
        except OSError as error:
            judged = judge_write(
                error, disk=self._disk, directory=self._directory, needed_bytes=plan.write_bytes
            )
            if not isinstance(judged, StorageFailure):
                self._take_back(targets)
            raise judged from error
        except BopError:
            self._take_back(targets)
            raise
        self._sync(targets)
        failpoints.fp("wal.after_fsync")
        self._register(targets)
        for segment, run in targets:
            segment.written = run.marks
            for entry in run.entries:
                segment.index.add(first_lsn=entry.first_lsn, offset=entry.offset)
        return tuple((segment, run.marks) for segment, run in targets)

    def seal_blocking(self, segment: Segment) -> SegmentInfo:
        """Directory, trailer and row, all durable. A second call does what the first could not.
        Everything in the segment is complete and durable before. Raises DiskFull, StorageFailure
        or what the catalogue refused with.
        """
        if segment.file_sealed is None:
            failpoints.fp("wal.before_seal")
            info = SegmentInfo.of(
                segment.written_summary(self._db_id), path=segment.path, engine=self._engine,
                index=segment.index.array(), state="sealed",
            )  # fmt: skip
            self._write_directory(segment, info)
            segment.file_sealed = info
        self._catalog.seal_blocking(segment.file_sealed)
        failpoints.fp("wal.after_seal")
        return segment.file_sealed

    def remove_blocking(self, segment_ids: Sequence[int]) -> None:
        """The files are gone, durably. Raises StorageFailure; NotReady where they are gone, but
        there was no descriptor to make that durable with.
        """
        failpoints.fp("wal.before_remove")
        try:
            for segment_id in segment_ids:
                self._disk.unlink(self._directory / segment_name(segment_id))
            self._sync_directory(self._directory)
        except FileNotFoundError:
            pass  # no directory: nothing is left to remove
        except OSError as error:
            raise StorageFailure(f"A WAL segment cannot be removed: {error}") from error
        failpoints.fp("wal.after_remove")

    def truncate_blocking(self, segment: Segment) -> None:
        """Cuts the file to `written`, durably. Raises StorageFailure."""
        try:
            fd = self._open(segment)
            self._disk.truncate(fd, segment.written.entries_end)
            self._disk.sync_data(fd)
        except OSError as error:
            raise StorageFailure(f"A WAL segment cannot be cut: {error}") from error

    def close_blocking(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            self._close(segment)

    # --- writing ------------------------------------------------------------------------------

    def _target(self, run: Run, tail: Segment | None, draft: Draft | None) -> Segment:
        if not run.creates:
            assert tail is not None
            assert tail.segment_id == run.segment_id
            self._open(tail)
            return tail
        path = self._directory / segment_name(run.segment_id)
        segment = Segment(segment_id=run.segment_id, path=path, first_lsn=run.first_lsn)
        if not self._directory_durable:
            # An earlier process may have made it and ended before it was synced.
            self._disk.make_directory(self._directory)
            self._sync_directory(self._directory.parent)
            self._directory_durable = True
        # What may be left of a failed group has no row; unlinked, never overwritten: a promoted
        # chunk is a link to its segment's inode.
        self._disk.unlink(path)
        segment.fd = self._disk.create(path) if draft is None else draft.link_blocking(run, path)
        return segment

    def _write_run(self, segment: Segment, run: Run, *, durable_lsn: int, now_us: int) -> None:
        assert segment.fd is not None
        header = None
        if run.creates:
            header = SegmentHeader(
                engine=self._engine, db_id=self._db_id, segment_id=run.segment_id,
                first_lsn=run.first_lsn, chunk_bytes=self._chunk_bytes,
            )  # fmt: skip
        RunWriter(
            self._disk, segment.fd, run, header=header, durable_lsn=durable_lsn, now_us=now_us
        ).write_blocking()

    def _sync(self, targets: Sequence[tuple[Segment, Run]]) -> None:
        try:
            for segment, _ in targets:
                assert segment.fd is not None
                self._disk.sync_data(segment.fd)
        except OSError as error:
            raise StorageFailure(f"The WAL cannot be synced: {error}") from error
        if any(run.creates for _, run in targets):
            try:
                self._sync_directory(self._directory)
            except NotReady:
                self._take_back(targets)
                raise

    def _register(self, targets: Sequence[tuple[Segment, Run]]) -> None:
        """Rows after the data, and all at once: no crash leaves a row whose segment is to be cut
        whole.
        """
        new = [
            NewSegment(
                segment_id=run.segment_id, first_lsn=segment.first_lsn, ceiling_lsn=run.ceiling_lsn
            )
            for segment, run in targets
            if run.ceiling_lsn > segment.ceiling_lsn
        ]
        if not new:
            return
        failpoints.fp("wal.before_register")
        try:
            self._catalog.register_blocking(db_id=self._db_id, segments=new)
        except BopError:
            self._take_back(targets)
            raise
        failpoints.fp("wal.after_register")
        for segment, run in targets:
            segment.ceiling_lsn = max(segment.ceiling_lsn, run.ceiling_lsn)

    def _take_back(self, targets: Sequence[tuple[Segment, Run]]) -> None:
        """As if the group had never been. Durably, so that what was answered with an error cannot
        come back after a power cut (I13).
        """
        try:
            for segment, run in reversed(targets):
                if run.creates:
                    self._empty(segment)  # its name may come back
                    self._close(segment)
                    self._disk.unlink(segment.path)
                else:
                    self.truncate_blocking(segment)
        except OSError as error:
            raise StorageFailure(f"A failed write cannot be taken back: {error}") from error

    # --- sealing ------------------------------------------------------------------------------

    def _write_directory(self, segment: Segment, info: SegmentInfo) -> None:
        directory = pack_directory(info.summary, info.index)
        half = len(directory) // 2
        offset = info.entries_end
        try:
            fd = self._open(segment)
            write_all(self._disk, fd, [directory[:half]], offset)
            failpoints.fp("wal.mid_seal")
            write_all(self._disk, fd, [directory[half:]], offset + half)
        except OSError as error:
            judged = judge_write(
                error, disk=self._disk, directory=self._directory, needed_bytes=len(directory)
            )
            if not isinstance(judged, StorageFailure):
                self.truncate_blocking(segment)
            raise judged from error
        try:
            self._disk.sync_data(fd)
        except OSError as error:
            raise StorageFailure(f"A sealed segment cannot be synced: {error}") from error
        self._close(segment)

    # --- files --------------------------------------------------------------------------------

    def _open(self, segment: Segment) -> int:
        if segment.fd is None:
            segment.fd = self._disk.open(segment.path, writable=True)
        return segment.fd

    def _empty(self, segment: Segment) -> None:
        if segment.fd is not None:
            self._disk.truncate(segment.fd, 0)
            self._disk.sync_data(segment.fd)

    def _close(self, segment: Segment) -> None:
        if segment.fd is not None:
            fd, segment.fd = segment.fd, None
            self._disk.close(fd)

    def _sync_directory(self, path: Path) -> None:
        """Raises NotReady where it could not even be opened for want of a descriptor."""
        try:
            self._disk.sync_directory(path)
        except OSError as error:
            raise judge_directory_sync(error) from error
