"""What the server's routes take and answer, as OpenAPI 3.1 says it."""

from __future__ import annotations

from typing import Any, Final

from engine import __version__
from engine.config import REASONS
from engine.service import Service

_ARROW: Final = "application/vnd.apache.arrow.stream"
_INSTANT: Final = {"type": "string", "format": "date-time"}
_OR_NONE: Final = {"type": ["string", "null"], "format": "date-time"}
#: An instant that int64 nanoseconds can say, of which engines know.
_DATE: Final = "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
_TIME: Final = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([.][0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_AT: Final = {"type": "string", "pattern": f"^(1[7-9]|20|21)[0-9]{{2}}-{_DATE}T{_TIME}$", "description": "as of when; not told: now"}
_SUM: Final = {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?$", "description": "decimal, exact"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_BINARY: Final = {"type": "string", "format": "binary", "description": "an Arrow IPC stream, not compressed"}
_LINES: Final = {"type": "string", "description": "JSON objects, one a line"}
#: Kinds of user ids in JSON.
_IDS: Final[dict[str | None, dict[str, Any]]] = {
    "int64": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "uint64": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
    "string": {"type": "string"},
    "binary": {"type": "string", "pattern": "^([0-9a-f]{2})*$", "description": "bytes in hex"},
    None: {"type": "string"},
}


def description(service: Service, users_max: int, top_max: int) -> dict[str, Any]:
    """The description of all routes, for the kind of user ids that the service has so far.

    Args:
        service: Who answers.
        users_max: Users of one request for scores.
        top_max: Users of one request for the greatest.

    Example:
        >>> from engine import RiskEngine
        >>> description(Service.of(RiskEngine(users=10)), 100, 10)["openapi"]
        '3.1.0'
    """
    kind = service.kind()
    user, config = _IDS[kind], service.config
    features = _object(
        user_id=user,
        score={"type": "number"},
        sum=_SUM,
        count=_COUNT,
        newest=_OR_NONE,
        valid_until={**_OR_NONE, "description": "the last instant at which the score is still right if nothing more arrives"},
        zero_at={**_OR_NONE, "description": "the first instant at which it is 0"},
    )
    members = {
        config.user_id: {**user, "type": [user["type"], "null"]},
        config.amount: {"type": ["number", "string", "null"], "description": "what is no amount rejects the row, not the request"},
        config.timestamp: {"type": ["number", "string", "null"] if config.time_unit else ["string", "null"], "description": "likewise"},
    }
    transaction = {"type": "object", "properties": members}
    paths = {
        "/v1/scores/{user}": {
            "get": _route("A user's score", {"at": _AT}, _with(features, at=_OR_NONE), 400, 404, 409, 422, 503, user=user)
        },
        "/v1/scores": {
            "post": _route(
                "Scores of many users",
                {},
                _object(scores={"type": "array", "items": {"type": ["number", "null"]}}, at=_OR_NONE),
                *(400, 406, 408, 409, 413, 415, 422, 503),
                bodies={
                    "application/json": _asked(user, users_max),
                    _ARROW: _BINARY,
                },
                arrow=True,
            )
        },
        "/v1/transactions": {
            "post": _route(
                "Apply transactions, all of a request or none",
                {"scores": {"type": "string", "enum": ["true", "false"]}, "rejects": {"type": "string", "enum": ["true", "false"]}},
                _with(
                    _object(
                        rows=_COUNT,
                        accepted=_COUNT,
                        rejected={"type": "object", "propertyNames": {"enum": list(REASONS)}, "additionalProperties": _COUNT},
                        rounded=_COUNT,
                    ),
                    False,
                    scores={"type": "array", "items": {"type": ["number", "null"]}},
                    rejects={"type": "array", "items": {"type": "object"}},
                ),
                *(400, 405, 408, 413, 415, 422, 503),
                bodies={_ARROW: _BINARY}
                if kind == "binary"
                else {"application/json": transaction, "application/x-ndjson": _LINES, _ARROW: _BINARY},
            )
        },
        "/v1/explain/{user}": {
            "get": _route(
                "A user's score with the transactions behind it",
                {"at": _AT},
                _object(
                    user_id=user,
                    score={"type": "number"},
                    sum=_SUM,
                    count=_COUNT,
                    at=_OR_NONE,
                    window={"type": "object", "properties": {"from": _INSTANT, "to": _INSTANT}, "required": ["from", "to"]},
                    reason={"type": "string"},
                    transactions={"type": "array", "items": _object(timestamp=_INSTANT, amount=_SUM)},
                ),
                *(400, 404, 409, 422, 503),
                user=user,
            )
        },
        "/v1/top": {
            "get": _route(
                "The greatest users",
                {
                    "k": {"type": "integer", "minimum": 0, "maximum": top_max, "default": 10},
                    "by": {"type": "string", "enum": ["score", "sum", "count", "newest"], "default": "score"},
                    "at": _AT,
                },
                _object(users={"type": "array", "items": features}, at=_OR_NONE),
                *(400, 409, 503),
            )
        },
        "/v1/stats": {"get": _route("What the engine holds and has seen", {}, {"type": "object"}, 400, 503)},
        "/v1/events": {"get": _route("What the live page shows, each second", {}, None, 400, 404, 503, kind="text/event-stream")},
        "/healthz": {"get": _route("Whether the process lives", {}, _object(status={"const": "alive"}))},
        "/readyz": {"get": _route("Whether scores can be trusted", {}, _object(status={"const": "ready"}), 503)},
        "/metrics": {"get": _route("For Prometheus", {}, None, kind="text/plain")},
        "/openapi.json": {"get": _route("This description", {}, {"type": "object"})},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "riskring", "version": __version__, "description": "Exact rolling risk scores per user."},
        "paths": paths,
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}, "schemas": {"problem": _PROBLEM}},
    }


