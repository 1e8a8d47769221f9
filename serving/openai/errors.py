"""Errors as clients of OpenAI's API know them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any, Self

from fastapi.responses import JSONResponse

from serving.calls import Refusal

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Ends a request with an error the client can read."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal

    @classmethod
    def bad_request(cls, message: str, *, param: str | None = None, code: str = "invalid_request") -> Self:
        """400."""
        return cls(Refusal(400, message, code, param))


def error_body(refusal: Refusal) -> dict[str, Any]:
    """A refusal in OpenAI's shape."""
    other = "invalid_request_error" if refusal.status < 500 else "server_error"
    kind = _TYPES.get(refusal.status, other)
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def error_response(refusal: Refusal) -> JSONResponse:
    """The same as a response, with the headers that go with its status."""
    headers: dict[str, str] = {}
    if refusal.retry_after_seconds is not None:
        headers["Retry-After"] = str(refusal.retry_after_seconds)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(refusal), refusal.status, headers=headers)
