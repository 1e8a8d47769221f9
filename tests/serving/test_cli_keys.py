"""`ganymede keys`, and what `ganymede serve` says where keys are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.errors import InputError
from configs.schema.serving import ServingConfig
from infra.cli.main import app
from infra.deploy import require_keys
from serving.keys import hashed


def test_a_key_is_shown_once_listed_by_name_and_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANYMEDE_HOME", str(tmp_path))

    def ganymede(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["keys", *arguments])
        return result.exit_code, result.stdout

    config = ServingConfig(host="0.0.0.0").within(tmp_path)
    with pytest.raises(InputError, match="ganymede keys add"):
        require_keys(config)
    code, shown = ganymede("add", "ana", "--model", "demo", "--tokens-per-minute", "500")
    assert code == 0
    require_keys(config)
    secret = shown.split()[0]
    assert secret.startswith("gk-")
    kept = (tmp_path / "keys.json").read_text()
    assert secret not in kept
    assert hashed(secret) in kept
    code, listed = ganymede("list", "--json")
    assert json.loads(listed) == [{"name": "ana", "models": ["demo"], "tokens_per_minute": 500}]
    assert ganymede("add", "ana")[0] == 2
    assert ganymede("add", "a b")[0] == 2
    assert ganymede("revoke", "ana")[0] == 0
    assert ganymede("revoke", "ana")[0] == 2
    assert ganymede("list", "--json")[1].strip() == "[]"
