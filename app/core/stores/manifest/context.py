"""What a batch is judged by, besides the rows."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchContext:
    """Read once for a batch, inside its transaction."""

    process_id: str
    epoch: int
    """This process's claim of the remote prefix."""
    now_us: int
    """For people: wall time never decides safety (I16)."""
    now_monotonic: float
    gc_grace_us: int = 0
    """Between a blob's doom and its deletion."""
