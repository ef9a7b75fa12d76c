"""What was last reported of the users of a shard, and who has to be looked at again.

It takes 9 bytes a slot, and exists from the first call of `RiskEngine.changes` on. Users whose memory expiry takes back although their
score was last reported not to be 0.0 are kept here, until it has been reported that it is.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from engine.columns import Ids
from engine.kernels import layout as at
from engine.kernels import list_changed
from engine.memory import reserved

#: Slots that are looked at in one call, so that the list of those found stays in a cache.
_SLOTS_AT_ONCE: Final = 1 << 16

#: So many epochs after the last report, a mark is still known to be due.
_EPOCHS_MAX: Final = at.MARK_EPOCHS - 4


class Watch:
    """What was reported of each slot of a shard.

    Attributes:
        marks: (slots,) uint8, when the score of a slot may next change (`list_changed`).
        reported: (slots,) float64, what was last reported of it; 0.0 at first.
        gone: Users without a slot whose last report was not 0.0, and that report.
    """

    def __init__(self, slots_max: int) -> None:
        lanes = -(-slots_max // at.MARK_LANES) * at.MARK_LANES
        self.marks: NDArray[np.uint8] = reserved(lanes, np.uint8)
        self.reported: NDArray[np.float64] = reserved(lanes, np.float64)
        self.gone: list[tuple[Ids, NDArray[np.float64]]] = []
        self._at_ns: int | None = None  # of the last report

    def rows_came(self, slots: NDArray[np.int32], epoch_bits: int) -> None:
        """Look at these slots next time."""
        if self._at_ns is not None:
            self.marks[slots] = at.MARKED | (self._at_ns >> epoch_bits) & (at.MARKED - 1)

    def leave(self, slots: NDArray[np.int32], ids: Ids) -> None:
        """Users lose their slots, though it has not been reported that their scores are 0.0."""
        self.gone.append((ids, self.reported[slots]))
        self.reported[slots] = 0.0

    def came_back(self, slots: NDArray[np.int32], reported: NDArray[np.float64]) -> None:
        """Users who had left have slots again, which are new to the watch and so will be looked at."""
        self.reported[slots] = reported

    def changed(
        self,
        at_ns: int,
        reach_ns: int,
        scale: int,
        slots_used: int,
        touched: bool,
        memory: NDArray[np.int64],
        control: NDArray[np.int64],
    ) -> NDArray[np.int32]:
        """Slots whose score at an instant is another than was last reported; what it is counts as reported now.

        `touched`: those too whose window holds transactions and may have changed since, which all are whose window has.

        Cost: a byte a slot, and a few random lines for each user whose window may have changed. All users are looked at the first time, and
        when the instant is before that of the last report or nearly a retention after it.
        """
        bits = int(control[at.EPOCH_BITS])
        every = self._at_ns is None or not 0 <= (at_ns >> bits) - (self._at_ns >> bits) <= _EPOCHS_MAX or at_ns < self._at_ns
        due = np.empty(_SLOTS_AT_ONCE + at.MARK_LANES, np.int32)
        found = []
        for first in range(0, slots_used, _SLOTS_AT_ONCE):
            changed = np.empty(_SLOTS_AT_ONCE + at.MARK_LANES, np.int32)
            last = min(first + _SLOTS_AT_ONCE, slots_used)
            count = list_changed(
                first, last, at_ns, reach_ns, scale, every, touched, memory, control, self.marks, self.reported, due, changed
            )
            found.append(changed[:count])
        self._at_ns = at_ns
        return np.concatenate(found) if found else np.empty(0, np.int32)
