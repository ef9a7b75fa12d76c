"""Lines of a log, one for each event: `key=value` for people and most tools, or JSON."""

from __future__ import annotations

import sys
from typing import Any

import structlog


def logger(as_json: bool) -> Any:
    """Who writes events to standard error: called with a level, an event and fields.

    Example:
        >>> logger(as_json=True)("debug", "not shown")
    """
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer()
            if as_json
            else structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], drop_missing=True),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    log = structlog.get_logger()

    def write(level: str, event: str, **fields: Any) -> None:
        getattr(log, level)(event, **fields)

    return write
