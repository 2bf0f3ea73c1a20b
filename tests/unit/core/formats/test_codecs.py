import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from app.core.formats.codecs import (
    BLOCK_BYTES_MAX,
    CodecCode,
    codec_code,
    compress,
    decompress,
)
from app.core.formats.damage import Damage

PACKED = [CodecCode.ZSTD, CodecCode.LZ4]
TEXT = b"the same line over and over\n" * 1000


@pytest.mark.parametrize("codec", list(CodecCode))
@given(data=st.binary(max_size=4096))
def test_round_trip(codec, data):
    packed = compress(codec, data)
    assert decompress(codec, packed, raw_bytes=len(data)) == data
    assert decompress(codec, memoryview(packed), raw_bytes=len(data)) == data
    assert compress(codec, memoryview(data)) == packed


def test_codes_are_stored_and_never_change():
    assert [codec_code(name) for name in ("none", "zstd", "lz4")] == [0, 1, 2]


@pytest.mark.parametrize("codec", PACKED)
def test_text_becomes_smaller(codec):
    assert len(compress(codec, TEXT)) < len(TEXT) / 20


@pytest.mark.parametrize("codec", list(CodecCode))
@pytest.mark.parametrize("wrong", [0, 1, len(TEXT) - 1, len(TEXT) + 1, BLOCK_BYTES_MAX + 1, -1])
def test_any_other_size_than_declared_is_damage(codec, wrong):
    if wrong == len(TEXT) + 1 and codec is CodecCode.NONE:
        return
    with pytest.raises(Damage):
        decompress(codec, compress(codec, TEXT), raw_bytes=wrong)


def test_a_zstd_frame_is_not_believed_before_it_is_looked_at():
    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(256 << 20))
    assert len(bomb) < 32_768
    with pytest.raises(Damage, match="another size"):
        decompress(CodecCode.ZSTD, bomb, raw_bytes=100)


def test_a_zstd_frame_without_its_size_is_refused():
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(TEXT)
    with pytest.raises(Damage):
        decompress(CodecCode.ZSTD, frame, raw_bytes=len(TEXT))


@pytest.mark.parametrize("codec", PACKED)
def test_cut_and_continued_blocks_are_damage(codec):
    packed = compress(codec, os.urandom(50) + TEXT)
    for data in (packed[:-1], packed + b"x", b"", packed[1:]):
        with pytest.raises(Damage):
            decompress(codec, data, raw_bytes=len(TEXT) + 50)


@pytest.mark.parametrize("codec", PACKED)
@given(data=st.binary(max_size=300), size=st.integers(0, 2000))
def test_hostile_bytes_are_damage_or_as_long_as_declared(codec, data, size):
    try:
        raw = decompress(codec, data, raw_bytes=size)
    except Damage:
        return
    assert len(raw) == size


@pytest.mark.parametrize("codec", PACKED)
def test_threads_do_not_meet(codec):
    blocks = [os.urandom(100) * (number + 1) for number in range(64)]

    def both_ways(block):
        packed = compress(codec, block)
        return packed, decompress(codec, packed, raw_bytes=len(block))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(both_ways, blocks * 8))
    assert [raw for _, raw in results] == blocks * 8
    assert [packed for packed, _ in results] == [compress(codec, block) for block in blocks] * 8
