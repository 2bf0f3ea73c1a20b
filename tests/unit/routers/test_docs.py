"""The documentation's page loads nothing from anywhere else, whatever stands before the service."""

import re
from urllib.parse import urljoin

import pytest

from tests.unit.routers.conftest import Running

LOADED = {
    "docs/swagger-ui.css": ("text/css", b".swagger-ui"),
    "docs/swagger-ui.js": ("text/javascript", b"SwaggerUIBundle"),
    "docs/favicon.png": ("image/png", b"\x89PNG"),
}


def addresses_in(page: str) -> list[str]:
    return re.findall(r'(?:src|href)="([^"]*)"', page)


async def test_everything_that_the_page_loads_is_served(client):
    page = await client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    addresses = addresses_in(page.text)
    assert {address.partition("?")[0] for address in addresses} == {
        *LOADED, "docs/start.js", "openapi.json",
    }  # fmt: skip
    for address in addresses:
        answer = await client.get(urljoin("/docs", address))
        assert answer.status_code == 200, address
        media_type, begin = LOADED.get(address.partition("?")[0], (None, b""))
        if media_type:
            assert answer.headers["content-type"].partition(";")[0] == media_type
            assert begin in answer.content


@pytest.mark.parametrize("path", ["/docs", "/docs/start.js"])
async def test_nothing_comes_from_another_host(client, path):
    text = (await client.get(path)).text
    assert "//" not in text
    assert "<script>" not in text


async def test_addresses_keep_a_prefix_that_a_proxy_takes_away(client):
    page = (await client.get("/docs")).text
    for address in addresses_in(page):
        assert urljoin("http://host/some/prefix/docs", address).startswith(
            "http://host/some/prefix/"
        )
    start = (await client.get("/docs/start.js")).text
    assert 'url: "openapi.json"' in start


async def test_the_policy_lets_the_browser_ask_nobody_else(client):
    headers = (await client.get("/docs")).headers
    policy = dict(
        directive.split(" ", 1) for directive in headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]


async def test_what_is_named_with_its_version_is_kept_and_the_rest_asked_for_again(client):
    addresses = addresses_in((await client.get("/docs")).text)
    versioned = [address for address in addresses if "?" in address]
    assert len(versioned) == len(LOADED)
    for address in versioned:
        answer = await client.head(urljoin("/docs", address))
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/docs", "/docs/start.js"):
        assert (await client.head(path)).headers["cache-control"] == "no-cache"


async def test_it_is_open_and_is_no_part_of_the_api(guarded: Running):
    for path in ("/docs", "/docs/start.js", "/docs/swagger-ui.js"):
        assert (await guarded.client.get(path)).status_code == 200
    document = (await guarded.client.get("/openapi.json")).json()
    assert not [path for path in document["paths"] if path.startswith("/docs")]
