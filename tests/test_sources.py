"""`engine.sources`: every source gives the same rows, and bad input is named, not guessed at."""

from __future__ import annotations

import bz2
import datetime
import gzip
import io
import json
import os
import sys
import threading
from types import SimpleNamespace

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from engine import sources
from engine.config import Config
from engine.errors import SchemaError
from engine.sources import PIECE_ROWS, read
from tests.rows import (
    CONFIG,
    IN_SECONDS,
    VIEWS,
    rows_of,
    rows_of_batch,
)

# --------------------------------------------------------------------------------------------------
# Sources: all give the same rows

SOURCE = pa.table(
    {
        "note": pa.array(["a", "b", None, 'quoted "x", with\ncomma', "e", "f"]),
        "user_id": pa.array(["alice", "007", None, "bob", "alice", "7"]),
        "amount": pa.array([12.5, 0.1, 1.0, -3.25, None, 0.00012]),
        "timestamp": pa.array([1_700_000_000_000_000 + step for step in (0, 1, 2, 3, 4, 5)], pa.timestamp("us", "UTC")),
    }
)
EXPECTED = [
    ("alice", 1_700_000_000_000_000_000, 125000, None, 0),
    ("007", 1_700_000_000_000_001_000, 1000, None, 0),
    (None, 0, 0, "null_user", 0),
    ("bob", 1_700_000_000_000_003_000, -32500, None, 0),
    ("alice", 0, 0, "null_amount", 0),
    ("7", 1_700_000_000_000_005_000, 1, None, 1),
]


class OneBatch:
    """Only the array side of Arrow's C interface."""

    def __init__(self, batch):
        self.batch = batch

    def __arrow_c_array__(self, requested_schema=None):
        return self.batch.__arrow_c_array__(requested_schema)


