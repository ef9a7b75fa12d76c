"""Rows of files as messages of a topic, each with the partition in which its user's rows are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from engine.arrays import storage_of
from engine.columns import Ids, check_schema, ids_of, ids_to_arrow
from engine.config import Config
from engine.errors import ConfigError
from engine.messages import arrow_messages, encode_json
from engine.ndjson import marked
from engine.partitions import partition_of
from engine.sources import read


class Message(NamedTuple):
    """What is sent.

    Attributes:
        rows: How many it holds.
        key: The user id of a JSON message; None: it has none.
        partition: Where it goes.
        value: Its bytes.
    """

    rows: int
    key: bytes | None
    partition: int
    value: bytes


def messages_of(
    files: list[str], config: Config, partitions: int, form: str, rows_per_message: int, bytes_max: int = 2**30
) -> Iterator[Message]:
    """Messages of the rows of files, in the order of the files for every user.

    Args:
        files: As `sources.read` takes them.
        config: Names of the columns, and the unit of integer times. In Arrow messages these become timestamps, which say their unit;
            in JSON messages and in text files they stay as they are.
        partitions: Of the topic.
        form: "arrow": up to `rows_per_message` rows of a partition a message; "json": one row a message.
        rows_per_message: See above.
        bytes_max: An Arrow message that would be larger becomes several.

    Rows without a user go to partition 0, where they are refused with that reason.

    Raises:
        ConfigError: JSON messages of binary ids are asked for.
        SchemaError: As `sources.read`.
    """
    waiting: dict[int, Any] = {}
    with closing(read(files, config)) as units:
        for batch in (batch for unit in units for batch in unit):
            place = check_schema(batch.schema, config, "")[0]
            ids = ids_of(batch.column(place), config.user_id)
            chosen = np.maximum(partition_of(ids, partitions), 0)
            table = _sendable(batch, ids, config, form == "arrow")
            if form == "json":
                yield from _objects(table, ids, chosen, config)
                continue
            order = np.argsort(chosen, kind="stable")
            bounds = np.searchsorted(chosen[order], np.arange(partitions + 1))
            for partition in np.flatnonzero(np.diff(bounds)).tolist():
                mine = table.take(pa.array(order[bounds[partition] : bounds[partition + 1]]))
                before = waiting.get(partition)
                if before is not None and not before.schema.equals(mine.schema, check_metadata=True):
                    yield from _streams(before, partition, rows_per_message, bytes_max)
                    before = None
                mine = mine if before is None else pa.concat_tables([before, mine])
                whole = len(mine) // rows_per_message * rows_per_message
                yield from _streams(mine.slice(0, whole), partition, rows_per_message, bytes_max)
                waiting[partition] = mine.slice(whole)
    for partition, table in waiting.items():
        yield from _streams(table, partition, rows_per_message, bytes_max)


def _streams(table: Any, partition: int, rows: int, bytes_max: int) -> Iterator[Message]:
    return (Message(count, None, partition, value) for count, value in arrow_messages(table, rows, bytes_max))


def _objects(table: Any, ids: Ids, chosen: Any, config: Config) -> Iterator[Message]:
    if ids.kind == "binary":
        raise ConfigError(f"column {config.user_id!r} is binary, and JSON has no bytes; use --format arrow, or make texts of it")
    keys = table[config.user_id].cast(pa.string()).to_pylist()
    for key, partition, value in zip(keys, chosen.tolist(), encode_json(table), strict=True):
        yield Message(1, None if key is None else key.encode(), partition, value)


def _sendable(batch: Any, ids: Ids, config: Config, with_units: bool) -> Any:
    """The three columns of a batch as a table, of types that messages have."""
    amount, time = (storage_of(batch.column(name)) for name in (config.amount, config.timestamp))
    if pa.types.is_null(amount.type):
        amount = amount.cast(pa.int64())
    if pa.types.is_null(time.type) or (with_units and pa.types.is_integer(time.type) and not pa.types.is_uint64(time.type)):
        time = time.cast(pa.int64()).cast(pa.timestamp(config.time_unit or "ns"))
    columns = {config.user_id: ids_to_arrow(ids), config.amount: amount, config.timestamp: time}
    return pa.table(columns, schema=marked(pa.schema([(name, column.type) for name, column in columns.items()]), config))
