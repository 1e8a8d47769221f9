"""Ctrl-C in the middle of training: the command ends cleanly, says how to go on, and leaves no process behind."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.faults.command import Command

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_ctrl_c_ends_a_run_cleanly_and_the_same_command_goes_on(tmp_path: Path) -> None:
    run = Command(tmp_path / "home", terminal=True)
    run.until(run.trained("pretrain", 10))
    family = psutil.Process(run.process.pid).children(recursive=True)
    run.interrupt()
    output, _ = run.process.communicate(timeout=60)
    assert run.process.returncode == 130
    assert output == b""
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, f"orphans: {[p.cmdline()[:3] for p in alive]}"
    said = Path(run.log.name).read_text()
    assert "interrupted; what was finished is kept. To go on: ganymede run" in said
    assert "Traceback" not in said

    outcomes = Command(tmp_path / "home").finish()["outcomes"]
    assert isinstance(outcomes, list)
    assert [o["status"] for o in outcomes[:2]] == ["reused", "reused"]
    assert outcomes[-1]["status"] == "acted"
