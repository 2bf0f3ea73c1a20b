from app.replication.shares import Shares


def test_what_is_carried_is_bounded_for_all_together():
    shares = Shares(carried_bytes=100)
    shares.take("a", 60)
    assert (shares.free_for("a"), shares.free_for("b")) == (100, 40)
    shares.take("b", 40)
    shares.take("a", 70)  # a follower that moves on holds both for a moment
    assert (shares.free_for("a"), shares.free_for("b")) == (60, 30)
    shares.take("a", 0)
    shares.take("a", 0)
    assert (shares.free_for("a"), shares.free_for("b")) == (60, 100)
