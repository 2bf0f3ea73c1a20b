"""Every failpoint in `app/`, found in the source."""

import ast
import re
from pathlib import Path

APP = Path(__file__).resolve().parents[2] / "app"

NAME = re.compile(r"[a-z]+(_[a-z]+)*\.(before|mid|after)_[a-z]+(_[a-z]+)*")


class UnnamedFailpoint(AssertionError):
    """A call of `fp` whose name is not a plain string: no test could aim at it."""


def failpoints_in(app: Path = APP) -> dict[str, list[str]]:
    """Name to the places (`path:line`) that call it."""
    found: dict[str, list[str]] = {}
    for path in sorted(app.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if not isinstance(node, ast.Call) or not _is_failpoint(node.func):
                continue
            place = f"{path.relative_to(app.parent)}:{node.lineno}"
            match node.args:
                case [ast.Constant(value=str(name))]:
                    found.setdefault(name, []).append(place)
                case _:
                    raise UnnamedFailpoint(place)
    return found


def functions_in(path: Path) -> set[str]:
    """The functions of a module, and the methods of its classes: what pytest may know as tests."""
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def _is_failpoint(function: ast.expr) -> bool:
    match function:
        case ast.Name(id="fp"):
            return True
        case ast.Attribute(value=ast.Name(id="failpoints"), attr="fp"):
            return True
        case _:
            return False
