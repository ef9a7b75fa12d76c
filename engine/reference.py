"""The definition of the engine in plain Python: the judge of everything fast, and the semantics to be read.

Whole numbers, lists and dicts only: nothing here is vectorised, nothing is approximated, and every rule of the
contract (S1-S15) stands where it is carried out. Times are nanoseconds since the epoch, amounts are whole
units of 10**-decimals. A score is one division of two whole numbers, which Python rounds correctly at any size.

It is not fast: 3 to 6 microseconds a row for users with a few transactions, and a time that grows with the number
of retained transactions for busy ones. `verify` runs it beside the engine on a user's own data.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from fractions import Fraction
from hashlib import blake2b
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import pyarrow as pa

from engine.config import AMOUNT_UNITS_MAX, REASONS, SUM_UNITS_MAX, TIME_NS_MAX, TIME_NS_MIN, TIME_UNIT_NS, Config
from engine.errors import CapacityError, TimeTooOldError

if TYPE_CHECKING:
    from engine.engine import RiskEngine
    from engine.results import IngestResult

User: TypeAlias = int | str | bytes
Amount: TypeAlias = int | float | Decimal
Entry: TypeAlias = tuple[int, int]  # (time_ns, units)

#: This many amounts of at most 2**53 units cannot sum to more than 2**62: below it no sum needs to be looked at.
_SUM_ROWS_SAFE: Final = SUM_UNITS_MAX // AMOUNT_UNITS_MAX
#: First half of the digest's hash keys: "riskring" in ASCII.
_DIGEST_KEY: Final = 0x7269736B72696E67
_WORD: Final = 2**64 - 1


class Row(NamedTuple):
    """What became of one row: the reason why it was not applied (S12), or its row score (S9)."""

    reason: str | None
    score: float | None


@dataclass(frozen=True, slots=True)
class Features:
    """A user at an instant; the columns of `RiskEngine.features`, in whole numbers.

    Attributes:
        count, sum_units: Transactions in the window, and their sum.
        score: Their mean, 0.0 when there are none.
        newest_ns: Time of the newest of them; None: there are none.
        valid_until_ns: Last instant through which the window holds the same transactions; None: nothing will ever change.
        zero_at_ns: First instant after this one at which the window is empty; None: it is empty already.
    """

    count: int
    sum_units: int
    score: float
    newest_ns: int | None
    valid_until_ns: int | None
    zero_at_ns: int | None


class Reference:
    """What `RiskEngine` must answer, row by row.

    Args:
        config: The same configuration as the engine's. `shards` means nothing here, and lookups without an instant use the
            event clock: who wants the wall clock passes it as `at_ns`.

    Attributes:
        clock_ns: Greatest event time accepted so far, None before the first (S6).
        accepted: Rows applied.
        rejected: Rows not applied, for each of REASONS (S12).
        rounded: Rows applied whose amount was changed by rounding to the grid (S3).

    Example:
        >>> reference = Reference(Config.of("60s"))
        >>> reference.ingest([("alice", 10, 0), ("alice", 15, 60 * 10**9)])
        [Row(reason=None, score=10.0), Row(reason=None, score=12.5)]
        >>> reference.score("alice"), reference.score("alice", 60 * 10**9 + 1), reference.score("bob")
        (12.5, 15.0, 0.0)
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.clock_ns: int | None = None
        self.accepted = 0
        self.rejected = dict.fromkeys(REASONS, 0)
        self.rounded = 0
        # Each user's transactions in event-time order, equal times in arrival order. What is no longer retained is
        # dropped when its user is touched; until then it is still here, and every reading method leaves it out.
        self._entries: dict[User, list[Entry]] = {}
        self._reported: dict[User, float] = {}  # by `changes`
        # What the users touched by the running batch had before it, should it have to be undone; None: not held.
        self._before: dict[User, list[Entry] | None] = {}

    # ---------------------------------------------------------------------------------------------- rows in

    def ingest(
        self,
        rows: Sequence[tuple[User | None, Amount | None, int | None]],
        *,
        wall_ns: int | None = None,
        single: bool = False,
        half: bool = False,
    ) -> list[Row]:
        """Apply rows in their order, all or (on an error) none of them (S13).

        Args:
            rows: (user, amount, time_ns); None is a null.
            wall_ns: The wall clock, for `max_ahead` (S8); None: there is none, and no row is in the future.
            single, half: Float amounts are float32 or float16 values (it decides only what counts as rounded).

        Raises:
            CapacityError: More than `config.users` users would have a retained transaction; the state is unchanged.
        """
        before = self.clock_ns, self.accepted, dict(self.rejected), self.rounded
        self._before = {}
        try:
            return [self._ingest_row(user, amount, time_ns, wall_ns, single, half) for user, amount, time_ns in rows]
        except CapacityError:
            self.clock_ns, self.accepted, self.rejected, self.rounded = before
            for user, entries in self._before.items():
                if entries is None:
                    self._entries.pop(user, None)
                else:
                    self._entries[user] = entries
            raise

    def _ingest_row(
        self, user: User | None, amount: Amount | None, time_ns: int | None, wall_ns: int | None, single: bool, half: bool
    ) -> Row:
        config, clock_ns = self.config, self.clock_ns

        # S12: the first reason that applies is the one that is given, in the order of REASONS.
        if user is None:
            return self._reject("null_user")
        if amount is None:
            return self._reject("null_amount")
        if time_ns is None:
            return self._reject("null_timestamp")
        if not (amount.is_finite() if isinstance(amount, Decimal) else -inf < amount < inf):
            return self._reject("amount_not_finite")
        units, rounded = to_units(amount, config.decimals, single=single, half=half)
        if not -AMOUNT_UNITS_MAX <= units <= AMOUNT_UNITS_MAX:  # S3
            return self._reject("amount_out_of_range")
        if not TIME_NS_MIN <= time_ns <= TIME_NS_MAX:  # S2
            return self._reject("timestamp_out_of_range")
        if config.max_ahead_ns is not None and wall_ns is not None and time_ns > wall_ns + config.max_ahead_ns:  # S8
            return self._reject("future")
        if clock_ns is not None:
            if config.max_jump_ns is not None and time_ns > clock_ns + config.max_jump_ns:  # S8
                return self._reject("jump")
            if time_ns < clock_ns - config.lateness_ns:  # S7: measured against the clock just before this row
                return self._reject("late")

        # S6: from here on the time is good, so the clock moves, whatever becomes of the amount.
        if clock_ns is None or time_ns > clock_ns:
            self.clock_ns = clock_ns = time_ns

        entries = self._entries_for_writing(user, clock_ns - config.retention_ns)
        if len(entries) >= _SUM_ROWS_SAFE and abs(sum(units for _, units in entries) + units) > SUM_UNITS_MAX:  # S3
            return self._reject("sum_overflow")

        # After all entries of the same time: equal times stay in arrival order.
        end = bisect_left(entries, (time_ns + 1,))
        entries.insert(end, (time_ns, units))
        self.accepted += 1
        self.rounded += rounded

        # S9: the score at the row's own time, over what was applied so far, itself included. Rows of the same time that
        # arrive after it are not applied yet; rows of a later time that arrived before it lie behind `end`.
        start = bisect_left(entries, (time_ns - config.reach_ns,))  # S4
        return Row(None, _score([units for _, units in entries[start : end + 1]], config.decimals))

    def _reject(self, reason: str) -> Row:
        self.rejected[reason] += 1
        return Row(reason, None)

    def _entries_for_writing(self, user: User, horizon_ns: int) -> list[Entry]:
        """The user's retained entries, as the list to insert into; a new user's is empty.

        Raises:
            CapacityError: The user would be one too many.
        """
        entries = self._entries.get(user)
        if user not in self._before:
            self._before[user] = None if entries is None else entries.copy()
        if entries is not None and entries[-1][0] < horizon_ns:  # S15: nothing retained, so this user holds no place
            del self._entries[user]
            entries = None
        if entries is None:
            self._make_place(horizon_ns)
            entries = self._entries[user] = []
        elif entries[0][0] < horizon_ns:
            del entries[: bisect_left(entries, (horizon_ns,))]
        return entries

    def _make_place(self, horizon_ns: int) -> None:
        """See to it that one more user may be held. Only users with a retained transaction count (S15)."""
        if len(self._entries) < self.config.users:
            return
        for user in [user for user, entries in self._entries.items() if entries[-1][0] < horizon_ns]:
            entries = self._entries.pop(user)
            self._before.setdefault(user, entries)
        if len(self._entries) >= self.config.users:
            raise CapacityError(
                f"a row would make more than users={self.config.users:,} users have a retained transaction; "
                "nothing of its batch was applied; give the engine more users"
            )

    # --------------------------------------------------------------------------------------------- lookups

    def score(self, user: User, at_ns: int | None = None) -> float:
        """The user's score at an instant, by default the clock (S5, S10).

        Raises:
            TimeTooOldError: `at_ns` is more than `lateness` behind the clock.
        """
        return self.features(user, at_ns).score

    def features(self, user: User, at_ns: int | None = None) -> Features:
        """Everything about the user at an instant, by default the clock (S10). An unknown user has nothing (S14).

        Raises:
            TimeTooOldError: `at_ns` is more than `lateness` behind the clock.
        """
        clock_ns, reach_ns = self.clock_ns, self.config.reach_ns
        if clock_ns is None:
            return Features(0, 0, 0.0, None, None, None)
        if at_ns is None:
            at_ns = clock_ns
        if at_ns < clock_ns - self.config.lateness_ns:
            raise TimeTooOldError(
                f"at={at_ns} ns is {clock_ns - at_ns} ns behind the clock, and scores are exact for {self.config.lateness_ns} ns only; "
                "ask for a later instant, or give the engine more lateness"
            )
        entries = self.retained(user)
        counted = [(time_ns, units) for time_ns, units in entries if at_ns - reach_ns <= time_ns <= at_ns]  # S4
        later = [time_ns for time_ns, _ in entries if time_ns > at_ns]  # not yet there at `at`, when that lies behind the clock

        # The window holds the same transactions until its oldest one leaves or the next one enters.
        changes = [later[0] - 1] if later else []
        if counted:
            changes.append(counted[0][0] + reach_ns)
        valid_until_ns = min(*changes, TIME_NS_MAX) if changes else None

        # It is empty right after its newest one left, unless another one has entered by then.
        newest_ns = zero_at_ns = None
        if counted:
            newest_ns = counted[-1][0]
            empty_ns = newest_ns + reach_ns + 1
            for time_ns in later:
                if time_ns <= empty_ns:
                    empty_ns = time_ns + reach_ns + 1
            zero_at_ns = min(empty_ns, TIME_NS_MAX)

        units_counted = [units for _, units in counted]
        score = _score(units_counted, self.config.decimals)
        return Features(len(counted), sum(units_counted), score, newest_ns, valid_until_ns, zero_at_ns)

    def changes(self, at_ns: int | None = None) -> dict[User, float]:
        """Users whose score at an instant, by default the clock, is another than this told last, 0.0 if it never did; with that score."""
        users = {*self._entries, *self._reported}
        scores = {user: self.score(user, at_ns) for user in sorted(users, key=_order)}
        changed = {user: score for user, score in scores.items() if score != self._reported.get(user, 0.0)}
        self._reported |= changed
        return changed

    def retained(self, user: User) -> list[Entry]:
        """The user's (time_ns, units) that an exact lookup can need, in event-time order, ties in arrival order (S15)."""
        entries = self._entries.get(user)
        if entries is None or self.clock_ns is None:
            return []
        return entries[bisect_left(entries, (self.clock_ns - self.config.retention_ns,)) :]

    def users(self) -> list[User]:
        """The users with a retained transaction, ascending: integers by value, strings and bytes by their bytes."""
        return sorted((user for user in self._entries if self.retained(user)), key=_order)

    # ---------------------------------------------------------------------------------------------- digest

    def digest(self) -> str:
        """32 hexadecimal digits that are equal exactly when the logical states are (S11), but for a chance of 2**-128.

        It covers configuration of time and money, the clock and each retained transaction with its place among its user's.
        It does not depend on the order of users, on totals or on `users` and `shards`.
        """
        config, lanes, users, transactions = self.config, [0, 0], 0, 0
        for user in self._entries:
            entries = self.retained(user)
            users += bool(entries)
            transactions += len(entries)
            for lane in (0, 1):
                # Integers and byte strings get keys of their own: 0x3736353433323130 is not "01234567".
                is_integer = isinstance(user, int)
                user_hash = siphash(_message(user), _DIGEST_KEY, lane + 2 if is_integer else lane)
                for position, (time_ns, units) in enumerate(entries):
                    entry = siphash(struct.pack("<qqq", position, time_ns, units), user_hash, lane)
                    lanes[lane] = (lanes[lane] + entry) & _WORD
        clock = "none" if self.clock_ns is None else self.clock_ns
        text = (
            f"riskring-1 {config.window_ns} {config.lateness_ns} {config.closed} {config.decimals} {clock} "
            f"{users} {transactions} {lanes[0]:016x} {lanes[1]:016x}"
        )
        return blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def _score(units: list[int], decimals: int) -> float:
    """Mean of amounts given in units (S5). Python divides whole numbers of any size correctly rounded; 0 / n is 0.0, never -0.0."""
    return sum(units) / (len(units) * 10**decimals) if units else 0.0


