"""The interactive documentation. Everything it loads comes from here: a cluster without a way out
shows it too, and its policy lets the browser ask nobody else.

Addresses are relative to the page, so that it works behind whatever prefix a proxy takes away.
"""

from importlib import metadata, resources
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from app.routers.auth import open_to_all
from app.routers.route import ScopedRoute

router = APIRouter(route_class=ScopedRoute, include_in_schema=False)

PACKAGE: Final = "fastapi_swagger"
"""Only its files are used: those of a release of Swagger UI, as they are (ADR 0035)."""
VERSION: Final = metadata.version(PACKAGE)
FILES: Final = Path(str(resources.files(PACKAGE) / "resources"))

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SNIFF_NOT: Final = {"X-Content-Type-Options": "nosniff"}
ASK_AGAIN: Final = {"Cache-Control": "no-cache", **SNIFF_NOT}
KEEP: Final = {"Cache-Control": "public, max-age=31536000, immutable", **SNIFF_NOT}
"""For what the page names with its version."""

PAGE: Final = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>bop-checkpoint</title>
<link rel="stylesheet" href="docs/swagger-ui.css?{VERSION}">
<link rel="icon" type="image/png" href="docs/favicon.png?{VERSION}">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>The same without scripts: <a href="openapi.json">openapi.json</a></noscript>
<script src="docs/swagger-ui.js?{VERSION}"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
START: Final = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
});
"""


@router.head("/docs")
@router.get("/docs")
@open_to_all
async def page(request: Request) -> Response:
    del request
    policy = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}
    return Response(PAGE, media_type="text/html", headers={**policy, **ASK_AGAIN})


@router.head("/docs/start.js")
@router.get("/docs/start.js")
@open_to_all
async def start(request: Request) -> Response:
    del request
    return Response(START, media_type="text/javascript", headers=ASK_AGAIN)


@router.head("/docs/swagger-ui.js")
@router.get("/docs/swagger-ui.js")
@open_to_all
async def script(request: Request) -> Response:
    del request
    return _file("swagger-ui-bundle.js", "text/javascript")


@router.head("/docs/swagger-ui.css")
@router.get("/docs/swagger-ui.css")
@open_to_all
async def style(request: Request) -> Response:
    del request
    return _file("swagger-ui.css", "text/css")


@router.head("/docs/favicon.png")
@router.get("/docs/favicon.png")
@open_to_all
async def icon(request: Request) -> Response:
    del request
    return _file("favicon-32x32.png", "image/png")


def _file(name: str, media_type: str) -> Response:
    return FileResponse(FILES / name, media_type=media_type, headers=KEEP)
