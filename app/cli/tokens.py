"""`tokens`: what goes into the tokens file."""

import hashlib
import sys
from typing import Annotated

import typer

from app.cli.failures import wrong_usage
from app.cli.session import session_of
from app.core.base.clock import SystemRandomness

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Tokens for BOP_AUTH_TOKENS_FILE."
)

GENERATED_BITS = 256


@app.callback()
def tokens() -> None:
    """Tokens for BOP_AUTH_TOKENS_FILE."""


@app.command("hash")
def hash_token(
    context: typer.Context,
    token: Annotated[
        str | None,
        typer.Argument(
            metavar="TOKEN",
            help="Better on standard input, where no list of processes shows it.",
            show_default=False,
        ),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Make a new token, and show it this once.")
    ] = False,
) -> None:
    """Print the SHA-256 that the tokens file takes for a token."""
    screen = session_of(context).screen
    if generate:
        if token is not None:
            raise wrong_usage("Give a token or --generate, not both.")
        token = f"{SystemRandomness().bits(GENERATED_BITS):0{GENERATED_BITS // 4}x}"
    elif token is None or token == "-":  # noqa: S105 - the usual name of standard input
        token = read_token()
    if not token:
        raise wrong_usage("The token is empty.")
    digest = hashlib.sha256(token.encode()).hexdigest()
    if screen.as_json:
        screen.document({"token": token, "sha256": digest} if generate else {"sha256": digest})
        return
    if generate:
        screen.note(f"Token: {token}")
    screen.raw(f"{digest}\n".encode())


def read_token() -> str:
    if sys.stdin.isatty():
        return str(typer.prompt("Token", hide_input=True, err=True))
    return sys.stdin.readline().rstrip("\r\n")
