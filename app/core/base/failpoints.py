"""Named places where tests make the process die, fail, or wait.

The implementation is a test-only package, `bop_failpoints`; where that is not installed every
call is a no-op and no environment variable has any effect. Names are
`<component>.<before|mid|after>_<step>`, and `tests/fault` fails on one that no scenario reaches.
"""

from collections.abc import Callable


def _nothing(name: str) -> None:
    """Outside fault tests a failpoint does nothing."""


fp: Callable[[str], None] = _nothing
VARIABLES = frozenset({"BOP_FAILPOINTS", "BOP_FAILPOINTS_TRACE"})
"""What the test-only package reads."""


def armed() -> bool:
    """Whether a failpoint may have an effect: then a step may be split to put one inside."""
    return fp is not _nothing


try:
    from bop_failpoints import hit
except ImportError:
    pass
else:
    fp = hit
