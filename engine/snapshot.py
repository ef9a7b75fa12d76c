"""Snapshots: an engine's state and the position of its source as a bundle of files, and back.

A snapshot is logical: the retained transactions, user after user, oldest first, in Parquet files that any tool can read, and a
manifest with everything else. It holds nothing of memory layout, so it loads into any number of shards, any capacity, and later versions.

    snapshot-00000000000000000042/
        transactions-00000.parquet     user_id | timestamp (ns, UTC) | amount_units (int64, 10**-decimals)
        ...
        manifest.json                  configuration, clock, totals, position, digest; size, rows and SHA-256 of each file, and of itself

Nothing in a snapshot is believed: a file is read up to the size that the manifest says, decoded when its hash is right, and checked; at the
end the digest of the engine must be that of the state that was saved. What the manifest says is protected by its own hash.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.columns import Columns, ids_of, ids_to_arrow
from engine.config import AMOUNT_UNITS_MAX, REASONS, TIME_NS_MAX, TIME_NS_MIN, USERS_MAX, Config
from engine.entries import Entries
from engine.errors import ConfigError, SnapshotError
from engine.storage import MANIFEST, Store, as_snapshot_error, store_of

FORMAT: Final = "riskring snapshot"
VERSION: Final = 1

#: Snapshots that stay when a new one has been written.
KEPT: Final = 3

#: A file of transactions ends when it has so many rows, or its ids so many bytes. Memory for two of them is needed.
PART_ROWS: Final = 1 << 20
PART_ID_BYTES: Final = 1 << 26

#: A part may have more: all transactions of one user are in one.
_PART_ROWS_MAX: Final = 1 << 28
_MANIFEST_BYTES_MAX: Final = 1 << 26
_FILE_BYTES_MAX: Final = 1 << 34

_NAME: Final = re.compile(r"snapshot-(\d{20})(?:-[0-9a-f]{8})?")
_PART_NAME: Final = re.compile(r"transactions-\d{5,}\.parquet")

_ID_TYPES: Final = {"int64": pa.int64(), "uint64": pa.uint64(), "string": pa.large_string(), "binary": pa.large_binary()}
_INSTANT: Final = pa.timestamp("ns", "UTC")

#: What of the configuration decides about the state; it cannot be changed on loading.
_FIXED: Final = ("window_ns", "lateness_ns", "closed", "decimals")


@dataclass(frozen=True, slots=True)
class Part:
    """One file of transactions."""

    name: str
    bytes: int
    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Rows an engine has seen: all, those rounded, and by reason those not applied (element 0: those applied)."""

    rows: int
    rounded: int
    by_reason: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class State:
    """What a snapshot says beside the transactions."""

    config: Config
    kind: str | None
    clock_ns: int | None
    totals: Totals
    position: Any


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot that was written or read.

    Attributes:
        name: Its folder.
        where: The folder of snapshots, or their URI.
        position: Where the source goes on, as it was given to `save`.
        clock: Greatest event time accepted; None before the first.
        users, transactions: What is retained.
        bytes: Size of all files.
        digest: `RiskEngine.digest` of the state.
        created: When it was written, numpy.datetime64[ns].
        version: Of the format.
        passed_over: Newer snapshots that could not be loaded, as (name, why).
    """

    name: str
    where: str
    position: Any
    clock: np.datetime64 | None
    users: int
    transactions: int
    bytes: int
    digest: str
    created: np.datetime64
    version: int = VERSION
    passed_over: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """`manifest.json`, checked."""

    state: State
    users: int
    transactions: int
    digest: str
    created_ns: int
    parts: tuple[Part, ...]


# ---- writing -----------------------------------------------------------------------------------------------------------------


def checked_position(position: Any) -> Any:
    """A position as JSON keeps it.

    Raises:
        ConfigError: JSON cannot keep it: it would come back as something else.
    """
    try:
        kept = json.loads(json.dumps(position, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"position={position!r} is not JSON ({error}); give dicts, lists, strings and numbers") from None
    if kept != position:
        raise ConfigError(f"position={position!r} would come back from JSON as {kept!r}; give that")
    return kept


def write(store: Store, state: State, chunks: Iterable[Entries], created_ns: int) -> SnapshotInfo:
    """Write a snapshot, and remove all but the newest few.

    Args:
        store: Where to.
        state: Everything but the transactions.
        chunks: The transactions, all of a user's in one.
        created_ns: The wall clock.

    Raises:
        SnapshotError: It could not be written; older snapshots are as they were.
    """
    names = _named(store)
    number = 1 + max((_number(name) for name in names), default=0)
    name = f"snapshot-{number:020}"
    writer = _Writer(store, name)
    try:
        with as_snapshot_error(f"{store.where}: {name} could not be written"):
            store.begin(name)
            for chunk in chunks:
                writer.add(chunk)
            manifest = writer.finish(state, created_ns)
    except BaseException as error:
        _abandon(store, name, error, writer)
        raise
    for old in [*names, name][:-KEPT]:
        with as_snapshot_error(f"{store.where}: {old}, which is no longer needed, could not be removed; {name} is written"):
            store.remove(old)
    return info_of(store, name, manifest, writer.size_bytes)


def _abandon(store: Store, name: str, error: BaseException, writer: _Writer) -> None:
    """Remove what was written, and say how much room a snapshot needs if there was too little."""
    try:
        if isinstance(error, SnapshotError) and isinstance(error.__cause__, OSError) and _is_full(error.__cause__):
            error.add_note(f"{writer.size_bytes:,} bytes had been written; {store.free_bytes() or 0:,} bytes were free")
    finally:
        try:
            store.abandon(name)
        except OSError as left:
            error.add_note(f"what was written of {name} could not be removed: {left}")


def _is_full(error: OSError) -> bool:
    import errno  # noqa: PLC0415 - only here

    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Writer:
    """The files of one snapshot."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._parts: list[Part] = []
        self._chunks: list[Any] = []
        self._rows = self._id_bytes = 0
        self._users = self._transactions = 0
        self._lanes = np.zeros(2, np.uint64)
        self.size_bytes = 0

    def add(self, chunk: Entries) -> None:
        count = len(chunk.time_ns)
        self._lanes += chunk.digest()
        self._users += len(chunk.counts)
        self._transactions += count
        self._chunks.append(_table(chunk))
        self._rows += count
        self._id_bytes += self._chunks[-1]["user_id"].nbytes
        if self._rows >= PART_ROWS or self._id_bytes >= PART_ID_BYTES:
            self._put()

    def _put(self) -> None:
        table = pa.concat_tables(self._chunks)
        data = _encoded(table)
        name = f"transactions-{len(self._parts):05}.parquet"
        self._store.put(self._name, name, data)
        self._parts.append(Part(name, len(data), len(table), hashlib.sha256(data).hexdigest()))
        self.size_bytes += len(data)
        self._chunks, self._rows, self._id_bytes = [], 0, 0

    def finish(self, state: State, created_ns: int) -> Manifest:
        if self._chunks:
            self._put()
        digest = state_digest(state.config, state.clock_ns, self._users, self._transactions, self._lanes)
        manifest = Manifest(state, self._users, self._transactions, digest, created_ns, tuple(self._parts))
        data = _manifest_bytes(manifest)
        self._store.publish(self._name, data)
        self.size_bytes += len(data)
        return manifest


