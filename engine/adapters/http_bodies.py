"""Bodies of HTTP requests as what the engine takes, and its answers as bodies. Bytes in and out; no server here.

JSON is read and written by orjson, except for transactions: their amounts and times are kept as they are written, as those of a Kafka
message are. Arrow bodies are streams, with what `messages` demands of those from strangers.
"""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from engine.config import Config
from engine.errors import ConfigError, EngineError, SchemaError
from engine.kernels.integers import parse_integers
from engine.messages import OFFSET, ROW, TOO_LARGE, UNDECODABLE, decode, decode_ids, encode_arrow
from engine.service import Service

JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
ARROW: Final = "application/vnd.apache.arrow.stream"

#: What is around the ids of a request for scores.
_HEAD: Final = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"user_ids"[ \t\r\n]*:[ \t\r\n]*\[')
_TAIL: Final = re.compile(rb'[ \t\r\n]*(?:,[ \t\r\n]*"at"[ \t\r\n]*:[ \t\r\n]*null[ \t\r\n]*)?\}[ \t\r\n]*')

#: Column of `?rejects=true`: the row's place in the request.
REQUEST_ROW: Final = "request_row"


class BodyError(EngineError):
    """A body makes no sense at all."""


class TooLargeError(EngineError):
    """A request has more bytes, rows or users than are taken at once."""


def json_of(body: bytes) -> Any:
    """What a JSON text says.

    Raises:
        BodyError: It is none.

    Example:
        >>> json_of(b'{"user_ids": [7]}')
        {'user_ids': [7]}
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BodyError(f"the body is no JSON in UTF-8: {error}") from None


def lookup(body: bytes, content: str, service: Service, users_max: int) -> tuple[Any, Any]:
    """User ids, as an Arrow array or NumPy's int64, and the instant of a request for scores; None if it tells none.

    Raises:
        BodyError, SchemaError, ConfigError, TooLargeError: It cannot be answered; says why.
    """
    users, at = decode_ids(body, service.config.user_id) if content == ARROW else _plain_lookup(body, service, users_max), None
    if users is None:
        asked = json_of(body)
        if not isinstance(asked, dict) or not isinstance(asked.get("user_ids"), list):
            raise SchemaError('the body must be an object such as {"user_ids": ["alice", "bob"], "at": null}')
        unknown = asked.keys() - {"user_ids", "at"}
        if unknown:
            raise SchemaError(f"the body has the member {_cut(min(unknown))}; wanted user_ids and, if need be, at")
        users, at = asked["user_ids"], asked.get("at")
        if not isinstance(at, str | None):
            raise ConfigError(f"at={_cut(at)} is no instant; write it as in '2026-01-31T12:00:00Z', or null for now")
        _check_count(users, users_max)
        users = service.users_of(users)
    _check_count(users, users_max)
    return users, at


def _plain_lookup(body: bytes, service: Service, users_max: int) -> NDArray[np.int64] | None:
    """The ids of a request that has integers only and no instant, as most have; None if it is another, or none at all."""
    head = _HEAD.match(body)
    if head is None or service.kind() != "int64":
        return None
    found = np.empty(min(len(body) // 2, users_max) + 1, np.int64)
    count = parse_integers(np.frombuffer(body, np.uint8), head.end(), found)
    return found[:count] if count > 0 and _TAIL.fullmatch(body, int(found[count])) else None


def _check_count(users: Any, users_max: int) -> None:
    if len(users) > users_max:
        raise TooLargeError(f"{len(users):,} users in a request; ask for {users_max:,} at most at a time")


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:76] + "..."


def transactions(body: bytes, content: str, config: Config, kind: str | None, numbered: bool) -> Any:
    """Rows of a request, an Arrow table; None if it has none.

    Args:
        body: What was sent.
        content: What it is.
        config: Names and units of the columns.
        kind: Kind of the user ids so far.
        numbered: Whether a column REQUEST_ROW is wanted.

    Raises:
        BodyError, SchemaError, TooLargeError: It cannot be taken; says which line.
    """
    if content == ARROW:
        values = [body]
    elif content == NDJSON:
        values = [line for line in body.split(b"\n") if line.strip()]
    else:
        values = [body.strip()]
    if content != ARROW:
        for number, value in enumerate(values):
            if value.lstrip(b" \t\r")[:1] != b"{":
                raise BodyError(f"{_place(content, number)} is no JSON object: {_cut(value[:60])}")
        values = [value.lstrip(b" \t\r") for value in values]
    elif body[:1] != b"\xff":
        raise BodyError("this is no Arrow IPC stream, which begins with 0xFF; nor is a file of that format one")
    numbers, zeros = np.arange(len(values)), np.zeros(len(values), np.int64)
    found = decode(values, numbers, zeros, config, kind)
    if kind is None and len(found.runs) > 1:  # rows without an id are of the kind of the others
        kinds = [run.kind for run in found.runs if run.table[0].null_count < len(run.table)]
        found = decode(values, numbers, zeros, config, kinds[0]) if kinds else found
    if found.dead:
        place, reason, text = found.dead[0]
        error = BodyError if reason == UNDECODABLE else TooLargeError if reason == TOO_LARGE else SchemaError
        raise error(f"{_place(content, place)}: {text}")
    if not found.runs:
        return None
    if len({run.kind for run in found.runs}) > 1:
        first, second = found.runs[:2]
        row = int(second.table[OFFSET][0].as_py())
        raise SchemaError(f"{_place(content, row)} has a user id of kind {second.kind}, those before {first.kind}; send ids of one kind")
    table = pa.concat_tables([run.table for run in found.runs])
    rows = table[ROW if content == ARROW else OFFSET].cast(pa.int64())
    table = table.drop_columns([OFFSET, ROW])
    return table.append_column(REQUEST_ROW, rows) if numbered else table


def _place(content: str, number: int) -> str:
    return f"line {number + 1}" if content == NDJSON else "the body"


# ---- answers ---------------------------------------------------------------------------------------------------------------------


def dumped(answer: Any) -> bytes:
    """An answer as JSON. Numbers of NumPy arrays are written as they are, nan as null."""
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def scores_arrow(users: Any, scores: Any) -> bytes:
    """Scores of an Arrow array of users as an Arrow stream `user_id, score`."""
    return encode_arrow(pa.table({"user_id": users, "score": scores}))
