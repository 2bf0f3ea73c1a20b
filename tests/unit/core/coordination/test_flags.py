"""Feature flags as the manifest holds them."""

import pytest

from app.core.base.errors import FeatureDisabled
from app.core.coordination.flags import flags_of, require_enabled
from app.core.stores.manifest.ops import ManifestBatch, PutTenant
from app.core.stores.manifest.records import FeatureFlags, TenantRecord
from tests.unit.core.stores.manifest.builders import FakeClock, open_store

FLAGS = (
    "enable_checkpoints",
    "enable_chunk_deltas",
    "enable_append_only_truncation",
    "enable_cold_scan",
)


@pytest.fixture
async def store(tmp_path):
    store = await open_store(tmp_path / "manifest", clock=FakeClock())
    yield store
    await store.aclose()


def test_all_is_on_for_a_tenant_that_nothing_was_set_for(store):
    with store.read() as view:
        assert flags_of(view, "acme") == FeatureFlags()
        for flag in FLAGS:
            require_enabled(view, "acme", flag)


@pytest.mark.parametrize("flag", FLAGS)
async def test_a_flag_turns_off_and_on_with_its_commit(store, flag):
    for enabled in (False, True):
        row = TenantRecord(tenant="acme", flags=FeatureFlags(**{flag: enabled}))
        await store.commit(ManifestBatch(ops=(PutTenant(row=row),), reason="tenant.changed"))
        with store.read() as view:
            require_enabled(view, "other", flag)
            if enabled:
                require_enabled(view, "acme", flag)
            else:
                with pytest.raises(FeatureDisabled) as refused:
                    require_enabled(view, "acme", flag)
                assert refused.value.fields == {"tenant": "acme", "flag": flag}
