"""CRC-64/NVME, the checksum that S3 keeps of whole objects (`x-amz-checksum-crc64nvme`).

Catalogue of parametrised CRC algorithms: width 64, polynomial 0xad93d23594c93659, reflected,
initial value and final XOR all ones; the check value of `123456789` is 0xae8b14860a799888. awscrt
computes it with carry-less multiplication, some tens of GB/s, over any contiguous buffer, uncopied.
"""

import base64

from awscrt import checksums

_crc64nvme = checksums.crc64nvme
_combine = checksums.combine_crc64nvme


def crc64(data: bytes | bytearray | memoryview, previous: int = 0) -> int:
    """The CRC of what `previous` covers followed by `data`."""
    result: int = _crc64nvme(data, previous)
    return result


def combine_crc64(first: int, second: int, *, second_bytes: int) -> int:
    """The CRC of two pieces one after the other, from the CRC of each."""
    result: int = _combine(first, second, second_bytes)
    return result


def encode_crc64(value: int) -> str:
    """As S3 writes it in headers: base64 of the 8 bytes, big-endian."""
    return base64.b64encode(value.to_bytes(8, "big")).decode("ascii")


def decode_crc64(text: str) -> int:
    """Raises ValueError unless it is base64 of 8 bytes."""
    raw = base64.b64decode(text, validate=True)
    if len(raw) != 8:
        raise ValueError("a CRC-64 has 8 bytes")
    return int.from_bytes(raw, "big")
