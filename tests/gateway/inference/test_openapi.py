"""The OpenAPI document: sound by itself, of exactly what is served, and true of what is answered."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.routing import Route

from gateway.inference.http import InferenceHttp
from gateway.inference.json_codec import write_response
from gateway.inference.openapi import document
from gateway.inference.words import InferRequest, InferResponse, OutputTensor
from mosel.status import HTTP_STATUS
from tests.gateway.inference.json_support import infer_body
from tests.gateway.scripted import Gateway

METHODS = {"get", "post"}
KINDS: Mapping[str, type] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "null": type(None),
}


def operations() -> Iterator[tuple[str, str, Any]]:
    for path, item in document()["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def resolved(schema: Any) -> Any:
    """A schema, or what it refers to."""
    while "$ref" in schema:
        parts = schema["$ref"].removeprefix("#/").split("/")
        schema = document()
        for part in parts:
            schema = schema[part]
    return schema


def everything(node: Any) -> Iterator[Any]:
    yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from everything(child)


def conform(content: Any, schema: Any) -> None:
    """Fails unless a value is as a schema says, as far as this document uses JSON Schema for answers."""
    schema = resolved(schema)
    if "enum" in schema:
        assert content in schema["enum"]
    if kinds := types_of(schema):
        assert isinstance(content, tuple(KINDS[kind] for kind in kinds)), (content, schema)
    for name in schema.get("required", ()):
        assert name in content
    for name, inner in schema.get("properties", {}).items():
        if name in content:
            conform(content[name], inner)
    if isinstance(schema.get("additionalProperties"), dict):
        for value in content.values():
            conform(value, schema["additionalProperties"])
    for element in content if "items" in schema else ():
        conform(element, schema["items"])


def test_it_has_what_openapi_asks_for() -> None:
    content = document()
    assert re.fullmatch(r"3\.1\.\d", content["openapi"])
    assert {*content} <= {"openapi", "info", "paths", "components", "security"}
    assert all(content["info"][name] for name in ("title", "version"))
    for path, method, operation in operations():
        assert path.startswith("/")
        assert method in METHODS
        assert {*operation} <= {"summary", "parameters", "requestBody", "responses"}
        assert operation["summary"].endswith(".")
        named = {(parameter["name"], parameter["in"]) for parameter in operation["parameters"]}
        assert len(named) == len(operation["parameters"])
        assert {name for name, where in named if where == "path"} == {*re.findall(r"{(\w+)}", path)}
        assert all(parameter["required"] for parameter in operation["parameters"] if parameter["in"] == "path")
        assert all(re.fullmatch(r"[2-5]\d\d", status) for status in operation["responses"])
        assert all(response["description"] for response in operation["responses"].values())
        assert "200" in operation["responses"]
    schemes = content["components"]["securitySchemes"]
    assert all(schemes.keys() >= requirement.keys() for requirement in content["security"])
    described = [content["paths"], content["components"]["schemas"]]
    kinds = {kind for node in everything(described) if isinstance(node, dict) for kind in types_of(node)}
    assert kinds <= KINDS.keys()


def types_of(node: dict[str, Any]) -> list[str]:
    kind = node.get("type", [])
    return kind if isinstance(kind, list) else [kind] if isinstance(kind, str) else []


def test_every_reference_leads_somewhere() -> None:
    references = [node for node in everything(document()) if isinstance(node, dict) and "$ref" in node]
    assert len(references) > 30
    assert all(resolved(reference) for reference in references)


def test_every_status_of_an_error_is_described() -> None:
    infer = document()["paths"]["/v2/models/{model}/infer"]["post"]["responses"]
    assert {*map(str, HTTP_STATUS.values())} == infer.keys() - {"200"}


async def test_it_describes_exactly_what_is_served(gateway: Gateway) -> None:
    with InferenceHttp(gateway.data_plane) as inference:
        routes = inference.app().routes
    served = {
        (route.path, method.lower())
        for route in routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert served == {(path, method) for path, method, _ in operations()}


@pytest.mark.parametrize("path", [path for path, method, _ in operations() if method == "get"])
async def test_what_is_answered_is_as_described(gateway: Gateway, path: str) -> None:
    with InferenceHttp(gateway.data_plane) as inference:
        transport = httpx.ASGITransport(inference.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            response = await client.get(path.format(model="fruit", version="1"))
            assert response.status_code == 200
            responses = document()["paths"][path]["get"]["responses"]
            conform(response.json(), responses["200"]["content"]["application/json"]["schema"])
            refused = await client.get(path.format(model="pear", version="1"))
            if refused.status_code != 200:
                described = resolved(responses[str(refused.status_code)])
                conform(refused.json(), described["content"]["application/json"]["schema"])
            index = await client.post("/v2/repository/index")
            schema = document()["paths"]["/v2/repository/index"]["post"]["responses"]["200"]
            conform(index.json(), schema["content"]["application/json"]["schema"])


def test_requests_and_responses_are_as_described(draw: Callable[..., Any]) -> None:
    schemas = document()["components"]["schemas"]
    for binary in (False, True):
        body = infer_body(draw(2), binary=binary, id="7", outputs=["labels"], min_accuracy=0.5, late_ok=True)
        conform(json.JSONDecoder().raw_decode(body.content.decode("latin-1"))[0], schemas["InferRequestJson"])
        output = OutputTensor("probabilities", "FP32", np.zeros((2, 3), np.float32))
        request = InferRequest("fruit", parameters={"binary_data_output": binary})
        written = write_response(request, InferResponse("fruit", "1", "7", {"queue_ms": 1.5}, [output]))
        conform(json.loads(written.body[: written.json_bytes]), schemas["InferResponse"])
