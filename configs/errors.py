"""The one exception tree of the project.

Every error a user can meet says what is wrong (a key or a path), what was received, what is allowed and the next
thing to do. `InputError` and what derives from it is bad input (exit code 2, HTTP 4xx); every other `GanymedeError`
is a failure (exit code 1, HTTP 5xx).
"""

from __future__ import annotations

from typing import Any, ClassVar


class GanymedeError(Exception):
    """A failure that a user can understand.

    Args:
        what: the problem, naming the key, path or thing concerned.
        received: what was there (its `repr` is shown); leave out when `what` says it.
        allowed: what would have been accepted.
        next_step: the command or change that helps.
    """

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, what: str, *, received: Any = None, allowed: str | None = None, next_step: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.received = received
        self.allowed = allowed
        self.next_step = next_step

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.what, self.received, self.allowed, self.next_step))

    def __str__(self) -> str:
        parts = [self.what]
        if self.received is not None:
            parts.append(f"received {self.received!r}")
        if self.allowed is not None:
            parts.append(f"allowed: {self.allowed}")
        if self.next_step is not None:
            parts.append(f"next: {self.next_step}")
        return "; ".join(parts)


def _rebuild(
    kind: type[GanymedeError], what: str, received: Any, allowed: str | None, next_step: str | None
) -> GanymedeError:
    return kind(what, received=received, allowed=allowed, next_step=next_step)


class InputError(GanymedeError):
    """Something the user gave cannot be used."""

    exit_code = 2
    code = "invalid_input"


class ConfigError(InputError):
    """A recipe or an override is wrong."""

    code = "invalid_config"


class DataError(InputError):
    """Source data is missing, empty or unreadable."""

    code = "invalid_data"


class ArtifactError(InputError):
    """An artifact is missing, or its name cannot be resolved."""

    code = "artifact_not_found"


class CorruptArtifactError(ArtifactError):
    """An artifact's files do not match its manifest."""

    code = "artifact_corrupt"


class DriftError(InputError):
    """The same name@version stands with another fingerprint."""

    code = "artifact_drift"


class ContractError(InputError):
    """A tokenizer, chat template or special token does not match the model it is used with."""

    code = "contract_mismatch"


class RequestError(InputError):
    """A generation request cannot be served; `param` names the field at fault."""

    code = "invalid_request"

    def __init__(
        self,
        what: str,
        *,
        param: str | None = None,
        received: Any = None,
        allowed: str | None = None,
        next_step: str | None = None,
    ) -> None:
        super().__init__(what, received=received, allowed=allowed, next_step=next_step)
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_request, (self.what, self.param, self.received, self.allowed, self.next_step))


def _rebuild_request(
    what: str, param: str | None, received: Any, allowed: str | None, next_step: str | None
) -> RequestError:
    return RequestError(what, param=param, received=received, allowed=allowed, next_step=next_step)


class StorageError(GanymedeError):
    """Storage is full, unwritable or gone."""

    code = "storage_error"


class LeaseError(GanymedeError):
    """Another run holds, or has taken over, this stage."""

    code = "lease_lost"


class StageError(GanymedeError):
    """A stage could not finish."""

    code = "stage_failed"


class TrackingError(GanymedeError):
    """The tracking server or registry refuses a request for good."""

    code = "tracking_error"


class EngineError(GanymedeError):
    """The inference engine cannot go on."""

    code = "engine_error"


class OverloadedError(GanymedeError):
    """No room for the request now; try again later."""

    code = "overloaded"
