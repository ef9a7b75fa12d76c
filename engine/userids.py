"""User ids as programs pass them in: single ones, lists and arrays; and whether they can be users of an engine at all (S14)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.arrays import NO_BYTES, NO_INTS, check_whole, frozen
from engine.columns import Ids, ids_of
from engine.errors import SchemaError


def ids_of_one(user_id: Any, column: str) -> Ids:
    """The id of one user.

    Raises:
        SchemaError: It is no integer, string or bytes.

    Example:
        >>> ids_of_one(7, "user_id").values
        array([7])
    """
    if isinstance(user_id, str | bytes):
        data = bytes_of_one(user_id, column)
        kind = "string" if isinstance(user_id, str) else "binary"
        return Ids(kind, NO_INTS, np.array([0, len(data)]), data, None)
    if isinstance(user_id, int | np.integer) and not isinstance(user_id, bool) and -(2**63) <= user_id < 2**63:
        return Ids("int64", np.array([int(user_id)]), NO_INTS, NO_BYTES, None)
    try:
        return ids_of(_plain_array([user_id]), column)
    except (pa.ArrowException, OverflowError) as error:
        raise SchemaError(f"{column}={user_id!r} is not a user id; give an integer, a string or bytes") from error


def bytes_of_one(user_id: str | bytes, column: str) -> NDArray[np.uint8]:
    """The bytes of a text id in UTF-8, or of an id of bytes.

    Raises:
        SchemaError: It is half of a surrogate pair, which is no character.
    """
    try:
        return np.frombuffer(user_id.encode() if isinstance(user_id, str) else user_id, np.uint8)
    except UnicodeEncodeError as error:
        raise SchemaError(f"{column}={user_id!r} is no text that UTF-8 can hold ({error.reason}); give another id, or bytes") from None


def id_array(user_ids: Any) -> tuple[Any, bool]:
    """The ids of a lookup as an Arrow array, and whether they came as one.

    Raises:
        SchemaError: They are no list of ids.

    Example:
        >>> id_array([7, 8])[1]
        False
    """
    try:
        array = _arrow_array(user_ids)
        if array is not None:
            check_whole(array, "user_ids")
            return array, True
        if isinstance(user_ids, str | bytes) or not hasattr(user_ids, "__iter__"):
            raise SchemaError(f"user_ids={user_ids!r} is not a list of ids; use score() for one user")
        return _plain_array(user_ids), False
    except (pa.ArrowException, TypeError, OverflowError, UnicodeError) as error:
        raise SchemaError(f"user_ids cannot be an Arrow array: {error}; give integers, strings or bytes of one kind") from error


def asked_ids(user_ids: Any, column: str) -> tuple[Ids, bool]:
    """The ids of a lookup, and whether they came as Arrow data. NumPy's int64 is taken as it is. Raises as `id_array` and `ids_of`."""
    if type(user_ids) is np.ndarray and user_ids.dtype == np.int64 and user_ids.ndim == 1 and user_ids.flags.carray:
        return Ids("int64", frozen(user_ids), NO_INTS, NO_BYTES, None), False
    array, is_arrow = id_array(user_ids)
    return ids_of(array, column), is_arrow


def _arrow_array(user_ids: Any) -> Any:
    """What is Arrow data or exports it; None for anything else."""
    if isinstance(user_ids, pa.Array | pa.ChunkedArray):
        return user_ids
    if hasattr(user_ids, "__arrow_c_stream__"):
        return pa.chunked_array(user_ids)
    return pa.array(user_ids) if hasattr(user_ids, "__arrow_c_array__") else None


def _plain_array(user_ids: Any) -> Any:
    values = user_ids if isinstance(user_ids, np.ndarray) else list(user_ids)
    try:
        return pa.array(values)
    except OverflowError:  # Arrow takes Python integers for int64 unless told otherwise
        return pa.array(values, pa.uint64())


def check_kinds(ids: Ids, kind: str, column: str) -> None:
    """Raise SchemaError unless ids of one kind can be users of an engine of another: integers that fit."""
    if {kind, ids.kind} != {"int64", "uint64"}:
        raise SchemaError(
            f"column {column!r} has {ids.kind} ids, but the engine's users have {kind} ids; an engine takes one kind: convert the column"
        )
    beyond = ids.values < 0
    if ids.valid is not None:
        beyond &= ids.valid
    if beyond.any():
        row = int(np.argmax(beyond))
        value = int(ids.values[row]) + (2**64 if ids.kind == "uint64" else 0)
        raise SchemaError(
            f"column {column!r}, row {row}: {value} does not fit the engine's {kind} ids; use one integer type for all batches"
        )


def unknown_ids(ids: Ids, kind: str | None) -> NDArray[np.uint8]:
    """1 for ids that no user of an engine of this kind can have: nulls, and integers beyond it. SchemaError for another kind."""
    unknown = np.zeros(len(ids), np.uint8)
    if ids.valid is not None:
        unknown[~ids.valid] = 1
    if kind is None or ids.kind == kind or unknown.all():
        return unknown
    if {kind, ids.kind} == {"int64", "uint64"}:
        unknown[ids.values < 0] = 1
        return unknown
    raise SchemaError(f"the engine's users have {kind} ids, asked for {ids.kind} ids; ask with ids of the same kind")
