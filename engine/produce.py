"""Rows of files as messages of a topic, each with the partition in which its user's rows are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa

from engine.columns import ids_of
from engine.config import Config
from engine.messages import encode_arrow, encode_json
from engine.partitions import partition_of
from engine.sources import read


def messages_of(
    files: list[str], config: Config, partitions: int, form: str, rows_per_message: int
) -> Iterator[tuple[int, bytes | None, int, bytes]]:
    """Messages of the rows of files, in the order of the files for every user.

    Args:
        files: As `sources.read` takes them.
        config: Names of the columns.
        partitions: Of the topic.
        form: "arrow": up to `rows_per_message` rows of a partition a message; "json": one row a message.
        rows_per_message: See above.

    Yields:
        Rows of the message, its key (None for Arrow messages), its partition, and its bytes.

    Rows without a user go to partition 0, where they are refused with that reason.
    """
    wanted = [config.user_id, config.amount, config.timestamp]
    waiting: dict[int, list[Any]] = {}
    with closing(read(files, config)) as units:
        for batch in (batch for unit in units for batch in unit):
            plain = pa.table([_plain(batch.column(name)) for name in wanted], names=wanted)
            chosen = np.maximum(partition_of(ids_of(plain[config.user_id].combine_chunks(), config.user_id), partitions), 0)
            if form == "json":
                keys = plain[config.user_id].cast(pa.string()) if not _is_binary(plain) else plain[config.user_id]
                texts = encode_json(plain)
                for key, partition, text in zip(keys.to_pylist(), chosen.tolist(), texts, strict=True):
                    yield 1, key.encode() if isinstance(key, str) else key, partition, text
                continue
            order = np.argsort(chosen, kind="stable")
            bounds = np.searchsorted(chosen[order], np.arange(partitions + 1))
            for partition in range(partitions):
                mine = order[bounds[partition] : bounds[partition + 1]]
                if len(mine):
                    waiting.setdefault(partition, []).append(plain.take(pa.array(mine)))
                    yield from _full(waiting, partition, rows_per_message)
    for partition, tables in waiting.items():
        for table in tables:
            if len(table):
                yield len(table), None, partition, encode_arrow(table)


def _full(waiting: dict[int, list[Any]], partition: int, rows: int) -> Iterator[tuple[int, None, int, bytes]]:
    """Messages of as many rows as they shall have; what is left waits for more."""
    table = pa.concat_tables(waiting[partition])
    first = 0
    while len(table) - first >= rows:
        yield rows, None, partition, encode_arrow(table.slice(first, rows).combine_chunks())
        first += rows
    waiting[partition] = [table.slice(first)]


def _plain(column: Any) -> Any:
    """A column of a type that messages may have."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    kind = str(column.type)
    return column.cast(pa.large_string() if kind == "string_view" else pa.large_binary()) if kind.endswith("_view") else column


def _is_binary(table: Any) -> bool:
    kind = table.schema.field(0).type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))
