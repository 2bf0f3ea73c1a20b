"""Who is told which files a store holds, so that each inode is paid for once."""

from typing import Protocol


class FileAccount(Protocol):
    """Told after a file was made or has grown, and after it was unlinked."""

    def charge(self, name: str, *, device: int, inode: int, size_bytes: int) -> None: ...

    def discharge(self, name: str, *, device: int, inode: int) -> None: ...


class CacheAccount(FileAccount, Protocol):
    """Of a store that need not take a file."""

    def missing_bytes(self, size_bytes: int) -> int:
        """How much has to go before a new file of that size fits what is allowed in all."""
        ...


class NoAccount:
    def charge(self, name: str, *, device: int, inode: int, size_bytes: int) -> None:
        pass

    def discharge(self, name: str, *, device: int, inode: int) -> None:
        pass

    def missing_bytes(self, size_bytes: int) -> int:
        del size_bytes
        return 0