def _table(chunk: Entries) -> Any:
    """Transactions as rows."""
    ids = ids_to_arrow(chunk.ids).cast(_ID_TYPES[chunk.ids.kind])
    if len(chunk.time_ns) > len(chunk.counts):
        ids = ids.take(pa.array(np.repeat(np.arange(len(chunk.counts)), chunk.counts)))
    return pa.table({"user_id": ids, "timestamp": pa.array(chunk.time_ns).cast(_INSTANT), "amount_units": pa.array(chunk.units)})


def _encoded(table: Any) -> Any:
    """A Parquet file in memory. Differences of times and amounts take the bits they need; nothing shrinks random integer ids."""
    numbers = pa.types.is_integer(table.schema.field("user_id").type)
    stream = pa.BufferOutputStream()
    pq.write_table(
        table,
        stream,
        row_group_size=len(table),
        compression={"user_id": "none" if numbers else "zstd", "timestamp": "none", "amount_units": "none"},
        use_dictionary=[] if numbers else ["user_id"],
        column_encoding={"timestamp": "DELTA_BINARY_PACKED", "amount_units": "DELTA_BINARY_PACKED"},
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    )
    return stream.getvalue()


def _manifest_bytes(manifest: Manifest) -> bytes:
    state = manifest.state
    config = asdict(state.config)
    del config["shards"]
    told = {
        "format": FORMAT,
        "version": VERSION,
        "created_ns": manifest.created_ns,
        "config": config,
        "kind": state.kind,
        "clock_ns": state.clock_ns,
        "rows": state.totals.rows,
        "rounded": state.totals.rounded,
        "accepted": state.totals.by_reason[0],
        "rejected": dict(zip(REASONS, state.totals.by_reason[1:], strict=True)),
        "position": state.position,
        "users": manifest.users,
        "transactions": manifest.transactions,
        "digest": manifest.digest,
        "files": [asdict(part) for part in manifest.parts],
    }
    return _sealed(told)


