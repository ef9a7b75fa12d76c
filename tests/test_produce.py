"""Files as messages, without a broker: what comes out of the messages of a partition is what went into it, row by row."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import ConfigError, RiskEngine
from engine.columns import ids_of
from engine.config import Config
from engine.messages import decode
from engine.partitions import partition_of
from engine.produce import Message, messages_of
from engine.sources import read

PARTITIONS = 3
USERS = [f"user {number % 7}" for number in range(40)]
IDS = {
    "string": pa.array(USERS),
    "large": pa.array(USERS, pa.large_string()),
    "dictionary": pa.array(USERS).dictionary_encode(),
    "with nulls": pa.array([user if place % 5 else None for place, user in enumerate(USERS)]),
    "int16": pa.array([place % 9 - 4 for place in range(40)], pa.int16()),
    "uint64": pa.array([2**64 - 1 - place % 9 for place in range(40)], pa.uint64()),
    "nothing": pa.nulls(40),
}
BINARY = {
    "binary": pa.array([bytes([255, place % 7]) for place in range(40)]),
    "uuid": pa.array([bytes(15) + bytes([place % 7]) for place in range(40)], pa.binary(16)),
}
AMOUNTS = {
    "float": pa.array([0.1 * place for place in range(40)]),
    "float32": pa.array([0.1 * place for place in range(40)], pa.float32()),
    "not finite": pa.array([[1.5, float("nan"), float("inf")][place % 3] for place in range(40)]),
    "decimal": pa.array(range(40)).cast(pa.decimal128(30, 3)),
    "nothing": pa.nulls(40),
}
TIMES = {
    "ns": pa.array([1_700_000_000_123_456_789 + place for place in range(40)], pa.timestamp("ns")),
    "zoned": pa.array([1_700_000_000 + place // 2 for place in range(40)], pa.timestamp("s", "America/New_York")),
    "integer": pa.array([1_700_000_000 + place for place in range(40)], pa.int32()),
    "unsigned": pa.array([2**64 - 1 if place == 3 else 1_700_000_000 + place for place in range(40)], pa.uint64()),
    "date": pa.array([19_000] * 40, pa.date32()),
    "nothing": pa.nulls(40),
}
#: Of files and of the node: seconds.
CONFIG = Config.of(time_unit="s", decimals=2)


def engine() -> RiskEngine:
    return RiskEngine(users=100, max_ahead=None, time_unit="s", decimals=2, window="1h")


def state(each: RiskEngine) -> Any:
    stats = each.stats()
    return each.digest(), stats.accepted, stats.rejected, stats.rounded


def sent(files: list[Path], form: str, rows: int = 4, config: Config = CONFIG, **options: Any) -> list[list[Message]]:
    """Messages of each partition."""
    found: list[list[Message]] = [[] for _ in range(PARTITIONS)]
    for message in messages_of([str(file) for file in files], config, PARTITIONS, form, rows, **options):
        found[message.partition].append(message)
    return found


def received(messages: list[Message], config: Config = CONFIG) -> Any:
    with engine() as judged:
        places = np.arange(len(messages))
        decoded = decode([message.value for message in messages], places, places, config, None)
        assert decoded.dead == []
        for run in decoded.runs:
            judged.ingest(run.table)
        return state(judged)


def expected(files: list[Path], partition: int) -> Any:
    """Rows of the files that belong to a partition, as the library takes them; those without a user belong to the first."""
    with engine() as judged:
        for batch in itertools.chain.from_iterable(read([str(file) for file in files], CONFIG)):
            chosen = np.maximum(partition_of(ids_of(batch.column("user_id"), "user_id"), PARTITIONS), 0)
            judged.ingest(batch.filter(pa.array(chosen == partition)))
        return state(judged)


def parquet(folder: Path, name: str, user_ids: Any, amounts: Any = AMOUNTS["float"], times: Any = TIMES["ns"]) -> Path:
    table = pa.table({"more": range(len(user_ids)), "timestamp": times, "user_id": user_ids, "amount": amounts})
    pq.write_table(table, folder / name, row_group_size=11)
    return folder / name


@pytest.mark.parametrize("form", ["arrow", "json"])
@pytest.mark.parametrize("ids", [*IDS, *BINARY])
def test_ids_of_every_type(tmp_path: Path, form: str, ids: str) -> None:
    file = parquet(tmp_path, "a.parquet", {**IDS, **BINARY}[ids])
    if form == "json" and ids in BINARY:
        with pytest.raises(ConfigError, match="'user_id' is binary, and JSON has no bytes; use --format arrow"):
            sent([file], form)
        return
    messages = sent([file], form)
    assert [received(each) for each in messages] == [expected([file], partition) for partition in range(PARTITIONS)]
    assert sum(message.rows for each in messages for message in each) == 40


@pytest.mark.parametrize("amounts", AMOUNTS)
def test_amounts_of_every_type(tmp_path: Path, amounts: str) -> None:
    file = parquet(tmp_path, "a.parquet", IDS["string"], AMOUNTS[amounts])
    wanted = [expected([file], partition) for partition in range(PARTITIONS)]
    assert [received(each) for each in sent([file], "arrow")] == wanted
    if amounts != "not finite":  # null in JSON
        assert [received(each) for each in sent([file], "json")] == wanted


@pytest.mark.parametrize("times", TIMES)
def test_times_of_every_type(tmp_path: Path, times: str) -> None:
    file = parquet(tmp_path, "a.parquet", IDS["string"], times=TIMES[times])
    wanted = [expected([file], partition) for partition in range(PARTITIONS)]
    assert [received(each) for each in sent([file], "json")] == wanted
    messages = sent([file], "arrow")
    assert [received(each) for each in messages] == wanted
    if times == "integer":  # whatever the node takes for the unit of integers
        assert [received(each, Config.of(time_unit="ns", decimals=2)) for each in messages] == wanted


TEXTS = {
    "a.csv": "user_id,amount,timestamp\na,0.125,2023-11-14T22:13:20.123456789Z\nb,1e1,1700000001\n"
    "a,much,1700000002\n007,-3,1700000003\n,1,1\n",
    "a.ndjson": '{"user_id":7,"amount":0.125,"timestamp":1700000000}\n{"user_id":8,"amount":"1","timestamp":"2023-11-14"}\n'
    '{"user_id":7,"amount":1e1}\n{"amount":1,"user_id":-1,"timestamp":17e8}\n',
}


@pytest.mark.parametrize("form", ["arrow", "json"])
@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_sent_as_they_are_written(tmp_path: Path, form: str, name: str) -> None:
    (tmp_path / name).write_text(TEXTS[name])
    messages = sent([tmp_path / name], form)
    assert [received(each) for each in messages] == [expected([tmp_path / name], partition) for partition in range(PARTITIONS)]
    assert sum(message.rows for each in messages for message in each) == TEXTS[name].count("\n") - (name == "a.csv")


def test_files_of_different_types_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text(TEXTS["a.csv"])
    files = [
        parquet(tmp_path, "a.parquet", IDS["string"]),
        tmp_path / "b.csv",
        parquet(tmp_path, "c.parquet", IDS["large"], AMOUNTS["decimal"], TIMES["zoned"]),
    ]
    for rows in (1, 3, 1000):
        messages = sent(files, "arrow", rows)
        assert [received(each) for each in messages] == [expected(files, partition) for partition in range(PARTITIONS)]


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_messages_are_full_and_their_rows_in_order(tmp_path: Path, rows: int) -> None:
    times = pa.array(range(40), pa.timestamp("ms"))
    file = parquet(tmp_path, "a.parquet", IDS["string"], times=times)
    chosen = partition_of(ids_of(IDS["string"], "user_id"), PARTITIONS)
    for partition, messages in enumerate(sent([file], "arrow", rows)):
        tables = [pa.ipc.open_stream(message.value).read_all() for message in messages]
        assert [len(table) for table in tables] == [message.rows for message in messages]
        assert all(len(table) == rows for table in tables[:-1])
        assert pa.concat_tables(tables)["timestamp"].cast(pa.int64()).to_pylist() == np.flatnonzero(chosen == partition).tolist()


def test_large_messages_become_several(tmp_path: Path) -> None:
    ids = pa.array([f"{place % 4}" * 500 for place in range(40)])
    file = parquet(tmp_path, "a.parquet", ids)
    for bytes_max in (10, 3000, 10**6):
        messages = sent([file], "arrow", 1000, bytes_max=bytes_max)
        assert all(len(message.value) <= bytes_max or message.rows == 1 for each in messages for message in each)
        assert [received(each) for each in messages] == [expected([file], partition) for partition in range(PARTITIONS)]


def test_keys_are_the_ids_as_text(tmp_path: Path) -> None:
    for name in ("with nulls", "int16", "uint64"):
        file = parquet(tmp_path, "a.parquet", IDS[name])
        keys = sorted(message.key or b"" for messages in sent([file], "json") for message in messages)
        assert keys == sorted(b"" if user is None else str(user).encode() for user in IDS[name].to_pylist())
        assert {message.key for messages in sent([file], "arrow") for message in messages} == {None}
