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
    mutant(
        "short-write-taken-for-whole", "I1",
        test=f"{WAL_TESTS}/test_failures.py"
        "::test_short_writes_are_completed",
        dies_of=r"Error",
        edits=[(
            f"{WAL}/run_writer.py",
            "            left[0] = memoryview(left[0])[count:]\n",
            "            del left[0]\n",
        )],
    ),
    mutant(
        "draft-linked-after-a-failed-sync", "I16",
        test=f"{WAL_TESTS}/test_draft.py"
        "::test_a_failed_sync_of_a_draft_is_fatal_once_it_is_used",
        dies_of="DID NOT RAISE",
        edits=[(
            f"{WAL}/draft.py",
            "                    self._failure = error\n",
            "                    del error\n",
        )],
    ),
    mutant(
        "no-descriptor-taken-for-a-failure", "I16",
        test=f"{WAL_TESTS}/test_failures.py"
        "::test_out_of_descriptors_is_no_failure_of_the_disk",
        dies_of=r"StorageFailure",
        edits=[(
            f"{WAL}/failure.py",
            "_NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})\n",
            "_NO_DESCRIPTORS = frozenset[int]()\n",
        )],
    ),
    mutant(
        "append-keys-forgotten", "I7",
        test=f"{WAL_TESTS}/test_keyed.py"
        "::test_a_replay_gets_the_first_answer",
        dies_of=r"AssertionError",
        edits=[(
            f"{WAL}/keyed.py",
            "        known = self._remembered.get(request.key_hash)\n",
            "        known = None\n",
        )],
    ),
    mutant(
        "manifest-goes-on-after-a-failure", "I16",
        test=f"{MANIFEST_TESTS}/test_writer.py::test_a_failing_disk_ends_the_writer_once",
        dies_of="DiskFull",
        edits=[(
            f"{MANIFEST}/writer.py",
            "            if isinstance(failure, StorageFailure) or not self._was_rolled_back():\n",
            "            if failure is None:\n",
        ), (
            f"{MANIFEST}/writer.py",
            "            outcomes = [DiskFull(failure.detail) for _ in group]\n",
            "            outcomes = [DiskFull(str(failure)) for _ in group]\n",
        )],
    ),
    mutant(
        "full-disk-ends-the-manifest", "I16",
        test=f"{MANIFEST_TESTS}/test_writer.py"
        "::test_a_full_disk_costs_the_batch_and_no_more",
        dies_of=r"StorageFailure",
        edits=[(
            f"{MANIFEST}/writer.py",
            "            if isinstance(failure, StorageFailure) or not self._was_rolled_back():\n",
            "            if failure is not None:\n",
        )],
    ),
    mutant(
        "full-map-ends-the-manifest", "I13",
        test=f"{MANIFEST_TESTS}/test_writer.py"
        "::test_map_full_refuses_whole_batches_and_goes_on",
        dies_of=r"StorageFailure",
        edits=[(
            f"{MANIFEST}/writer.py",
            "        except (lmdb.MapFullError, lmdb.TxnFullError) as error:\n",
            "        except lmdb.TxnFullError as error:\n",
        )],
    ),
    mutant(
        "parked-readers-stay", "I11",
        test=f"{MANIFEST_TESTS}/test_views.py"
        "::test_parked_reader_is_ended_by_age",
        dies_of=r"AssertionError|DID NOT RAISE",
        edits=[(
            f"{MANIFEST}/views.py",
            "if access.opened_at < oldest]",
            "if access.opened_at is None]",
        )],
    ),
    mutant(
        "dead-readers-keep-their-slots", "I11",
        test=f"{FAULT}/test_manifest_crash.py"
        "::test_killed_reader_gives_its_slots_back",
        dies_of=r"ManifestBusy",
        edits=[(
            f"{MANIFEST}/views.py",
            "            self._environment.clear_stale_readers()\n",
            "",
        )],
    ),
    mutant(
        "format-of-the-future-taken", "I10",
        test=f"{MANIFEST_TESTS}/test_environment.py"
        "::test_a_manifest_of_a_newer_version_is_refused",
        dies_of=r"DID NOT RAISE",
        edits=[(
            f"{MANIFEST}/ledger.py",
            "        if step is None or step.name != entry.name:\n",
            "        if step is not None and step.name != entry.name:\n",
        )],
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
    mutant(
        "lease-outlives-its-process", "I6",
        test=f"{MANIFEST_TESTS}/test_preconditions.py"
        "::test_leases_of_an_earlier_process_are_dead",
        dies_of=r"Lease|AssertionError|DID NOT RAISE",
        edits=[(
            f"{MANIFEST}/apply_bookkeeping.py",
            "        lease.process_id == context.process_id\n        and context",
            "        lease.token > 0\n        and context",
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
            "        await store_document(parts.remote(), document)\n",
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
    mutant(
        "given-up-at-once", "I7",
        test="tests/unit/core/stores/remote/test_requests.py"
        "::test_waits_with_full_jitter_and_then_succeeds",
        dies_of=r"Remote",
        edits=[(
            "app/core/stores/remote/requests.py",
            "        if self._policy.gives_up(error, attempt=attempt) or",
            "        if attempt or",
        )],
    ),
    mutant(
        "throttled-taken-for-refused", "I7",
        test="tests/unit/core/stores/remote/test_s3_errors.py"
        "::test_answers",
        dies_of=r"AssertionError",
        edits=[(
            "app/core/stores/remote/s3_errors.py",
            "    if code in _THROTTLED or status in {429, 503}:\n",
            "    if status == 503:\n",
        )],
    ),
    mutant(
        "lost-race-taken-for-anothers", "I15",
        test="tests/unit/core/stores/remote/test_retrying.py"
        "::test_a_conditional_write_with_a_lost_answer_is_adopted",
        dies_of=r"AssertionError",
        edits=[(
            "app/core/stores/remote/retrying.py",
            "            return await self._equal_object(key, body)\n",
            "            return None\n",
        )],
    ),
    mutant(
        "waiting-for-100-continue", "I11",
        test="tests/integration/test_remote_contract.py"
        "::test_no_request_waits_for_100_continue",
        dies_of=r"AssertionError|Remote",
        edits=[(
            "app/core/stores/remote/s3_client.py",
            '    client.meta.events.unregister("before-call.s3", add_expect_header)\n',
            "",
        )],
    ),
    mutant(
        "restart-uses-up-an-attempt", "I7",
        test="tests/unit/core/jobs/test_queue.py"
        "::test_a_restart_resumes_at_once_and_uses_up_no_attempt",
        dies_of=r"AssertionError",
        edits=[(
            "app/core/jobs/queue.py",
            '                    "attempts": max(job.attempts - 1, 0),\n',
            '                    "attempts": job.attempts,\n',
        )],
    ),
    mutant(
        "limits-passed-together", "I9",
        test="tests/unit/core/coordination/test_quota.py"
        "::test_fifty_tasks_reserve_at_once",
        dies_of=r"AssertionError",
        edits=[(
            "app/core/coordination/quota_levels.py",
            "level.used_bytes + size_bytes > limit:",
            "level.used_bytes > limit:",
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
            "closing(self._remote().list_blobs(prefix))",
            "closing(_as_far_as_it_goes(self._remote(), prefix))",
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
    mutant(
        "collection-by-any-clock", "I16",
        test=f"{RETENTION_TESTS}/test_collection_time.py"
        "::test_a_jump_pauses_until_someone_accepts_the_clock",
        dies_of=r"AssertionError",
        edits=[(
            "app/core/retention/collection_time.py",
            "            paused=self.paused or abs(stepped_us) > JUMP_US_MAX,\n",
            "            paused=self.paused,\n",
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
    mutant(
        "stream-begun-anew", "I10",
        test="tests/unit/core/stores/remote/test_retrying.py"
        "::test_a_stream_goes_on_behind_the_last_byte",
        dies_of=r"AssertionError",
        edits=[(
            "app/core/stores/remote/retrying.py",
            "first=first + arrived, length=left",
            "first=first, length=left",
        )],
    ),
    mutant(
        "missing-blob-taken-for-an-outage", "I10",
        test="tests/unit/core/reads/test_page_store.py"
        "::test_a_missing_object_is_corrupt_and_an_outage_is_not",
        dies_of=r"BlobMissing",
        edits=[(
            "app/core/reads/blob_reader.py",
            "            except BlobMissing as error:\n",
            "            except LookupError as error:\n",
        )],
    ),
    mutant(
        "declared-size-believed", "I11",
        test="tests/unit/core/formats/test_codecs.py"
        "::test_a_zstd_frame_is_not_believed_before_it_is_looked_at",
        dies_of=r"AssertionError|DID NOT RAISE|Error",
        edits=[(
            "app/core/formats/codecs.py",
            "        if zstandard.get_frame_parameters(data).content_size != raw_bytes:\n",
            "        if not data:\n",
        )],
    ),
    mutant(
        "another-log-taken-for-the-same", "I5",
        test="tests/unit/replication/test_plan.py"
        "::test_checksums_tell_whether_a_log_is_the_one_the_service_has",
        dies_of=r"AssertionError",
        edits=[(
            "app/replication/plan.py",
            "        if reason := _mismatch(view, position):\n            return SendImage(",
            "        if reason := None:\n            return SendImage(",
        )],
    ),
    mutant(
        "body-without-a-bound", "I11",
        test="tests/unit/routers/test_bodies.py"
        "::test_an_endless_body_is_refused_as_it_passes_the_limit",
        dies_of=r"AssertionError|DID NOT RAISE|Error",
        edits=[(
            "app/routers/bodies.py",
            "        if exchange.body_received > limits.bytes_max:\n",
            "        if exchange.body_received < 0:\n",
        )],
    ),
)  # fmt: skip
