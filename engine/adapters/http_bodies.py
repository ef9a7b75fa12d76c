"""Bodies of HTTP requests as what the engine takes, and its answers as bodies. Bytes in and out; no server here.

JSON is read and written by orjson, except for transactions: their amounts and times are kept as they are written, as those of a Kafka
message are. Arrow bodies are streams, with what `messages` demands of those from strangers.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
import orjson
import pyarrow as pa

from engine.config import Config
from engine.errors import ConfigError, EngineError, SchemaError
from engine.instants import instant_text
from engine.messages import OFFSET, ROW, TOO_LARGE, UNDECODABLE, decode, decode_ids, encode_arrow
from engine.results import Explanation, IngestResult, Stats
from engine.service import Service
from engine.shard import NO_TIME, Features

JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
ARROW: Final = "application/vnd.apache.arrow.stream"

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
    """User ids, as an Arrow array, and the instant of a request for scores; None if it tells none.

    Raises:
        BodyError, SchemaError, ConfigError, TooLargeError: It cannot be answered; says why.
    """
    if content == ARROW:
        users, at = decode_ids(body, service.config.user_id), None
    else:
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


@functools.lru_cache(maxsize=1024)
def _second_text(second: int) -> str:
    return instant_text(second * 10**9)[:-1]


def time_json(time_ns: int | None) -> str | None:
    """An instant as JSON has it; None for none.

    Example:
        >>> time_json(1_500_000_000), time_json(2_000_000_000), time_json(None)
        ('1970-01-01T00:00:01.5Z', '1970-01-01T00:00:02Z', None)
    """
    if time_ns is None or time_ns == NO_TIME:
        return None
    second, rest = divmod(time_ns, 10**9)
    return f"{_second_text(second)}.{rest:09d}".rstrip("0") + "Z" if rest else _second_text(second) + "Z"


def amount_json(units: int, decimals: int) -> str:
    """An amount in decimal, exactly.

    Example:
        >>> amount_json(-12345, 4), amount_json(7, 0)
        ('-1.2345', '7')
    """
    if not decimals:
        return str(units)
    digits = str(abs(units)).rjust(decimals + 1, "0")
    return f"{'-' if units < 0 else ''}{digits[:-decimals]}.{digits[-decimals:]}"


def id_json(user_id: Any) -> Any:
    """A user id as JSON has it: integers and texts as they are, bytes in hex."""
    return user_id.hex() if isinstance(user_id, bytes) else user_id


def features_json(user_id: Any, features: Features, at_ns: int | None, decimals: int) -> dict[str, Any]:
    """What is known of one user at an instant."""
    low, high = features.sums.tolist()
    return {
        "user_id": id_json(user_id),
        "score": features.scores.item(),
        "sum": amount_json((high << 64) | (low & (2**64 - 1)), decimals),
        "count": features.counts.item(),
        "at": time_json(at_ns),
        "newest": time_json(features.newest.item()),
        "valid_until": time_json(features.valid_until.item()),
        "zero_at": time_json(features.zero_at.item()),
    }


def table_json(table: Any) -> list[dict[str, Any]]:
    """Rows of a table of features or rejects."""
    columns = {name: _column_json(table[name]) for name in table.column_names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _column_json(column: Any) -> list[Any]:
    kind = column.type
    if pa.types.is_timestamp(kind):
        times = column.cast(pa.timestamp("ns", kind.tz)).cast(pa.int64()).to_pylist()
        return [time_json(time_ns) for time_ns in times]
    values: list[Any] = column.to_pylist()
    if pa.types.is_decimal(kind):
        return [None if value is None else f"{value:f}" for value in values]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return [None if value is None else value.hex() for value in values]
    return values


def explanation_json(found: Explanation, at_ns: int | None) -> dict[str, Any]:
    """A user's score with the transactions behind it."""
    first, last = (time_json(int(time.astype(np.int64))) for time in found.window)
    return {
        "user_id": id_json(found.user_id),
        "score": found.score,
        "sum": f"{found.sum:f}",
        "count": found.count,
        "at": time_json(at_ns),
        "window": {"from": first, "to": last},
        "reason": found.reason,
        "transactions": table_json(found.transactions),
    }


def ingested_json(result: IngestResult | None, rejects: bool) -> dict[str, Any]:
    """What became of a request's rows; None: it had none."""
    answer: dict[str, Any] = {"rows": 0, "accepted": 0, "rejected": {}, "rounded": 0}
    if result is not None:
        answer = {"rows": result.rows, "accepted": result.accepted, "rejected": result.rejected, "rounded": result.rounded}
        if result.scores is not None:
            answer["scores"] = result.scores.to_numpy(zero_copy_only=False)  # null as nan, which JSON has as null
    if rejects:
        answer["rejects"] = [] if result is None else table_json(result.rejects())
    return answer


def stats_json(stats: Stats, service: Service) -> dict[str, Any]:
    """What the engines hold and have seen."""
    return {
        "users": stats.users,
        "transactions": stats.transactions,
        "clock": None if stats.clock is None else time_json(int(stats.clock.astype(np.int64))),
        "bytes": stats.bytes,
        "rows": stats.rows,
        "accepted": stats.accepted,
        "rejected": stats.rejected,
        "rounded": stats.rounded,
        "lookups": service.lookups,
        "ids": service.kind(),
        "window_seconds": service.config.window_ns / 1e9,
        "closed": service.config.closed,
        "decimals": service.config.decimals,
    }


def scores_arrow(users: Any, scores: Any) -> bytes:
    """Scores of an Arrow array of users as an Arrow stream `user_id, score`."""
    return encode_arrow(pa.table({"user_id": users, "score": scores}))
