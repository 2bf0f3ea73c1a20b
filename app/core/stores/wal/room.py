"""The disk room of one log: asked before an append is queued, told what the files hold."""

from typing import Protocol

from app.core.stores.file_account import FileAccount, NoAccount


class Hold(Protocol):
    """Room for one append that is on its way to the disk."""

    def spend(self) -> None:
        """It is in the files, which were charged."""
        ...

    def release(self) -> None:
        """It will not be. Again is harmless."""
        ...


class WalRoom(FileAccount, Protocol):
    def hold(self, size_bytes: int) -> Hold | None:
        """None: `make_way` first. Raises Backpressure."""
        ...

    async def make_way(self, size_bytes: int) -> None:
        """Returns once asking again is worth it. Raises QuotaExhausted."""
        ...

    def unpublished(self, size_bytes: int) -> None:
        """So much of the log is in no generation yet."""
        ...

    def forget(self) -> None:
        """The log and its files are gone."""
        ...


class _NoHold:
    def spend(self) -> None:
        pass

    def release(self) -> None:
        pass


_NO_HOLD = _NoHold()


class EndlessRoom(NoAccount):
    """Where nobody counts: tests, and tools on a stopped service's directory."""

    def hold(self, size_bytes: int) -> Hold | None:
        del size_bytes
        return _NO_HOLD

    async def make_way(self, size_bytes: int) -> None:
        pass

    def unpublished(self, size_bytes: int) -> None:
        pass

    def forget(self) -> None:
        pass