class Stream:
    """Only the stream side, and no length."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


def chunked():
    return pa.concat_tables([SOURCE[:1], SOURCE[1:1], SOURCE[1:4], SOURCE[4:]])


def write_parquet(path):
    pq.write_table(SOURCE, path, row_group_size=4)


def write_arrow(path, stream=False):
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), SOURCE.schema) as writer:
        writer.write_table(SOURCE, max_chunksize=4)


def csv_bytes():
    sink = io.BytesIO()
    pa_csv.write_csv(SOURCE, sink)
    return sink.getvalue()


def ndjson_bytes():
    def plain(value):
        return value.isoformat() if isinstance(value, datetime.datetime) else value

    return "".join(json.dumps({name: plain(value) for name, value in row.items()}) + "\n" for row in SOURCE.to_pylist()).encode()


IN_MEMORY = {
    "batch": lambda: SOURCE.combine_chunks().to_batches()[0],
    "table": lambda: SOURCE,
    "chunked": chunked,
    "sliced": lambda: pa.concat_tables([SOURCE[4:], chunked(), SOURCE[:2]])[2:8],
    "dict of lists": lambda: {name: SOURCE[name].to_pylist() for name in SOURCE.column_names},
    "dict of arrays": lambda: {name: SOURCE[name] for name in SOURCE.column_names},
    "dict mixed": lambda: {
        "timestamp": SOURCE["timestamp"].to_numpy(),
        "user_id": np.array(SOURCE["user_id"].to_pylist(), dtype=object),
        "amount": SOURCE["amount"].combine_chunks(),
    },
    "c array": lambda: OneBatch(SOURCE.combine_chunks().to_batches()[0]),
    "pandas": lambda: pd.DataFrame(
        {**SOURCE.to_pandas(), "amount": SOURCE["amount"].to_pandas(types_mapper=lambda _: pd.ArrowDtype(pa.float64()))}
    ),
    "dictionary": lambda: SOURCE.set_column(1, "user_id", SOURCE["user_id"].dictionary_encode()),
    "decimal": lambda: SOURCE.set_column(2, "amount", SOURCE["amount"].cast(pa.decimal128(20, 10))),
}
if VIEWS:
    IN_MEMORY["polars"] = lambda: pl.from_arrow(SOURCE)
    IN_MEMORY["polars categorical"] = lambda: pl.from_arrow(SOURCE).with_columns(pl.col("user_id").cast(pl.Categorical))
    IN_MEMORY["duckdb"] = lambda: duckdb.sql("select * from source", connection=connection())
    IN_MEMORY["dict of series"] = lambda: pl.from_arrow(SOURCE).to_dict()


def connection():
    made = duckdb.connect()
    made.register("source", SOURCE)
    return made


@pytest.mark.parametrize("source", IN_MEMORY.values(), ids=IN_MEMORY.keys())
def test_data_in_memory_is_one_unit(source):
    units = list(read(source(), CONFIG))
    assert len(units) == 1
    assert [row for batch in units[0] for row in rows_of_batch(batch)] == EXPECTED


def test_nan_of_pandas_is_null_as_pandas_means_it():
    assert rows_of(SOURCE.to_pandas()) == EXPECTED


@pytest.mark.parametrize("source", [Stream, lambda table: table.to_reader()], ids=["c stream", "reader"])
def test_each_batch_of_a_stream_is_a_unit(source):
    (batch,) = SOURCE.to_batches()
    table = pa.Table.from_batches([batch[:4], batch[:0], batch[4:]])
    units = list(read(source(table), CONFIG))
    assert [[batch.num_rows for batch in unit] for unit in units] == [[4], [0], [2]]
    assert [row for unit in units for batch in unit for row in rows_of_batch(batch)] == EXPECTED


FILES = {
    "a.parquet": write_parquet,
    "a.pq": write_parquet,
    "A.PARQUET": write_parquet,
    "parquet without suffix": write_parquet,
    "a.arrow": write_arrow,
    "a.feather": write_arrow,
    "a.ipc": write_arrow,
    "a.arrows": lambda path: write_arrow(path, stream=True),
    "stream.arrow": lambda path: write_arrow(path, stream=True),
    "arrow.unknown": write_arrow,
    "a.csv": lambda path: path.write_bytes(csv_bytes()),
    "bom.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + csv_bytes()),
    "crlf.csv": lambda path: path.write_bytes(csv_bytes().replace(b"\n", b"\r\n")),
    "open end.csv": lambda path: path.write_bytes(csv_bytes().rstrip()),
    "a.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_bytes())),
    "a.csv.bz2": lambda path: path.write_bytes(bz2.compress(csv_bytes())),
    "a.csv.zst": lambda path: path.write_bytes(pa.compress(csv_bytes(), "zstd", asbytes=True)),
    "a.csv.lz4": lambda path: path.write_bytes(pa.compress(csv_bytes(), "lz4", asbytes=True)),
    "a.ndjson": lambda path: path.write_bytes(ndjson_bytes()),
    "a.jsonl": lambda path: path.write_bytes(ndjson_bytes().replace(b"\n", b"\r\n\n")),
    "a.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + ndjson_bytes().rstrip()),
    "a.ndjson.gz": lambda path: path.write_bytes(gzip.compress(ndjson_bytes())),
    "a.json.zst": lambda path: path.write_bytes(pa.compress(ndjson_bytes(), "zstd", asbytes=True)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("as_path", [str, lambda path: path, lambda path: [path]], ids=["str", "path", "list"])
def test_files(tmp_path, name, as_path):
    path = tmp_path / name
    FILES[name](path)
    assert rows_of(as_path(path)) == EXPECTED
    notes = [note for unit in read(as_path(path), CONFIG) for batch in unit for note in batch.column("note").to_pylist()]
    assert [note and note.replace("\r", "") for note in notes] == SOURCE["note"].to_pylist()


def test_folders_globs_and_lists(tmp_path):
    for name in ("2.csv", "1.parquet", "3.ndjson", "4.arrow"):
        {"csv": FILES["a.csv"], "parquet": write_parquet, "ndjson": FILES["a.ndjson"], "arrow": write_arrow}[name[2:]](tmp_path / name)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.csv").write_text("x")
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.csv" / "inner.csv").write_bytes(csv_bytes())
    assert sources.files_of(tmp_path) == [str(tmp_path / name) for name in ("1.parquet", "2.csv", "3.ndjson", "4.arrow")]
    assert rows_of(tmp_path) == EXPECTED * 4
    assert rows_of(str(tmp_path / "[12].*")) == EXPECTED * 2
    assert rows_of([tmp_path / "1.parquet", str(tmp_path / "folder.csv"), str(tmp_path / "?.csv")]) == EXPECTED * 3


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    path = tmp_path / "a[1].csv"
    path.write_bytes(csv_bytes())
    assert rows_of(path) == EXPECTED


def arrow_bytes(stream):
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, SOURCE.schema) as writer:
        writer.write_table(SOURCE)
    return sink.getvalue()


def feed(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(data))))


@pytest.mark.parametrize(
    "data",
    [
        lambda: arrow_bytes(True),
        lambda: arrow_bytes(False),
        csv_bytes,
        ndjson_bytes,
        lambda: b"\n " + ndjson_bytes(),
        lambda: gzip.compress(csv_bytes()),
        lambda: pa.compress(ndjson_bytes(), "zstd", asbytes=True),
        lambda: bz2.compress(arrow_bytes(True)),
    ],
    ids=["stream", "file", "csv", "ndjson", "blank", "csv.gz", "ndjson.zst", "stream.bz2"],
)
def test_standard_input(monkeypatch, data):
    feed(monkeypatch, data())
    assert rows_of("-") == EXPECTED


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "standard input is empty"),
        (b"PAR1xxxxxxxx", "standard input is a Parquet file.*give the path"),
        (b"[1, 2]", "standard input is a JSON array"),
        (b"nonsense\n", "standard input: column 'user_id' is missing"),
        (b"\n\n\n", "standard input"),
        (b"\xff\xff\xff\xff", "standard input is damaged"),
        (b"\x1f\x8bxxxxxxxxx", "standard input"),
    ],
)
def test_bad_standard_input(monkeypatch, data, message):
    feed(monkeypatch, data)
    with pytest.raises(SchemaError, match=message):
        rows_of("-")


def test_standard_input_stays_open(monkeypatch):
    feed(monkeypatch, csv_bytes())
    assert rows_of("-") == EXPECTED
    assert not sys.stdin.buffer.closed


def test_a_named_pipe_is_read_like_standard_input(tmp_path):
    for name, data in (("pipe", csv_bytes()), ("pipe.arrow", arrow_bytes(True)), ("pipe.csv", ndjson_bytes())):
        os.mkfifo(tmp_path / name)
        writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(data,))
        writer.start()
        assert rows_of(tmp_path / name) == EXPECTED
        writer.join()


def test_large_data_comes_in_pieces(tmp_path):
    n = 2 * PIECE_ROWS + 5
    table = pa.table({"user_id": np.arange(n), "amount": np.arange(n) % 1000, "timestamp": np.arange(n).astype("M8[ms]")})
    (unit,) = read(table.combine_chunks(), CONFIG)
    assert [batch.num_rows for batch in unit] == [PIECE_ROWS, PIECE_ROWS, 5]
    assert [[b.num_rows for b in unit] for unit in read(pa.RecordBatchReader.from_batches(table.schema, table.to_batches()), CONFIG)] == [
        [PIECE_ROWS, PIECE_ROWS, 5]
    ]
    pq.write_table(table, tmp_path / "a.parquet")
    pa_csv.write_csv(table, tmp_path / "a.csv")
    pl.from_arrow(table).with_columns(pl.col("timestamp").dt.to_string("%Y-%m-%dT%H:%M:%S%.3f")).write_ndjson(tmp_path / "a.ndjson")
    expected = [(row, row * 10**6, row % 1000 * 10**4, None, 0) for row in range(n)]
    for name in ("a.parquet", "a.csv", "a.ndjson"):
        units = list(read(tmp_path / name, CONFIG))
        assert len(units) > 1
        assert all(len(unit) <= 2 for unit in units)
        found = [row for unit in units for batch in unit for row in rows_of_batch(batch)]
        assert [(int(row[0]), *row[1:]) for row in found] == expected, name


def test_reading_is_lazy(tmp_path):
    """Of a stream only what is asked for is read."""
    pulled = []

    def batches():
        for batch in SOURCE.to_batches(max_chunksize=2):
            pulled.append(batch)
            yield batch

    units = read(pa.RecordBatchReader.from_batches(SOURCE.schema, batches()), CONFIG)
    next(units)
    assert len(pulled) == 1


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("riskring-read")]


def test_a_thread_fetches_the_next_few_batches_and_ends():
    fetched = []

    def batches():
        for number in range(20):
            fetched.append((number, threading.current_thread().name))
            yield number
        fetched.append("end")

    found = sources._ahead(batches())
    assert [next(found), next(found)] == [0, 1]
    assert len(fetched) <= 2 + sources._AHEAD_PIECES
    assert list(found) == list(range(2, 20))
    assert fetched[-1] == "end"
    assert {name for _, name in fetched[:-1]} == {"riskring-read_0"}
    assert not reading_threads()


def test_what_fails_ahead_is_raised_in_its_turn():
    def batches():
        yield 1
        yield 2
        raise OSError("no more")

    found = sources._ahead(batches())
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(OSError, match="no more"):
        next(found)
    assert not reading_threads()


def test_a_file_that_is_not_read_to_its_end_leaves_no_thread(tmp_path):
    n = 10 * PIECE_ROWS
    pq.write_table(
        pa.table({"user_id": np.arange(n), "amount": np.ones(n), "timestamp": np.arange(n).astype("M8[ms]")}), tmp_path / "a.parquet"
    )
    units = read(tmp_path / "a.parquet", CONFIG)
    assert next(units)[0].num_rows == PIECE_ROWS
    assert reading_threads()
    units.close()
    assert not reading_threads()


@pytest.mark.parametrize("empty", [SOURCE[:0], SOURCE.to_batches()[0][:0]], ids=["table", "batch"])
def test_no_rows(empty):
    ((batch,),) = read(empty, CONFIG)
    assert batch.schema.equals(SOURCE.schema)
    assert rows_of_batch(batch) == []


def test_no_rows_in_files(tmp_path):
    pq.write_table(SOURCE[:0], tmp_path / "a.parquet")
    pa.ipc.new_file(str(tmp_path / "a.arrow"), SOURCE.schema).close()
    (tmp_path / "a.csv").write_bytes(b"user_id,amount,timestamp\n")
    for name in ("a.parquet", "a.arrow", "a.csv"):
        assert rows_of(tmp_path / name) == []
        ((batch,),) = read(tmp_path / name, CONFIG)
        assert batch.schema.names[-3:] == ["user_id", "amount", "timestamp"]


# --------------------------------------------------------------------------------------------------
# CSV and NDJSON in particular


def test_csv_keeps_what_is_written(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('extra,user_id,amount,timestamp\n007,007,1.10,2020-01-01\n,"",,NA\nNaN,,nan,"2020-01-01"\n1e5,NULL,"",2020-01-01\n')
    ((batch,),) = read(path, CONFIG)
    assert batch.to_pydict() == {
        "extra": ["007", None, "NaN", "1e5"],
        "user_id": ["007", "", None, "NULL"],
        "amount": ["1.10", None, "nan", ""],
        "timestamp": ["2020-01-01", "NA", "2020-01-01", "2020-01-01"],
    }
    assert [row[3] for row in rows_of_batch(batch)] == [None, "null_amount", "null_user", "null_amount"]


@pytest.mark.parametrize("wrong", ["1,2", "1,2,2020-01-01,4"])
@pytest.mark.parametrize("at", [0, 3, 200_000])
def test_csv_rows_of_wrong_width(tmp_path, wrong, at):
    path = tmp_path / "a.csv"
    path.write_text("user_id,amount,timestamp\n" + "1,2,2020-01-01\n" * at + wrong + "\n" + "1,2,2020-01-01\n" * 5)
    with pytest.raises(SchemaError) as caught:
        rows_of(path)
    assert f"{path}: row {at + 2} has {wrong.count(',') + 1} values, wanted 3: {wrong!r}" in str(caught.value)


def test_csv_header_with_quotes_and_long_rows(tmp_path):
    path = tmp_path / "a.csv"
    config = Config.of(shards=1, amount="the\namount, in EUR")
    path.write_text('user_id,"the\namount, in EUR",timestamp\n1,2,2020-01-01\n')
    assert [row[2] for row in rows_of(path, config)] == [20000]
    path.write_text("user_id,amount,timestamp\n1,2,2020-01-01\n" + "x" * 10**7 + ",2,2020-01-01\n")
    with pytest.raises(SchemaError, match=r"a\.csv: a row after row .* is longer than"):
        rows_of(path)


def test_csv_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"user_id,amount,timestamp\n\xff\xfe,2,2020-01-01\n")
    with pytest.raises(SchemaError, match=r"a\.csv is damaged.*0 rows were read before.*UTF8"):
        rows_of(path)
    path.write_bytes("user_id,amount,timestamp\n".encode("utf-16"))
    with pytest.raises(SchemaError, match=r"a\.csv is damaged.*utf-8"):
        rows_of(path)


@pytest.mark.parametrize("suffix", ["csv", "ndjson"])
def test_integer_times_in_text_need_a_unit(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text(
        "user_id,amount,timestamp\na,1,1700000000\nb,2,1700000001\n"
        if suffix == "csv"
        else '{"user_id":"a","amount":1,"timestamp":1700000000}\n{"user_id":"b","amount":2,"timestamp":1700000001}\n'
    )
    with pytest.raises(SchemaError, match=rf"a\.{suffix}: column 'timestamp' holds integers such as '1700000000'.*time_unit="):
        rows_of(path)
    assert [row[1] for row in rows_of(path, IN_SECONDS)] == [1_700_000_000 * 10**9, 1_700_000_001 * 10**9]


def test_ndjson_amounts_and_times_are_exact(tmp_path):
    path = tmp_path / "a.ndjson"
    lines = [
        '{"user_id": "a", "amount": 1.50, "timestamp": "2020-01-01"}',
        '{"amount": "1.50", "timestamp": "2020-01-01", "user_id": "a"}',
        '{"user_id": "a", "amount": 0.00005, "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount" :0.00015 , "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount": 1e2, "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount": -3, "timestamp": 1577836800}',
        '{"user_id": "a", "amount": NaN, "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount": "much", "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount": 123456789012345678901234567890, "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount": null, "timestamp": "2020-01-01"}',
        '{"user_id": "a", "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount": 1, "timestamp": 1.5}',
        '{"user_id": null, "amount": 1, "timestamp": "2020-01-01"}',
        '{"user_id": "\\"amount\\": 5, \\"timestamp\\": 7", "amount": 1, "timestamp": "2020-01-01"}',
    ]
    path.write_text("\n".join(lines))
    found = rows_of(path, IN_SECONDS)
    assert [(units, reason, rounded) for _, _, units, reason, rounded in found] == [
        *[(15000, None, 0)] * 2,
        *[(0, None, 1), (2, None, 1), (10**6, None, 0), (-30000, None, 0)],
        *[(0, "amount_not_finite", 0), (0, "null_amount", 0), (0, "amount_out_of_range", 0), (0, "null_amount", 0), (0, "null_amount", 0)],
        *[(0, "null_timestamp", 0), (0, "null_user", 0), (10000, None, 0)],
    ]
    assert {time for _, time, _, reason, _ in found if not reason} == {1577836800 * 10**9}
    assert found[-1][0] == '"amount": 5, "timestamp": 7'
    table = pa.Table.from_batches([batch for unit in read(path, IN_SECONDS) for batch in unit])
    assert table["amount"].to_pylist()[:3] == ["1.50", "1.50", "0.00005"]


def test_ndjson_names_of_any_kind(tmp_path):
    path = tmp_path / "a.ndjson"
    for amount in ("the amount", "Betrag \u20ac", 'a "quoted" $^.*+?()[]{}|\\ name', "#&~-"):
        path.write_text(json.dumps({"user_id": 1, amount: 0.00015, "timestamp": 1}, ensure_ascii=False), encoding="utf-8")
        config = Config.of(shards=1, time_unit="s", amount=amount)
        assert rows_of(path, config) == [(1, 10**9, 2, None, 1)]


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ("1 2", [1, 2]),
        ('"1" "02"', ["1", "02"]),
        ("null null", [None, None]),
        ("null 5", [None, 5]),
        ("18446744073709551615 1", [2**64 - 1, 1]),
        ('"2020-01-01" "2020-01-02"', ["2020-01-01", "2020-01-02"]),
    ],
)
def test_ndjson_ids_are_what_json_says(tmp_path, users, expected):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"user_id": {user}, "amount": 1, "timestamp": "2020-01-01"}}\n' for user in users.split()))
    assert [row[0] for row in rows_of(path)] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user_id": 1.5, "amount": 1, "timestamp": "2020-01-01"}', "1.5"),
        ('{"user_id": "x", "amount": 1, "timestamp": "2020-01-01"}', "in row 2"),
        ('{"user_id": 1, "amount": true, "timestamp": "2020-01-01"}', "amount.* in row 2"),
        ('{"user_id": 1, "amount": 1', "row"),
        ("[1]", "array"),
        ("5", "number"),
        ('{"user_id": 1, "amount": 1, "amount": 2, "timestamp": "2020-01-01"}', "amount.*twice"),
    ],
)
def test_malformed_ndjson(tmp_path, line, message):
    path = tmp_path / "a.ndjson"
    good = '{"user_id": 1, "amount": 1, "timestamp": "2020-01-01"}\n'
    path.write_text(good + line + "\n")
    with pytest.raises(SchemaError, match=rf"a\.ndjson.*0 rows were read before.*{message}"):
        rows_of(path)
    path.write_text(good * 100_000 + line + "\n")
    with pytest.raises(SchemaError, match=r"a\.ndjson.* (?!0)[0-9,]+ rows were read before") as caught:
        rows_of(path)
    if "in row 2" in message:
        assert "in row 100001" in str(caught.value)


def test_ndjson_types_do_not_drift_between_blocks(tmp_path):
    path = tmp_path / "a.ndjson"
    n = 60_000
    lines = [f'{{"user_id":{row},"amount":1,"timestamp":"2020-01-01","memo":null,"when":"2020-01-01"}}' for row in range(n)]
    lines.append('{"user_id":1,"amount":0.5,"timestamp":"2020-01-01","memo":"text","when":"today","new":1}')
    path.write_text("\n".join(lines))
    units = list(read(path, CONFIG))
    assert len(units) > 1
    assert len({str(batch.schema) for unit in units for batch in unit}) == 1
    last = units[-1][-1][-1:].to_pylist() if hasattr(units[-1][-1], "to_pylist") else None
    assert last == [{"user_id": 1, "amount": "0.5", "timestamp": "2020-01-01", "memo": "text", "when": "today"}]


# --------------------------------------------------------------------------------------------------
# Bad sources


def test_missing_columns_suggest_near_misses():
    data = {"userid": [1], "amount": [1], "timestamp": [1]}
    with pytest.raises(SchemaError, match=r"column 'user_id' is missing, found 'userid', .*did you mean 'userid'\?.*user_id='userid'"):
        rows_of(data, IN_SECONDS)
    with pytest.raises(SchemaError, match=r"did you mean 'Amount'\?.*amount='Amount'"):
        rows_of({"user_id": [1], "Amount": [1], "timestamp": [1]}, IN_SECONDS)
    with pytest.raises(
        SchemaError, match=r"column 'timestamp' is missing, found 'user_id', 'amount'; if it has another name.*timestamp='\.\.\.'"
    ):
        rows_of({"user_id": [1], "amount": [1]}, IN_SECONDS)
    assert rows_of(data, Config.of(shards=1, time_unit="s", user_id="userid")) == [(1, 10**9, 10000, None, 0)]


@pytest.mark.parametrize("data", [{}, pa.table({}), pa.schema([]).empty_table(), pd.DataFrame()], ids=["dict", "table", "empty", "pandas"])
def test_no_columns(data):
    with pytest.raises(SchemaError, match="no columns; wanted 'user_id'"):
        rows_of(data)


def test_a_column_twice(tmp_path):
    batch = pa.RecordBatch.from_arrays([pa.array([1])] * 4, ["user_id", "amount", "amount", "timestamp"])
    with pytest.raises(SchemaError, match="'amount' is there 2 times"):
        rows_of(batch)
    (tmp_path / "a.csv").write_text("user_id,amount,amount,timestamp\n1,1,1,1\n")
    with pytest.raises(SchemaError, match="'amount' is there 2 times"):
        rows_of(tmp_path / "a.csv")


@pytest.mark.parametrize("data", [5, None, [1, 2], [], object(), [{"user_id": 1}], (1, 2)], ids=lambda data: type(data).__name__)
def test_what_cannot_be_read(data):
    with pytest.raises(SchemaError, match=r"cannot be read; give|must be a non-empty list of paths"):
        rows_of(data)


def test_dicts_that_are_not_columns():
    with pytest.raises(SchemaError, match=r"equal lengths, found \{'user_id': 1, 'amount': 2"):
        rows_of({"user_id": [1], "amount": [1, 2], "timestamp": [1]})
    with pytest.raises(SchemaError, match="column 'amount' cannot be an Arrow array"):
        rows_of({"user_id": [1, 2], "amount": [1, "x"], "timestamp": [1, 2]})
    with pytest.raises(SchemaError, match="column 'user_id' cannot be an Arrow array"):
        rows_of({"user_id": [2**70], "amount": [1], "timestamp": [1]})
    with pytest.raises(SchemaError, match="column 'user_id' cannot be an Arrow array"):
        rows_of({"user_id": 5, "amount": [1], "timestamp": [1]})

    with pytest.raises(SchemaError, match="column 'user_id' is one value, 'ab'"):
        rows_of({"user_id": "ab", "amount": [1, 2], "timestamp": [1, 2]})


def test_a_stream_of_something_else():
    with pytest.raises(SchemaError, match="not a table of columns"):
        rows_of(pl.Series([1, 2]))


def test_paths_that_name_nothing(tmp_path):
    (tmp_path / "sales.parquet").write_bytes(b"x")
    with pytest.raises(SchemaError, match=r"'.*sale\.parquet' does not exist; did you mean '.*sales\.parquet'\?"):
        rows_of(tmp_path / "sale.parquet")
    with pytest.raises(SchemaError, match=r"'.*nothing/there\.csv' does not exist; check the path"):
        rows_of(tmp_path / "nothing" / "there.csv")
    with pytest.raises(SchemaError, match=r"no file matches '.*\*\.csv'"):
        rows_of(str(tmp_path / "*.csv"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("x")
    with pytest.raises(SchemaError, match=r"folder '.*folder' has no data files; wanted files that end in \.parquet"):
        rows_of(tmp_path / "folder")
    with pytest.raises(SchemaError, match=r"notes\.txt: its format cannot be told.*rename it to end in \.parquet"):
        rows_of(tmp_path / "folder" / "notes.txt")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv", "a.ndjson", "a.csv.gz", "a"])
def test_empty_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(SchemaError, match=rf"{name} is empty \(0 bytes\)"):
        rows_of(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.ndjson"])
def test_blank_and_compressed_empty_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"\n\n")
    with pytest.raises(SchemaError, match=name):
        rows_of(tmp_path / name)
    (tmp_path / (name + ".gz")).write_bytes(gzip.compress(b""))
    with pytest.raises(SchemaError, match=name):
        rows_of(tmp_path / (name + ".gz"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.arrows", "a.csv.gz", "a.ndjson.gz"])
def test_truncated_files(tmp_path, name):
    path = tmp_path / name
    FILES[name](path)
    whole = path.read_bytes()
    for size in (1, 7, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:size])
        with pytest.raises(SchemaError, match=name):
            rows_of(path)


def test_a_file_that_is_damaged_further_on(tmp_path):
    path = tmp_path / "a.parquet"
    n = 3 * PIECE_ROWS
    table = pa.table({"user_id": np.arange(n), "amount": np.arange(n) % 1000, "timestamp": np.arange(n).astype("M8[ms]")})
    pq.write_table(table, path, row_group_size=PIECE_ROWS, compression="zstd", write_page_checksum=False, use_dictionary=False)
    place = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[place : place + 2000] = b"\xff" * 2000
    path.write_bytes(damaged)
    rows = 0
    with pytest.raises(SchemaError, match=rf"a\.parquet is damaged.*{2 * PIECE_ROWS:,} rows were read before"):  # noqa: PT012
        for unit in read(path, CONFIG):
            rows += sum(batch.num_rows for batch in unit)
    assert rows == 2 * PIECE_ROWS


def test_files_of_another_format_than_their_name(tmp_path):
    (tmp_path / "a.parquet").write_bytes(csv_bytes())
    (tmp_path / "a.arrow").write_bytes(csv_bytes())
    write_parquet(tmp_path / "a.csv")
    write_parquet(tmp_path / "a.ndjson")
    (tmp_path / "a.csv.gz").write_bytes(csv_bytes())
    for name in ("a.parquet", "a.arrow", "a.csv", "a.ndjson", "a.csv.gz"):
        with pytest.raises(SchemaError, match=name):
            rows_of(tmp_path / name)
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    with pytest.raises(SchemaError, match="compressed Parquet file; decompress it first"):
        rows_of(tmp_path / "a.parquet.gz")
    (tmp_path / "b.json").write_text('[{"user_id": 1}]')
    with pytest.raises(SchemaError, match=r"b\.json is a JSON array.*one JSON object per line"):
        rows_of(tmp_path / "b.json")


def test_ndjson_lines_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LINE_BYTES_MAX", 2**22)
    (tmp_path / "a.ndjson").write_bytes(b'{"user_id": "' + b"x" * 2**23 + b'"}')
    with pytest.raises(SchemaError, match="line of more than"):
        rows_of(tmp_path / "a.ndjson")


def test_columns_are_checked_before_the_first_batch(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(SOURCE.rename_columns(["note", "user_id", "amonut", "timestamp"]), path)
    with pytest.raises(SchemaError, match=r"a\.parquet: column 'amount' is missing.*did you mean 'amonut'"):
        next(read(path, CONFIG))
    reader = pa.RecordBatchReader.from_batches(SOURCE.schema, iter(SOURCE.to_batches()))
    with pytest.raises(SchemaError, match="'total' is missing"):
        next(read(reader, Config.of(shards=1, amount="total")))


def test_a_failing_reader_is_not_blamed_on_the_schema():
    def batches():
        yield from SOURCE.to_batches()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        rows_of(pa.RecordBatchReader.from_batches(SOURCE.schema, batches()))


def test_random_bytes_are_a_schema_error_in_any_format(tmp_path):
    generator = np.random.default_rng(5)
    for name in ("a.parquet", "a.arrow", "a.arrows", "a.csv", "a.ndjson", "a.csv.gz", "a.csv.zst"):
        for magic in (b"", b"ARROW1\0\0", b"PAR1", b"\xff\xff\xff\xff", b"{", b"user_id,amount,timestamp\n"):
            (tmp_path / name).write_bytes(magic + generator.bytes(300) + b"PAR1")
            with pytest.raises(SchemaError, match=name):
                rows_of(tmp_path / name)


def test_flipped_bytes_of_an_arrow_file_never_crash(tmp_path):
    path = tmp_path / "a.arrow"
    write_arrow(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(6)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            rows_of(path)
        except SchemaError:
            continue
        except UnicodeDecodeError:  # from this test's own to_pylist
            continue
