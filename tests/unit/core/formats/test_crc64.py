"""CRC-64/NVME: known answers, pieces, and the form that S3 wants."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.formats.crc64 import combine_crc64, crc64, decode_crc64, encode_crc64

POLYNOMIAL = 0x9A6C9329AC4BC9B5  # 0xad93d23594c93659, reflected
ONES = (1 << 64) - 1


def slow_crc64(data: bytes) -> int:
    """From the definition, bit by bit."""
    value = ONES
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (POLYNOMIAL if value & 1 else 0)
    return value ^ ONES


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xAE8B14860A799888),  # the catalogue's check value
        (bytes(4096), 0x6482D367EB22B64E),  # the NVM Express specification's examples
        (b"\xff" * 4096, 0xC0DDBA7302ECA3AC),
        (bytes(range(256)) * 16, 0x3E729F5F6750449C),
    ],
)
def test_known_answers(data: bytes, expected: int) -> None:
    assert crc64(data) == expected


@given(st.binary(max_size=300))
def test_agrees_with_the_definition(data: bytes) -> None:
    assert crc64(data) == slow_crc64(data)


@given(st.binary(max_size=300), st.integers(0, 300))
def test_pieces(data: bytes, cut: int) -> None:
    first, second = data[:cut], data[cut:]
    assert crc64(second, crc64(first)) == crc64(data)
    assert combine_crc64(crc64(first), crc64(second), second_bytes=len(second)) == crc64(data)


def test_takes_any_buffer_without_a_copy_of_its_own() -> None:
    data = bytes(range(256)) * 4
    expected = crc64(data[1:])
    assert crc64(memoryview(data)[1:]) == expected
    assert crc64(bytearray(data)[1:]) == expected
    with pytest.raises(BufferError):
        crc64(memoryview(data)[::2])


def test_as_s3_writes_it() -> None:
    assert encode_crc64(0xAE8B14860A799888) == "rosUhgp5mIg="
    assert decode_crc64("rosUhgp5mIg=") == 0xAE8B14860A799888


@given(st.integers(0, ONES))
def test_encoding_round_trip(value: int) -> None:
    assert decode_crc64(encode_crc64(value)) == value


@pytest.mark.parametrize("text", ["", "AAAA", "rosUhgp5mIg", "rosUhgp5mIg=\n", "not base64!!", "é"])
def test_damaged_encodings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        decode_crc64(text)
