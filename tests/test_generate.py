"""Streams that are made up: the same for the same seed, cut anywhere, and shaped as asked."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import pytest

from engine.errors import ConfigError, SchemaError
from engine.generate import BAD_KINDS, BLOCK_ROWS, FUTURE_US, NEVER_US, mix, schema, transactions, write, zipf
from engine.outputs import FileWriter, file_format

EVERYTHING = {"users": 500, "rate": 5000, "skew": 1.1, "bursts": 0.1, "disorder": "2s", "ties": 0.05, "bad": 0.05, "seed": 7}
START_US = 1_735_689_600_000_000  # 2025-01-01


def table(rows: int, **options: object) -> pa.Table:
    return pa.Table.from_batches(list(transactions(rows, **options)), schema(str(options.get("ids", "int"))))


def times(stream: pa.Table) -> np.ndarray:
    return stream["timestamp"].cast(pa.int64()).to_numpy()


def same(one: pa.Table, other: pa.Table) -> bool:
    """Equal, NaN to NaN."""
    return all(
        pc.all(pc.equal(a.cast(pa.string()), b.cast(pa.string())).fill_null(True)).as_py() and a.is_null().equals(b.is_null())
        for a, b in ((one[name].combine_chunks(), other[name].combine_chunks()) for name in one.column_names)
    )


# The same rows


@pytest.mark.parametrize("ids", ["int", "uuid", "name"])
@pytest.mark.parametrize("batch_rows", [1, 999, BLOCK_ROWS - 1, BLOCK_ROWS + 1, 200_000])
def test_stream_does_not_depend_on_the_batch_size(ids: str, batch_rows: int) -> None:
    rows = 3000 if batch_rows == 1 else 140_000
    whole = table(rows, ids=ids, **EVERYTHING)
    batches = list(transactions(rows, ids=ids, batch_rows=batch_rows, **EVERYTHING))
    assert [batch.num_rows for batch in batches[:-1]] == [batch_rows] * (len(batches) - 1)
    assert sum(batch.num_rows for batch in batches) == rows
    assert same(pa.Table.from_batches(batches), whole)


def test_shorter_stream_is_the_beginning_of_a_longer_one() -> None:
    assert same(table(70_000, **EVERYTHING), table(150_000, **EVERYTHING).slice(0, 70_000))


def test_seed_decides() -> None:
    options = {**EVERYTHING, "seed": 8}
    assert same(table(1000, **options), table(1000, **options))
    assert not same(table(1000, **options), table(1000, **EVERYTHING))


def test_no_rows() -> None:
    assert list(transactions(0)) == []


@pytest.mark.parametrize("ids", ["int", "uuid", "name"])
def test_schema(ids: str) -> None:
    batch = next(transactions(10, ids=ids))
    assert batch.schema.equals(schema(ids))
    assert batch.schema.types == [pa.int64() if ids == "int" else pa.string(), pa.float64(), pa.timestamp("us", "UTC")]
    batch.validate(full=True)


# Their shape


def test_plain_stream_is_in_order_at_its_rate_and_clean() -> None:
    stream = table(200_000, users=1000, rate=1000)
    assert sum(column.null_count for column in stream.columns) == 0
    time_us = times(stream)
    assert (np.diff(time_us) >= 0).all()
    assert time_us[0] >= START_US
    assert (time_us[-1] - time_us[0]) / 1e6 == pytest.approx(200, rel=0.02)
    gaps = np.diff(time_us)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential, as in a Poisson process


def test_amounts_look_like_payments() -> None:
    amount = table(100_000)["amount"].to_numpy()
    assert (amount >= 0.01).all()
    assert (np.round(amount, 2) == amount).all()
    assert np.median(amount) == pytest.approx(30, rel=0.03)
    assert amount.mean() == pytest.approx(30 * math.exp(1.2**2 / 2), rel=0.05)


def test_uniform_users() -> None:
    counts = np.array(list(Counter(table(100_000, users=100)["user_id"].to_pylist()).values()))
    assert counts.size == 100
    assert counts.min() > 850
    assert counts.max() < 1150


def test_skewed_users_follow_zipf() -> None:
    users = table(131_072, users=10_000, skew=1.0)["user_id"].to_numpy()
    ranked = mix(np.arange(10_000)).view(np.int64)
    harmonic = (1 / np.arange(1, 10_001)).sum()
    for rank in (1, 2, 3, 10, 100):
        expected = users.size / rank / harmonic
        assert abs((users == ranked[rank - 1]).sum() - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("exponent", [0.3, 0.999999, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("most", [1, 2, 7])
def test_zipf_frequencies(exponent: float, most: int) -> None:
    ranks = zipf(np.random.default_rng(1), exponent, most, 50_000)
    weights = np.arange(1, most + 1) ** -exponent
    expected = 50_000 * weights / weights.sum()
    assert np.abs(np.bincount(ranks, minlength=most + 1)[1:] - expected).max() <= 5 * math.sqrt(50_000 / 4)
    assert ranks.min() >= 1
    assert ranks.max() <= most


def test_zipf_needs_no_table_of_users() -> None:
    ranks = zipf(np.random.default_rng(1), 0.5, 2**62, 10_000)
    assert ranks.min() >= 1
    assert ranks.max() <= 2**62
    assert np.median(ranks) == pytest.approx(2**60, rel=0.1)  # P(rank <= x) = sqrt(x / most)


def test_bursts_are_one_user_within_seconds() -> None:
    stream = table(BLOCK_ROWS, users=10**12, rate=1000, bursts=0.25)  # so many users that only bursts repeat one
    users, time_us = stream["user_id"].to_numpy(), times(stream)
    of_user: dict[int, list[int]] = {}
    for user, at in zip(users.tolist(), time_us.tolist(), strict=True):
        of_user.setdefault(user, []).append(at)
    repeated = [instants for instants in of_user.values() if len(instants) > 1]
    assert sum(map(len, repeated)) / stream.num_rows == pytest.approx(0.25, abs=0.01)
    assert max(instants[-1] - instants[0] for instants in repeated) <= 5_000_000
    assert np.mean([len(instants) for instants in repeated]) == pytest.approx(8, abs=0.3)
    assert (np.diff(time_us) >= 0).all()


def test_bursts_fit_into_a_block_that_is_shorter_than_they_are() -> None:
    time_us = times(table(BLOCK_ROWS, rate=10**6, bursts=1.0))
    assert time_us.min() >= START_US
    assert time_us.max() <= START_US + BLOCK_ROWS


def test_disorder_is_normal_and_never_ahead() -> None:
    calm, late = (times(table(BLOCK_ROWS, rate=1000, disorder=disorder)) for disorder in ("0s", "3s"))
    delay = calm - late
    assert (delay >= 0).all()
    assert math.sqrt((delay.astype(float) ** 2).mean()) == pytest.approx(3e6, rel=0.02)
    assert (delay < 3e6).mean() == pytest.approx(0.6827, abs=0.01)
    assert (np.diff(late) < 0).any()


def test_ties() -> None:
    stream = times(table(BLOCK_ROWS, rate=1, disorder="1h", ties=0.2))
    assert (np.diff(stream) == 0).mean() == pytest.approx(0.2, abs=0.01)


def test_all_ties_share_one_time_per_block() -> None:
    assert len(set(times(table(2 * BLOCK_ROWS, ties=1.0)))) == 2


def test_bad_rows() -> None:
    rows, share = 2 * BLOCK_ROWS, 0.08
    good, stream = table(rows, rate=1000), table(rows, rate=1000, bad=share)
    each = rows * share / len(BAD_KINDS)
    amount = stream["amount"].to_numpy()
    time_us = stream["timestamp"].cast(pa.int64()).fill_null(START_US).to_numpy()
    counts = {
        "null_user": stream["user_id"].null_count,
        "null_amount": stream["amount"].null_count,
        "null_timestamp": stream["timestamp"].null_count,
        "amount_not_finite": pc.sum(pc.invert(pc.is_finite(stream["amount"]))).as_py(),
        "amount_out_of_range": (amount == 1e18).sum(),
        "timestamp_out_of_range": (time_us == NEVER_US).sum(),
        "future": ((time_us >= FUTURE_US) & (time_us < NEVER_US)).sum(),
        "late": (times(good) - time_us >= 3_600_000_000).sum(),
    }
    assert tuple(counts) == BAD_KINDS
    for name, count in counts.items():
        assert abs(count - each) < 5 * math.sqrt(each), name
    kinds = set(np.unique(amount[~np.isfinite(amount)]).astype(str))
    assert kinds == {"nan", "inf", "-inf"}


@pytest.mark.parametrize("ids", ["uuid", "name"])
def test_bad_rows_of_string_ids_have_null_users(ids: str) -> None:
    assert 0.1 < table(10_000, ids=ids, bad=1.0)["user_id"].null_count / 10_000 < 0.15


def test_ids() -> None:
    numbers = np.arange(100_000)
    assert len(set(mix(numbers).tolist())) == numbers.size
    ints = table(10_000)["user_id"].to_numpy()
    assert (ints < 0).mean() == pytest.approx(0.5, abs=0.03)
    uuids = table(1000, ids="uuid")["user_id"].to_pylist()
    hexes = "[0-9a-f]"
    pattern = f"^{hexes}{{8}}-{hexes}{{4}}-4{hexes}{{3}}-[89ab]{hexes}{{3}}-{hexes}{{12}}$"
    assert pc.all(pc.match_substring_regex(pa.array(uuids), pattern)).as_py()
    assert len(set(table(10_000, users=100, ids="uuid")["user_id"].to_pylist())) == 100
    assert set(table(1000, users=3, ids="name")["user_id"].to_pylist()) == {"user-0", "user-1", "user-2"}


@pytest.mark.parametrize(
    "start",
    [
        "2025-06-01",
        "2025-06-01T02:00:00+02:00",
        datetime.datetime(2025, 6, 1),
        datetime.datetime(2025, 6, 1, tzinfo=datetime.UTC),
        np.datetime64("2025-06-01"),
    ],
)
def test_start(start: object) -> None:
    assert times(table(1, start=start, rate=1e9))[0] == 1_748_736_000_000_000


# Bad configuration


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rows": -1}, "rows=-1"),
        ({"rows": 1.5}, "rows=1.5"),
        ({"users": 0}, "users=0"),
        ({"users": True}, "users=True"),
        ({"rate": 0}, "rate=0"),
        ({"rate": math.nan}, "rate=nan"),
        ({"rate": "fast"}, "rate='fast'"),
        ({"skew": -0.1}, "skew=-0.1"),
        ({"skew": 11}, "skew=11"),
        ({"bursts": 1.1}, "bursts=1.1"),
        ({"disorder": 5}, "disorder=5"),
        ({"disorder": "5 parsecs"}, "disorder='5 parsecs'"),
        ({"ties": -1}, "ties=-1"),
        ({"bad": 2}, "bad=2"),
        ({"ids": "ints"}, "ids='ints'"),
        ({"start": "yesterday"}, "start='yesterday'"),
        ({"start": 0}, "start=0"),
        ({"start": "2300-01-01"}, "start='2300-01-01'"),
        ({"start": np.datetime64("NaT")}, "1678 and 2262"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_rows": 0}, "batch_rows=0"),
        ({"rows": 10**12, "rate": 1}, "after the year 2262"),
    ],
)
def test_bad_configuration_is_refused_by_the_call(options: dict[str, object], text: str) -> None:
    arguments = {"rows": 10, **options}
    with pytest.raises(ConfigError) as caught:
        transactions(**arguments)
    assert text in str(caught.value)


# Files


def read(path: str) -> pa.Table:
    kind, compression = file_format(path)
    stream = pa.input_stream(path, compression=compression)
    if kind == "parquet":
        return pa.parquet.read_table(path)
    if kind == "arrow":
        return pa.ipc.open_file(path).read_all()
    return pa.csv.read_csv(stream) if kind == "csv" else pa.json.read_json(stream)


@pytest.mark.parametrize(
    "suffix", ["parquet", "pq", "arrow", "ipc", "feather", "csv", "csv.gz", "csv.zst", "ndjson", "jsonl", "ndjson.gz", "NDJSON"]
)
def test_write_and_read_back(tmp_path, suffix: str) -> None:
    path = str(tmp_path / f"stream.{suffix}")
    size_bytes = write(path, 1500, users=50, ids="name", seed=3, ties=0.1)
    assert size_bytes == (tmp_path / f"stream.{suffix}").stat().st_size
    back, wanted = read(path), table(1500, users=50, ids="name", seed=3, ties=0.1)
    assert back["user_id"].to_pylist() == wanted["user_id"].to_pylist()
    assert back["amount"].to_pylist() == wanted["amount"].to_pylist()
    assert pc.equal(back["timestamp"].cast(pa.timestamp("us", "UTC")), wanted["timestamp"]).to_pylist() == [True] * 1500
    assert [entry.name for entry in tmp_path.iterdir()] == [f"stream.{suffix}"]


@pytest.mark.parametrize("name", ["stream", "stream.txt", "stream.parquet.gz", "stream.arrow.zst", "stream.gz", ".csv"])
def test_unknown_suffix(tmp_path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.parquet.*\.csv"):
        write(tmp_path / name, 10)
    assert list(tmp_path.iterdir()) == []


def test_bad_configuration_leaves_no_file(tmp_path) -> None:
    with pytest.raises(ConfigError):
        write(tmp_path / "stream.csv", 10, users=0)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "nowhere" / "stream.csv", 10)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv", "ndjson"])
def test_writer_leaves_the_old_file_when_it_fails(tmp_path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    path.write_text("old")
    batch = pa.record_batch({"n": [1]})
    writer = FileWriter(path, batch.schema)
    writer.write(batch)
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_that_cannot_get_its_name_is_removed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "stream.csv")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        write(tmp_path / "stream.csv", 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv"])
def test_writer_of_no_batches_writes_the_columns(tmp_path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    with FileWriter(path, pa.schema([("n", pa.int64())])):
        pass
    back = read(str(path))
    assert (back.num_rows, back.column_names) == (0, ["n"])


def test_writer_refuses_other_columns_and_types_it_cannot_write(tmp_path) -> None:
    batch = pa.record_batch({"n": [1]})
    with pytest.raises(SchemaError, match=r"out\.csv"), FileWriter(tmp_path / "out.csv", batch.schema) as writer:
        writer.write(pa.record_batch({"m": [1]}))
    lists = pa.record_batch({"n": [[1]]})
    for suffix in ("csv", "ndjson"):
        with pytest.raises(SchemaError, match="list"), FileWriter(tmp_path / f"out.{suffix}", lists.schema) as writer:
            writer.write(lists)
    assert list(tmp_path.iterdir()) == []


def test_ndjson_is_json(tmp_path) -> None:
    rows = [
        {'na"me\n': 'quote " backslash \\ tab \t newline \n bell \x07 é 𝄞', "x": 0.1, "day": "2025-01-01", "flag": True, "kind": "a"},
        {'na"me\n': "", "x": 1e300, "day": None, "flag": None, "kind": "b"},
        {'na"me\n': None, "x": None, "day": "1970-01-01", "flag": False, "kind": "a"},
    ]
    text = pa.table({name: [row[name] for row in rows] for name in rows[0]})
    stream = text.set_column(2, "day", text["day"].cast(pa.date32())).set_column(4, "kind", text["kind"].dictionary_encode())
    with FileWriter(tmp_path / "out.ndjson", stream.schema) as writer:
        writer.write(stream)
        writer.write(stream.slice(0, 0))
        writer.write(stream.slice(1))
    lines = (tmp_path / "out.ndjson").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows + rows[1:]


def test_ndjson_has_no_nan(tmp_path) -> None:
    batch = pa.record_batch({"x": [math.nan, math.inf, -math.inf, -0.0]})
    with FileWriter(tmp_path / "out.ndjson", batch.schema) as writer:
        writer.write(batch)
    assert [json.loads(line)["x"] for line in (tmp_path / "out.ndjson").read_text().splitlines()] == [None, None, None, 0.0]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv", "ndjson"])
def test_views_are_written_as_plain_columns(tmp_path, suffix: str) -> None:
    """Frames of polars hold views, and dictionaries of views."""
    table = pa.table({"a": ["x", None, "more than twelve bytes"], "b": ["p", "q", "p"]})
    view = pa.string_view()
    try:
        views = table.set_column(0, "a", table["a"].cast(view))
        views = views.set_column(1, "b", pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(["p", "q"]).cast(view)))
    except pa.ArrowNotImplementedError:
        pytest.skip(f"pyarrow {pa.__version__} cannot make views")
    path = tmp_path / f"out.{suffix}"
    with FileWriter(path, views.schema) as writer:
        writer.write(views)
    if suffix == "csv":
        assert path.read_text().splitlines()[1:] == ['"x","p"', ',"q"', '"more than twelve bytes","p"']
    elif suffix == "ndjson":
        assert [json.loads(line) for line in path.read_text().splitlines()] == table.to_pylist()
    else:
        assert (pa.parquet.read_table(path) if suffix == "parquet" else pa.ipc.open_file(path).read_all()).equals(table)
