"""A disk in memory that can fail at any call and lose power at any time: what stands behind a `LocalStore` in tests.

What is durable and what is not is modelled as unkindly as file systems may behave. Of a file, what was synced is safe; of what was
written later any first part may be there, and some of it may be zeros or garbage. Of a folder, the names it had when it was synced are
safe; of what was done to them later (make, rename, remove) any part may have happened, in any order. A rename happens or does not.
Names lie in folders: a folder whose own name was lost is gone with all in it.
"""

from __future__ import annotations

import copy
import errno
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from engine.storage import System

#: How a call can fail. After a crash the process is dead: all later calls crash too. A "short" write or read does a part, as systems may.
MANNERS = ("error", "full", "crash before", "crash after", "short")


class Crash(BaseException):
    """The process is dead; nothing may catch it and go on."""


@dataclass
class File:
    """Its bytes, and how many of them are safe. Bytes are only ever appended."""

    data: bytearray = field(default_factory=bytearray)
    synced: int = 0
    sync_failed: bool = False

    def after_crash(self, random: Random) -> File:
        tail = bytearray(self.data[self.synced : random.randint(self.synced, len(self.data))])
        if random.random() < 0.5:
            bad = random.randint(0, len(tail))
            tail[bad:] = random.choice((bytes, random.randbytes))(len(tail) - bad)
        data = self.data[: self.synced] + tail
        return File(data, len(data))


