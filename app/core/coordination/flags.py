"""A tenant's feature flags: what may be asked of the service for that tenant.

Flags are rows of the manifest, read anew at every use: a change is effective with its commit, for
new work; work in flight goes on.
"""

from typing import Literal, TypeAlias

from app.core.base.errors import FeatureDisabled
from app.core.stores.manifest.records import FeatureFlags
from app.core.stores.manifest.view import ManifestView

Flag: TypeAlias = Literal[
    "enable_checkpoints",
    "enable_chunk_deltas",
    "enable_append_only_truncation",
    "enable_cold_scan",
]

_FEATURES: dict[Flag, str] = {
    "enable_checkpoints": "Checkpoints are",
    "enable_chunk_deltas": "Chunk deltas are",
    "enable_append_only_truncation": "Truncation is",
    "enable_cold_scan": "Cold scan is",
}

DEFAULT_FLAGS = FeatureFlags()


def flags_of(view: ManifestView, tenant: str) -> FeatureFlags:
    """All on for a tenant of which nothing was ever set."""
    known = view.tenant(tenant)
    return DEFAULT_FLAGS if known is None else known.flags


def require_enabled(view: ManifestView, tenant: str, flag: Flag) -> None:
    """Raises FeatureDisabled."""
    if not getattr(flags_of(view, tenant), flag):
        raise FeatureDisabled(
            f"{_FEATURES[flag]} switched off for this tenant.", tenant=tenant, flag=flag
        )
