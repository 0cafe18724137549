"""The OpenAPI document of the gateway's HTTP port."""

from collections.abc import Iterator
from functools import cache

from pydantic.json_schema import models_json_schema

import mosel
from gateway.inference.json_messages import IndexRequestJson, InferRequestJson, LoadRequestJson
from gateway.inference.metadata import Json

_DESCRIPTION = (
    "The Open Inference Protocol (KServe v2) with the binary tensor extension. Bodies may be compressed with gzip or "
    "deflate. Parameters, errors and examples: docs/protocols.md."
)
_JSON, _BYTES = "application/json", "application/octet-stream"
_REF = "#/components/schemas/"
_HEADER = "Inference-Header-Content-Length"

# What requests that are not understood, or not answered, are answered with.
_ERRORS = {
    "400": "a field, header or parameter is wrong",
    "401": "the token is missing or of no tenant, where the gateway asks for one",
    "403": "only admins may do this",
    "404": "no such model, or not in this version",
    "413": "more bytes or items than a setting allows",
    "422": "nothing that could be run is accurate or fast enough; or the model package is wrong",
    "429": "a limit is reached; Retry-After says when to try again",
    "499": "the caller went away, or the job was cancelled",
    "500": "a bug",
    "503": "a service that is needed is away",
    "504": "the deadline passed",
}


