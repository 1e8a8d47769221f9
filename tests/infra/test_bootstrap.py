"""What `make setup` says where something that it needs is missing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

BOOTSTRAP = Path(__file__).parents[2] / "infra" / "bootstrap.py"


def bootstrap(folder: Path, before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The set-up in an empty folder, in an interpreter that `before` took something from."""
    script = f"import runpy, sys\n{before}\nrunpy.run_path({str(BOOTSTRAP)!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_old_python_is_told_so_by_a_file_it_can_parse(tmp_path: Path) -> None:
    ast.parse(BOOTSTRAP.read_text(), feature_version=(3, 6))
    done = bootstrap(tmp_path, "sys.version_info = (3, 10, 13, 'final', 0)")
    assert done.returncode == 1
    what, received, step = done.stderr.splitlines()
    assert what == "error: Ganymede needs Python 3.11 or newer"
    assert received == f"  received: Python 3.10.13 ({sys.executable})"
    assert step == "  next: install Python 3.11 and run: make PYTHON=python3.11"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_what_to_install(tmp_path: Path, module: str) -> None:
    done = bootstrap(tmp_path, f"sys.modules[{module!r}] = None")
    assert done.returncode == 1
    what, received, step = done.stderr.splitlines()
    assert what == "error: Python's venv module is missing"
    assert received == f"  received: {sys.executable}"
    assert "apt-get install python3-venv" in step
    assert not any(tmp_path.iterdir())


def test_a_package_that_cannot_be_installed_is_named(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text("no-such-package-of-ours==1.0\n")
    done = bootstrap(tmp_path, "", PIP_NO_INDEX="1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: pip could not install\n")
    assert "no-such-package-of-ours==1.0" in done.stderr
    assert "Traceback" not in done.stderr
