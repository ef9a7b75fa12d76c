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

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.columns import Columns, ids_of, ids_to_arrow
from engine.config import AMOUNT_UNITS_MAX, REASONS, TIME_NS_MAX, TIME_NS_MIN, Config
from engine.entries import Entries
from engine.errors import ConfigError, SnapshotError
from engine.instants import instant_text
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

#: What a position may be: a manifest stays far from the limits of its own, and of whoever reads JSON.
_POSITION_BYTES_MAX: Final = 1 << 24
_POSITION_DEPTH_MAX: Final = 100

#: Characters of a position in an error text.
_SHOWN_MAX: Final = 200

_NAME: Final = re.compile(r"snapshot-(\d{20})(?:-[0-9a-f]{8})?")
_PART_NAME: Final = re.compile(r"transactions-\d{5,}\.parquet")

_ID_TYPES: Final = {"int64": pa.int64(), "uint64": pa.uint64(), "string": pa.large_string(), "binary": pa.large_binary()}
_STORED_ID_TYPES: Final = {**_ID_TYPES, "string": pa.string(), "binary": pa.binary()}  # as Parquet has them
_INSTANT: Final = pa.timestamp("ns", "UTC")

#: Errors that say that there is no room.
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

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
        kind: Of the user ids: "int64", "uint64", "string" or "binary"; None before the first.
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
    kind: str | None
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
    too_deep = ConfigError(f"position is nested more than {_POSITION_DEPTH_MAX} deep; give a flatter one")
    try:
        text = json.dumps(position, allow_nan=False)
        kept = json.loads(text)
    except RecursionError:
        raise too_deep from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"position={_shown(position)} is not JSON ({error}); give dicts, lists, strings and numbers") from None
    if len(text) > _POSITION_BYTES_MAX:
        raise ConfigError(f"position takes {len(text):,} bytes as JSON, {_POSITION_BYTES_MAX:,} is the most; keep it elsewhere")
    if _depth(kept) > _POSITION_DEPTH_MAX:
        raise too_deep
    if kept != position:
        raise ConfigError(f"position={_shown(position)} would come back from JSON as {_shown(kept)}; give that")
    return kept


def _shown(position: Any) -> str:
    """A position for an error text; some are long, and some integers too long to be written."""
    try:
        text = repr(position)
    except ValueError:
        text = f"<{type(position).__name__}>"
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."


