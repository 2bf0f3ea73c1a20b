"""What a decoder raises: bytes that are not what they claim to be."""


class Damage(Exception):
    """Bytes fail a check. The caller knows whose they are and raises CorruptWal or CorruptBlob."""

    def __init__(self, reason: str, *, offset: int | None = None) -> None:
        self.reason = reason
        self.offset = offset
        super().__init__(reason if offset is None else f"{reason} at byte {offset}")