def _sealed(told: dict[str, Any]) -> bytes:
    """JSON in the one form that there is of it, its last member the hash of the others in that form."""
    text = json.dumps(told, ensure_ascii=True, allow_nan=False, indent=1)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**told, "sha256": sha256}, ensure_ascii=True, allow_nan=False, indent=1) + "\n").encode()


# ---- reading -----------------------------------------------------------------------------------------------------------------


def state_digest(config: Config, clock_ns: int | None, users: int, transactions: int, lanes: NDArray[np.uint64]) -> str:
    """Hash of a logical state, in hex: configuration of the window, clock, and all transactions, whose hashes were added up."""
    clock = "none" if clock_ns is None else clock_ns
    text = (
        f"riskring-1 {config.window_ns} {config.lateness_ns} {config.closed} {config.decimals} {clock} "
        f"{users} {transactions} {int(lanes[0]):016x} {int(lanes[1]):016x}"
    )
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def _number(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1])


def _named(store: Store) -> list[str]:
    """Names of the snapshots there are, oldest first."""
    with as_snapshot_error(f"{store.where}: cannot be listed"):
        return sorted((name for name in store.names() if _NAME.fullmatch(name)), key=_number)


def snapshots(uri: Any) -> tuple[Store, list[str]]:
    """The store and names of the snapshots in a folder, newest first; or of the one snapshot that `uri` is.

    Raises:
        ConfigError: `uri` names no folder.
        SnapshotError: It cannot be read.
    """
    if isinstance(uri, str | os.PathLike):
        path, _, name = os.fspath(uri).rstrip("/").rpartition("/")
        if isinstance(name, str) and _NAME.fullmatch(name):
            return store_of(path or "."), [name]
    store = store_of(uri)
    return store, _named(store)[::-1]


def read_manifest(store: Store, name: str) -> Manifest:
    """The manifest of a snapshot.

    Raises:
        SnapshotError: It is damaged, or of a version that is not known.
    """
    what = f"{store.where}/{name}/{MANIFEST}"
    with as_snapshot_error(what):
        data = store.get(name, MANIFEST, _MANIFEST_BYTES_MAX)
    try:
        told = json.loads(data)
        version = told["version"]
        if told["format"] == FORMAT and isinstance(version, int) and version > VERSION:
            raise SnapshotError(f"{what}: has version {version}, this riskring knows {VERSION}; use a newer one")
        if not _is_sealed(told, data) or told["format"] != FORMAT or version != VERSION:
            raise ValueError("it is not as it was written")
        return _checked(told)
    except SnapshotError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise SnapshotError(f"{what}: is damaged ({type(error).__name__}: {error}); load an older snapshot") from None


