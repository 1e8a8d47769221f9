"""The command line as a whole: what it loads, what it says, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.conftest import Ganymede, command_environment

HEAVY = ("torch", "ray", "mlflow", "transformers", "numpy", "pandas", "pyarrow", "fastapi")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["artifacts", "--help"]])
def test_help_loads_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    script = (
        "import sys\nfrom infra.cli.main import main\n"
        f"sys.argv = ['ganymede', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        f"print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=command_environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "[]"


def test_help_documents_the_exit_codes(ganymede: Ganymede) -> None:
    assert "0 done, 1 failed, 2 bad input, 130 interrupted" in " ".join(ganymede("--help").stdout.split())


@pytest.mark.parametrize(
    "command", ["run", "generate", "up", "status", "down", "serve", "submit", "doctor", "jobs stop", "artifacts gc"]
)
def test_every_help_text_has_an_example(ganymede: Ganymede, command: str) -> None:
    assert f"Example: ganymede {command}" in " ".join(ganymede(*command.split(), "--help").stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "dmo"], "did you mean demo?"),
        (["run", "demo", "--set", "nmae=x"], "nmae: unknown key; did you mean name?"),
        (["run", "demo", "--only", "pretrian"], "did you mean pretrain?"),
        (["run"], "Missing argument"),
        (["artifacts", "show", "model"], "kind/name@version"),
        (["generate", "model/none@1", "--prompt", "x"], "no artifact model/none@1"),
        (["generate", ".", "--prompt", "x", "--top-p", "0"], "--top-p"),
        (["jobs", "list"], "--address is needed"),
        (["submit", "demo", "--address", "http://127.0.0.1:1"], "no Ray dashboard answers"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(ganymede: Ganymede, arguments: list[str], message: str) -> None:
    done = ganymede(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_error_with_json_is_still_one_document(ganymede: Ganymede) -> None:
    done = ganymede("run", "dmo", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["received"] == "dmo"


def test_debug_shows_the_traceback(ganymede: Ganymede) -> None:
    assert "Traceback" in ganymede("run", "dmo", "--debug").stderr


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "infra.cli.main", "artifacts", "list"],
        env=command_environment(tmp_path / "file" / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "set GANYMEDE_HOME" in done.stderr


def test_doctor_reports_every_topic_as_json(ganymede: Ganymede) -> None:
    done = ganymede("doctor", "--json")
    topics = {finding["topic"] for finding in json.loads(done.stdout)}
    assert {"Python", "cores", "memory", "disk", "processor", "GPU", "C++ toolchain", "packages"} <= topics
