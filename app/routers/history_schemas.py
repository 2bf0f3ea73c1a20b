"""JSON of retention, snapshots and forks."""

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from app.core.base.clock import rfc3339
from app.core.stores.manifest.records import Retention, SnapshotRecord
from app.routers.schemas import EXAMPLE_TIME, Body, Name, PageOf, View, example

GENERATION_MAX = 2**63 - 1
COUNT_MAX = 2**31 - 1

GenerationNumber = Annotated[int, Field(ge=1, le=GENERATION_MAX)]


class RetentionChange(Body):
    """What is left out stays as it is; null switches a rule off."""

    keep_generations: Annotated[int | None, Field(ge=1, le=COUNT_MAX)] = None
    keep_seconds: Annotated[int | None, Field(ge=0, le=COUNT_MAX)] = None
    minimum_generations: Annotated[int, Field(ge=1, le=COUNT_MAX)] = 2

    def applied_to(self, retention: Retention) -> Retention:
        given = self.model_fields_set
        return Retention(
            keep_generations=self.keep_generations
            if "keep_generations" in given
            else retention.keep_generations,
            keep_seconds=self.keep_seconds if "keep_seconds" in given else retention.keep_seconds,
            minimum_generations=self.minimum_generations
            if "minimum_generations" in given
            else retention.minimum_generations,
        )


class ChangeDatabaseBody(Body):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "retention": {
                    "keep_generations": 100,
                    "keep_seconds": 604_800,
                    "minimum_generations": 2,
                }
            }
        )
    )

    retention: RetentionChange


class CreateSnapshotBody(Body):
    model_config = ConfigDict(
        json_schema_extra=example({"name": "before-migration", "generation": 7})
    )

    name: Name
    generation: GenerationNumber | None = None
    """By default the newest published one."""


class SnapshotView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "name": "before-migration",
                "generation": 7,
                "last_lsn": 1000,
                "page_count": 250,
                "created_at": EXAMPLE_TIME,
            }
        )
    )

    name: str
    generation: int
    last_lsn: int
    page_count: int
    created_at: str

    @classmethod
    def of(cls, row: SnapshotRecord) -> Self:
        return cls(
            name=row.name,
            generation=row.generation,
            last_lsn=row.last_lsn,
            page_count=row.page_count,
            created_at=rfc3339(row.created_at_us),
        )


class SnapshotPage(PageOf):
    items: list[SnapshotView]


class CreateForkBody(Body):
    model_config = ConfigDict(
        json_schema_extra=example({"database": "events-copy", "snapshot": "before-migration"})
    )

    database: Name
    """The new one."""
    tenant: Name | None = None
    """Of the new one; by default the parent's."""
    generation: GenerationNumber | None = None
    """By default the newest published one, WAL excluded."""
    snapshot: Name | None = None

    @model_validator(mode="after")
    def _choose(self) -> Self:
        if self.generation is not None and self.snapshot is not None:
            raise ValueError("generation and snapshot exclude each other")
        return self
