"""The ceilings that HTTP itself sets: a bare FastAPI route and a bare ASGI drain."""

import uvicorn
from fastapi import FastAPI, Request, Response

api = FastAPI()


@api.post("/tenants/{tenant}/databases/{database}/records", status_code=201)
async def bare_records(tenant: str, database: str, request: Request) -> dict[str, int]:
    body = await request.body()
    return {"first_lsn": 1, "last_lsn": 1, "count": 1, "bytes": len(body)}


_PAGE = bytes(range(256)) * 16


@api.get("/tenants/{tenant}/databases/{database}/pages/{page_no}", response_class=Response)
async def bare_page(tenant: str, database: str, page_no: int) -> Response:
    return Response(_PAGE, media_type="application/octet-stream")


async def drain(scope, receive, send):
    """Reads the whole body and answers how much it was."""
    if scope["type"] != "http":
        return
    total, more = 0, True
    while more:
        message = await receive()
        total += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = b'{"bytes": %d}' % total
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    import sys

    uvicorn.run(
        {"api": api, "drain": drain}[sys.argv[1]],
        host="127.0.0.1", port=int(sys.argv[2]), http="httptools", loop="uvloop",
        lifespan="off", access_log=False, log_level="error",
    )  # fmt: skip
