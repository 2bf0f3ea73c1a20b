"""Room on the disk that was promised to somebody; see `quota.py`."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from app.core.base.errors import InvariantViolation


class Reservation:
    """Room that was promised. Released by `release`, or on leaving it as a context."""

    __slots__ = ("_give_back", "_size_bytes", "drained", "job_id", "tenant")

    def __init__(
        self,
        give_back: Callable[["Reservation", int, bool], None],  # how much of it goes; spent or not
        *,
        tenant: str,
        job_id: str | None,
        size_bytes: int,
        drained: bool,
    ) -> None:
        self._give_back = give_back
        self._size_bytes = size_bytes
        self.tenant = tenant
        self.job_id = job_id
        self.drained = drained
        """Taken from the drain reserve, outside the tenant's and the global budget."""

    def __repr__(self) -> str:
        return f"<Reservation {self.size_bytes} bytes, tenant={self.tenant} job={self.job_id}>"

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def shrink(self, *, to_bytes: int) -> None:
        """Gives back what is not needed after all; what is already smaller stays."""
        self._shrink(to_bytes, spent=False)

    def spend(self, size_bytes: int) -> None:
        """So much of it became a file that is charged: it is no longer promised, nor free."""
        self._shrink(max(self._size_bytes - size_bytes, 0), spent=True)

    def release(self) -> None:
        """Again is harmless."""
        self.shrink(to_bytes=0)

    def _shrink(self, to_bytes: int, *, spent: bool) -> None:
        if to_bytes < 0:
            raise InvariantViolation("A reservation has no negative size.", to_bytes=to_bytes)
        surplus = self._size_bytes - to_bytes
        if surplus > 0:
            self._give_back(self, surplus, spent)
            self._size_bytes = to_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
