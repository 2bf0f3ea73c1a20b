"""The decisions of a follower, from plain values."""

from dataclasses import replace

import pytest

from app.replication.plan import (
    MIB,
    AskPosition,
    Carried,
    LetGo,
    Limits,
    Position,
    SendCarried,
    SendImage,
    SendWal,
    SqliteCheckpoint,
    StepAside,
    TakeLock,
    View,
    Wait,
    decide,
    unsent_bytes,
)
from app.replication.wal_index import Log

LIMITS = Limits()
OLD, NEW, OTHER = (7, 70), (8, 81), (9, 92)
FRAME = 4096 + 24


def log(salts=OLD, frames=10, backfilled=0, checksums=(1, 2)):
    return Log(
        salts=salts,
        page_size=4096,
        frames=frames,
        page_count=5,
        checksums=checksums,
        backfilled=backfilled,
    )


def at(frames):
    return 32 + frames * FRAME


def view(**changes):
    base = View(
        log=log(),
        lock=log(frames=4),
        position=Position(last_lsn=50, salts=OLD, offset=at(4)),
        found_checksums=None,
        carried=None,
        away=False,
        may_checkpoint=True,
    )
    return replace(base, **changes)


def test_the_same_log_goes_on_where_the_service_is():
    assert decide(view(), LIMITS) == SendWal(at(4), at(10), None)


def test_nothing_new_is_waited_for():
    known = Position(last_lsn=50, salts=OLD, offset=at(10))
    assert decide(view(position=known), LIMITS) == Wait(caught_up=True)


def test_a_new_log_behind_an_unbroken_lock_follows_the_last_lsn():
    seen = view(log=log(salts=NEW, frames=3))
    assert decide(seen, LIMITS) == SendWal(0, at(3), 50)


def test_a_new_log_without_frames_is_waited_for():
    assert decide(view(log=log(salts=NEW, frames=0)), LIMITS) == Wait(caught_up=True)


@pytest.mark.parametrize("salts", [OLD, NEW])
def test_behind_an_image_of_an_empty_log_the_first_frames_follow_the_last_lsn(salts):
    empty = log(salts=OLD, frames=0)
    known = Position(last_lsn=50, salts=OLD, offset=0)
    seen = view(lock=empty, position=known, log=log(salts=salts, frames=2))
    assert decide(seen, LIMITS) == SendWal(0, at(2), 50)


@pytest.mark.parametrize(
    "position",
    [
        Position(last_lsn=50, salts=OLD, offset=at(3)),  # frames of the old log are missing
        Position(last_lsn=50, salts=OLD, offset=at(5)),  # the log was said to end before
        Position(last_lsn=50, salts=OTHER, offset=at(4)),
        Position(last_lsn=50, salts=OLD, offset=at(4), checksums=(3, 4)),
        Position(last_lsn=50, salts=None, offset=0),
    ],
)
def test_a_new_log_after_anything_else_means_an_image(position):
    seen = view(log=log(salts=NEW, frames=3), position=position)
    assert isinstance(decide(seen, LIMITS), SendImage)


def test_a_lock_taken_later_does_not_make_a_new_log_follow():
    """The case of a restart of our own: salt-1 has grown by one, and that proves nothing."""
    seen = view(log=log(salts=NEW, frames=3), lock=log(salts=NEW, frames=3))
    assert isinstance(decide(seen, LIMITS), SendImage)


def test_checksums_tell_whether_a_log_is_the_one_the_service_has():
    known = Position(last_lsn=50, salts=OLD, offset=at(4), checksums=(3, 4))
    assert isinstance(decide(view(position=known, found_checksums=(5, 6)), LIMITS), SendImage)
    assert isinstance(decide(view(position=known), LIMITS), SendImage)
    assert decide(view(position=known, found_checksums=(3, 4)), LIMITS) == SendWal(
        at(4), at(10), None
    )


def test_a_log_shorter_than_what_the_service_has_means_an_image():
    """After a power cut the application lost commits that had been sent."""
    known = Position(last_lsn=50, salts=OLD, offset=at(11))
    assert isinstance(decide(view(position=known), LIMITS), SendImage)


def test_carried_frames_go_before_the_new_log():
    carried = Carried(salts=OLD, offset=at(4), data=bytes(2 * FRAME))
    seen = view(log=log(salts=NEW, frames=1), lock=log(frames=6), carried=carried)
    assert decide(seen, LIMITS) == SendCarried(0)
    half = replace(seen, position=Position(last_lsn=51, salts=OLD, offset=at(5)))
    assert decide(half, LIMITS) == SendCarried(FRAME)
    done = replace(seen, position=Position(last_lsn=52, salts=OLD, offset=at(6)))
    assert decide(done, LIMITS) == SendWal(0, at(1), 52)


def test_first_comes_the_place_then_the_lock_then_the_rest():
    assert decide(view(lock=None, position=None), LIMITS) == AskPosition()
    assert decide(view(lock=None), LIMITS) == TakeLock()
    assert decide(view(position=None), LIMITS) == AskPosition()
    assert decide(view(image_reason="so"), LIMITS) == SendImage("so")


