"""The OpenAPI document: problems where they can occur, an example beside every body."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from app.core.base.errors import (
    BopError,
    Forbidden,
    InvalidRequest,
    ManifestBusy,
    NotReady,
    Unauthenticated,
)
from app.routers.problems import MEDIA_TYPE, STATUS, problem_members
from app.routers.schemas import Problem

Responses = dict[int | str, dict[str, Any]]


def _header(text: str, kind: str = "string") -> dict[str, Any]:
    return {"description": text, "schema": {"type": kind}}


_RETRY_AFTER = {"Retry-After": _header("Seconds.", "integer")}
MADE_HEADERS: dict[str, Any] = {"Location": _header("Where it is.")}
ACCEPTED_HEADERS: dict[str, Any] = {"Location": _header("Where the job is."), **_RETRY_AFTER}
_HEADERS_OF: dict[str, dict[str, Any]] = {
    "401": {"WWW-Authenticate": _header("`Bearer`")},
    "405": {"Allow": _header("What the path takes.")},
    "429": _RETRY_AFTER,
    "503": _RETRY_AFTER,
    "507": _RETRY_AFTER,
}
_EVERYWHERE: tuple[type[BopError], ...] = (InvalidRequest, BopError, NotReady)
_GUARDED: tuple[type[BopError], ...] = (Unauthenticated, Forbidden, ManifestBusy)
EXAMPLE_REQUEST_ID = "0f8fad5bd9cb469fa16570867728950e"


def problems(*errors: type[BopError]) -> Responses:
    """The responses that tell of these errors, by status."""
    return _responses(errors)


def common_problems(*, guarded: bool) -> Responses:
    return _responses(_EVERYWHERE + (_GUARDED if guarded else ()))


def merged(first: Responses, second: Responses) -> Responses:
    """Both; where they meet on a status, both their examples."""
    result: Responses = {**second, **first}
    for status in set(first) & set(second):
        one = first[status].get("content", {}).get(MEDIA_TYPE)
        other = second[status].get("content", {}).get(MEDIA_TYPE)
        if one is not None and other is not None:
            examples = {**other["examples"], **one["examples"]}
            result[status] = _response(examples)
    return result


def _responses(errors: Iterable[type[BopError]]) -> Responses:
    by_status: dict[int, dict[str, Any]] = defaultdict(dict)
    for error in errors:
        status = int(STATUS[error.kind])
        members = problem_members(
            code=error.code,
            title=error.title,
            status=status,
            detail=error(error.title).advice,
            extras={"request_id": EXAMPLE_REQUEST_ID},
        )
        by_status[status][error.code] = {"summary": error.title, "value": members}
    return {status: _response(examples) for status, examples in by_status.items()}


def _response(examples: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": "Problem: " + ", ".join(f"`{code}`" for code in examples) + ".",
        "content": {
            MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "examples": examples,
            }
        },
    }


def install(app: FastAPI) -> None:
    """Makes `app.openapi()` give the completed document, once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                routes=app.routes,
            )
            app.openapi_schema = _completed(made)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas["Problem"] = Problem.model_json_schema(
        ref_template="#/components/schemas/{model}", mode="serialization"
    )
    schemas.update(schemas["Problem"].pop("$defs", {}))
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    models = {model.__name__: model for model in _subclasses(BaseModel)}
    for name, schema in schemas.items():
        model = models.get(name)
        if model is not None and (extra := model.model_config.get("json_schema_extra")):
            schema.update(extra)  # FastAPI drops the nulls of examples
    components["securitySchemes"] = {
        "bearer": {
            "type": "http",
            "scheme": "bearer",
            "description": "A token of the tokens file. Without one the service takes all.",
        }
    }
    for path in document["paths"].values():
        for operation in path.values():
            _complete_operation(operation, schemas)
    return document


def _subclasses(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Those of this package: what its bodies and answers look like."""
    for model in base.__subclasses__():
        yield from _subclasses(model)
        if model.__module__.startswith("app.routers."):
            yield model


def _complete_operation(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    bodies = [operation["requestBody"]] if "requestBody" in operation else []
    bodies += operation["responses"].values()
    for body in bodies:
        for media in body.get("content", {}).values():
            if "example" not in media and "examples" not in media:
                media["example"] = example_of(media.get("schema", {}), schemas)
    for status, response in operation["responses"].items():
        headers = response.setdefault("headers", {})
        headers |= _HEADERS_OF.get(status, {})
        headers["X-Request-ID"] = _header("The request's own, or one made for it.")
        answer = response.get("content", {}).get("application/json", {}).get("schema", {})
        if answer.get("$ref", "").endswith("Page"):
            headers["Link"] = _header('The next page, `rel="next"`; missing from the last one.')


def example_of(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """A value of the schema: its own example, or one put together from its parts'."""
    if "$ref" in schema:
        return example_of(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if schema.get("examples"):
        return schema["examples"][0]
    for choice in schema.get("anyOf", ()):
        return None if choice.get("type") == "null" else example_of(choice, schemas)
    match schema.get("type"):
        case "object":
            members = schema.get("properties", {})
            return {name: example_of(member, schemas) for name, member in members.items()}
        case "array":
            return [example_of(schema.get("items", {}), schemas)]
        case _:
            return None
