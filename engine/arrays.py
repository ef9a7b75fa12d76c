"""Arrow memory as NumPy arrays, without copying where the layout allows it.

Null rows have undefined values: whoever reads values also asks `valid_rows` or `null_rows`. What comes from outside passes `check_whole`
first; offsets of byte strings are checked once more where they are taken, because kernels and the text parsers read between them unchecked.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.errors import SchemaError

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def values_of(array: Any, dtype: Any, per_row: int = 1) -> NDArray[Any]:
    """View of an array's fixed-width values, (n * per_row,), nulls included; copied only if it is not aligned."""
    buffer = array.buffers()[1]
    count = len(array) * per_row
    if buffer is None or count == 0:
        return np.zeros(count, dtype)
    view: NDArray[Any] = np.frombuffer(buffer, dtype, count, array.offset * per_row * np.dtype(dtype).itemsize)
    return view if view.flags.aligned else view.copy()


def dtype_of(kind: Any) -> np.dtype[Any]:
    """NumPy's type for an Arrow type of integers or floats. Arrow's own answer needs pandas in some versions."""
    letter = "f" if pa.types.is_floating(kind) else "i" if pa.types.is_signed_integer(kind) else "u"
    return np.dtype(f"{letter}{kind.bit_width // 8}")


def valid_rows(array: Any) -> Bools | None:
    """(n,) False at nulls, unpacked from the bitmap; None if there are none."""
    if array.null_count == 0:
        return None
    n = len(array)
    buffer = array.buffers()[0]
    if buffer is None:  # an array of type null has no bitmap
        return np.zeros(n, np.bool_)
    first = array.offset // 8
    skip = array.offset % 8
    packed = np.frombuffer(buffer, np.uint8, (skip + n + 7) // 8, first)
    bits = np.unpackbits(packed, count=skip + n, bitorder="little")
    return bits[skip:].view(np.bool_)


def null_rows(array: Any) -> Bools | None:
    """(n,) True at nulls; None if there are none."""
    valid = valid_rows(array)
    return None if valid is None else ~valid


def check_whole(data: Any, what: str) -> None:
    """Look at all that Arrow reads unchecked, in an array or all columns of a batch: buffers, nulls, offsets, dictionary indices, UTF-8.

    Raises:
        SchemaError: Something of it points where it should not, which only damaged data does.

    Cost: nothing for numbers and times, 4 ns a row for strings of 36 characters.
    """
    try:
        data.validate(full=True)
    except pa.ArrowInvalid as error:
        raise SchemaError(f"{what} is damaged: {error}; write it again") from error


def storage_of(array: Any) -> Any:
    """The array below an extension type such as a UUID; any other array as it is."""
    return array.storage if isinstance(array.type, pa.BaseExtensionType) else array


def mask_of(mask: Any) -> Bools:
    """An Arrow boolean array as NumPy; null counts as False."""
    found: Bools = pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
    return found


def matches(text: Any, pattern: str) -> Bools:
    """Which of some texts a regular expression finds something in; null counts as False."""
    return mask_of(pc.match_substring_regex(text, pattern))


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Read-only, so that kernels see one kind of array whether it is a view of Arrow memory or not."""
    if array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array


NO_INTS: Final[Ints] = frozen(np.zeros(0, np.int64))
NO_BYTES: Final[NDArray[np.uint8]] = frozen(np.zeros(0, np.uint8))


def bytes_of(array: Any, column: str) -> tuple[Ints, NDArray[np.uint8]]:
    """Offsets and bytes of strings or binary of any width: row i is `data[offsets[i]:offsets[i + 1]]`.

    Raises:
        SchemaError: The offsets fall or point outside of the data, which only damaged data can do.
    """
    n = len(array)
    kind = array.type
    if pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        buffer = array.buffers()[1]
        offsets = np.arange(array.offset, array.offset + n + 1, dtype=np.int64) * width
    else:
        large = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
        dtype = np.dtype(np.int64 if large else np.int32)
        _, places, buffer = array.buffers()
        if n == 0 or places is None:
            return np.zeros(n + 1, np.int64), NO_BYTES
        raw = np.frombuffer(places, dtype, n + 1, array.offset * dtype.itemsize)
        # Kernels read data[offsets[i]:offsets[i + 1]] unchecked, so this is the door.
        falling = raw[1:] < raw[:-1]
        if falling.any():
            raise SchemaError(f"column {column!r}, row {int(falling.argmax())}: its offsets fall; the data is damaged, write it again")
        offsets = np.ascontiguousarray(raw.astype(np.int64, copy=not raw.flags.aligned))
    data = NO_BYTES if buffer is None else np.frombuffer(buffer, np.uint8)
    if offsets[0] < 0 or offsets[-1] > len(data):
        raise SchemaError(
            f"column {column!r}: offsets reach from {offsets[0]} to {offsets[-1]} in {len(data)} bytes; the data is damaged, write it again"
        )
    return offsets, data


def array_of(values: NDArray[Any], kind: Any, nulls: Bools | None = None) -> Any:
    """An Arrow array of a fixed-width type over NumPy memory. `pyarrow.array` would first import pandas, where that is installed."""
    bitmap = None if nulls is None else pa.py_buffer(np.packbits(~nulls, bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [bitmap, pa.py_buffer(values)])


def taken(array: Any, places: Ints) -> Any:
    """Rows of an array of any type, by ascending row number."""
    try:
        return array.take(array_of(places, pa.int64()))
    except pa.ArrowNotImplementedError:  # views and run-end encoded columns: then run by run
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        return pa.concat_arrays([array.slice(int(run[0]), len(run)) for run in runs])