def test_a_service_away_is_waited_for_until_the_log_is_too_long():
    long = log(frames=64 * MIB // 4096)
    assert decide(view(away=True), LIMITS) == Wait(caught_up=False)
    assert decide(view(away=True, position=None, log=long), LIMITS) == LetGo("the service is away")
    assert decide(view(away=True, lock=None, log=long), LIMITS) == Wait(caught_up=False)
    assert isinstance(decide(view(log=long), LIMITS), SendWal)


def test_a_service_far_behind_is_let_go_too():
    assert isinstance(decide(view(log=log(frames=300 * MIB // 4096)), LIMITS), LetGo)


def test_a_log_shorter_than_its_database_is_sent():
    """What came while a long image was sent: another image would take as long."""
    frames = 300 * MIB // 4096
    large = replace(log(frames=frames), page_count=2 * frames)
    assert isinstance(decide(view(log=large), LIMITS), SendWal)
    restarted = replace(large, salts=NEW)
    assert decide(view(log=restarted), LIMITS) == SendWal(0, at(frames), 50)
    small = replace(large, page_count=frames // 2)
    assert isinstance(decide(view(log=small), LIMITS), LetGo)
    assert isinstance(decide(view(log=replace(small, salts=NEW)), LIMITS), LetGo)


def test_a_long_log_is_copied_once_little_is_left_to_send():
    frames = 4 * MIB // 4096
    near = Position(last_lsn=50, salts=OLD, offset=at(frames - 5))
    seen = view(log=log(frames=frames), position=near)
    assert decide(seen, LIMITS) == SqliteCheckpoint(at(frames - 5))
    assert isinstance(decide(replace(seen, may_checkpoint=False), LIMITS), SendWal)
    far = view(log=log(frames=4 * frames), position=near)
    assert isinstance(decide(far, LIMITS), SendWal)


def test_a_copied_log_waits_for_the_write_that_restarts_it():
    full = log(frames=2000, backfilled=2000)
    known = Position(last_lsn=50, salts=OLD, offset=full.end)
    assert decide(view(log=full, lock=full, position=known), LIMITS) == Wait(caught_up=True)
    partly = replace(full, backfilled=1000)
    assert isinstance(decide(view(log=partly, lock=full, position=known), LIMITS), SqliteCheckpoint)


def test_what_is_unsent():
    carried = Carried(salts=OLD, offset=at(4), data=bytes(2 * FRAME))
    known = Position(last_lsn=50, salts=OLD, offset=at(4))
    assert unsent_bytes(log(), known, None) == 6 * FRAME
    assert unsent_bytes(log(salts=NEW, frames=1), known, carried) == at(1) + 2 * FRAME
    assert unsent_bytes(log(), None, None) == at(10)


def test_a_long_log_is_copied_though_the_service_is_behind():
    """Else a service that is as fast as the application would never let the log be restarted."""
    limits = Limits(log_bytes=at(50), carried_bytes=at(5), carried_bytes_max=at(30))
    short = view(log=log(frames=50), lock=log(frames=4), position=sent(30))
    small = replace(limits, checkpoint_bytes=at(20))
    assert decide(short, small) == SendWal(at(30), at(50), None)
    long = view(log=log(frames=60), lock=log(frames=4), position=sent(40))
    assert decide(long, small) == SqliteCheckpoint(at(40))
    assert decide(replace(long, position=sent(20)), small) == SendWal(at(20), at(60), None)


def test_a_log_of_twice_the_bound_is_let_go_where_it_cannot_be_carried():
    limits = Limits(log_bytes=at(20), unsent_bytes=at(50), carried_bytes_max=at(10))
    behind = view(log=log(frames=110), lock=log(frames=4), position=sent(80))
    assert decide(behind, limits) == LetGo("the service is too far behind")
    assert isinstance(decide(replace(behind, position=sent(105)), limits), SendWal)


def test_who_waits_for_the_log_gets_it_once_all_is_sent():
    waited_for = view(position=sent(10), waited_for=True)
    assert decide(waited_for, LIMITS) == StepAside(at(10))
    assert decide(replace(waited_for, position=sent(9)), LIMITS) == SendWal(at(9), at(10), None)
    free = replace(waited_for, log=log(backfilled=10), lock=log(backfilled=10))
    assert decide(free, LIMITS) == Wait(caught_up=True)


def test_who_waits_for_the_log_is_not_held_up_by_a_service_that_is_away():
    away = view(position=None, confirmed=sent(8), waited_for=True, away=True)
    assert decide(away, LIMITS) == StepAside(at(8))
    assert decide(replace(away, waited_for=False), LIMITS) == Wait(caught_up=False)


@pytest.mark.parametrize(
    "confirmed",
    [
        None,
        Position(last_lsn=50, salts=OTHER, offset=at(8)),  # frames of two logs would be carried
        Position(last_lsn=50, salts=OLD, offset=0),
        Position(last_lsn=50, salts=OLD, offset=at(11)),
        Position(last_lsn=50, salts=OLD, offset=at(7)),  # too much
    ],
)
def test_what_cannot_be_carried_is_let_go_for_who_waits(confirmed):
    limits = replace(LIMITS, carried_bytes=2 * FRAME)
    away = view(position=None, confirmed=confirmed, waited_for=True, away=True)
    assert isinstance(decide(away, limits), LetGo)
    assert decide(replace(away, confirmed=sent(8)), limits) == StepAside(at(8))


def test_an_idle_lock_moves_out_of_the_way():
    """Who waits for it then has something to write, which wakes the follower."""
    behind = view(position=sent(10), lock=log(frames=4))
    assert decide(behind, LIMITS) == Wait(caught_up=True)
    assert decide(replace(behind, quiet=True), LIMITS) == StepAside(at(10))
    there = view(position=sent(10), lock=log(), quiet=True)
    assert decide(there, LIMITS) == Wait(caught_up=True)


def test_a_lock_does_not_stay_on_a_log_that_somebody_has_copied():
    copied = view(position=sent(10), lock=log(), log=log(backfilled=10))
    assert decide(copied, LIMITS) == StepAside(at(10))
    assert decide(replace(copied, lock=log(backfilled=10)), LIMITS) == Wait(caught_up=True)
    assert decide(replace(copied, log=log(backfilled=9)), LIMITS) == Wait(caught_up=True)


def sent(frames):
    return Position(last_lsn=50, salts=OLD, offset=at(frames))