def to_units(amount: Amount, decimals: int, *, single: bool = False, half: bool = False) -> tuple[int, bool]:
    """Put a finite amount on the grid of 10**-decimals: (units, whether rounding changed it) (S3).

    The exact value is rounded half-even. A float stands for the decimal number people wrote, so it is unchanged when it is the float
    (float32 for `single`, float16 for `half`) nearest to its grid value; any other number when it is exactly its grid value.

    Example:
        >>> to_units(0.1, 4), to_units(0.12345, 4), to_units(Decimal("0.00005"), 4), to_units(Decimal("0.00015"), 4)
        ((1000, False), (1235, True), (0, True), (2, True))
    """
    scale = 10**decimals
    numerator, denominator = amount.as_integer_ratio()  # exact for int, float and Decimal alike
    units, rest = divmod(numerator * scale, denominator)
    if 2 * rest > denominator or (2 * rest == denominator and units % 2 == 1):
        units += 1
    if rest == 0:
        return units, False
    if isinstance(amount, float):
        narrow = nearest_float16 if half else nearest_float32
        nearest = narrow(Fraction(units, scale)) if single or half else units / scale
        return units, nearest != amount
    return units, True


def nearest_float32(value: Fraction) -> float:
    """The float32 nearest to a fraction, ties to the even one, for magnitudes float32 can hold.

    Rounding to float64 first and to float32 then would round twice.

    Example:
        >>> nearest_float32(Fraction(1, 10)) == struct.unpack("f", struct.pack("f", 0.1))[0]
        True
    """
    return _nearest(value, Fraction(1, 2**149), 24)


