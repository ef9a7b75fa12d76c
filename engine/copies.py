"""A shard as it stood at one instant, copied out little by little while rows go on.

Copy-on-write, user by user: who has yet to be copied is a bit a slot. Before rows change a user, the user is copied; the others are
copied in the order of their slots whenever there is time. Expiry waits meanwhile. So the copy is exactly the state between two batches, and
no pause is longer than reading a few thousand users.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from engine.entries import Entries
from engine.errors import SnapshotError

#: Users that are read at a time, and entries after which a call ends: a few milliseconds.
_USERS_AT_ONCE: Final = 1 << 11
_ENTRIES_AT_ONCE: Final = 1 << 17


class Copy:
    """What is retained in a shard at one instant.

    Args:
        pending: (slots,) bool, which slots are in use; it belongs to the copy from now on.
        read: Gives the retained transactions of the users in some slots, as of that instant.
    """

    def __init__(self, pending: NDArray[np.bool_], read: Callable[[NDArray[np.int32]], Entries]) -> None:
        self._pending = pending
        self._read = read
        self._next = 0
        self._kept: list[Entries] = []
        self._torn = False  # some users have been taken off `pending`, but their transactions may not be in the copy

    def before(self, slots: NDArray[np.int32]) -> None:
        """Copy the users in these slots (-1: none), who are about to change."""
        known = slots[(slots >= 0) & (slots < len(self._pending))]
        known = known[self._pending[known]]
        if len(known):
            self._read_pending(np.unique(known), self._kept)

    def before_all(self) -> None:
        """Copy all users who have not been yet, in one go."""
        while self._next < len(self._pending):
            self._some(self._kept)

    def take(self) -> list[Entries]:
        """Some of the copy: those users who had to be copied, and a few of the others; nothing when that was all."""
        if self._torn:
            raise SnapshotError("rows were interrupted while what they change was copied, so the snapshot is not whole; save again")
        kept, self._kept = self._kept, []
        self._some(kept)
        return kept

    def _some(self, taken: list[Entries]) -> None:
        """Copy a few users."""
        entries = 0
        while entries < _ENTRIES_AT_ONCE and self._next < len(self._pending):
            ahead = self._pending[self._next : self._next + 16 * _USERS_AT_ONCE]
            slots = np.flatnonzero(ahead)[:_USERS_AT_ONCE]
            last = len(ahead) if len(slots) < _USERS_AT_ONCE else int(slots[-1]) + 1
            if len(slots):
                self._read_pending((self._next + slots).astype(np.int32), taken)
                entries += len(taken[-1].time_ns)
            self._next += last

    def _read_pending(self, slots: NDArray[np.int32], taken: list[Entries]) -> None:
        self._torn = True  # until this is done: memory may be short, and Ctrl-C come anywhere
        self._pending[slots] = False
        taken.append(self._read(slots))
        self._torn = False

    @property
    def complete(self) -> bool:
        """Whether all has been taken."""
        return self._next >= len(self._pending) and not self._kept and not self._torn
