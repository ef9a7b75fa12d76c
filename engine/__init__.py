"""riskring: exact rolling per-user risk scores over a stream of transactions.

>>> from engine import RiskEngine
>>> engine = RiskEngine(users=1000, max_ahead=None)
>>> engine.add("alice", 12.5, "2026-01-01T00:00:00Z")
12.5
"""

from typing import TYPE_CHECKING, Any

from engine.errors import CapacityError, ConfigError, ConnectorError, EngineError, SchemaError, SnapshotError, StaleError, TimeTooOldError

if TYPE_CHECKING:
    from engine.engine import RiskEngine
    from engine.results import Explanation, IngestResult, Stats
    from engine.snapshot import SnapshotInfo

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "ConfigError",
    "ConnectorError",
    "EngineError",
    "Explanation",
    "IngestResult",
    "RiskEngine",
    "SchemaError",
    "SnapshotError",
    "SnapshotInfo",
    "StaleError",
    "Stats",
    "TimeTooOldError",
    "__version__",
]

_LAZY = {
    "RiskEngine": "engine.engine",
    "Explanation": "engine.results",
    "IngestResult": "engine.results",
    "SnapshotInfo": "engine.snapshot",
    "Stats": "engine.results",
}


def __getattr__(name: str) -> Any:
    """Import the engine when it is first asked for, so that the command line starts without Numba and Arrow."""
    if name in _LAZY:
        from importlib import import_module  # noqa: PLC0415 - see above

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