@cache
def document() -> Json:
    """The document: OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "MOSEL", "version": mosel.__version__, "description": _DESCRIPTION},
        "paths": dict(_paths()),
        "components": {
            "schemas": _sent() | _answered(),
            "responses": {"Error": _reply("An error.", "Error")},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        # Not every gateway asks for tokens.
        "security": [{}, {"token": []}],
    }


def _paths() -> Iterator[tuple[str, Json]]:
    yield "/openapi.json", _get("This document.", _reply("The document.", {"type": "object"}))
    yield "/v2", _get("Who answers.", _reply("The server.", "ServerMetadata"))
    yield "/v2/health/live", _get("Whether the server lives.", _reply("It does.", "Live"))
    ready = {"503": _reply("Not now.", "Ready")}
    yield "/v2/health/ready", _get("Whether every model would answer.", _reply("Each would.", "Ready"), ready)
    yield "/v2/models/stats", _get("What became of the requests to all models.", _reply("Counts.", "Statistics"))
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        none = _errors("404")
        yield path, _get("Inputs and outputs of a model.", _reply("The model.", "ModelMetadata"), none, path)
        yield (
            f"{path}/ready",
            _get("Whether a model would answer.", _reply("It would.", "Ready"), none | ready, path),
        )
        configuration = _reply("The configuration.", "ModelConfig")
        yield f"{path}/config", _get("A model as Triton describes one.", configuration, none, path)
        counts = _reply("Counts.", "Statistics")
        yield f"{path}/stats", _get("What became of the requests to a model.", counts, none, path)
        yield f"{path}/infer", {"post": _infer() | {"parameters": [*_parameters(path), *_infer_headers()]}}
    index = _post("The models, and whether they would answer.", "IndexRequestJson", _reply("The models.", "Index"))
    yield "/v2/repository/index", index
    for verb in ("load", "unload"):
        path = f"/v2/repository/models/{{model}}/{verb}"
        done = _reply("Done.", {"type": "object"})
        yield path, _post(f"{verb.capitalize()} a model.", "LoadRequestJson", done, path)


def _infer() -> Json:
    request, response = {"$ref": f"{_REF}InferRequestJson"}, {"$ref": f"{_REF}InferResponse"}
    binary = {"schema": {"type": "string", "format": "binary"}}
    headers = {_HEADER: {"description": "Bytes of the JSON in front of binary outputs.", "schema": {"type": "integer"}}}
    answer = {"description": "The answer.", "content": {_JSON: {"schema": response}, _BYTES: binary}}
    return {
        "summary": "Infer.",
        "requestBody": {"required": True, "content": {_JSON: {"schema": request}, _BYTES: binary}},
        "responses": {"200": answer | {"headers": headers}} | _errors(*_ERRORS),
    }


def _infer_headers() -> list[Json]:
    described = {
        _HEADER: ("Bytes of the JSON in front of binary inputs.", {"type": "integer", "minimum": 0}),
        "Content-Encoding": ("How the whole body is compressed.", {"enum": ["gzip", "deflate", "identity"]}),
        "Accept-Encoding": ("How the answer may be compressed: gzip, deflate.", {"type": "string"}),
    }
    return [
        {"name": name, "in": "header", "description": text, "schema": schema}
        for name, (text, schema) in described.items()
    ]


def _get(summary: str, reply: Json, others: Json | None = None, path: str = "") -> Json:
    responses = {"200": reply} | (others or {}) | _errors("401", "429", "500")
    return {"get": {"summary": summary, "parameters": _parameters(path), "responses": responses}}


def _post(summary: str, sent: str, reply: Json, path: str = "") -> Json:
    body = {"content": {_JSON: {"schema": {"$ref": f"{_REF}{sent}"}}}}
    responses = {"200": reply} | _errors(*_ERRORS)
    return {"post": {"summary": summary, "parameters": _parameters(path), "requestBody": body, "responses": responses}}


def _parameters(path: str) -> list[Json]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in ("model", "version")
        if f"{{{name}}}" in path
    ]


def _errors(*statuses: str) -> Json:
    return {status: {"$ref": "#/components/responses/Error", "description": _ERRORS[status]} for status in statuses}


def _reply(description: str, schema: str | Json) -> Json:
    content = {"$ref": f"{_REF}{schema}"} if isinstance(schema, str) else schema
    return {"description": description, "content": {_JSON: {"schema": content}}}


def _sent() -> Json:
    messages = [(message, "validation") for message in (InferRequestJson, IndexRequestJson, LoadRequestJson)]
    _, definitions = models_json_schema(messages, ref_template=f"{_REF}{{model}}")  # type: ignore[arg-type]
    schemas: Json = definitions["$defs"]
    return schemas


def _answered() -> Json:
    text, whole = {"type": "string"}, {"type": "integer"}
    shape = _list(whole)
    tensor = _object(name=text, datatype=text, shape=shape)
    output = _object(name=text, datatype=text, shape=shape)
    output["properties"] |= {"data": {"type": "array"}, "parameters": {"type": "object"}}
    said = {"$ref": f"{_REF}ResponseParameters"}
    infer = _object(model_name=text, model_version=text, parameters=said, outputs=_list(output))
    infer["properties"] |= {"id": text}
    model = _object(name=text, version=text, state={"enum": ["READY", "UNAVAILABLE"]}, reason=text)
    numbers = {"type": "object", "additionalProperties": _object(count=whole, ns=whole)}
    counted = _object(name=text, version=text, inference_count=whole, execution_count=whole, inference_stats=numbers)
    return {
        "Error": _object(error=text),
        "Live": _object(live={"type": "boolean"}),
        "Ready": _object(ready={"type": "boolean"}),
        "ServerMetadata": _object(name=text, version=text, extensions=_list(text)),
        "ModelMetadata": _object(
            name=text, versions=_list(text), platform=text, inputs=_list(tensor), outputs=_list(tensor)
        ),
        "ModelConfig": _object(name=text, platform=text, max_batch_size=whole, input=_list({}), output=_list({})),
        "Statistics": _object(model_stats=_list(counted)),
        "Index": _list(model),
        "InferResponse": infer,
        "ResponseParameters": {"type": "object", "properties": _response_parameters()},
    }


def _response_parameters() -> Json:
    """What an answer says of itself beside the outputs."""
    text: Json = {"type": "string"}
    number: Json = {"type": "number"}
    share: Json = {"type": "number", "minimum": 0, "maximum": 1}
    described: dict[str, tuple[Json, str]] = {
        "job_id": (text, "32 hexadecimal digits."),
        "modalities_used": (text, "The distinct modality sets, separated by commas."),
        "modalities_unavailable": (text, "Those that would have been run, had their encoders not been away."),
        "expected_accuracy": (share, "Over the items."),
        "guarantee": ({"enum": ["calibrated", "live", "none", "estimate"]}, "What the accuracy stands on."),
        "guaranteed_accuracy": (share, "Items that are served so are right at least so often."),
        "guaranteed_loss": (share, "They are wrong at most so much more often than if everything were run."),
        "confidence": (share, "With which that is guaranteed."),
        "saved": (share, "Of the compute time of everything that was sent; 0 while nothing is measured."),
        "floor_source": ({"enum": ["caller", "tenant", "settings", "model"]}, "Whose floor counted."),
        "note": (text, "What else there is to say of the guarantee."),
        "queue_ms": (number, "Until the first encoder call."),
        "compute_ms": (number, "From then on."),
        "deadline_slack_ms": (number, "What was left until the deadline; below 0 the answer is late."),
    }
    return {name: {"description": text, **schema} for name, (schema, text) in described.items()}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}
