"""The wheel, built as pip builds it: what it says of itself, and that nothing is left out."""

import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("app", "migrations", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree)
    built = tmp_path_factory.mktemp("built")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--wheel-dir", str(built), str(tree)],
        check=True,
    )  # fmt: skip
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_it_carries_its_licence(wheel: zipfile.ZipFile):
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    said = message_from_bytes(wheel.read(metadata))
    assert said["License-Expression"] == "Apache-2.0"
    assert said["License-File"] == "LICENSE"
    text = wheel.read(metadata.replace("METADATA", "licenses/LICENSE")).decode()
    assert text == (REPOSITORY / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_no_module_is_left_out(wheel: zipfile.ZipFile):
    packed = {name for name in wheel.namelist() if name.startswith(("app/", "migrations/"))}
    written = {
        path.relative_to(REPOSITORY).as_posix()
        for folder in ("app", "migrations")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == written


def test_the_image_copies_nothing_that_its_context_leaves_out():
    copied = [
        word
        for line in (REPOSITORY / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    ]
    let_in = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "LICENSE" in copied
    assert [name for name in copied if f"!{name}" not in let_in] == []
