"""Every knob, read once: environment `BOP_…` over the TOML file `BOP_CONFIG_FILE` over defaults.

Nothing else reads the environment. Names end in their unit. `redacted()` is what
`serve --print-config` shows.
"""

import os
import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from app.core.base import failpoints


def _split(value: object) -> object:
    """`a, b` as the environment has it; a list as TOML has it."""
    return (
        [one.strip() for one in value.split(",") if one.strip()]
        if isinstance(value, str)
        else value
    )


CommaSeparated = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]

ASYMMETRIC = frozenset(
    f"{kind}{bits}" for kind in ("RS", "PS", "ES") for bits in (256, 384, 512)
) | {"EdDSA"}

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

OF_THE_COMMANDS = frozenset({"BOP_CONFIG_FILE", "BOP_URL", "BOP_TOKEN"})

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


class TomlFile(PydanticBaseSettingsSource):
    """Values from the file that `BOP_CONFIG_FILE` names, keys as the settings without `BOP_`."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        del field
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        path = os.environ.get("BOP_CONFIG_FILE")  # noqa: TID251 - the one reader of the environment
        if not path:
            return {}
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        return {name.lower().removeprefix("bop_"): value for name, value in values.items()}


class StandardVariables(PydanticBaseSettingsSource):
    """Names that are a standard of their own."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        del field
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")  # noqa: TID251 - see above
        return {"otlp_endpoint": endpoint} if endpoint else {}


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="BOP_", extra="forbid", frozen=True)

    # --- the process
    data_dir: Path = Path("./data")
    host: str = "127.0.0.1"
    port: int = Field(default=8600, ge=0, le=65535)
    log_format: Literal["json", "console"] = "json"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    shutdown_seconds: float = Field(default=25.0, gt=0)
    """How long requests and jobs in flight may take to end after SIGTERM."""
    take_over: bool = False
    """Claim a remote prefix that another node identity owns."""

    # --- access
    auth_tokens_file: Path | None = None
    admin_approvals: bool = True
    """A forced lease release takes a second principal."""
    admin_approval_seconds: float = Field(default=3600.0, gt=0)
    """How long an act waits for its approval."""
    audit_log_count: int = Field(default=100_000, ge=1)
    """Admin actions that are kept to be looked at."""
    admin_port: int | None = Field(default=None, ge=1, le=65535)
    """`/admin` and `/debug` answer on this port alone; elsewhere they do not exist."""
    admin_host: str | None = None
    """Of `admin_port`; by default `host`."""
    oidc_issuer: str | None = None
    """Takes tokens that this OpenID Connect provider signed (`iss`), beside the tokens file's."""
    oidc_audience: str = ""
    oidc_jwks: str = ""
    """URL or path of the provider's key set."""
    oidc_algorithms: CommaSeparated = ("RS256", "ES256", "EdDSA")
    oidc_name_claim: str = "sub"
    oidc_scopes_claim: str = "scope"
    oidc_tenants_claim: str = "tenants"
    """A token without it sees no tenant; one with `*` sees all."""
    oidc_leeway_seconds: float = Field(default=30.0, ge=0, le=300)
    trusted_proxies: CommaSeparated = ()
    """Addresses whose X-Forwarded-For and X-Forwarded-Proto are believed."""

    # --- metrics
    metrics_databases_max: int = Field(default=200, ge=0)
    """So many databases have series of their own; all of them count in the totals."""

    # --- traces
    otlp_endpoint: str = ""
    """Of an OpenTelemetry collector, like http://collector:4318; by default the standard variable
    OTEL_EXPORTER_OTLP_ENDPOINT."""
    trace_ratio: float = Field(default=0.01, ge=0, le=1)
    """Of the requests that no caller traces; those of a sampled trace are always sent."""

    # --- remote store
    remote_url: str = ""
    """`s3://bucket/prefix` or `file:///path`; empty: `remote/` under the data directory."""
    s3_endpoint_url: str | None = None
    s3_region: str | None = None
    s3_addressing: Literal["auto", "path", "virtual"] = "auto"
    s3_ca_file: Path | None = None
    s3_storage_class: str | None = None
    s3_sse: Literal["AES256", "aws:kms"] | None = None
    s3_sse_kms_key_id: str | None = None
    remote_concurrency: int = Field(default=16, ge=1)
    """Ceiling of requests in flight; throttling lowers it (AIMD)."""
    remote_attempts: int = Field(default=6, ge=1)
    remote_connect_timeout_seconds: float = Field(default=5.0, gt=0)
    remote_idle_timeout_seconds: float = Field(default=30.0, gt=0)
    """A request that moves no byte for this long is given up."""
    remote_request_timeout_seconds: float = Field(default=300.0, gt=0)
    remote_retry_base_seconds: float = Field(default=0.1, gt=0)
    remote_retry_cap_seconds: float = Field(default=10.0, gt=0)

    # --- manifest
    manifest_map_bytes: int = Field(default=64 * GIB, ge=1 * MIB)
    manifest_backups_count: int = Field(default=3, ge=1)
    """Copies made by `POST /admin/manifest/backup` that are kept."""
    manifest_max_readers: int = Field(default=126, ge=2)

    # --- room
    quota_global_bytes: int = Field(default=64 * GIB, ge=1)
    drain_reserve_bytes: int = Field(default=256 * MIB, ge=0)
    """On top of the quota, for checkpoints alone: what frees WAL can always run."""
    wal_budget_bytes: int = Field(default=8 * GIB, ge=1)
    """Unpublished WAL in all, shared evenly among tenants that have some."""
    wal_trigger_ratio: float = Field(default=0.4, gt=0, lt=0.5)
    """Of a database's share of the WAL budget: there a checkpoint begins by itself."""
    checkpoint_overdue_seconds: float = Field(default=30.0, ge=0)
    """After that long above the trigger, a database beyond its share is refused appends."""
    page_cache_bytes: int = Field(default=64 * MIB, ge=0)
    hot_cache_bytes: int = Field(default=4 * GIB, ge=0)
    directory_cache_bytes: int = Field(default=256 * MIB, ge=0)
    """Directories of page blobs on the disk, for some 50 GiB of databases; beside the quota."""
    body_memory_bytes: int = Field(default=64 * MIB, ge=1 * MIB)
    """All request bodies held in memory at once; what does not fit is spooled to a file."""

    # --- cold scans
    cold_scan_bytes_per_second: int = Field(default=500_000_000, ge=0)
    """What all scans of a tenant together read from the remote store; 0: as much as it gives."""
    cold_scan_requests: int = Field(default=8, ge=1)
    """A tenant's scans' requests to the remote store at once; all scans together take at most half
    of `remote_concurrency`."""
    cold_scan_pause_seconds: float = Field(default=0.1, gt=0)
    """Scans pause while the 99th percentile of foreground page fetches is above it."""

    # --- verification
    verify_bytes_per_second: int = Field(default=50_000_000, ge=0)
    """What all verification reads from the remote store; 0: as much as it gives."""
    verify_interval_seconds: float = Field(default=0, ge=0)
    """How often the generation verified longest ago is verified by itself; 0: only on demand."""
    verify_age_seconds: float = Field(default=7 * 86_400, gt=0)
    """Younger verifications are not repeated by themselves."""

    # --- limits of requests
    max_append_bytes: int = Field(default=64 * MIB, ge=1)
    max_wal_bytes: int = Field(default=1 * GIB, ge=1)
    max_image_bytes: int = Field(default=1024 * GIB, ge=1)
    max_record_bytes: int = Field(default=16 * MIB, ge=1)
    max_json_bytes: int = Field(default=1 * MIB, ge=1)
    max_head_bytes: int = Field(default=64 * KIB, ge=1 * KIB)
    """Of a request: its line and its headers."""
    max_head_fields: int = Field(default=128, ge=16)
    head_timeout_seconds: float = Field(default=15.0, gt=0)
    """A request's head that is not whole by then is refused."""
    answer_stall_seconds: float = Field(default=120.0, gt=0)
    """A client that takes nothing of its answer for this long is let go."""
    connections_max: int = Field(default=4096, ge=1)
    body_idle_timeout_seconds: float = Field(default=30.0, gt=0)
    """A body of which nothing arrives for this long is refused."""
    body_bytes_per_second_min: int = Field(default=1024, ge=0)
    """After a minute, a body slower than this on average is refused (slowloris)."""

    # --- jobs and checkpoints
    job_concurrency: int = Field(default=4, ge=1)
    job_attempts: int = Field(default=8, ge=1)
    job_backoff_base_seconds: float = Field(default=0.5, gt=0)
    job_backoff_cap_seconds: float = Field(default=60.0, gt=0)
    job_deadline_seconds: float = Field(default=3600.0, gt=0)
    job_stall_seconds: float = Field(default=600.0, gt=0)
    job_queue_depth_max: int = Field(default=10_000, ge=1)
    job_history_count: int = Field(default=10_000, ge=1)
    """Ended jobs that are kept to be looked at."""
    lease_ttl_seconds: float = Field(default=120.0, gt=0)
    staging_concurrency: int = Field(default=2, ge=1)
    upload_concurrency: int = Field(default=4, ge=1)
    checkpoint_interval_seconds: int = Field(default=60, ge=0)
    """0: only on demand and by WAL pressure."""
    change_history_count: int = Field(default=100_000, ge=0)
    """Changes that are kept in the change log whether a subscriber needs them or not."""
    change_lag_count_max: int = Field(default=1_000_000, ge=1)
    """A cursor further behind than this no longer keeps changes, and expires with them."""
    gc_grace_seconds: int = Field(default=3600, ge=0)
    gc_interval_seconds: float = Field(default=60.0, gt=0)
    gc_orphan_age_seconds: int = Field(default=86_400, ge=0)
    """Objects that nobody knows count as orphans only when they are older."""
    delta_bytes_max: int = Field(default=10_000_000, ge=0)
    """A delta expected to be as large as this makes its chunk be rewritten."""
    delta_dirty_ratio_max: float = Field(default=0.5, ge=0, le=1)
    """More of a chunk's pages dirty makes it be rewritten."""
    delta_count_max: int = Field(default=3, ge=1)
    """Deltas over one base; one more coalesces them."""
    coalesce: Literal["merge", "rewrite"] = "merge"
    """Into one delta where the limits above allow it, or always into a new base."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        return (
            init_settings,
            env_settings,
            TomlFile(settings_cls),
            StandardVariables(settings_cls),
        )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        open_to_all = self.auth_tokens_file is None and self.oidc_issuer is None
        for name, host in (("BOP_HOST", self.host), ("BOP_ADMIN_HOST", self.admin_host)):
            if open_to_all and host is not None and host not in LOOPBACK:
                raise ValueError(
                    f"{name}={host} needs BOP_AUTH_TOKENS_FILE or BOP_OIDC_ISSUER: "
                    "without tokens the service answers on loopback only"
                )
        if self.admin_port is not None and self.admin_port == self.port:
            raise ValueError("BOP_ADMIN_PORT must be another port than BOP_PORT")
        for proxy in self.trusted_proxies:
            ip_address(proxy)  # raises ValueError: exact addresses, no networks, no `*`
        return self

    @model_validator(mode="after")
    def _provider_is_whole(self) -> Self:
        if self.oidc_issuer is None:
            return self
        if not self.oidc_audience or not self.oidc_jwks:
            raise ValueError("BOP_OIDC_ISSUER needs BOP_OIDC_AUDIENCE and BOP_OIDC_JWKS")
        if (
            self.oidc_jwks.startswith("http://")
            and urlsplit(self.oidc_jwks).hostname not in LOOPBACK
        ):
            raise ValueError("BOP_OIDC_JWKS must be https://: its keys decide who is let in")
        if unknown := set(self.oidc_algorithms) - ASYMMETRIC:
            raise ValueError(
                f"BOP_OIDC_ALGORITHMS: {', '.join(sorted(unknown))} is no asymmetric signature"
            )
        return self

    @property
    def effective_remote_url(self) -> str:
        return self.remote_url or f"file://{(self.data_dir / 'remote').resolve()}"

    def redacted(self) -> dict[str, Any]:
        """Every setting as `BOP_…`; no setting holds a secret, and credentials in a URL are cut."""
        shown = self.model_dump(mode="json")
        for name, value in shown.items():
            if isinstance(value, str) and "://" in value and "@" in value:
                scheme, rest = value.split("://", 1)
                shown[name] = f"{scheme}://***@{rest.rsplit('@', 1)[1]}"
        return {f"BOP_{name.upper()}": value for name, value in shown.items()}


def unknown_variables() -> list[str]:
    """Environment variables that look like settings and are none: perhaps misspelt."""
    known = {f"BOP_{name.upper()}" for name in Settings.model_fields} | OF_THE_COMMANDS
    if failpoints.armed():
        known |= failpoints.VARIABLES
    given = os.environ  # noqa: TID251 - see TomlFile
    return sorted(
        name for name in given if name.upper().startswith("BOP_") and name.upper() not in known
    )
