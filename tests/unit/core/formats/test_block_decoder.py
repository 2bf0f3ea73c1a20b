"""Blocks of pages with a dictionary."""

import random

import pytest
import zstandard

from app.core.formats.codecs import CodecCode
from app.core.formats.page_codec import BlockDecoder, BlockEncoder, train_dictionary


@pytest.fixture
def dictionary() -> bytes:
    words = [f"word-{number:04}" for number in range(300)]
    chance = random.Random(3)
    text = " ".join(chance.choices(words, k=100_000)).encode()
    trained = train_dictionary(memoryview(text[: len(text) // 512 * 512]), page_size=512)
    assert trained
    return trained


class TakenByOthers(list[zstandard.ZstdDecompressor]):
    """Holds one when it is looked at; by the time it is reached for, another thread has it."""

    def __bool__(self) -> bool:
        return True


def test_threads_do_not_take_each_others_contexts(dictionary: bytes) -> None:
    raw = b"word-0001 word-0002 " * 100
    [stored] = BlockEncoder(CodecCode.ZSTD, dictionary=dictionary).encode(
        memoryview(raw), [len(raw)]
    )
    decoder = BlockDecoder(CodecCode.ZSTD, dictionary=dictionary)
    decoder._idle = TakenByOthers()
    assert decoder.decode(memoryview(stored), raw_bytes=len(raw)) == raw
    decoder._idle.clear()
    assert decoder.decode(memoryview(stored), raw_bytes=len(raw)) == raw
    assert len(decoder._idle) == 1
