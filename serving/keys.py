"""API keys: who may ask which models, and how many tokens a minute.

A file holds of each key its SHA-256 alone (keys are 256 random bits, so that no slow hash is needed). The ingress reads
the file again when it changes: a new key counts at once, a revoked one is refused within a second. All requests pass
the one ingress, so that a limit holds across all replicas.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from configs.errors import ConfigError, InputError
from configs.schema.serving import KEY_NAME, ApiKey
from serving.calls import Refusal
from serving.openai.errors import error_response

OPEN_PATHS = frozenset({"/live", "/health"})
"""Asked by load balancers, without a key."""
WINDOW_SECONDS = 60.0
_PREFIX = "gk-"
_CHECK_SECONDS = 1.0


def hashed(secret: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a file; none if there is no file. Raises `ConfigError` for a file that is not one of keys."""
    try:
        return [ApiKey.model_validate(entry) for entry in json.loads(path.read_text("utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} does not hold API keys: {error}", next_step="remove it, and make keys with: ganymede keys add NAME"
        ) from error


def add_key(path: Path, name: str, models: tuple[str, ...], tokens_per_minute: int | None) -> str:
    """Makes a key and returns it; it is shown nowhere again. Raises `InputError` if the name is taken, or is none."""
    if not re.match(KEY_NAME, name):
        raise InputError("not a name for an API key", received=name, allowed=KEY_NAME)
    keys = read_keys(path)
    if any(key.name == name for key in keys):
        raise InputError(
            "an API key of this name exists", received=name, next_step=f"ganymede keys revoke {name}, or another name"
        )
    secret = _PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(name=name, sha256=hashed(secret), models=models, tokens_per_minute=tokens_per_minute)
    _write(path, [*keys, key])
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Forgets a key. Raises `InputError` if there is none of this name."""
    keys = read_keys(path)
    kept = [key for key in keys if key.name != name]
    if len(kept) == len(keys):
        names = ", ".join(key.name for key in keys) or "none"
        raise InputError("there is no API key of this name", received=name, allowed=names)
    _write(path, kept)


def _write(path: Path, keys: list[ApiKey]) -> None:
    """Replaces the file; nobody else may read it."""
    fresh = path.with_suffix(".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump([key.model_dump() for key in keys], file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


class Budget:
    """Tokens that one key has used in the last minute.

    A request is let in as long as the limit is not reached; what it takes is not known before, so that the last one let
    in may pass the limit.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._used: deque[tuple[float, int]] = deque()
        self._total = 0

    def spend(self, tokens: int) -> None:
        """Takes tokens down as used now."""
        self._used.append((self._clock(), tokens))
        self._total += tokens

    def wait_seconds(self, limit: int) -> int:
        """0 if a request is let in now, else seconds until one will be."""
        now = self._clock()
        while self._used and now - self._used[0][0] >= WINDOW_SECONDS:
            self._total -= self._used.popleft()[1]
        left = self._total
        for at, tokens in self._used:
            if left < limit:
                break
            left -= tokens
            if left < limit:
                return max(1, math.ceil(at + WINDOW_SECONDS - now))
        return 0


class KeyRing:
    """The keys of a file, as it is now, and what they have used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._budgets: dict[str, Budget] = {}
        self._keys: dict[str, ApiKey] = {}
        self._checked = -math.inf
        self._stamp: tuple[int, int] | None = None

    def find(self, secret: str) -> ApiKey | None:
        """The key, if it is one."""
        digest = hashed(secret)
        if digest not in self._keys or time.monotonic() - self._checked > _CHECK_SECONDS:
            self._refresh()
        return self._keys.get(digest)

    def budget(self, key: ApiKey) -> Budget:
        """What the key has used."""
        return self._budgets.setdefault(key.name, Budget())

    def _refresh(self) -> None:
        self._checked = time.monotonic()
        try:
            found = self._path.stat()
            stamp = (found.st_mtime_ns, found.st_ino)
        except FileNotFoundError:
            stamp = (0, 0)
        if stamp != self._stamp:
            self._keys = {key.sha256: key for key in read_keys(self._path)}
            self._stamp = stamp


class Keyed:
    """ASGI middleware: lets requests in that carry a key, as `Authorization: Bearer ...`, and are within its limit.

    The key is in `scope["key"]` then, and the trace spends from its budget.
    """

    def __init__(self, app: ASGIApp, ring: KeyRing) -> None:
        self._app = app
        self._ring = ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 or 429 itself."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        refusal = self._admit(scope)
        await (self._app if refusal is None else error_response(refusal))(scope, receive, send)

    def _admit(self, scope: Scope) -> Refusal | None:
        scheme, _, secret = Request(scope).headers.get("authorization", "").partition(" ")
        key = self._ring.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            message = "no valid API key; allowed: the header Authorization: Bearer KEY, with a key of ganymede keys add"
            return Refusal(401, message, "invalid_api_key")
        trace: Any = scope["trace"]
        trace.key = scope["key"] = key
        if key.tokens_per_minute is None:
            return None
        budget = self._ring.budget(key)
        wait = budget.wait_seconds(key.tokens_per_minute)
        if wait:
            message = f"the key {key.name!r} has used its {key.tokens_per_minute} tokens of this minute"
            return Refusal(429, message, "rate_limit_exceeded", retry_after_seconds=wait)
        trace.spend = budget.spend
        return None
