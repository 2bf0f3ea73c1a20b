"""Decoders are made when modules are loaded: a struct's first one is not safe among threads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

APP = Path(__file__).parents[2] / "app"
IN_ONE_THREAD = {
    "app/client/calls.py": "a client's answers are decoded by its event loop",
    "app/client/jobs.py": "as above",
    "app/routers/paging.py": "a cursor's parts are no structs",
}
RACE = """
import sys, threading, zstandard
from app.core.base.errors import CorruptBlob
from app.core.checkpoint import generation_document as generations
from app.core.retention import snapshot_document as snapshots

sys.setswitchinterval(1e-6)
plain = b'{"format":"bop-generation","version":1,"database":{"db_id":1},"chunks":[{}]}'
documents = [
    (generations.decode_document, zstandard.ZstdCompressor().compress(plain)),
    (snapshots.decode_snapshot, b'{"format":"bop-snapshot","version":1,"db_id":1}'),
]
barrier = threading.Barrier(8)

def decode():
    barrier.wait()
    for function, data in documents:
        try:
            function(data, key="k")
        except CorruptBlob:
            pass

threads = [threading.Thread(target=decode) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_nothing_is_decoded_into_a_type_that_is_looked_at_then() -> None:
    found: dict[str, list[int]] = {}
    for path in sorted(APP.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "decode"
                and any(keyword.arg == "type" for keyword in node.keywords)
            ):
                name = str(path.relative_to(APP.parent))
                found.setdefault(name, []).append(node.lineno)
    assert found.keys() == IN_ONE_THREAD.keys(), found


@pytest.mark.parametrize("_turn", range(3))
def test_threads_that_decode_their_first_document_at_once_do_not_crash(_turn: int) -> None:
    done = subprocess.run([sys.executable, "-c", RACE], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