def nearest_float16(value: Fraction) -> float:
    """As `nearest_float32`, for float16.

    Example:
        >>> nearest_float16(Fraction(1, 10)) == struct.unpack("e", struct.pack("e", 0.1))[0]
        True
    """
    return _nearest(value, Fraction(1, 2**24), 11)


def _nearest(value: Fraction, least: Fraction, bits: int) -> float:
    step = least  # so many bits of significand are in units of a larger step where they are not enough
    while abs(value) >= 2**bits * step:
        step *= 2
    return float(round(value / step) * step)


def siphash(message: bytes, key0: int, key1: int, *, compressions: int = 1, finalizations: int = 3) -> int:
    """SipHash-c-d of Aumasson and Bernstein (INDOCRYPT 2012, section 2), by default SipHash-1-3: 64 bits.

    Args:
        message: Any bytes.
        key0, key1: The halves of the key, each below 2**64.
        compressions, finalizations: Rounds after each word, and at the end.
    """
    v = (key0 ^ 0x736F6D6570736575, key1 ^ 0x646F72616E646F6D, key0 ^ 0x6C7967656E657261, key1 ^ 0x7465646279746573)
    padded = message + bytes(7 - len(message) % 8) + bytes([len(message) % 256])
    for (word,) in struct.iter_unpack("<Q", padded):
        v = (v[0], v[1], v[2], v[3] ^ word)
        for _ in range(compressions):
            v = _sip_round(*v)
        v = (v[0] ^ word, v[1], v[2], v[3])
    v = (v[0], v[1], v[2] ^ 0xFF, v[3])
    for _ in range(finalizations):
        v = _sip_round(*v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def _sip_round(v0: int, v1: int, v2: int, v3: int) -> tuple[int, int, int, int]:
    v0 = (v0 + v1) & _WORD
    v1 = ((v1 << 13 | v1 >> 51) & _WORD) ^ v0
    v0 = (v0 << 32 | v0 >> 32) & _WORD
    v2 = (v2 + v3) & _WORD
    v3 = ((v3 << 16 | v3 >> 48) & _WORD) ^ v2
    v0 = (v0 + v3) & _WORD
    v3 = ((v3 << 21 | v3 >> 43) & _WORD) ^ v0
    v2 = (v2 + v1) & _WORD
    v1 = ((v1 << 17 | v1 >> 47) & _WORD) ^ v2
    v2 = (v2 << 32 | v2 >> 32) & _WORD
    return v0, v1, v2, v3


def _message(user: User) -> bytes:
    """The bytes of an id that are hashed."""
    if isinstance(user, int):
        return struct.pack("<Q", user & _WORD)
    return user.encode() if isinstance(user, str) else user


def _order(user: User) -> int | bytes:
    return user.encode() if isinstance(user, str) else user


# -------------------------------------------------------------------------------- the engine against the definition


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        rows: Rows compared.
        users: Users with a retained transaction at the end, whose features were compared.
        equal: Whether everything was equal.
        difference: The first thing that was not: where, what was found, what was wanted; None when equal.
    """

    rows: int
    users: int
    equal: bool
    difference: str | None


def verify(data: Any, config: Config, *, wall_ns: int | None = None, progress: Callable[[int], object] | None = None) -> Verification:
    """Run the engine and the definition side by side over a user's own data, and compare them with `==`.

    Compared are the reason and the row score of each row, the totals after each batch, and at the end the digest and the
    features of all users at the clock. It stops at the first difference.

    Args:
        data: Whatever `RiskEngine.ingest` takes.
        config: How both are configured.
        wall_ns: The wall clock during the run, for `max_ahead`; None: no row is in the future.
        progress: Called with the number of rows compared so far, after each batch.

    Raises:
        SchemaError: The data cannot be read.
        CapacityError: Both find that there are more users than `config.users`.

    Cost:
        About 15 microseconds a row for users with few retained transactions, and about 500 bytes per user.

    Example:
        >>> verify({"user_id": ["a", "a"], "amount": [1.5, 2.0], "timestamp": [0, 60]}, Config.of(time_unit="s"))
        Verification(rows=2, users=1, equal=True, difference=None)
    """
    from engine.sources import read  # noqa: PLC0415 - the definition itself must stand without what it judges

    if wall_ns is None:
        config = replace(config, max_ahead_ns=None)
    judge, rows = Reference(config), 0
    with _engine(config, wall_ns) as engine:
        for batch_index, batches in enumerate(read(data, config)):
            table = pa.Table.from_batches(batches)
            result: IngestResult | CapacityError
            wanted: list[Row] | CapacityError
            try:
                result = engine.ingest(table, scores=True)
            except CapacityError as error:
                result = error
            # The batches of a unit are applied all or none: here they are one batch.
            its_rows = [row for batch in batches for row in plain_rows(batch, config)]
            kind = table.schema.field(config.amount).type
            try:
                wanted = judge.ingest(its_rows, wall_ns=wall_ns, single=pa.types.is_float32(kind), half=pa.types.is_float16(kind))
            except CapacityError as error:
                wanted = error
            if isinstance(result, CapacityError) and isinstance(wanted, CapacityError):
                raise result
            rows += table.num_rows
            difference = _compare_rows(result, wanted, its_rows, engine, judge)
            if difference is not None:
                return Verification(rows, len(judge.users()), False, f"batch {batch_index}, {difference}")
            if progress is not None:
                progress(rows)
        difference = _compare_states(engine, judge)
    return Verification(rows, len(judge.users()), difference is None, difference)


def _engine(config: Config, wall_ns: int | None) -> RiskEngine:
    """An engine of this configuration, whose wall clock stands still."""
    from engine.engine import RiskEngine  # noqa: PLC0415 - as in `verify`

    def duration(nanoseconds: int | None) -> str | None:
        return None if nanoseconds is None else f"{nanoseconds}ns"

    return RiskEngine(
        duration(config.window_ns),
        lateness=duration(config.lateness_ns),
        closed=config.closed,
        decimals=config.decimals,
        users=config.users,
        shards=config.shards,
        max_ahead=duration(config.max_ahead_ns),
        max_jump=duration(config.max_jump_ns),
        time_unit=config.time_unit,
        user_id=config.user_id,
        amount=config.amount,
        timestamp=config.timestamp,
        now=lambda: wall_ns or 0,  # not asked without max_ahead, which needs a wall clock here
    )


def _compare_rows(
    result: IngestResult | CapacityError, wanted: list[Row] | CapacityError, rows: Sequence[Any], engine: RiskEngine, judge: Reference
) -> str | None:
    if isinstance(result, CapacityError) or isinstance(wanted, CapacityError):
        return f"found {_outcome(result)}, wanted {_outcome(wanted)}"
    reasons = iter(result.rejects().column("reason").to_pylist())
    for index, (score, want) in enumerate(zip(result.scores.to_pylist(), wanted, strict=True)):
        # A row without a score is a row not applied; they stand in the table of rejects in their order.
        found = Row(None, score) if score is not None else Row(next(reasons, "missing in the rejects"), None)
        if found != want:
            return f"row {index} {rows[index]!r}: found {_outcome(found)}, wanted {_outcome(want)}"
    stats = engine.stats()
    for name, found_total, wanted_total in (
        ("accepted", stats.accepted, judge.accepted),
        ("rejected", {**dict.fromkeys(REASONS, 0), **stats.rejected}, judge.rejected),
        ("rounded", stats.rounded, judge.rounded),
    ):
        if found_total != wanted_total:
            return f"total of rows {name}: found {found_total!r}, wanted {wanted_total!r}"
    return None


def _outcome(outcome: Any) -> str:
    if isinstance(outcome, Row):
        return f"score {outcome.score!r}" if outcome.reason is None else f"reason {outcome.reason}"
    return "CapacityError" if isinstance(outcome, CapacityError) else "no error"


def _compare_states(engine: RiskEngine, judge: Reference) -> str | None:
    users = judge.users()
    found_rows = plain_features(engine.features(), judge.config.decimals)
    for found, user in zip(found_rows, users, strict=False):
        wanted = (user, judge.features(user))
        if found != wanted:
            return f"features at the clock: found {found!r}, wanted {wanted!r}"
    if len(found_rows) != len(users):
        return f"users with a retained transaction: found {len(found_rows)}, wanted {len(users)}"
    if engine.digest() != judge.digest():
        return f"digest: found {engine.digest()}, wanted {judge.digest()}"
    return None


def plain_features(table: Any, decimals: int) -> list[tuple[User, Features]]:
    """A table of `RiskEngine.features` as whole numbers."""
    times = [table.column(name).cast(pa.int64()).to_pylist() for name in ("newest", "valid_until", "zero_at")]
    sums = [int(Fraction(value) * 10**decimals) for value in table.column("sum").to_pylist()]
    counts, scores = table.column("count").to_pylist(), table.column("score").to_pylist()
    features = map(Features, counts, sums, scores, *times)
    return list(zip(table.column("user_id").to_pylist(), features, strict=True))


def _amounts(column: Any) -> list[Any]:
    """Plain values. Arrow has decimals of scales of which it makes no text, from which Python's are made."""
    if not pa.types.is_decimal(column.type) or abs(column.type.scale) <= 38:
        return list(column.to_pylist())
    width = column.type.bit_width // 8
    data = column.buffers()[1].to_pybytes()[column.offset * width :]
    numbers = [int.from_bytes(data[row * width : (row + 1) * width], "little", signed=True) for row in range(len(column))]
    exponent = min(max(-column.type.scale, -200), 100)  # beyond these every number but 0 is nearest to 0, or too great, whatever the scale
    return [
        Decimal(f"{number}E{exponent}") if valid else None for number, valid in zip(numbers, column.is_valid().to_pylist(), strict=True)
    ]


def plain_rows(batch: Any, config: Config) -> list[tuple[User | None, Amount | None, int | None]]:
    """The rows of a RecordBatch from `sources.read` as plain Python values, each converted exactly and on its own.

    This is a second, slow implementation of what `columns.columns_of` does with whole columns.
    """
    users, amounts = _storage(batch.column(config.user_id)).to_pylist(), _amounts(_storage(batch.column(config.amount)))
    if _is_text(batch.column(config.amount).type):
        amounts = [None if text is None else _amount_of_text(text.strip(_SPACE)) for text in amounts]
    elif pa.types.is_float16(batch.column(config.amount).type):  # NumPy's floats in some versions of pyarrow
        amounts = [None if amount is None else float(amount) for amount in amounts]
    return list(zip(users, amounts, _times_ns(_storage(batch.column(config.timestamp)), config), strict=True))


def _times_ns(array: Any, config: Config) -> list[int | None]:
    """Instants of any Arrow type in nanoseconds, as whole numbers without a limit (S2)."""
    kind = array.type
    unit_ns = TIME_UNIT_NS[config.time_unit or "ns"]
    if _is_text(kind):
        numbers = config.time_unit is not None
        return [None if text is None else _time_ns_of_text(text.strip(_SPACE), unit_ns if numbers else None) for text in array.to_pylist()]
    if pa.types.is_timestamp(kind):
        unit_ns = TIME_UNIT_NS[kind.unit]
    elif pa.types.is_date32(kind):
        array, unit_ns = array.cast(pa.int32()), _DAY_NS
    elif pa.types.is_date64(kind):
        unit_ns = 10**6
    if pa.types.is_timestamp(kind) or pa.types.is_date64(kind):
        array = array.cast(pa.int64())
    return [None if time is None else time * unit_ns for time in array.to_pylist()]


def _storage(array: Any) -> Any:
    return array.storage if isinstance(array.type, pa.BaseExtensionType) else array


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind))


