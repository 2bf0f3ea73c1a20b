from dataclasses import replace

from app.replication.pace import AGAIN_SECONDS, CheckpointPace, WhoWaits
from app.replication.wal_index import Log

LOG = Log(salts=(7, 70), page_size=4096, frames=10, page_count=5, checksums=(1, 2), backfilled=0)
LONGER = replace(LOG, frames=20)
OTHER = replace(LOG, salts=(8, 80))


def test_a_checkpoint_is_not_repeated_before_the_log_has_grown_or_is_another():
    pace = CheckpointPace(step_bytes=LONGER.end - LOG.end)
    assert pace.is_due(LOG, 0)
    pace.done(LOG)
    assert not pace.is_due(replace(LOG, frames=19), 0)
    assert pace.is_due(LONGER, 0)
    assert pace.is_due(OTHER, 0)


def test_one_that_failed_is_tried_ever_less_until_one_is_done():
    pace, now = CheckpointPace(step_bytes=1), 100.0
    for seconds in (*AGAIN_SECONDS, AGAIN_SECONDS[-1]):
        pace.failed(now)
        assert not pace.is_due(LOG, now + seconds - 0.1)
        now += seconds
        assert pace.is_due(LOG, now)
    pace.done(LOG)
    pace.failed(now)
    assert pace.is_due(LONGER, now + AGAIN_SECONDS[0])


def test_who_is_seen_twice_where_nothing_moves_waits():
    who = WhoWaits()
    assert who.look(None, LOG) == (False, False)
    assert who.look(5, LOG) == (False, True)
    assert who.look(5, LOG) == (True, False)
    assert who.look(5, LONGER) == (False, False), "it writes"
    assert who.look(6, LONGER) == (False, False), "another one"
    assert who.look(None, LONGER) == (False, False)
    assert who.look(6, LONGER) == (False, True)
