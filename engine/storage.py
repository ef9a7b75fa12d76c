"""Folders of files that outlive a crash: on local disks, and through pyarrow.fs in object stores.

A store holds *bundles*: sets of files that appear all at once or not at all, and never change. The last file of a bundle is its manifest: a
bundle without one does not exist. What a bundle says is no business of this module.

On a local disk a bundle is written into a hidden folder; each file is synced before the next is begun, then the folder, which then gets
its name by a rename, and its parent is synced. An fsync that failed is not tried again on the same file: the pages it could not write
may count as clean by then. Where there is no rename, as in object stores, the manifest is written last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.fs

from engine.errors import ConfigError, EngineError, SnapshotError

MANIFEST: Final = "manifest.json"

#: Names of bundles that are being written or removed begin so: no reader looks at them, and nobody else makes such names.
_HIDDEN: Final = ".riskring-"


class Store(Protocol):
    """A folder of bundles."""

    where: str

    def names(self) -> list[str]:
        """Bundles that have a manifest, in the order of their names."""

    def taken(self) -> list[str]:
        """All names that no new bundle can have: those of bundles, of what is left of some, and of anything else."""

    def begin(self, name: str) -> None:
        """Prepare a new bundle."""

    def put(self, name: str, file: str, data: Any) -> None:
        """Write a file of a bundle that was begun. It is durable when this returns, but not visible."""

    def publish(self, name: str, manifest: bytes) -> None:
        """Make a bundle visible. It is durable when this returns."""

    def abandon(self, name: str) -> None:
        """Remove what there is of a bundle that was begun."""

    def get(self, name: str, file: str, size_max: int) -> bytes:
        """A file of a bundle; at most one byte more than `size_max`."""

    def remove(self, name: str) -> None:
        """Remove a bundle; at no instant is it visible and not whole."""

    def free_bytes(self) -> int | None:
        """Room there is for more; None if nobody can say."""


class System:
    """The calls on files that a `LocalStore` makes, one of the operating system each. Tests put others in their place."""

    def names(self, folder: str) -> list[str]:
        """Names in a folder."""
        return os.listdir(folder)

    def is_folder(self, path: str) -> bool:
        """Whether there is such a folder; an error if that cannot be told, which must not pass for a no."""
        try:
            return stat.S_ISDIR(os.stat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def make_folder(self, folder: str) -> None:
        """Make a folder in one that exists."""
        os.mkdir(folder)

    def create(self, file: str) -> int:
        """Make a new file and open it for writing."""
        return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)

    def open_folder(self, folder: str) -> int:
        """Open a folder, to sync it."""
        return os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))

    def hold(self, handle: int) -> bool:
        """Lock a folder as long as it is open. False if another process holds it."""
        import fcntl  # noqa: PLC0415 - not on every system

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def write(self, handle: int, data: memoryview) -> int:
        """Write the first of these bytes. Returns how many."""
        return os.write(handle, data)

    def sync(self, handle: int) -> None:
        """Make durable what was written, or which names are in a folder."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        """Close."""
        os.close(handle)

    def read(self, file: str, size_max: int) -> bytes:
        """The first bytes of a file. Memory is taken for those that there are: what is asked for may be a lie."""
        with open(file, "rb") as stream:
            return stream.read(min(size_max, os.fstat(stream.fileno()).st_size))

    def rename(self, old: str, new: str) -> None:
        """Give another name. A file of that name is replaced."""
        os.rename(old, new)

    def remove_file(self, file: str) -> None:
        """Remove a file."""
        os.unlink(file)

    def remove_folder(self, folder: str) -> None:
        """Remove an empty folder."""
        os.rmdir(folder)

    def free_bytes(self, folder: str) -> int:
        """Room there is on the disk."""
        return shutil.disk_usage(folder).free


#: The greatest piece that is written at a time: system calls take no more than 2 GiB.
_WRITE_BYTES_MAX: Final = 1 << 30


class LocalStore:
    """A `Store` in a local folder, which is made when it is first needed.

    Several processes may use it at a time. Each holds a lock on what it has not finished, so that the others see what they may clear away.
    """

    def __init__(self, root: str, system: System | None = None) -> None:
        self.where = root
        self._system = System() if system is None else system
        self._token = secrets.token_hex(4)  # no other process's part has the same name, whatever becomes of that process
        self._held: int | None = None  # the bundle that is being written

    def names(self) -> list[str]:
        return sorted(name for name in self.taken() if self._is_bundle(name))

    def taken(self) -> list[str]:
        if not self._system.is_folder(self.where):
            return []
        return [name for name in self._system.names(self.where) if not name.startswith(_HIDDEN)]

    def _is_bundle(self, name: str) -> bool:
        folder = f"{self.where}/{name}"
        return self._system.is_folder(folder) and MANIFEST in self._system.names(folder)

    def begin(self, name: str) -> None:
        make_folder(self.where, self._system)
        for left in self._system.names(self.where):
            if left.startswith(_HIDDEN) and left.endswith((".part", ".removed")):
                self._clear(f"{self.where}/{left}")
        self._system.make_folder(self._part(name))
        self._held = self._system.open_folder(self._part(name))
        if not self._system.hold(self._held):
            raise FileExistsError(errno.EEXIST, "another process clears it away", self._part(name))

    def _part(self, name: str) -> str:
        return f"{self.where}/{_HIDDEN}{name}.{self._token}.part"

    def put(self, name: str, file: str, data: Any) -> None:
        write_file(f"{self._part(name)}/{file}", data, self._system)

    def publish(self, name: str, manifest: bytes) -> None:
        self.put(name, MANIFEST, manifest)
        self._sync_folder(self._part(name))
        self._system.rename(self._part(name), f"{self.where}/{name}")
        self._sync_folder(self.where)
        self._release()

    def abandon(self, name: str) -> None:
        try:
            if self._held is not None and self._system.is_folder(self._part(name)):
                self._remove_hidden(self._part(name))
        finally:
            self._release()

    def get(self, name: str, file: str, size_max: int) -> bytes:
        return self._system.read(f"{self.where}/{name}/{file}", size_max + 1)

    def remove(self, name: str) -> None:
        hidden = f"{self.where}/{_HIDDEN}{name}.{self._token}.removed"
        with contextlib.suppress(FileNotFoundError):  # another process did it
            self._system.rename(f"{self.where}/{name}", hidden)
            self._sync_folder(self.where)
            self._clear(hidden)

    def free_bytes(self) -> int | None:
        return self._system.free_bytes(self.where)

    def _release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._system.close(held)

    def _clear(self, folder: str) -> None:
        """Remove what a process has left that died."""
        with contextlib.suppress(FileNotFoundError):  # another process did it
            handle = self._system.open_folder(folder)
            try:
                if self._system.hold(handle):
                    self._remove_hidden(folder)
            finally:
                self._system.close(handle)

    def _remove_hidden(self, folder: str) -> None:
        for file in self._system.names(folder):
            self._system.remove_file(f"{folder}/{file}")
        self._system.remove_folder(folder)

    def _sync_folder(self, folder: str) -> None:
        sync_folder(folder, self._system)


def make_folder(folder: str, system: System) -> None:
    """Make a folder if there is none. Its name is made durable in any case: who made it may have died before that was done."""
    parent = os.path.dirname(folder) or "."
    if not system.is_folder(folder):
        make_folder(parent, system)
        with contextlib.suppress(FileExistsError):
            system.make_folder(folder)
    if folder not in ("/", "."):
        with contextlib.suppress(PermissionError):  # who may not look into the parent did not make the folder
            sync_folder(parent, system)


def write_file(file: str, data: Any, system: System) -> None:
    """Make a new file of these bytes. They are durable when this returns; the file's name is when its folder has been synced."""
    handle = system.create(file)
    try:
        rest = memoryview(data).cast("B")
        while len(rest):
            written = system.write(handle, rest[:_WRITE_BYTES_MAX])
            if written <= 0:
                raise OSError(errno.EIO, "nothing more was written", file)
            rest = rest[written:]
        system.sync(handle)
    finally:
        system.close(handle)


