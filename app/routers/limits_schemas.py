"""What storage limits and feature flags look like."""

from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from app.core.services.tenants import TenantLimits
from app.core.stores.manifest.records import FeatureFlags
from app.routers.schemas import Body, View, example

Bytes = Annotated[int, Field(ge=0, le=2**63 - 1)]
Seconds = Annotated[int, Field(ge=0, le=366 * 86_400)]

_FLAGS = {
    "enable_checkpoints": True,
    "enable_chunk_deltas": True,
    "enable_append_only_truncation": True,
    "enable_cold_scan": True,
    "checkpoint_interval_seconds": 60,
}


class FlagsView(View):
    model_config = ConfigDict(json_schema_extra=example(_FLAGS))

    enable_checkpoints: bool
    enable_chunk_deltas: bool
    enable_append_only_truncation: bool
    enable_cold_scan: bool
    checkpoint_interval_seconds: int
    """0: only on demand and by WAL pressure."""

    @classmethod
    def of(cls, flags: FeatureFlags) -> Self:
        return cls(
            enable_checkpoints=flags.enable_checkpoints,
            enable_chunk_deltas=flags.enable_chunk_deltas,
            enable_append_only_truncation=flags.enable_append_only_truncation,
            enable_cold_scan=flags.enable_cold_scan,
            checkpoint_interval_seconds=flags.checkpoint_interval_seconds or 0,
        )


class ChangeFlagsBody(Body):
    """Fields that are left out stay as they are."""

    model_config = ConfigDict(json_schema_extra=example({"enable_checkpoints": False}))

    enable_checkpoints: bool = True
    enable_chunk_deltas: bool = True
    enable_append_only_truncation: bool = True
    enable_cold_scan: bool = True
    checkpoint_interval_seconds: Seconds | None = None
    """Null: `BOP_CHECKPOINT_INTERVAL_SECONDS`. 0: only on demand and by WAL pressure."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("name at least one flag")
        return self

    def changes(self) -> dict[str, Any]:
        return self.model_dump(include=self.model_fields_set)


class GlobalLimitView(View):
    model_config = ConfigDict(json_schema_extra=example({"global_bytes": 68_719_476_736}))

    global_bytes: int


class GlobalLimitBody(Body):
    model_config = ConfigDict(json_schema_extra=example({"global_bytes": 68_719_476_736}))

    global_bytes: Annotated[int, Field(ge=1, le=2**63 - 1)] | None
    """Null: `BOP_QUOTA_GLOBAL_BYTES`."""


class TenantLimitsView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {"tenant": "acme", "limit_bytes": 10_737_418_240, "job_limit_bytes": 1_073_741_824}
        )
    )

    tenant: str
    limit_bytes: int | None
    job_limit_bytes: int | None

    @classmethod
    def of(cls, tenant: str, limits: TenantLimits) -> Self:
        return cls(
            tenant=tenant, limit_bytes=limits.limit_bytes, job_limit_bytes=limits.job_limit_bytes
        )


class TenantLimitsBody(Body):
    """Replaces both: a limit that is null or left out does not hold."""

    model_config = ConfigDict(
        json_schema_extra=example({"limit_bytes": 10_737_418_240, "job_limit_bytes": 1_073_741_824})
    )

    limit_bytes: Bytes | None = None
    job_limit_bytes: Bytes | None = None
