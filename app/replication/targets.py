"""Which files go to which databases.

A configuration is TOML, a list of:

    [[follow]]
    file = "/var/lib/app/main.db"
    database = "acme/main"

    [[follow]]
    directory = "/var/lib/app/tenants"
    pattern = "*.db"                # the default; "*/data" for sqld's namespaces
    database = "acme/{stem}"        # {stem}: the file's name without its suffix; {parent}: its
                                    # directory's name

Relative paths start from the configuration's own directory. In a directory every SQLite database
that matches is followed, also one that is made later. One that is listed as a file, too, goes where
that says.
"""

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.replication.open_files import begins_with_blocking
from app.replication.replica import Target
from app.replication.source import MAGIC, SIDE_FILES

DEFAULT_PATTERN = "*.db"
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_FIELD = re.compile(r"\{(\w*)\}")
_KEYS = frozenset({"file", "directory", "pattern", "database"})


class BadTargets(ValueError):
    """The configuration is wrong; the text says where and how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRule:
    path: Path
    database: str
    """TENANT/DATABASE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryRule:
    path: Path
    pattern: str
    database: str
    """TENANT/DATABASE with fields."""


Rule = FileRule | DirectoryRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    targets: tuple[Target, ...]
    unnamed: tuple[tuple[Path, str], ...]
    """Files that match, and why they have no database to go to."""
    directories: frozenset[Path]
    """Where files may come and go: what is watched besides the files' own directories."""
    unreadable: tuple[tuple[Path, str], ...]
    """Directories, and why nobody knows what is in them."""


def rule_for(path: Path, database: str) -> Rule:
    """A file, or a directory: then TENANT alone takes the files' names. Raises BadTargets."""
    if path.is_dir():
        template = database if "/" in database else f"{database}/{{stem}}"
        return _directory_rule(path, DEFAULT_PATTERN, template)
    if split_name(database) is None:
        raise BadTargets(f"{database!r} is not TENANT/DATABASE")
    return FileRule(path=path, database=database)


def load_rules_blocking(config: Path) -> list[Rule]:
    """Raises BadTargets."""
    try:
        document = tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadTargets(f"{config} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadTargets(f"{config} is not TOML: {error}") from error
    entries = document.get("follow")
    if set(document) != {"follow"} or not isinstance(entries, list) or not entries:
        raise BadTargets(f"{config} must hold [[follow]] entries and nothing else")
    rules = [
        _rule(entry, config.parent, f"{config}, entry {number}")
        for number, entry in enumerate(entries, 1)
    ]
    files = [rule.path for rule in rules if isinstance(rule, FileRule)]
    for path in files:
        if files.count(path) > 1:
            raise BadTargets(f"{config} lists {path} twice")
    return rules


def find_targets_blocking(rules: list[Rule]) -> Found:
    """The files as they are now."""
    targets: dict[Path, Target] = {}
    unnamed: dict[Path, str] = {}
    unreadable: dict[Path, str] = {}
    watched: set[Path] = set()
    # a file that is listed has the name that it is given there
    for rule in sorted(rules, key=lambda each: isinstance(each, DirectoryRule)):
        try:
            paths = _paths(rule)
            watched |= _directories(rule)
        except OSError as error:
            unreadable[rule.path] = error.strerror or str(error)
            continue
        for path in paths:
            parts = split_name(name := _name_of(path, rule))
            if parts is None:
                unnamed[path] = f"{name!r} is no name of a database; --config can give `file` one"
            elif path not in targets:
                targets[path] = Target(path=path, tenant=parts[0], database=parts[1])
    return Found(
        targets=tuple(targets.values()),
        unnamed=tuple((path, why) for path, why in unnamed.items() if path not in targets),
        directories=frozenset(watched),
        unreadable=tuple(unreadable.items()),
    )


def _name_of(path: Path, rule: Rule) -> str:
    stem = path.name if path.name.startswith(".") else path.name.split(".")[0]
    values = {"stem": stem.lower(), "parent": path.parent.name.lower()}
    return _FIELD.sub(lambda match: values[match[1]], rule.database)


def _directories(rule: Rule) -> set[Path]:
    if not isinstance(rule, DirectoryRule) or not rule.path.is_dir():
        return set()
    below = {path for path in rule.path.iterdir() if path.is_dir()} if "/" in rule.pattern else {}
    return {rule.path, *below}


def split_name(text: str) -> tuple[str, str] | None:
    tenant, slash, database = text.partition("/")
    if slash and _NAME.fullmatch(tenant) and _NAME.fullmatch(database):
        return tenant, database
    return None


def _paths(rule: Rule) -> list[Path]:
    if isinstance(rule, FileRule):
        return [rule.path]
    return [
        path
        for path in sorted(rule.path.glob(rule.pattern))
        if not path.name.endswith(SIDE_FILES)
        and path.is_file()
        and begins_with_blocking(path, MAGIC)
    ]


def _rule(entry: Any, base: Path, where: str) -> Rule:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise BadTargets(f"{where}: every value is a string")
    if any("\0" in value for value in entry.values()):
        raise BadTargets(f"{where}: a value holds a zero byte")
    if unknown := set(entry) - _KEYS:
        raise BadTargets(f"{where}: unknown {', '.join(sorted(unknown))}")
    if ("file" in entry) == ("directory" in entry):
        raise BadTargets(f"{where}: needs a file or a directory")
    if "database" not in entry:
        raise BadTargets(f"{where}: needs a database")
    if "file" in entry:
        if "pattern" in entry:
            raise BadTargets(f"{where}: a pattern belongs to a directory")
        if split_name(entry["database"]) is None:
            raise BadTargets(f"{where}: {entry['database']!r} is not TENANT/DATABASE")
        return FileRule(path=base / entry["file"], database=entry["database"])
    try:
        return _directory_rule(
            base / entry["directory"], entry.get("pattern", DEFAULT_PATTERN), entry["database"]
        )
    except BadTargets as error:
        raise BadTargets(f"{where}: {error}") from error


def _directory_rule(path: Path, pattern: str, template: str) -> DirectoryRule:
    fields = _FIELD.findall(template)
    if not fields or not set(fields) <= {"stem", "parent"}:
        raise BadTargets(f"{template!r} must name each file by {{stem}} or {{parent}}")
    if split_name(_FIELD.sub("x", template)) is None:
        raise BadTargets(f"{template!r} is not TENANT/DATABASE")
    if not pattern or Path(pattern).is_absolute():
        raise BadTargets(f"the pattern {pattern!r} is not one of names within the directory")
    try:
        next(iter(Path(os.devnull).glob(pattern)), None)
    except ValueError as error:
        raise BadTargets(f"the pattern {pattern!r} is none: {error}") from error
    return DirectoryRule(path=path, pattern=pattern, database=template)