def sync_folder(folder: str, system: System) -> None:
    """Make durable which names are in a folder."""
    handle = system.open_folder(folder)
    try:
        system.sync(handle)
    finally:
        system.close(handle)


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold a local folder, made if it is missing, against other processes. The lock goes with the process, however that ends.

    Raises:
        EngineError: Another process holds it.
    """
    import fcntl  # noqa: PLC0415 - not on every system

    folder = folder.rstrip("/") or "/"
    make_folder(folder, System())
    handle = os.open(f"{folder}/{_HIDDEN}lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EngineError(f"{folder}: another process uses this folder; wait for it, or give another one") from None
        yield
    finally:
        os.close(handle)


class ArrowStore:
    """A `Store` in any file system of pyarrow, such as S3 or GCS. Names are never used twice, and the manifest comes last."""

    def __init__(self, files: Any, root: str, where: str) -> None:
        self.where = where
        self._files = files
        self._root = root.rstrip("/")

    def _path(self, *parts: str) -> str:
        return str(PurePosixPath(self._root, *parts))

    def names(self) -> list[str]:
        names = self.taken()
        manifests = self._files.get_file_info([self._path(name, MANIFEST) for name in names]) if names else []
        return sorted(name for name, info in zip(names, manifests, strict=True) if info.type == pa.fs.FileType.File)

    def taken(self) -> list[str]:
        found = self._files.get_file_info(pa.fs.FileSelector(self._root or "/", allow_not_found=True))
        return [info.base_name for info in found if info.type == pa.fs.FileType.Directory]

    def begin(self, name: str) -> None:
        self._files.create_dir(self._path(name), recursive=True)

    def put(self, name: str, file: str, data: Any) -> None:
        with self._files.open_output_stream(self._path(name, file), compression=None) as stream:
            stream.write(data)

    def publish(self, name: str, manifest: bytes) -> None:
        self.put(name, MANIFEST, manifest)

    def abandon(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self._files.delete_dir(self._path(name))

    def get(self, name: str, file: str, size_max: int) -> bytes:
        with self._files.open_input_file(self._path(name, file)) as stream:
            data: bytes = stream.read(min(size_max + 1, stream.size()))
            return data

    def remove(self, name: str) -> None:
        self._files.delete_file(self._path(name, MANIFEST))
        self._files.delete_dir(self._path(name))

    def free_bytes(self) -> int | None:
        return None


def store_of(uri: Any) -> Store:
    """The store that a path, a URI of pyarrow.fs such as `s3://bucket/folder`, or a `pyarrow.fs.FileSystem` (its root) names.

    Raises:
        ConfigError: It names none.

    Example:
        >>> store_of("/var/lib/risk").where
        '/var/lib/risk'
    """
    if isinstance(uri, LocalStore | ArrowStore):
        return uri
    if isinstance(uri, pa.fs.SubTreeFileSystem) and isinstance(uri.base_fs, pa.fs.LocalFileSystem):
        return LocalStore(uri.base_path.rstrip("/") or "/")  # which syncs; pyarrow does not
    if isinstance(uri, pa.fs.LocalFileSystem):
        raise ConfigError("a LocalFileSystem names no folder; give the path of one")
    if isinstance(uri, pa.fs.FileSystem):
        return ArrowStore(uri, "", f"<{uri.type_name}>")
    try:
        path = os.fspath(uri)
    except TypeError:
        raise ConfigError(f"{uri!r} is neither a path, a URI nor a pyarrow FileSystem") from None
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{uri!r} is no path; give the folder of snapshots")
    if "://" not in path:
        return LocalStore(path.rstrip("/") or "/")
    try:
        files, root = pa.fs.FileSystem.from_uri(path)
    except (pa.ArrowException, ValueError) as error:
        raise ConfigError(f"{path}: {error}; give a path or a URI that pyarrow.fs knows, such as s3://bucket/folder") from None
    if isinstance(files, pa.fs.LocalFileSystem):
        return LocalStore(root)
    return ArrowStore(files, root, path)


@contextlib.contextmanager
def as_snapshot_error(what: str) -> Iterator[None]:
    """Failures of files, as `SnapshotError`."""
    try:
        yield
    except SnapshotError:
        raise
    except OSError as error:
        raise SnapshotError(f"{what}: {error.strerror or error}") from error
