"""The exception classes.

Each text says what is wrong, where (column, row), what was found, what was wanted, and the fix.
"""


class EngineError(Exception):
    """Base of everything riskring raises on purpose."""


class ConfigError(EngineError, ValueError):
    """An option, a duration or an instant cannot be used as given."""


class SchemaError(EngineError, ValueError):
    """Data has the wrong columns or types, or cannot be read; nothing of it was applied."""


class TimeTooOldError(EngineError, ValueError):
    """A lookup asks for an instant before `clock - lateness`, where scores are no longer exact."""


class CapacityError(EngineError, MemoryError):
    """The engine has no room for the batch; nothing of the batch was applied."""


class SnapshotError(EngineError, OSError):
    """A snapshot is damaged, incomplete or of an unknown version, or could not be written; engine and older snapshots are untouched."""


class ConnectorError(EngineError):
    """A system outside, such as Kafka or Redis, cannot be reached, refuses, or is not set up as it must be."""


class StaleError(ConnectorError):
    """Scores that are kept elsewhere are too old, or not complete yet: they are not known, which is not 0."""