_PROBLEM: Final = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}


def _object(**members: Any) -> dict[str, Any]:
    return {"type": "object", "properties": members, "required": list(members)}


def _with(found: dict[str, Any], all_required: bool = True, **members: Any) -> dict[str, Any]:
    required = [*found["required"], *(members if all_required else ())]
    return {**found, "properties": {**found["properties"], **members}, "required": required}


def _asked(user: dict[str, Any], users_max: int) -> dict[str, Any]:
    users = {"type": "array", "items": {**user, "type": [user["type"], "null"]}, "maxItems": users_max}
    return {**_object(user_ids=users, at={**_AT, "type": ["string", "null"]}), "required": ["user_ids"], "additionalProperties": False}


def _route(
    summary: str,
    query: dict[str, Any],
    answer: dict[str, Any] | None,
    *errors: int,
    user: dict[str, Any] | None = None,
    bodies: dict[str, Any] | None = None,
    arrow: bool = False,
    kind: str = "application/json",
) -> dict[str, Any]:
    """One operation: what it takes, and each status with which it answers."""
    content: dict[str, Any] = {kind: {"schema": {"type": "string"} if answer is None else answer}}
    if arrow:
        content[_ARROW] = {"schema": _BINARY}
    problems = {
        str(status): {
            "description": "problem",
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/problem"}}},
        }
        for status in (*errors, 401, 421, 503)
    }
    parameters = [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in query.items()]
    if user is not None:
        parameters.append(
            {"name": "user", "in": "path", "required": True, "schema": {**user, **({"minLength": 1} if user["type"] == "string" else {})}}
        )
    made = {
        "summary": summary,
        "parameters": parameters,
        "responses": {"200": {"description": "done", "content": content}, **problems},
        "security": [{"token": []}, {}],
    }
    if bodies is not None:
        made["requestBody"] = {"required": True, "content": {name: {"schema": schema} for name, schema in bodies.items()}}
    return made