_SPACE: Final = " \t\n\r\v\f"
_DAY_NS: Final = 86_400 * 10**9
_DAYS_IN_400_YEARS: Final = 146_097
_DECIMAL_TEXT: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)")
_POWER_TEXT: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]+")
_SHORT_POWER_TEXT: Final = re.compile(r"[+-]?0*[0-9]{0,18}(\.[0-9]{0,18})?[eE][+-]?0*([0-9]|1[0-9]|20)")
_BRIEF_POWER_TEXT: Final = re.compile(r"[+-]?[0-9.]{1,26}[eE][+-]?0*[0-9]")
_NOT_FINITE_TEXT: Final = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_INTEGER_TEXT: Final = re.compile(r"[+-]?[0-9]+")
_INSTANT_TEXT: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[ Tt]([0-9]{2})(?::([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,9}))?)?)?([Zz]|[+-][0-9]{2}(?::?[0-9]{2})?)?)?"
)


def _amount_of_text(text: str) -> Amount | None:
    """An amount as it is written; None: it cannot be read, which counts as null.

    Numbers are exact, but for some with an exponent, which stand for the float64 nearest to them: powers beyond 20, powers of
    two digits behind more than 18 digits, and any power behind more than 26 digits. Python takes minutes for 1e999999999, so what
    leaves the range of float64 is decided without it.
    """
    if _DECIMAL_TEXT.fullmatch(text):
        return Decimal(text)
    if _NOT_FINITE_TEXT.fullmatch(text):
        return float(text)
    if _POWER_TEXT.fullmatch(text) is None:
        return None
    if _SHORT_POWER_TEXT.fullmatch(text) or _BRIEF_POWER_TEXT.fullmatch(re.sub("^([+-]?)0+(?=[0-9])", r"\1", text)):
        return Decimal(text)
    value = float(text)
    if value in (inf, -inf):
        return 10**400  # a number, beyond any range
    if value == 0.0 and re.search("[1-9]", text.lower().split("e")[0]):
        return 5e-324  # not zero, below any grid
    return value


def _time_ns_of_text(text: str, unit_ns: int | None) -> int | None:
    """An ISO 8601 instant, UTC unless it says otherwise, or with a unit a whole number of them; None: it cannot be read, a null."""
    if unit_ns is not None and _INTEGER_TEXT.fullmatch(text):
        return int(text) * unit_ns
    match = _INSTANT_TEXT.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    fraction, zone = match[7] or "", match[8] or "Z"
    zone_hour, zone_minute = (int(zone[1:3]), int(zone[3:].lstrip(":") or 0)) if zone not in "Zz" else (0, 0)
    if hour > 23 or minute > 59 or second > 59 or zone_hour > 23 or zone_minute > 59:
        return None
    try:
        # The calendar repeats after 400 years, and Python's knows no year 0.
        days = date(year % 400 + 400, month, day).toordinal() - date(1970, 1, 1).toordinal() + (year // 400 - 1) * _DAYS_IN_400_YEARS
    except ValueError:
        return None
    east = (zone_hour * 60 + zone_minute) * (-1 if zone[0] == "-" else 1)
    return (((days * 24 + hour) * 60 + minute - east) * 60 + second) * 10**9 + int(fraction.ljust(9, "0"))
