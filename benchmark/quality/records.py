"""Results as they come: one JSON line each, so that a run that was cut off can go on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Records:
    """A file of records, keyed by what was measured.

    A record has ``kind`` and, with kind ``answer``, ``data``, ``config`` and ``sample``. A line
    that was cut off is ignored and measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = list(read(path)) if path.exists() else []
        self._keys = {self._key(record) for record in self.records}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            # Not to append to half a line.
            with path.open("a") as file:
                file.write("\n")

    def has(self, **key: Any) -> bool:
        """Whether a record with these fields as its key is there."""
        return self._key(key) in self._keys

    def add(self, records: Iterable[Record]) -> None:
        """Append and flush."""
        with self.path.open("a", encoding="utf-8") as file:
            for record in records:
                self.records.append(record)
                self._keys.add(self._key(record))
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    @staticmethod
    def _key(record: Record) -> tuple[Any, ...]:
        names = ("kind", "model", "data", "mode", "config", "sample", "turn")
        return tuple(record.get(name) for name in names)


def read(path: Path) -> Iterator[Record]:
    """The complete records of a file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
