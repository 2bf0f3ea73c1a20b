"""What a truncation is asked with. Its answer is a Job like any other."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from app.routers.schemas import Body, Name, example

LEASE_TIMEOUT_SECONDS_MAX = 3600


class TruncateBody(Body):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "tenant": "acme",
                "database": "events",
                "direction": "head",
                "lsn": 1001,
                "on_lease": "wait",
                "lease_timeout_seconds": 30,
            }
        )
    )

    tenant: Name
    database: Name
    direction: Literal["head", "tail"]
    """head: the oldest records go, in whole chunks; tail: the newest ones."""
    lsn: Annotated[int, Field(ge=1, lt=2**63)]
    """head: chunks that end below it go; tail: it and all after it, up to the newest, go."""
    on_lease: Literal["wait", "cancel"] = "wait"
    """What becomes of a checkpoint in the way."""
    lease_timeout_seconds: Annotated[
        float, Field(ge=0, le=LEASE_TIMEOUT_SECONDS_MAX, allow_inf_nan=False)
    ] = 30
    """Counted from acceptance."""
