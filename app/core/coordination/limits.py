"""The limits that an operator set: rows of the manifest, over what the settings say."""

from app.core.coordination.quota import StorageQuota
from app.core.stores.manifest.ops import PutMeta
from app.core.stores.manifest.view import ManifestView

GLOBAL_LIMIT_META = "quota/global_bytes"


def global_limit_of(view: ManifestView) -> int | None:
    """None: what the settings say holds."""
    raw = view.meta(GLOBAL_LIMIT_META)
    return int(raw) if raw else None


def global_limit_op(global_bytes: int | None) -> PutMeta:
    value = b"" if global_bytes is None else b"%d" % global_bytes
    return PutMeta(name=GLOBAL_LIMIT_META, value=value)


def load_limits(view: ManifestView, quota: StorageQuota) -> None:
    """At start."""
    global_bytes = global_limit_of(view)
    if global_bytes is not None:
        quota.set_global_limit(global_bytes)
    for row in view.tenants():
        if row.limit_bytes is not None or row.job_limit_bytes is not None:
            quota.set_tenant_limits(
                row.tenant, limit_bytes=row.limit_bytes, job_limit_bytes=row.job_limit_bytes
            )
