"""The mutants: which protection goes, by which edit, and which one test is aimed at it.

An edit replaces a piece of text that occurs exactly once in its file, so that it survives lines
that move and fails loudly where the protection was rewritten. `dies_of` is looked for in what
pytest says: red for another reason does not count.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    path: str
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    name: str
    """What is missing."""
    invariants: str
    test: str
    """`path::name`, as pytest takes it."""
    dies_of: str
    """A regular expression."""
    edits: tuple[Edit, ...]


FAULT = "tests/fault"
MANIFEST = "app/core/stores/manifest"
MANIFEST_TESTS = "tests/unit/core/stores/manifest"
RETENTION_TESTS = "tests/unit/core/retention"
WAL = "app/core/stores/wal"
WAL_TESTS = "tests/unit/core/stores/wal"


def mutant(
    name: str, invariants: str, *, test: str, dies_of: str, edits: list[tuple[str, str, str]]
) -> Mutant:
    return Mutant(
        name=name, invariants=invariants, test=test, dies_of=dies_of,
        edits=tuple(Edit(path=path, old=old, new=new) for path, old, new in edits),
    )  # fmt: skip


MUTANTS = (
    # --- what was acknowledged
    mutant(
        "wal-not-synced", "I1",
        test=f"{FAULT}/test_wal_powercut.py"
        "::test_a_power_cut_at_any_step_keeps_what_was_acknowledged",
        dies_of="corrupt_wal|AssertionError",
        edits=[(
            f"{WAL}/writer.py",
            "                self._disk.sync_data(segment.fd)\n",
            "                pass\n",
        )],
    ),
    mutant(
        "wal-directory-not-synced", "I1",
        test=f"{FAULT}/test_wal_powercut.py"
        "::test_a_power_cut_at_any_step_keeps_what_was_acknowledged",
        dies_of="wal_lost|AssertionError",
        edits=[(
            f"{WAL}/writer.py",
            "        if any(run.creates for _, run in targets):\n",
            "        if not targets:\n",
        )],
    ),
    mutant(
        "acknowledging-after-a-failure", "I16",
        test=f"{WAL_TESTS}/test_failures.py::test_a_failure_of_the_disk_ends_all_logs_at_once",
        dies_of="DID NOT RAISE|AssertionError",
        edits=[(
            f"{WAL}/failure.py",
            'once tripped."""\n        if self._cause is not None:\n',
            'once tripped."""\n        if self._on_trip is None:\n',
        )],
    ),
    mutant(
        "tail-cut-whatever-was-durable", "I1",
        test=f"{WAL_TESTS}/test_recovery.py"
        "::test_any_bit_flipped_before_the_last_append_is_damage",
        dies_of="corrupt_wal",
        edits=[(
            f"{WAL}/recovery.py", "        if tail.claimed:\n", "        if not tail.segments:\n",
        )],
    ),
    mutant(
        "environment-not-synced", "I1, I3",
        test=f"{FAULT}/test_manifest_crash.py::test_power_cut_order_of_the_creation",
        dies_of="AssertionError",
        edits=[(f"{MANIFEST}/environment.py", "    fsync_path_blocking(being_made)\n", "")],
    ),
    # --- who may publish
    mutant(
        "two-owners-of-a-directory", "I17",
        test=f"{MANIFEST_TESTS}/test_environment.py::test_one_owner",
        dies_of="DID NOT RAISE|Error",
        edits=[(
            f"{MANIFEST}/environment.py",
            "        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
            "        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)\n",
        )],
    ),
    mutant(
        "older-copy-taken", "I14, I17",
        test="tests/unit/core/workers/test_older_copy.py"
        "::test_a_later_document_is_told_with_what_to_do",
        dies_of="DID NOT RAISE",
        edits=[(
            "app/core/workers/older_copy.py",
            "        if newest > database.generation:\n",
            "        if newest < 0:\n",
        )],
    ),
    mutant(
        "lease-tokens-not-checked", "I6",
        test=f"{MANIFEST_TESTS}/test_preconditions.py"
        "::test_an_earlier_run_is_fenced_by_the_later_ones_token",
        dies_of="DID NOT RAISE",
        edits=[(
            f"{MANIFEST}/preconditions.py",
            ("    if {(lease.chunk_id, lease.token) for lease in held.values()} "
            "!= set(expected.tokens):\n"),
            "    if len(held) != len(expected.tokens):\n",
        )],
    ),
    mutant(
        "lease-renewed-after-its-end", "I6, I16",
        test=f"{MANIFEST_TESTS}/test_preconditions.py::test_renewing",
        dies_of="DID NOT RAISE",
        edits=[(
            f"{MANIFEST}/apply_bookkeeping.py",
            "    for lease in leases:\n        if not is_live(lease, context):\n",
            "    for lease in leases:\n        if lease.process_id != context.process_id:\n",
        )],
    ),
    mutant(
        "lease-judged-by-the-wall-clock", "I16",
        test=f"{MANIFEST_TESTS}/test_preconditions.py::test_clock_jump_never_moves_a_lease",
        dies_of="Lease|DID NOT RAISE|AssertionError",
        edits=[(
            f"{MANIFEST}/apply_bookkeeping.py",
            "        and context.now_monotonic < lease.expires_at_monotonic\n",
            "        and context.now_us < lease.expires_at_us\n",
        )],
    ),
    mutant(
        "generation-not-expected", "I6",
        test=f"{MANIFEST_TESTS}/test_preconditions.py::test_expect_generation",
        dies_of="DID NOT RAISE",
        edits=[(
            f"{MANIFEST}/preconditions.py",
            "            if generation != expected.generation:\n",
            "            if generation < expected.generation:\n",
        )],
    ),
    mutant(
        "truncation-over-a-lease", "I6",
        test=f"{MANIFEST_TESTS}/test_truncation_ops.py"
        "::test_a_live_lease_of_the_database_refuses",
        dies_of="DID NOT RAISE",
        edits=[(
            f"{MANIFEST}/preconditions.py",
            " is_live(lease, context):\n                    raise LeaseConflict(\n",
            " lease.token < 0:\n                    raise LeaseConflict(\n",
        )],
    ),
    mutant(
        "approved-by-who-asked", "I6",
        test="tests/unit/core/services/test_approvals.py"
        "::test_nobody_approves_what_they_asked_for",
        dies_of="DID NOT RAISE",
        edits=[(
            "app/core/services/approvals.py",
            "        if approval.requested_by == principal:\n",
            "        if not principal:\n",
        )],
    ),
    # --- a publication and what comes after it
    mutant(
        "published-before-the-upload", "I2",
        test="tests/unit/core/checkpoint/test_blob_pipeline.py"
        "::test_a_blob_counts_once_the_store_has_confirmed_it_and_no_sooner",
        dies_of=r"assert \[True\] == \[False\]",
        edits=[(
            "app/core/checkpoint/blob_pipeline.py",
            ("                await self.upload(row)\n"
            "            await log.uploaded(row.chunk_id)\n"),
            ("                await log.uploaded(row.chunk_id)\n"
            "            await self.upload(row)\n"),
        )],
    ),
    mutant(
        "upload-without-a-checksum", "I2",
        test=f"{FAULT}/test_remote_faults.py"
        "::test_an_upload_damaged_again_and_again_is_our_damage",
        dies_of="DID NOT RAISE",
        edits=[(
            "app/core/stores/remote/s3.py",
            "                        ChecksumCRC64NVME=encode_crc64(body.crc64),\n",
            "",
        ), (
            "app/core/stores/remote/s3.py",
            "        confirmed = crc64_of(answer)\n",
            "        confirmed = body.crc64\n",
        )],
    ),
    mutant(
        "lost-answer-taken-for-a-failure", "I15",
        test="tests/unit/core/stores/remote/test_retrying.py"
        "::test_a_lost_answer_is_looked_up_and_adopted",
        dies_of="AssertionError|OutcomeUnknown",
        edits=[(
            "app/core/stores/remote/retrying.py",
            "                if ours is not None:\n",
            "                if ours is adopt:\n",
        )],
    ),
    mutant(
        "document-not-stored", "I3",
        test=f"{FAULT}/test_service_faults.py"
        "::test_wal_and_watermark_wait_for_the_document",
        dies_of="AssertionError",
        edits=[(
            "app/core/checkpoint/completion.py",
            "        await store_document(parts.remote(), document, key=generation.document_key)\n",
            "",
        )],
    ),
    mutant(
        "wal-removed-before-the-document", "I4",
        test=f"{FAULT}/test_service_faults.py"
        "::test_wal_and_watermark_wait_for_the_document",
        dies_of=r"assert \[\] != \[\]",
        edits=[(
            "app/core/checkpoint/completion.py",
            '        failpoints.fp("publish.before_document")\n',
            ("        await parts.release.release(db_id)\n"
            '        failpoints.fp("publish.before_document")\n'),
        ), (
            "app/core/checkpoint/wal_release.py",
            "    return generation is None or generation.document_stored",
            "    return generation is not None",
        )],
    ),
    mutant(
        "reservation-kept-after-a-failure", "I9",
        test="tests/integration/test_quota.py::test_reservation_release_on_failure",
        dies_of="AssertionError",
        edits=[(
            "app/core/checkpoint/executor.py",
            "            reservation.release()\n",
            "            reservation.spend(0)\n",
        )],
    ),
    # --- what is deleted
    mutant(
        "doomed-key-published", "I8",
        test=f"{RETENTION_TESTS}/test_collector.py"
        "::test_a_publication_while_its_blob_is_deleted_is_refused",
        dies_of="DID NOT RAISE",
        edits=[(
            f"{MANIFEST}/gc_queue.py",
            "    if row.doomed:\n        raise KeyDoomed(key=key)\n",
            "",
        )],
    ),
    mutant(
        "deleted-before-doomed", "I8",
        test=f"{RETENTION_TESTS}/test_collector.py::test_doom_grace_deletion",
        dies_of="AssertionError|WrongState",
        edits=[(
            "app/core/retention/collector.py",
            ("            doomed = [row for row in due if row.doomed]\n"
            "            retired = [row for row in due if not row.doomed]\n"),
            "            doomed, retired = due, list[GcRecord]()\n",
        )],
    ),
    mutant(
        "collected-under-a-reader", "I8",
        test=f"{RETENTION_TESTS}/test_expiry.py"
        "::test_a_reader_keeps_its_generation_and_nobody_begins_on_one_that_goes",
        dies_of="AssertionError",
        edits=[(
            "app/core/retention/expiry.py",
            "                if (reopen := self._pins.close(db_id, generation)) is not None\n",
            "                if (reopen := self._pins.close(db_id, generation) or bool)\n",
        )],
    ),
    mutant(
        "deleted-after-half-a-listing", "I8",
        test=f"{RETENTION_TESTS}/test_collector.py"
        "::test_a_listing_that_breaks_off_deletes_nothing",
        dies_of="DID NOT RAISE",
        edits=[(
            "app/core/retention/orphans.py",
            "            async for info in self._remote().list_blobs(prefix):\n",
            "            async for info in _as_far_as_it_goes(self._remote(), prefix):\n",
        ), (
            "app/core/retention/orphans.py",
            "class Known:\n",
            ("async def _as_far_as_it_goes(remote, prefix):\n"
            "    try:\n"
            "        async for info in remote.list_blobs(prefix):\n"
            "            yield info\n"
            "    except Exception:\n"
            "        return\n\n\n"
            "class Known:\n"),
        )],
    ),
    mutant(
        "deleted-without-the-prefix", "I17",
        test=f"{RETENTION_TESTS}/test_collector.py"
        "::test_who_lost_the_prefix_deletes_nothing",
        dies_of="DID NOT RAISE",
        edits=[(
            "app/core/retention/collector.py",
            "            await self._ownership.confirm()\n",
            "",
        )],
    ),
    # --- what is read
    mutant(
        "page-not-checked", "I10",
        test="tests/unit/core/reads/test_page_store.py"
        "::test_every_flipped_byte_of_a_remote_blob_is_found",
        dies_of="AssertionError|DID NOT RAISE|Error",
        edits=[(
            "app/core/formats/page_blob.py",
            '        if crc64(view) != int(row["crc64"]):\n',
            '        if not row["stored_bytes"]:\n',
        ), (
            "app/core/formats/page_blob.py",
            "        if len(page) != self.page_size or crc64(page) != place.checksum:\n",
            "        if len(page) != self.page_size:\n",
        )],
    ),
    mutant(
        "download-not-checked", "I10",
        test="tests/unit/core/stores/local/test_hot_cache.py"
        "::test_streamed_blob_is_verified_before_it_is_kept",
        dies_of="DID NOT RAISE",
        edits=[(
            "app/core/stores/local/cache_writer.py",
            ("        if self._written != self._size_bytes "
            "or self._hash.hexdigest() != self._sha256:\n"),
            "        if self._written != self._size_bytes:\n",
        )],
    ),
)  # fmt: skip
