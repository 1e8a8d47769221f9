"""What the store's reports say of a model that is to take an alias, against the model that has it.

The candidate has to have been asked, alike, every task of which there is a report on the other model: what is missing
is named, with the command that measures it, because a task on which it got worse must not be passed over in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.store.artifacts import Artifact, ArtifactStore
from actors.store.registry import RegisteredVersion
from configs.errors import DataError
from pipelines.evaluation.comparing import compare_task
from pipelines.evaluation.gate import Measured, measured
from pipelines.evaluation.task_report import ANSWERS, TasksReport

_ROLE = "models."


@dataclass(frozen=True)
class Judged:
    """A model in a report of tasks."""

    artifact: Artifact
    label: str
    report: TasksReport


def reports_on(digest: str, store: ArtifactStore) -> list[Judged]:
    """The store's reports of tasks on the model artifact with this digest, the newest first.

    Raises:
        CorruptArtifactError: a report is not what was published.
    """
    manifests = [m for m in store.list() if m.kind == "report" and any(file.path == ANSWERS for file in m.files)]
    found = []
    for manifest in sorted(manifests, key=lambda m: (m.created_at, str(m.ref)), reverse=True):
        for role, record in manifest.inputs.items():
            if role.startswith(_ROLE) and record.digest == digest:
                artifact = store.get(manifest.ref)
                found.append(Judged(artifact, role.removeprefix(_ROLE), TasksReport.load(artifact.path)))
    return found


def measure(
    candidate: RegisteredVersion, holder: RegisteredVersion | None, store: ArtifactStore
) -> tuple[list[Measured], list[str]]:
    """The candidate's scores, against the holder's if there is one, and the reports they were taken from.

    Of several reports of a task the newest that compare are taken.

    Raises:
        CorruptArtifactError: a report is not what was published.
        DataError: there is no report, or the candidate was not asked a task as the holder was.
    """
    mine = reports_on(candidate.digest, store)
    if holder is None:
        return _alone(mine)
    theirs = reports_on(holder.digest, store)
    tasks = sorted({task for judged in theirs for task in judged.report.tasks})
    if not tasks:
        raise DataError(
            f"there is no report of tasks on {holder}, which {candidate} would replace", received=holder.ref,
            allowed="a report in this store on both models", next_step=f"ganymede evaluate {holder} --task TASK",
        )  # fmt: skip
    scores: list[Measured] = []
    used: set[str] = set()
    for task in tasks:
        pair = _asked_alike(task, theirs, mine)
        if pair is None:
            raise DataError(
                f"{candidate} was not asked {task} as {holder} was, so that nothing says whether it got worse",
                received="reports on it: " + (", ".join(sorted({str(one.artifact.ref) for one in mine})) or "none"),
                allowed="the same task, data, limit, examples and template",
                next_step=f"ganymede evaluate {candidate} --task {task}, with the options of "
                + next(str(judged.artifact.ref) for judged in theirs if task in judged.report.tasks),
            )  # fmt: skip
        before, after = pair
        metrics = after.report.tasks[task].metrics
        folders = (before.artifact.path, before.label), (after.artifact.path, after.label)
        scores += measured(compare_task(task, metrics, *folders))
        used |= {str(before.artifact.ref), str(after.artifact.ref)}
    return scores, sorted(used)


def _asked_alike(task: str, theirs: Sequence[Judged], mine: Sequence[Judged]) -> tuple[Judged, Judged] | None:
    """The newest two reports that asked the holder and the candidate the same."""
    for after in mine:
        for before in theirs:
            asked = after.report.tasks.get(task)
            if asked is not None and asked == before.report.tasks.get(task):
                return before, after
    return None


def _alone(mine: Sequence[Judged]) -> tuple[list[Measured], list[str]]:
    """The scores of the newest report of each task."""
    scores: dict[str, list[Measured]] = {}
    used: set[str] = set()
    for judged in mine:
        for task, one in judged.report.models[judged.label].tasks.items():
            if task not in scores:
                headline = next(iter(one.scores))
                scores[task] = [Measured(task, m, s.value, m == headline) for m, s in one.scores.items()]
                used.add(str(judged.artifact.ref))
    return [score for task in sorted(scores) for score in scores[task]], sorted(used)
