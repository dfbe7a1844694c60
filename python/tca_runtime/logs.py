"""Log lines of both processes: text for people, JSON for machines.

Fields given as ``extra={"fields": {...}}`` are keys of their own in JSON and ``key=value`` in text.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from tca_runtime.config import ServerArgs


class TextFormatter(logging.Formatter):
    """One line per record; line breaks inside a message stay, those of fields are escaped."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        return " ".join([line, *(f"{k}={_shown(v)}" for k, v in _fields(record).items())])


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, process, logger, message, and the record's fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logging(args: ServerArgs, process: str) -> None:
    """Set up the root logger of this process."""
    formatter = JsonFormatter(process) if args.log_format == "json" else TextFormatter(process)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=args.log_level.upper(), handlers=[handler], force=True)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    # A client's rid must not be able to forge a line, or a field.
    return text if text.isprintable() and " " not in text and text else json.dumps(text)
