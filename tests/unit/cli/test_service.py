import tomllib

import pytest

from app.settings import Settings


def test_print_config_is_toml_that_the_service_reads_back(cli, tmp_path):
    env = {"BOP_PORT": "8700", "BOP_REMOTE_URL": "s3://key:secret@bucket/prefix"}
    shown = cli("serve", "--print-config", env=env).stdout
    values = tomllib.loads(shown)
    assert values["BOP_PORT"] == 8700
    assert values["BOP_TAKE_OVER"] is False
    assert "secret" not in shown
    file = tmp_path / "config.toml"
    file.write_text(shown)
    again = cli.json("serve", "--print-config", env={"BOP_CONFIG_FILE": str(file)}).json
    assert {name: value for name, value in again.items() if value is not None} == values
    assert set(again) == {f"BOP_{name.upper()}" for name in Settings.model_fields}


def test_a_misspelt_setting_is_told(cli):
    ran = cli("serve", "--print-config", env={"BOP_PROT": "8700"})
    assert (ran.exit_code, ran.stderr) == (0, "BOP_PROT is set, and is no setting.\n")


def test_take_over_reaches_the_settings(cli):
    assert cli.json("serve", "--take-over", "--print-config").json["BOP_TAKE_OVER"] is True


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"BOP_PORT": "many"}, "BOP_PORT"),
        ({"BOP_HOST": "0.0.0.0"}, "BOP_AUTH_TOKENS_FILE"),
        ({"BOP_CONFIG_FILE": "/no/such/file"}, "BOP_CONFIG_FILE"),
    ],
)
def test_wrong_settings_are_named(cli, env, said):
    ran = cli.json("serve", "--print-config", env=env)
    assert ran.exit_code == 2
    assert ran.problem["code"] == "wrong_usage"
    assert said in ran.problem["detail"]