def _is_sealed(told: Any, data: bytes) -> bool:
    """Whether these are the very bytes that were written."""
    return bool(_sealed({name: value for name, value in told.items() if name != "sha256"}) == data)


def _checked(told: dict[str, Any]) -> Manifest:
    """The parsed manifest as records; ValueError and the like if anything is not what it must be."""
    config = told["config"]
    if set(config) != {field.name for field in fields(Config)} - {"shards"}:
        raise ValueError("the configuration has other options")
    rejected = told["rejected"]
    by_reason = (_count(told["accepted"]), *(_count(rejected[reason]) for reason in REASONS))
    if len(rejected) != len(REASONS) or sum(by_reason) != _count(told["rows"]):
        raise ValueError("rows and reasons do not add up")
    clock_ns, kind = told["clock_ns"], told["kind"]
    if clock_ns is not None and not TIME_NS_MIN <= _whole(clock_ns) <= TIME_NS_MAX:
        raise ValueError(f"clock_ns is {clock_ns}")
    if (kind is None) != (clock_ns is None) or (kind is not None and kind not in _ID_TYPES):
        raise ValueError(f"kind is {kind!r}")
    parts = tuple(Part(**part) for part in told["files"])
    for part in parts:
        if (
            not _PART_NAME.fullmatch(part.name)
            or not 0 < _whole(part.bytes) <= _FILE_BYTES_MAX
            or not 0 < _whole(part.rows) <= _PART_ROWS_MAX
        ):
            raise ValueError(f"file {part.name!r} of {part.bytes} bytes and {part.rows} rows")
    users, transactions = _count(told["users"]), _count(told["transactions"])
    if sum(part.rows for part in parts) != transactions or not min(transactions, 1) <= users <= min(transactions, USERS_MAX):
        raise ValueError("files, users and transactions do not add up")
    if len({part.name for part in parts}) != len(parts):
        raise ValueError("two files have the same name")
    created_ns = _whole(told["created_ns"])
    if not TIME_NS_MIN <= created_ns <= TIME_NS_MAX:
        raise ValueError(f"created_ns is {created_ns}")
    checked = _checked_config(config)
    if users > checked.users:
        raise ValueError(f"{users} users, where {checked.users} is the most")
    state = State(
        config=checked,
        kind=kind,
        clock_ns=clock_ns,
        totals=Totals(told["rows"], _count(told["rounded"]), by_reason),
        position=told["position"],
    )
    return Manifest(state, users, transactions, str(told["digest"]), created_ns, parts)


def _checked_config(told: dict[str, Any]) -> Config:
    config = Config(shards=1, **told)
    options = asdict(config_with(config, {"shards": 1}))  # ConfigError, a ValueError, if an engine could not have had it
    if [(value, type(value)) for value in options.values()] != [(value, type(value)) for value in asdict(config).values()]:
        raise ValueError("an option is not as an engine has it")
    return config


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _count(value: Any) -> int:
    if not 0 <= _whole(value) < 2**63:
        raise ValueError(f"{value!r} is no count")
    return int(value)


def info_of(store: Store, name: str, manifest: Manifest, size_bytes: int, passed_over: tuple[tuple[str, str], ...] = ()) -> SnapshotInfo:
    """What there is to know of a snapshot."""
    state = manifest.state
    return SnapshotInfo(
        name=name,
        where=store.where,
        position=state.position,
        clock=None if state.clock_ns is None else np.datetime64(state.clock_ns, "ns"),
        users=manifest.users,
        transactions=manifest.transactions,
        bytes=size_bytes,
        digest=manifest.digest,
        created=np.datetime64(manifest.created_ns, "ns"),
        passed_over=passed_over,
    )


