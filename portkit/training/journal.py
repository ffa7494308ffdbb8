"""What a run leaves to be read: `run.json`, what it is; `run.jsonl`, what happened, line by line.

Each line is one JSON object with `event` (`step`, `evaluation`, `sample`, `saved`, `note`) and
`step`, the number of optimizer steps done. A run that goes on from step N drops the lines beyond
it, so that no step is told twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from portkit.errors import TrainingError
from portkit.json_reading import parse_object, read_object
from portkit.shown import as_json

RUN, LINES = "run.json", "run.jsonl"


class Journal:
    """`run.jsonl` of a run's folder, kept up to `step` and open for what comes next."""

    def __init__(self, folder: Path, step: int) -> None:
        kept = [record for record in read_lines(folder) if record["step"] <= step]
        path = folder / LINES
        partial = path.with_name(f".{LINES}.partial")
        partial.write_text("".join(map(_line, kept)), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(_line(record))

    def close(self) -> None:
        self._file.close()


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """All records of a run so far; a last line that was cut off by a kill is left out."""
    path = folder / LINES
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = parse_object(line, str(path), TrainingError)
            except TrainingError:
                break
            if type(record.get("step")) is not int:
                break
            records.append(record)
    return records


def read_run(folder: Path) -> dict[str, Any] | None:
    """`run.json`, or None where no run has begun. Raises TrainingError where it is damaged."""
    path = folder / RUN
    if not path.is_file():
        return None
    found = read_object(path, str(path), TrainingError, "bring it back from a copy")
    if found.get("format") != 1:
        raise TrainingError(f"{path} is not of a run that this portkit can go on with")
    return found


def write_run(folder: Path, content: Mapping[str, Any]) -> None:
    partial = folder / f".{RUN}.partial"
    partial.write_text(json.dumps({"format": 1, **content}, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / RUN)


def series(records: Iterable[Mapping[str, Any]], event: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of every record of one kind that has the key."""
    return [(one["step"], one[key]) for one in records if one["event"] == event and key in one]


def _line(record: Mapping[str, Any]) -> str:
    return as_json(record, allow_nan=True) + "\n"
