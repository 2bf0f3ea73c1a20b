"""Streams that are closed where they are consumed, not when the garbage collector comes by."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TypeVar, cast

T = TypeVar("T")


def closing(stream: AsyncIterator[T]) -> aclosing[AsyncGenerator[T, None]]:
    """For the iterators of a RemoteStore: leaving the block closes the connection or file."""
    return aclosing(cast("AsyncGenerator[T, None]", stream))
