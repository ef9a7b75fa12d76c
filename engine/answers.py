"""What servers answer, in forms that JSON has: instants and exact amounts as texts, user ids as they are."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config import TIME_UNIT_NS
from engine.instants import instant_text
from engine.results import Explanation, IngestResult, Stats
from engine.service import Service
from engine.shard import UserFeatures


@functools.lru_cache(maxsize=1024)
def _second_text(second: int) -> str:
    return instant_text(second * 10**9)[:-1]


def time_json(time_ns: int | None) -> str | None:
    """An instant as JSON has it; None for none.

    Example:
        >>> time_json(1_500_000_000), time_json(2_000_000_000), time_json(None)
        ('1970-01-01T00:00:01.5Z', '1970-01-01T00:00:02Z', None)
    """
    if time_ns is None:
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


def features_json(user_id: Any, features: UserFeatures, at_ns: int | None, decimals: int) -> dict[str, Any]:
    """What is known of one user at an instant."""
    return {
        "user_id": id_json(user_id),
        "score": features.score,
        "sum": amount_json(features.sum_units, decimals),
        "count": features.count,
        "at": time_json(at_ns),
        "newest": time_json(features.newest_ns),
        "valid_until": time_json(features.valid_until_ns),
        "zero_at": time_json(features.zero_at_ns),
    }


def table_json(table: Any) -> list[dict[str, Any]]:
    """Rows of a table of features or rejects."""
    columns = {name: _column_json(table[name]) for name in table.column_names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _column_json(column: Any) -> list[Any]:
    kind = column.type
    if pa.types.is_temporal(kind):  # which may be beyond what nanoseconds or Python's dates can say: rows are rejected for that
        unit_ns = 86_400 * 10**9 if pa.types.is_date32(kind) else 10**6 if pa.types.is_date64(kind) else TIME_UNIT_NS[kind.unit]
        numbers = column.cast(pa.int32() if pa.types.is_date32(kind) else pa.int64()).to_pylist()
        return [None if number is None else time_json(number * unit_ns) for number in numbers]
    if pa.types.is_decimal(kind) and kind.scale < 0:
        texts: list[Any] = column.cast(pa.string()).to_pylist()
        return texts
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


def ingested_json(result: IngestResult | None, rejects: bool, scores: bool = True) -> dict[str, Any]:
    """What became of a request's rows, with scores as an array of NumPy if there are any and they are wanted; None: it had none."""
    answer: dict[str, Any] = {"rows": 0, "accepted": 0, "rejected": {}, "rounded": 0}
    if result is not None:
        answer = {"rows": result.rows, "accepted": result.accepted, "rejected": result.rejected, "rounded": result.rounded}
        if scores and result.scores is not None:
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