def parts_of(store: Store, name: str, manifest: Manifest) -> Iterator[Columns]:
    """The transactions of a snapshot, file by file.

    Raises:
        SnapshotError: A file is missing or is not what was written.
    """
    state = manifest.state
    for part in manifest.parts:
        what = f"{store.where}/{name}/{part.name}"
        with as_snapshot_error(what):
            data = store.get(name, part.name, part.bytes)
        if len(data) != part.bytes:
            size = f"more than {part.bytes:,}" if len(data) > part.bytes else f"{len(data):,}"
            raise SnapshotError(f"{what}: has {size} bytes instead of {part.bytes:,}; load an older snapshot")
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise SnapshotError(f"{what}: its SHA-256 is not that of the manifest: it is damaged; load an older snapshot")
        assert state.clock_ns is not None, "a snapshot without a clock has no files"
        try:
            yield _columns(data, part, state)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise SnapshotError(f"{what}: is no part of a snapshot ({error}); load an older snapshot") from None


def _columns(data: bytes, part: Part, state: State) -> Columns:
    """The rows of one file, checked; ValueError if anything is not what it must be."""
    assert state.kind is not None
    assert state.clock_ns is not None
    id_type = _ID_TYPES[state.kind]
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        said = file.metadata.num_rows
        table = file.read(use_threads=False) if said == part.rows else None
    if table is None or len(table) != part.rows:  # it may also say what it does not hold
        raise ValueError(f"it has {said if table is None else len(table)} rows instead of {part.rows}")
    table.validate(full=True)
    if table.column_names != ["user_id", "timestamp", "amount_units"] or any(column.null_count for column in table.columns):
        raise ValueError("its columns are others")
    table = table.cast(pa.schema({"user_id": id_type, "timestamp": _INSTANT, "amount_units": pa.int64()})).combine_chunks()
    ids = ids_of(table["user_id"].chunk(0), "user_id")
    time_ns = table["timestamp"].cast(pa.int64()).to_numpy().copy()
    units = table["amount_units"].to_numpy().copy()
    floor_ns = max(state.clock_ns - state.config.retention_ns, TIME_NS_MIN)
    if time_ns.min() < floor_ns or time_ns.max() > state.clock_ns:
        raise ValueError("a time is not within the retention")
    if units.min() < -AMOUNT_UNITS_MAX or units.max() > AMOUNT_UNITS_MAX:
        raise ValueError("an amount is out of range")
    nothing = np.zeros(len(units), np.uint8)
    return Columns(None, ids, time_ns, units, nothing, nothing.copy())


def config_with(config: Config, overrides: dict[str, Any]) -> Config:
    """The configuration of an engine that is loaded, with the options that were given in place of the saved ones.

    Raises:
        ConfigError: An option cannot be used, or contradicts the state.
    """
    names = {field.name for field in fields(Config)}
    options = {
        "window": _duration(config.window_ns),
        "lateness": _duration(config.lateness_ns),
        "max_ahead": None if config.max_ahead_ns is None else _duration(config.max_ahead_ns),
        "max_jump": None if config.max_jump_ns is None else _duration(config.max_jump_ns),
        **{name: getattr(config, name) for name in names if not name.endswith("_ns") and name != "shards"},
    }
    unknown = set(overrides) - set(options) - {"shards"}
    if unknown:
        raise ConfigError(f"{', '.join(sorted(unknown))}: no such option; there are {', '.join(sorted([*options, 'shards']))}")
    wanted = Config.of(**{**options, **overrides})
    for name in _FIXED:
        if getattr(wanted, name) != getattr(config, name):
            option = name.removesuffix("_ns")
            raise ConfigError(
                f"{option}={overrides[option]!r} contradicts the snapshot, whose state was kept for {name}={getattr(config, name)!r}; "
                "leave it out, or replay the rows into a new engine"
            )
    return wanted


def _duration(nanoseconds: int) -> str:
    return f"{nanoseconds}ns"


def created_text(info: SnapshotInfo) -> str:
    """When a snapshot was written, to the second."""
    seconds = int(info.created.astype("int64")) // 10**9
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")