@dataclass
class Folder:
    """Its names, those that are safe, and what was done since: (name, what it became, name that is gone)."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)
    later: list[tuple[str | None, File | Folder | None, str | None]] = field(default_factory=list)

    def change(self, name: str | None, node: File | Folder | None, gone: str | None) -> None:
        self.later.append((name, node, gone))
        self.names = _changed(self.names, [self.later[-1]])

    def sync(self) -> None:
        self.synced, self.later = dict(self.names), []

    def after_crash(self, random: Random) -> Folder:
        happened = [change for change in self.later if random.random() < 0.5]
        random.shuffle(happened)
        names = {name: node.after_crash(random) for name, node in _changed(self.synced, happened).items()}
        return Folder(names, dict(names))


def _changed(names: dict[str, File | Folder], changes: list[Any]) -> dict[str, File | Folder]:
    names = dict(names)
    for name, node, gone in changes:
        names.pop(gone, None)
        if name is not None:
            names[name] = node
    return names


def _call(method: Callable[..., Any]) -> Callable[..., Any]:
    """A call that is counted, and fails if it is to."""

    @functools.wraps(method)
    def called(self: Disk, *arguments: Any) -> Any:
        manner = self._begins(method.__name__, arguments)
        if manner in ("error", "full"):
            if method.__name__ == "close":
                method(self, *arguments)  # a handle is gone even if closing it failed
            if method.__name__ == "sync" and isinstance(node := self._handles[arguments[0]], File):
                node.sync_failed = True
            code = errno.EIO if manner == "error" else errno.ENOSPC
            raise OSError(code, os.strerror(code))
        if manner == "crash before":
            self._die()
        if manner == "short" and method.__name__ == "write":
            arguments = (arguments[0], arguments[1][: len(arguments[1]) // 2])
        result = method(self, *arguments)
        if manner == "crash after":
            self._die()
        return result[: len(result) // 2] if manner == "short" and method.__name__ == "read" else result

    return called


class Disk(System):
    """A file system.

    Attributes:
        calls: (name, path) of each call so far.
        during: Called before each call with its name, such as "write"; tests do other things in it.
        free: What `free_bytes` says.
    """

    def __init__(self, root: Folder | None = None) -> None:
        self.root = Folder() if root is None else root
        self.calls: list[tuple[str, str]] = []
        self.during: Callable[[str], None] = lambda call: None
        self.free = 10**12
        self._handles: dict[int, File | Folder] = {}
        self._held: set[int] = set()
        self._paths: dict[int, str] = {}
        self._opened = 0
        self._fail_at, self._manner, self._for_good = -1, "", False
        self._dead = False

    def fail(self, number: int, manner: str, for_good: bool = False) -> None:
        """Let the call after so many others fail, and all after it if it is `for_good`."""
        self._fail_at, self._manner, self._for_good = len(self.calls) + number, manner, for_good

    def crash(self, random: Random) -> Disk:
        """The disk as it may be found when power is back."""
        return Disk(self.root.after_crash(random))

    def restarted(self) -> Disk:
        """The disk as the next process finds it: no power was lost, so nothing else was."""
        return Disk(copy.deepcopy(self.root))

    @property
    def open_handles(self) -> int:
        return len(self._handles)

    def _begins(self, name: str, arguments: tuple[Any, ...]) -> str:
        if self._dead:
            raise Crash
        self.during(name)
        subject = arguments[0]
        self.calls.append((name, self._paths[subject] if isinstance(subject, int) else subject))
        number = len(self.calls) - 1
        due = number == self._fail_at or (self._for_good and 0 <= self._fail_at < number)
        return self._manner if due else ""

    def _die(self) -> None:
        self._dead = True
        raise Crash

    def _node(self, path: str) -> File | Folder:
        node: File | Folder = self.root
        for name in path.split("/"):
            if name:
                if isinstance(node, File):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
                if name not in node.names:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                node = node.names[name]
        return node

    def folder(self, path: str) -> Folder:
        """What is at a path, which must be a folder."""
        node = self._node(path)
        if isinstance(node, File):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return node

    def file(self, path: str) -> File:
        """What is at a path, which must be a file."""
        node = self._node(path)
        if isinstance(node, Folder):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return node

    def _parent(self, path: str) -> tuple[Folder, str]:
        parent, _, name = path.rpartition("/")
        return self.folder(parent), name

    def _new(self, path: str, node: File | Folder) -> None:
        folder, name = self._parent(path)
        if name in folder.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        folder.change(name, node, None)

    def _open(self, path: str, node: File | Folder) -> int:
        self._opened += 1
        self._handles[self._opened], self._paths[self._opened] = node, path
        return self._opened

    def paths(self, path: str = "") -> Iterator[str]:
        """All files, wherever they are."""
        for name, node in self.folder(path).names.items():
            if isinstance(node, File):
                yield f"{path}/{name}"
            else:
                yield from self.paths(f"{path}/{name}")

    @_call
    def names(self, folder: str) -> list[str]:
        return list(self.folder(folder).names)

    @_call
    def is_folder(self, path: str) -> bool:
        try:
            return isinstance(self._node(path), Folder)
        except (FileNotFoundError, NotADirectoryError):
            return False

    @_call
    def make_folder(self, folder: str) -> None:
        self._new(folder, Folder())

    @_call
    def create(self, file: str) -> int:
        node = File()
        self._new(file, node)
        return self._open(file, node)

    @_call
    def open_folder(self, folder: str) -> int:
        return self._open(folder, self.folder(folder))

    @_call
    def hold(self, handle: int) -> bool:
        others = (self._handles[other] for other in self._held if other != handle)
        if any(node is self._handles[handle] for node in others):
            return False
        self._held.add(handle)
        return True

    @_call
    def write(self, handle: int, data: memoryview) -> int:
        node = self._handles[handle]
        assert isinstance(node, File)
        node.data += data
        return len(data)

    @_call
    def sync(self, handle: int) -> None:
        node = self._handles[handle]
        if isinstance(node, Folder):
            node.sync()
            return
        assert not node.sync_failed, "an fsync that failed was tried again"
        node.synced = len(node.data)

    @_call
    def close(self, handle: int) -> None:
        del self._handles[handle]
        self._held.discard(handle)

    @_call
    def read(self, file: str, size_max: int) -> bytes:
        return bytes(self.file(file).data[:size_max])

    @_call
    def rename(self, old: str, new: str) -> None:
        (folder, old_name), (other, new_name) = self._parent(old), self._parent(new)
        assert folder is other, "no rename leaves its folder"
        node = self._node(old)
        if isinstance(there := folder.names.get(new_name), Folder) and there.names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), new)
        folder.change(new_name, node, old_name)

    @_call
    def remove_file(self, file: str) -> None:
        self.file(file)
        folder, name = self._parent(file)
        folder.change(None, None, name)

    @_call
    def remove_folder(self, folder: str) -> None:
        if self.folder(folder).names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), folder)
        parent, name = self._parent(folder)
        parent.change(None, None, name)

    @_call
    def free_bytes(self, folder: str) -> int:
        self.folder(folder)
        return self.free
