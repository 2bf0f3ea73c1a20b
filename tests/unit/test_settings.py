"""Every knob: from where it is read, what is refused, what is shown."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.core.base import failpoints
from app.settings import MIB, Settings, unknown_variables

FIXED = {
    "BOP_DATA_DIR",
    "BOP_REMOTE_URL",
    "BOP_S3_ENDPOINT_URL",
    "BOP_S3_REGION",
    "BOP_HOST",
    "BOP_PORT",
    "BOP_AUTH_TOKENS_FILE",
    "BOP_QUOTA_GLOBAL_BYTES",
    "BOP_WAL_BUDGET_BYTES",
    "BOP_PAGE_CACHE_BYTES",
    "BOP_HOT_CACHE_BYTES",
    "BOP_JOB_CONCURRENCY",
    "BOP_CHECKPOINT_INTERVAL_SECONDS",
    "BOP_GC_GRACE_SECONDS",
    "BOP_MAX_APPEND_BYTES",
    "BOP_ADMIN_APPROVALS",
    "BOP_LOG_FORMAT",
}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith("BOP_")]:
        monkeypatch.delenv(name)


def test_defaults_are_those_of_the_contract():
    settings = Settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8600)
    assert settings.data_dir == Path("./data")
    assert settings.max_append_bytes == 64 * MIB
    assert settings.max_record_bytes == 16 * MIB
    assert settings.checkpoint_interval_seconds == 60
    assert settings.gc_grace_seconds == 3600
    assert settings.admin_approvals is True
    assert settings.log_format == "json"


def test_the_fixed_names_exist():
    assert set(Settings().redacted()) >= FIXED


def test_environment_over_file_over_defaults(tmp_path, monkeypatch):
    file = tmp_path / "bop.toml"
    file.write_text('port = 9000\nBOP_LOG_LEVEL = "debug"\ngc_grace_seconds = 0\n')
    monkeypatch.setenv("BOP_CONFIG_FILE", str(file))
    monkeypatch.setenv("BOP_PORT", "9001")
    settings = Settings()
    assert settings.port == 9001
    assert settings.log_level == "debug"
    assert settings.gc_grace_seconds == 0
    assert Settings(port=9002).port == 9002


def test_unknown_names_in_the_file_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "bop.toml"
    file.write_text("prot = 9000\n")
    monkeypatch.setenv("BOP_CONFIG_FILE", str(file))
    with pytest.raises(ValidationError, match="prot"):
        Settings()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_without_tokens_it_answers_on_loopback_only(tmp_path, host):
    with pytest.raises(ValidationError, match="BOP_AUTH_TOKENS_FILE"):
        Settings(host=host)
    assert Settings(host=host, auth_tokens_file=tmp_path / "tokens.json").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_tokens(host):
    assert Settings(host=host).host == host


@pytest.mark.parametrize(
    "values",
    [
        {"port": 65536},
        {"port": -1},
        {"job_concurrency": 0},
        {"gc_grace_seconds": -1},
        {"log_format": "xml"},
        {"shutdown_seconds": 0},
        {"max_append_bytes": 0},
    ],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValidationError):
        Settings(**values)


def test_the_remote_store_is_under_the_data_directory_by_default(tmp_path):
    settings = Settings(data_dir=tmp_path)
    assert settings.effective_remote_url == f"file://{tmp_path.resolve()}/remote"
    assert Settings(remote_url="s3://b/p").effective_remote_url == "s3://b/p"


def test_credentials_in_urls_are_cut():
    shown = Settings(s3_endpoint_url="https://user:hunter2@s3.example.org/x").redacted()
    assert shown["BOP_S3_ENDPOINT_URL"] == "https://***@s3.example.org/x"
    assert "hunter2" not in repr(shown)


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        Settings().port = 1


OIDC = {"oidc_issuer": "https://id", "oidc_audience": "bop", "oidc_jwks": "https://id/jwks"}


def test_an_identity_provider_lets_it_answer_elsewhere():
    assert Settings(host="0.0.0.0", **OIDC).oidc_algorithms == ("RS256", "ES256", "EdDSA")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"oidc_audience": ""}, "BOP_OIDC_AUDIENCE"),
        ({"oidc_jwks": ""}, "BOP_OIDC_JWKS"),
        ({"oidc_jwks": "http://id/jwks"}, "https"),
        ({"oidc_algorithms": "RS256,HS256"}, "HS256"),
        ({"oidc_algorithms": "none"}, "none"),
        ({"admin_port": 8600}, "BOP_ADMIN_PORT"),
        ({"trusted_proxies": "10.0.0.0/8"}, "trusted_proxies|10.0.0.0/8"),
        ({"trusted_proxies": "*"}, "trusted_proxies|does not appear"),
    ],
)
def test_access_settings_that_would_let_too_many_in_are_refused(changes, told):
    with pytest.raises(ValidationError, match=told):
        Settings(**{**OIDC, **changes})


def test_the_admin_port_needs_tokens_to_leave_loopback():
    with pytest.raises(ValidationError, match="BOP_ADMIN_HOST"):
        Settings(admin_host="0.0.0.0")


def test_lists_come_separated_by_commas(monkeypatch):
    monkeypatch.setenv("BOP_TRUSTED_PROXIES", "10.0.0.1, ::1")
    assert Settings().trusted_proxies == ("10.0.0.1", "::1")


def test_misspelt_variables_are_told(monkeypatch):
    monkeypatch.setenv("BOP_QUOTA_GLOBAL_BYTE", "1")
    monkeypatch.setenv("bop_port", "8601")
    monkeypatch.setenv("BOP_URL", "http://127.0.0.1:8600")
    assert "BOP_QUOTA_GLOBAL_BYTE" in unknown_variables()
    assert not {"bop_port", "BOP_URL"} & set(unknown_variables())


def test_the_failpoints_variables_are_known_where_they_have_an_effect(monkeypatch):
    monkeypatch.setenv("BOP_FAILPOINTS", "{}")
    monkeypatch.setattr(failpoints, "fp", failpoints._nothing)
    assert unknown_variables() == ["BOP_FAILPOINTS"]  # misplaced: nothing heeds it
    monkeypatch.setattr(failpoints, "fp", lambda name: None)
    monkeypatch.setenv("BOP_FAILPOINTS_TRACE", "/nowhere")
    assert unknown_variables() == []
