"""The description of the routes against the routes: requests made from it, good and bad, must be answered as it says.

More of them: `RISKRING_EXAMPLES=1000 python -m pytest tests/adapters/test_openapi.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra `serve`")
pytest.importorskip("schemathesis", reason="pip install schemathesis")

from engine.access import Token
from engine.adapters.http_server import Limits
from tests.adapters.test_http import Server, service_of

EXAMPLES = os.environ.get("RISKRING_EXAMPLES", "15")


@pytest.mark.parametrize("ids", [("alice", "bob", "alice"), (7, 8, 7), (b"\0", b"\xff", b"\0")], ids=["string", "int64", "binary"])
def test_all_checks(ids: tuple[Any, ...], tmp_path: Path) -> None:
    program = shutil.which("schemathesis", path=os.path.dirname(sys.executable)) or "schemathesis"
    server = Server(service_of(ids, users=100_000), token=Token("s3cret"), limits=Limits(seconds=5), page="<p>")
    with contextlib.closing(server):
        command = [program, "run", f"{server.url}/openapi.json", "-H", "Authorization: Bearer s3cret", "--checks", "all"]
        without = ["/v1/events", "/v1/transactions"] if ids[0] == b"\0" else ["/v1/events"]  # bytes come as Arrow, which it cannot make
        command += [word for path in without for word in ("--exclude-path", path)]
        command += ["--max-examples", EXAMPLES, "--seed", "1", "--generation-deterministic", "--no-color"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        generated = re.search(r"(\d[\d,]*) generated", done.stdout)
        assert generated and int(generated[1].replace(",", "")) > 100
        server.service.stats()
