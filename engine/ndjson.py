"""JSON objects, one a line or one a message, as the columns of a transaction stream. Blocks of bytes in, tables out; no files.

Arrow's JSON reader has no type that takes both numbers and strings and keeps what is written. So numbers under the names of the amount
and the time are put into quotes first, and parsed as the texts of a CSV file are: exactly, and one malformed value costs one row. (Inside
a text a name's first quote has a backslash before it, so that nothing there matches. Numbers under the same name in a nested object do
become texts.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

from engine.columns import TEXT_MARK
from engine.config import Config
from engine.kernels.quoting import quote_numbers


def quoting(config: Config) -> Callable[[bytes], bytes]:
    """What puts the numbers of a block that are to be kept as they are written into quotes. Cost: some 0.7 ns a byte."""
    keys = [np.frombuffer(json.dumps(key, ensure_ascii=False).encode(), np.uint8) for key in (config.amount, config.timestamp)]

    def quoted(block: bytes) -> bytes:
        found = np.empty(len(block) + len(block) // 2 + 2, np.uint8)
        length = quote_numbers(np.frombuffer(block, np.uint8), *keys, found)
        return found[:length].tobytes()

    return quoted


def parsed(block: bytes, schema: Any, rows: int) -> Any:
    """A block of whole objects as a table.

    Args:
        block: What `quoting` made of it.
        schema: Types of the members; others are left out. None: all that there are, of the types they seem to have.
        rows: How many came before, for the text of an error.

    Raises:
        pyarrow.ArrowInvalid: It is no JSON, or not of these types.
    """
    # To Arrow null is an object without members, but in front of all objects the process dies of it.
    block = re.sub(rb"^(?:\xef\xbb\xbf)?[ \t\r\n]*null", b"{}", block)
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="infer" if schema is None else "ignore")
    try:
        return pa_json.read_json(
            pa.BufferReader(block), read_options=pa_json.ReadOptions(block_size=len(block) + 1, use_threads=False), parse_options=options
        )
    except pa.ArrowInvalid as error:
        # Arrow counts the rows of a block from 0; people count those of a file from 1.
        raise pa.ArrowInvalid(re.sub(r"in row (\d+)", lambda found: f"in row {rows + int(found[1]) + 1}", str(error))) from error


def guessed_schema(block: bytes, config: Config) -> Any:
    """Types of the members of a block, as far as they can be kept for blocks to come."""
    schema = parsed(block, None, 0).schema
    for place, field in enumerate(schema):
        kind = field.type
        if pa.types.is_timestamp(kind) or (pa.types.is_null(kind) and field.name != config.user_id):
            kind = pa.string()  # Arrow guesses times; and a member that is null so far may still become a text
        if field.name == config.user_id and pa.types.is_floating(kind):
            kind = pa.uint64()  # what Arrow makes of integers beyond int64; true floats will not parse
        if field.name == config.user_id and pa.types.is_null(kind):
            kind = pa.string()
        schema = schema.set(place, field.with_type(kind))
    return marked(schema, config)


def marked(schema: Any, config: Config) -> Any:
    """The schema, with a mark at amounts and times that are texts to be parsed."""
    for place, field in enumerate(schema):
        if field.name in (config.amount, config.timestamp) and pa.types.is_string(field.type):
            schema = schema.set(place, field.with_metadata(TEXT_MARK))
    return schema
