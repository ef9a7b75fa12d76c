"""An object store in memory, as pyarrow.fs sees one: an object appears whole when its stream is closed, and there is no rename."""

from __future__ import annotations

import errno
import io
from typing import Any

import pyarrow as pa
import pyarrow.fs


class _Upload(io.BytesIO):
    """An object that is being written."""

    def __init__(self, objects: dict[str, bytes], path: str) -> None:
        super().__init__()
        self._objects, self._path = objects, path

    def close(self) -> None:
        if not self.closed:
            self._objects[self._path] = self.getvalue()
        super().close()


class Objects(pyarrow.fs.FileSystemHandler):  # type: ignore[misc]
    """Objects by path. Folders are what their paths imply.

    Attributes:
        objects: Bytes of each.
        calls: Names of the calls so far.
        fail_at: Number of the call that fails, and with it all later ones if it is `for_good`; -1: none.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.fail_at = -1
        self.for_good = False

    def _call(self, name: str) -> None:
        self.calls.append(name)
        number = len(self.calls) - 1
        if number == self.fail_at or (self.for_good and 0 <= self.fail_at < number):
            raise OSError(errno.EIO, "the network is down")

    def get_type_name(self) -> str:
        return "objects"

    def normalize_path(self, path: str) -> str:
        return path

    def _info(self, path: str) -> Any:
        path = path.strip("/")
        if path in self.objects:
            return pyarrow.fs.FileInfo(path, pyarrow.fs.FileType.File, size=len(self.objects[path]))
        inside = not path or any(other.startswith(f"{path}/") for other in self.objects)
        return pyarrow.fs.FileInfo(path, pyarrow.fs.FileType.Directory if inside else pyarrow.fs.FileType.NotFound)

    def get_file_info(self, paths: list[str]) -> list[Any]:
        self._call("get_file_info")
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: Any) -> list[Any]:
        self._call("get_file_info_selector")
        assert not selector.recursive
        base = selector.base_dir.strip("/")
        prefix = f"{base}/" if base else ""
        inside = {prefix + path.removeprefix(prefix).split("/")[0] for path in self.objects if path.startswith(prefix)}
        if not inside and not selector.allow_not_found:
            raise FileNotFoundError(selector.base_dir)
        return [self._info(path) for path in sorted(inside)]

    def create_dir(self, path: str, recursive: bool) -> None:
        self._call("create_dir")

    def delete_dir(self, path: str) -> None:
        self._call("delete_dir")
        for other in [other for other in self.objects if other.startswith(f"{path.strip('/')}/")]:
            del self.objects[other]

    def delete_file(self, path: str) -> None:
        self._call("delete_file")
        del self.objects[path.strip("/")]

    def open_input_file(self, path: str) -> Any:
        self._call("open_input_file")
        if path.strip("/") not in self.objects:
            raise FileNotFoundError(path)
        return pa.PythonFile(io.BytesIO(self.objects[path.strip("/")]), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self._call("open_output_stream")
        return pa.PythonFile(_Upload(self.objects, path.strip("/")), mode="w")

    def _never(self, *_: Any) -> Any:
        raise AssertionError("a snapshot has no need of this call")

    delete_dir_contents = delete_root_dir_contents = move = copy_file = open_append_stream = open_input_stream = _never
