"""What every kind of report has in common: it is the `report.json` of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict

from configs.errors import CorruptArtifactError

REPORT = "report.json"


class Record(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredReport(Record):
    """A report. Holds no time and no place: the same models and data give the same bytes."""

    made_by: ClassVar[str]
    """What makes such reports, for whoever names another artifact."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The report of an artifact. Raises `CorruptArtifactError` if it is not one."""
        path = folder / REPORT
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptArtifactError(
                f"{path} is no report by {cls.made_by}: {error}", next_step=f"name a report that {cls.made_by} made"
            ) from error

    def save(self, folder: Path) -> None:
        """Writes `report.json`."""
        (folder / REPORT).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
