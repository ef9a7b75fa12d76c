"""`engine.outputs`: what is written is what was given, whatever encodes it; errors of the writing thread reach the caller."""

from __future__ import annotations

import datetime
import decimal
import math
import os
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import outputs
from engine.errors import SchemaError
from engine.outputs import FileWriter


def writing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("riskring-write")]


INSTANTS = [datetime.datetime(1970, 1, 1), None, datetime.datetime(2262, 1, 1), datetime.datetime(1900, 1, 1, 0, 0, 0, 1000)]
EVERY_TYPE = pa.table(
    {
        "user": pa.array([2**63 - 1, None, -(2**63), 0]),
        "name": ["alice", None, "", "bob"],
        "amount": [0.1, None, -0.0, 1e300],
        "score": pa.array([0.1, None, math.inf, 5e-324]),
        "narrow": pa.array([0.5, None, 1.5, 2.5], pa.float32()),
        "half": pa.array(np.array([0.5, 1.5, 2.5, 3.5], np.float16)),
        "small": pa.array([1, None, -1, 7], pa.int8()),
        "unsigned": pa.array([2**64 - 1, None, 0, 1], pa.uint64()),
        "flag": [True, None, False, True],
        "exact": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("-0.01"), decimal.Decimal(0)]),
        "uuid": pa.array([b"0123456789abcdef", None, b"fedcba9876543210", b"\0" * 16], pa.binary(16)),
        "day": pa.array([datetime.date(2025, 1, 1), None, datetime.date(1969, 12, 31), datetime.date(1970, 1, 1)]),
        "naive": pa.array(INSTANTS, pa.timestamp("ms")),
        "zoned": pa.array(INSTANTS, pa.timestamp("us", "UTC")),
        "fine": pa.array(INSTANTS, pa.timestamp("ns")),
        "a.b": [1, 2, 3, 4],
    }
)
NESTED = pa.table({"list": [[1], None, [], [2, 3]], "pair": [{"a": 1.5}, None, {"a": None}, {"a": 0.5}], "time": EVERY_TYPE["fine"]})


