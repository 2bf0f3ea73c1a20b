"""The list of steps that this version knows: every `NNNN_name.py` beside this module.

A step module has one function, `apply(transaction)`, over raw rows. A released step never
changes; a new one takes the next number.
"""

import importlib
import re
from pathlib import Path

from app.core.stores.manifest.ledger import MigrationStep

_STEP = re.compile(r"(\d{4})_([a-z0-9_]+)")


def load_steps() -> tuple[MigrationStep, ...]:
    """In order. For `ManifestStore.open(…, migrations=load_steps())`."""
    steps = []
    for path in sorted(Path(__file__).parent.glob("[0-9]*.py")):
        named = _STEP.fullmatch(path.stem)
        if named is None:
            raise ImportError(f"{path.name} is not named NNNN_name.py")
        module = importlib.import_module(f"{__package__}.{path.stem}")
        steps.append(MigrationStep(number=int(named[1]), name=named[2], apply=module.apply))
    numbers = [step.number for step in steps]
    if numbers != list(range(1, len(steps) + 1)):
        raise ImportError(f"schema steps are not numbered from 1 without a gap: {numbers}")
    return tuple(steps)