def _depth(value: Any) -> int:
    """How many lists and dicts lie in each other."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
    return depth


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
    number = 1 + max((_number(name) for name in _matching(store.taken, store)), default=0)
    name = f"snapshot-{number:020}"
    writer, chunks = _Writer(store, name), iter(chunks)
    try:
        with as_snapshot_error(f"{store.where}: {name} could not be written"):
            store.begin(name)
            for chunk in chunks:
                writer.add(chunk)
            manifest = writer.finish(state, created_ns)
    except BaseException as error:
        _abandon(store, name, error)
        if isinstance(error, SnapshotError) and isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL:
            room = f"it needs {writer.needed_bytes(chunks, state, created_ns):,} bytes, and {_free_text(store)} free"
            raise SnapshotError(f"{error}; {room}; make room, or save elsewhere") from error.__cause__
        raise
    for old in [*names, name][:-KEPT]:
        with as_snapshot_error(f"{store.where}: {old}, which is no longer needed, could not be removed; {name} is written"):
            store.remove(old)
    return info_of(store, name, manifest)


def _abandon(store: Store, name: str, error: BaseException) -> None:
    """Remove what was written, as far as that can be done."""
    try:
        store.abandon(name)
    except OSError as left:
        error.add_note(f"what was written of {name} could not be removed: {left}")


def _free_text(store: Store) -> str:
    try:
        free = store.free_bytes()
    except OSError:
        free = None
    return "an unknown number is" if free is None else f"{free:,} are"


class _Nowhere:
    """Takes files whose sizes alone are wanted."""

    def put(self, name: str, file: str, data: Any) -> None:
        pass

    def publish(self, name: str, manifest: bytes) -> None:
        pass


class _Writer:
    """The files of one snapshot."""

    def __init__(self, store: Store, name: str) -> None:
        self._store: Store | _Nowhere = store
        self._name = name
        self._parts: list[Part] = []
        self._chunks: list[Any] = []
        self._rows = self._id_bytes = 0
        self._users = self._transactions = 0
        self._lanes = np.zeros(2, np.uint64)

    def add(self, chunk: Entries) -> None:
        count = len(chunk.time_ns)
        if count == 0:
            return
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
        self._chunks, self._rows, self._id_bytes = [], 0, 0

    def finish(self, state: State, created_ns: int) -> Manifest:
        if self._chunks:
            self._put()
        digest = state_digest(state.config, state.clock_ns, self._users, self._transactions, self._lanes)
        manifest = Manifest(state, self._users, self._transactions, digest, created_ns, tuple(self._parts))
        self._store.publish(self._name, _manifest_bytes(manifest))
        return manifest

    def needed_bytes(self, rest: Iterable[Entries], state: State, created_ns: int) -> int:
        """Size of the whole snapshot, when it could not be written: what has not been yet is encoded for nothing but its size."""
        self._store = _Nowhere()
        if self._chunks:
            self._put()  # the file that did not fit
        for chunk in rest:
            self.add(chunk)
        return _size_bytes(self.finish(state, created_ns))


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
    return sorted(_matching(store.names, store), key=_number)


def _matching(listed: Callable[[], list[str]], store: Store) -> list[str]:
    with as_snapshot_error(f"{store.where}: cannot be listed"):
        return [name for name in listed() if _NAME.fullmatch(name)]


def snapshots(uri: Any) -> tuple[Store, list[str]]:
    """The store and names of the snapshots in a folder, newest first; or of the one snapshot that `uri` is.

    Raises:
        ConfigError: `uri` names no folder.
        SnapshotError: It cannot be read.
    """
    if isinstance(uri, str | os.PathLike):
        whole = os.fspath(uri)
        path, _, name = whole.rstrip("/").rpartition("/")
        if isinstance(name, str) and _NAME.fullmatch(name):
            return store_of(path or ("/" if whole.startswith("/") else ".")), [name]
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
        if not _is_sealed(told, data) or told["format"] != FORMAT or _whole(version) != VERSION:
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
    config = _checked_config(told["config"])
    rejected = told["rejected"]
    by_reason = (_count(told["accepted"]), *(_count(rejected[reason]) for reason in REASONS))
    if len(rejected) != len(REASONS) or sum(by_reason) != _count(told["rows"]) or _count(told["rounded"]) > by_reason[0]:
        raise ValueError("rows and reasons do not add up")
    clock_ns, kind = told["clock_ns"], told["kind"]
    if clock_ns is not None and not TIME_NS_MIN <= _whole(clock_ns) <= TIME_NS_MAX:
        raise ValueError(f"clock_ns is {clock_ns}")
    if (kind is None) != (clock_ns is None) or (kind is not None and kind not in _ID_TYPES):
        raise ValueError(f"kind is {kind!r}")
    parts = tuple(Part(**part) for part in told["files"])
    for part in parts:
        in_range = 0 < _whole(part.bytes) <= _FILE_BYTES_MAX and 0 < _whole(part.rows) <= _PART_ROWS_MAX
        if not _PART_NAME.fullmatch(part.name) or not in_range:
            raise ValueError(f"file {part.name!r} of {part.bytes} bytes and {part.rows} rows")
    users, transactions = _count(told["users"]), _count(told["transactions"])
    if sum(part.rows for part in parts) != transactions or not min(transactions, 1) <= users <= min(transactions, config.users):
        raise ValueError("files, users and transactions do not add up")
    if len({part.name for part in parts}) != len(parts):
        raise ValueError("two files have the same name")
    if clock_ns is None and parts:
        raise ValueError("there are transactions, but no clock")
    created_ns = _whole(told["created_ns"])
    if not TIME_NS_MIN <= created_ns <= TIME_NS_MAX:
        raise ValueError(f"created_ns is {created_ns}")
    state = State(
        config=config,
        kind=kind,
        clock_ns=clock_ns,
        totals=Totals(told["rows"], told["rounded"], by_reason),
        position=told["position"],
    )
    return Manifest(state, users, transactions, str(told["digest"]), created_ns, parts)


def _checked_config(told: dict[str, Any]) -> Config:
    """The configuration, if it is one that `Config.of` could have made."""
    if set(told) != {field.name for field in fields(Config)} - {"shards"}:
        raise ValueError("the configuration has other options")
    config = config_with(Config(shards=1, **told), {"shards": 1})
    if any(repr(getattr(config, name)) != repr(value) for name, value in told.items()):
        raise ValueError("the configuration is not as options are kept")
    return config


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _count(value: Any) -> int:
    if not 0 <= _whole(value) < 2**63:
        raise ValueError(f"{value!r} is no count")
    return int(value)


def _size_bytes(manifest: Manifest) -> int:
    """Size of all files of a snapshot."""
    return len(_manifest_bytes(manifest)) + sum(part.bytes for part in manifest.parts)


def info_of(store: Store, name: str, manifest: Manifest, passed_over: tuple[tuple[str, str], ...] = ()) -> SnapshotInfo:
    """What there is to know of a snapshot."""
    state = manifest.state
    return SnapshotInfo(
        name=name,
        where=store.where,
        position=state.position,
        clock=None if state.clock_ns is None else np.datetime64(state.clock_ns, "ns"),
        users=manifest.users,
        transactions=manifest.transactions,
        bytes=_size_bytes(manifest),
        digest=manifest.digest,
        kind=state.kind,
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
    schema = pa.schema({"user_id": id_type, "timestamp": _INSTANT, "amount_units": pa.int64()})
    stored = schema.set(0, pa.field("user_id", _STORED_ID_TYPES[state.kind]))
    if table.schema.remove_metadata() not in (schema, stored) or any(column.null_count for column in table.columns):
        raise ValueError("its columns are others")
    table = table.cast(schema).combine_chunks()
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


def described(store: Store, name: str) -> dict[str, Any]:
    """What a manifest says, as plain values for people: times as text."""
    manifest = read_manifest(store, name)
    state = manifest.state
    config = asdict(state.config)
    del config["shards"]
    return {
        "created": instant_text(manifest.created_ns),
        "clock": None if state.clock_ns is None else instant_text(state.clock_ns),
        "users": manifest.users,
        "transactions": manifest.transactions,
        "rows": state.totals.rows,
        "files": len(manifest.parts),
        "bytes": sum(part.bytes for part in manifest.parts),
        "digest": manifest.digest,
        "ids": state.kind,
        "position": state.position,
        "config": config,
    }
