"""One small JSON POST, on a bare FastAPI application and on the service's own, with its edge, its
metrics, a token and the limits of its connections around it.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel

from app.core.base.events import Events
from app.main import create_app
from app.observability.logging import log_sink
from app.routers.auth import needs
from app.routers.route import ScopedRoute
from app.serving.server import OrderlyServer
from app.settings import Settings

TOKEN = "bench"
PATH = "/tenants/acme/databases/events/bench"
ROUTE = "/tenants/{tenant}/databases/{database}/bench"


class Order(BaseModel):
    number: int
    items: list[str]


class Taken(BaseModel):
    number: int
    count: int


bare = FastAPI()


@bare.post(ROUTE, status_code=201)
async def take_bare(tenant: str, database: str, body: Order) -> Taken:
    return Taken(number=body.number, count=len(body.items))


router = APIRouter(route_class=ScopedRoute)


@router.post(ROUTE, status_code=201)
@needs("write")
async def take(tenant: str, database: str, body: Order, request: Request) -> Taken:
    return Taken(number=body.number, count=len(body.items))


def serve_ours(port: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        tokens = Path(work) / "tokens.json"
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        entry = {"name": "bench", "sha256": digest, "scopes": ["write"], "tenants": ["acme"]}
        tokens.write_text(json.dumps({"tokens": [entry]}))
        settings = Settings(
            data_dir=Path(work) / "data", port=port, auth_tokens_file=tokens,
            manifest_map_bytes=64 << 20,
        )  # fmt: skip
        events = Events(log_sink(log_format="json", level="warning"))
        app = create_app(settings, events=events)
        app.router.routes.extend(router.routes)
        OrderlyServer(app, settings, events=events).run()


if __name__ == "__main__":
    if sys.argv[1] == "ours":
        serve_ours(int(sys.argv[2]))
    else:
        uvicorn.run(
            bare, host="127.0.0.1", port=int(sys.argv[2]), http="httptools", loop="uvloop",
            lifespan="off", access_log=False, log_level="error",
        )  # fmt: skip
