"""What the change feed's JSON looks like."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field

from app.core.base.clock import rfc3339
from app.core.services.change_feed import CursorStatus
from app.routers.operations_schemas import ChangePage
from app.routers.schemas import EXAMPLE_TIME, Body, PageOf, View, example

__all__ = ["AckBody", "ChangePage", "CursorPage", "CursorView", "PutCursorBody"]


class PutCursorBody(Body):
    model_config = ConfigDict(json_schema_extra=example({"from": "start"}))

    start: Annotated[
        Literal["start", "now"] | Annotated[int, Field(ge=1)],
        Field(
            alias="from",
            description="The first change to be given: the oldest retained one, the next to "
            "come, or the one with this sequence.",
        ),
    ]


class AckBody(Body):
    model_config = ConfigDict(json_schema_extra=example({"sequence": 7}))

    sequence: Annotated[int, Field(ge=0)]


class CursorView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "name": "billing",
                "state": "live",
                "acknowledged": 7,
                "lag": 2,
                "first_sequence": 1,
                "last_sequence": 9,
                "created_at": EXAMPLE_TIME,
                "acknowledged_at": EXAMPLE_TIME,
            }
        )
    )

    name: str
    state: Literal["live", "expired"]
    acknowledged: int
    lag: int
    """Changes behind `acknowledged`, those of other tenants included."""
    first_sequence: int
    last_sequence: int
    created_at: str
    acknowledged_at: str

    @classmethod
    def of(cls, status: CursorStatus) -> Self:
        record = status.record
        return cls(
            name=record.name,
            state="expired" if status.expired else "live",
            acknowledged=record.acknowledged,
            lag=status.last_sequence - record.acknowledged,
            first_sequence=status.first_sequence,
            last_sequence=status.last_sequence,
            created_at=rfc3339(record.created_at_us),
            acknowledged_at=rfc3339(record.acknowledged_at_us),
        )


class CursorPage(PageOf):
    items: list[CursorView]
