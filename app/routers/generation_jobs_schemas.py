"""What a verification or a download is asked for."""

from typing import Annotated

from pydantic import ConfigDict, Field

from app.routers.schemas import Body, Name, example


class GenerationJobBody(Body):
    """Without `generation`: the newest published one."""

    model_config = ConfigDict(
        json_schema_extra=example({"tenant": "acme", "database": "events", "generation": 7})
    )

    tenant: Name
    database: Name
    generation: Annotated[int | None, Field(ge=1, le=2**63 - 1)] = None