@pytest.mark.parametrize("table", [EVERY_TYPE, NESTED], ids=["flat", "nested"])
@pytest.mark.parametrize("distinct", [(), ("user", "score", "narrow", "half", "name", "unsigned", "zoned", "exact", "absent")])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_every_type_comes_back(tmp_path, table: pa.Table, distinct: tuple[str, ...], suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    with FileWriter(path, table.schema, distinct) as writer:
        for row in range(4):
            writer.write(table.slice(row, 1))
        writer.write(table.slice(0, 0))
    found = pq.read_table(path) if suffix == "parquet" else pa.ipc.open_file(path).read_all()
    assert found.schema.equals(table.schema)
    assert found.equals(table)
    assert not writing_threads()


def test_encodings(tmp_path) -> None:
    """Readers that know Parquet from before 2015 but for the differences of times, which Spark reads since 3.3."""
    with FileWriter(tmp_path / "out.parquet", EVERY_TYPE.schema, ("user", "score")) as writer:
        writer.write(EVERY_TYPE)
    group = pq.ParquetFile(tmp_path / "out.parquet").metadata.row_group(0)
    columns = {group.column(place).path_in_schema: group.column(place) for place in range(group.num_columns)}
    assert [name for name, column in columns.items() if "DELTA_BINARY_PACKED" in column.encodings] == ["naive", "zoned", "fine"]
    assert [name for name, column in columns.items() if column.has_dictionary_page] == [
        *("name", "amount", "narrow", "half", "small", "unsigned", "exact", "uuid", "day", "a.b")
    ]
    assert [name for name, column in columns.items() if column.compression == "UNCOMPRESSED"] == ["score"]
    assert {name for name, column in columns.items() if column.compression == "ZSTD"} == {"name", "exact", "uuid"}
    assert all(column.is_stats_set for name, column in columns.items() if name not in ("half", "exact", "uuid"))


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 12), st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_groups_keep_rows_and_order(tmp_path_factory, sizes: list[int], group_rows: int, group_bytes: int) -> None:
    path = tmp_path_factory.mktemp("groups") / "out.parquet"
    total = sum(sizes)
    whole = pa.table({"n": np.arange(total)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "GROUP_ROWS", group_rows)
        patch.setattr(outputs, "GROUP_BYTES", group_bytes)
        with FileWriter(path, whole.schema) as writer:
            first = 0
            for size in sizes:
                writer.write(whole.slice(first, size))
                first += size
    assert pq.read_table(path).equals(whole)
    groups = pq.ParquetFile(path).metadata
    assert all(0 < groups.row_group(place).num_rows < group_rows + 9 for place in range(groups.num_row_groups))


def test_large_groups_are_cut_by_bytes(tmp_path) -> None:
    text = "x" * 2**20
    with FileWriter(tmp_path / "out.parquet", pa.schema([("text", pa.string())])) as writer:
        for _ in range(70):
            writer.write(pa.table({"text": [text]}))
    groups = pq.ParquetFile(tmp_path / "out.parquet").metadata
    assert [groups.row_group(place).num_rows for place in range(groups.num_row_groups)] == [32, 32, 6]


class Stuck:
    """A sink that holds its thread until it is let go."""

    def __init__(self, sink: object, fails_at: int | None = None) -> None:
        self.sink, self.fails_at = sink, fails_at
        self.go, self.begun = threading.Event(), threading.Event()
        self.tables = 0

    def write_table(self, table: pa.Table) -> None:
        self.tables += 1
        self.begun.set()
        self.go.wait()
        if self.tables == self.fails_at:
            raise OSError(28, "No space left on device", "disk")
        self.sink.write_table(table)

    def close(self) -> None:
        self.sink.close()


@pytest.fixture
def stuck(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outputs, "GROUP_ROWS", 1)
    writer = FileWriter(tmp_path / "out.parquet", pa.schema([("n", pa.int64())]))
    writer._open()
    writer._sink = Stuck(writer._sink)
    yield writer
    writer._sink.go.set()
    writer.abandon()


def test_write_waits_when_enough_waits_to_be_written(stuck: FileWriter, tmp_path) -> None:
    row = pa.table({"n": [7]})
    for _ in range(outputs._GROUPS_WAITING):
        stuck.write(row)
    late = threading.Thread(target=stuck.write, args=(row,))
    late.start()
    stuck._sink.begun.wait()
    assert late.is_alive()
    stuck._sink.go.set()
    late.join()
    stuck.finish()
    assert pq.read_table(tmp_path / "out.parquet")["n"].to_pylist() == [7, 7, 7]


@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_an_error_of_the_thread_reaches_the_caller_unchanged(stuck: FileWriter, tmp_path, fails_at: int) -> None:
    stuck._sink.fails_at = fails_at
    stuck._sink.go.set()
    with pytest.raises(OSError, match="No space left") as caught, stuck:  # noqa: PT012
        for _ in range(5):
            stuck.write(pa.table({"n": [7]}))
    assert (caught.value.errno, caught.value.filename) == (28, "disk")
    assert os.listdir(tmp_path) == []
    assert not writing_threads()


def test_an_interrupted_writer_leaves_out_what_waits(stuck: FileWriter, tmp_path) -> None:
    sink = stuck._sink
    with pytest.raises(KeyboardInterrupt), stuck:  # noqa: PT012
        for _ in range(outputs._GROUPS_WAITING):
            stuck.write(pa.table({"n": [7]}))
        sink.begun.wait()
        stuck._waiting[-1].add_done_callback(lambda _: sink.go.set())  # when it is called off
        raise KeyboardInterrupt
    assert sink.tables == 1
    assert os.listdir(tmp_path) == []
    assert not writing_threads()


def test_other_columns_name_the_file(tmp_path) -> None:
    with pytest.raises(SchemaError, match=r"out\.parquet"), FileWriter(tmp_path / "out.parquet", pa.schema([("n", pa.int64())])) as writer:
        writer.write(pa.table({"m": [1]}))
    assert os.listdir(tmp_path) == []
