import gc

import pytest

from app.serving.server import COLLECT_AFTER, spare_the_collector


@pytest.fixture
def usual_collector():
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("usual_collector")
def test_collections_leave_out_what_starting_made():
    made_at_start: list[object] = [object()]
    spare_the_collector()
    assert gc.get_freeze_count() > 0
    looked_at = {id(one) for one in gc.get_objects()}
    assert id(made_at_start) not in looked_at
    made_later: list[object] = [made_at_start]
    assert id(made_later) in {id(one) for one in gc.get_objects()}
    assert gc.get_threshold() == COLLECT_AFTER
