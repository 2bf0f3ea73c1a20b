"""What a command shows: tables for people, or JSON for programs, on standard output; everything
that is only about the doing on standard error.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from app.cli.failures import Failure
from app.cli.units import plain_text

Output = Literal["table", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    name: str
    right: bool = False


class Meter(Protocol):
    """Takes how far something is."""

    def __call__(self, text: str, done: float, total: float | None) -> None: ...


class Screen:
    """Its libraries are loaded when something is shown: `--help` does without them."""

    def __init__(self, output: Output) -> None:
        self.output = output

    @property
    def as_json(self) -> bool:
        return self.output == "json"

    def document(self, value: object) -> None:
        """One JSON document on a line of its own."""
        self.documents([value])

    def documents(self, values: Iterable[object]) -> None:
        self.raw(encoded(values))

    def raw(self, data: bytes) -> None:
        """Bytes as they are. Raises BrokenPipeError when nobody reads on."""
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def let_go(self) -> None:
        """At the end: what could not be written has been told, and the interpreter must not try it
        once more, and complain.
        """
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)

    def text(self, markup: str) -> None:
        """A line for people; rich markup."""
        from app.cli.drawing import draw_line  # noqa: PLC0415 - see the class

        draw_line(sys.stdout, markup)

    def note(self, line: str) -> None:
        """About the doing, for people only; plain text."""
        if not self.as_json:
            sys.stderr.write(f"{plain_text(line)}\n")

    def table(
        self, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, empty: str
    ) -> None:
        """`empty` is said on standard error where there is no row."""
        from app.cli.drawing import draw_table  # noqa: PLC0415 - see the class

        if rows:
            draw_table(sys.stdout, columns, rows)
        else:
            self.note(empty)

    def facts(self, facts: Mapping[str, str]) -> None:
        """One thing: its properties, a line each."""
        from app.cli.drawing import draw_facts  # noqa: PLC0415 - see the class

        draw_facts(sys.stdout, facts)

    def failure(self, failure: Failure) -> None:
        if self.as_json:
            sys.stderr.write(encoded([failure.document()]).decode())
            return
        hint = f"\n{failure.hint}" if failure.hint else ""
        sys.stderr.write(f"Error: {plain_text(failure.detail + hint)}\n")

    @contextmanager
    def meter(self) -> Iterator[Meter]:
        """A progress bar on standard error while someone looks at it; nothing otherwise."""
        if self.as_json or not sys.stderr.isatty():
            yield _unseen
            return
        from app.cli.drawing import drawn_meter  # noqa: PLC0415 - see the class

        with drawn_meter(sys.stderr) as meter:
            yield meter


def encoded(values: Iterable[object]) -> bytes:
    """A line of JSON for each. Takes structs, dataclasses and what JSON has."""
    import msgspec  # noqa: PLC0415 - see Screen

    encoder = msgspec.json.Encoder(enc_hook=str)

    def line(value: object) -> bytes:
        try:
            return encoder.encode(value) + b"\n"
        except UnicodeEncodeError:  # a file's name that is no UTF-8: `\udcXX`, as Python reads it
            import json  # noqa: PLC0415 - seldom needed

            plain = msgspec.to_builtins(value, enc_hook=str)
            return f"{json.dumps(plain, separators=(',', ':'))}\n".encode()

    return b"".join(line(value) for value in values)


def _unseen(text: str, done: float, total: float | None) -> None:
    """The meter where nobody looks."""
