import errno
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from app.replication.open_files import claim_blocking, disclaim
from app.replication.targets import (
    BadTargets,
    FileRule,
    find_targets_blocking,
    load_rules_blocking,
    rule_for,
)


def make(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (a)")
    return path


def found(rules):
    return find_targets_blocking(rules)


def test_a_list_of_files_directories_and_databases(tmp_path):
    make(tmp_path / "dbs/Alpha.db")
    make(tmp_path / "dbs/__.db")
    make(tmp_path / "ns/one/data")
    config = tmp_path / "follow.toml"
    config.write_text(
        """
        [[follow]]
        file = "main.db"
        database = "acme/main"
        [[follow]]
        directory = "dbs"
        database = "acme/t-{stem}"
        [[follow]]
        directory = "ns"
        pattern = "*/data"
        database = "sqld/{parent}"
        """
    )
    what = found(load_rules_blocking(config))
    assert {(each.path.relative_to(tmp_path).as_posix(), each.name) for each in what.targets} == {
        ("main.db", "acme/main"),
        ("dbs/Alpha.db", "acme/t-alpha"),
        ("ns/one/data", "sqld/one"),
    }
    assert [path.name for path, _ in what.unnamed] == ["__.db"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must hold"),
        ("follow = 3", "must hold"),
        ("[[follow]]\nfile = 'a'", "needs a database"),
        ("[[follow]]\ndatabase = 'a/b'", "needs a file or a directory"),
        ("[[follow]]\nfile = 'a'\ndirectory = 'b'\ndatabase = 'a/b'", "a file or a directory"),
        ("[[follow]]\nfile = 'a'\ndatabase = 'a'", "not TENANT/DATABASE"),
        ("[[follow]]\nfile = 'a'\ndatabase = 'a/b'\ncolour = 'red'", "unknown colour"),
        ("[[follow]]\nfile = 'a'\npattern = '*'\ndatabase = 'a/b'", "belongs to a directory"),
        ("[[follow]]\ndirectory = 'a'\npattern = ''\ndatabase = 'a/{stem}'", "the pattern ''"),
        ("[[follow]]\ndirectory = 'a'\npattern = '/*'\ndatabase = 'a/{stem}'", "the pattern '/"),
        ("[[follow]]\ndirectory = 'a'\ndatabase = 'a/b'", "must name each file"),
        ("[[follow]]\ndirectory = 'a'\ndatabase = 'a/{name}'", "must name each file"),
        (
            "[[follow]]\ndirectory = 'a'\npattern = '**.db'\ndatabase = 'a/{stem}'",
            "pattern '\\*\\*",
        ),
        ('[[follow]]\nfile = "a\\u0000"\ndatabase = "a/b"', "zero byte"),
        ("[[follow]]\nfile = 'a'\ndatabase = 'a/b'\n" * 2, "twice"),
        ("[[follow", "not TOML"),
    ],
)
def test_a_wrong_list_says_what_is_wrong(tmp_path, text, says):
    config = tmp_path / "follow.toml"
    config.write_text(text)
    with pytest.raises(BadTargets, match=says):
        load_rules_blocking(config)


def test_a_directory_on_the_command_line_takes_a_tenant(tmp_path):
    make(tmp_path / "a.db")
    assert [each.name for each in found([rule_for(tmp_path, "acme")]).targets] == ["acme/a"]
    assert rule_for(tmp_path / "a.db", "acme/x") == FileRule(
        path=tmp_path / "a.db", database="acme/x"
    )
    with pytest.raises(BadTargets):
        rule_for(tmp_path / "a.db", "acme")


def test_what_is_followed_already_is_not_opened(tmp_path):
    path = tmp_path / "a.db"
    path.write_bytes(b"looking into it would show that it is none")
    assert not found([rule_for(tmp_path, "acme")]).targets
    claimed = claim_blocking(path)
    assert found([rule_for(tmp_path, "acme")]).targets
    (tmp_path / "b.db").hardlink_to(path)
    assert len(found([rule_for(tmp_path, "acme")]).targets) == 2, "under whatever name"
    disclaim(claimed)
    assert not found([rule_for(tmp_path, "acme")]).targets


def test_a_file_that_is_listed_goes_where_its_entry_says(tmp_path):
    make(tmp_path / "dbs/a.db")
    make(tmp_path / "dbs/Not a name.db")
    config = tmp_path / "follow.toml"
    config.write_text(
        """
        [[follow]]
        directory = "dbs"
        database = "acme/{stem}"
        [[follow]]
        file = "dbs/a.db"
        database = "acme/main"
        [[follow]]
        file = "dbs/Not a name.db"
        database = "acme/other"
        """
    )
    what = found(load_rules_blocking(config))
    assert [each.name for each in what.targets] == ["acme/main", "acme/other"]
    assert not what.unnamed


def test_a_directory_that_cannot_be_read_hides_no_other(tmp_path, monkeypatch):
    for name in ("one", "two"):
        make(tmp_path / f"{name}/{name}.db")
    glob = Path.glob

    def fail(path, pattern):
        if path.name == "one":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return glob(path, pattern)

    monkeypatch.setattr(Path, "glob", fail)
    what = found([rule_for(tmp_path / name, "acme") for name in ("one", "two")])
    assert [each.name for each in what.targets] == ["acme/two"]
    assert what.unreadable == ((tmp_path / "one", "Input/output error"),)
