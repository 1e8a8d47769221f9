"""`ganymede serve` with several models and adapters, as it is typed: asked by `openai` and curl, ended by Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest

from infra.platform import free_ports
from tests.faults.command import heed_interrupts
from tests.infra.conftest import command_environment, run_ganymede
from tests.serving.test_several_models import ADAPTERS, PROMPT, home

__all__ = ["home"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

FILE = """
precision: fp32
cpus_per_replica: 0.5
models:
  - model: model/base@1
    adapters: [model/legal@1, model/medical@1]
    max_adapters: 1
  - model: model/other@1
    replicas_max: 1
"""


@contextmanager
def serving(home: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`ganymede serve`, once it says that it answers; ended by Ctrl-C, after which nothing of it is left."""
    command = [sys.executable, "-m", "infra.cli.main", "serve", *arguments]
    process = subprocess.Popen(
        command, cwd=home, env=command_environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.readline()
    assert "Ctrl-C ends it" in said, said + process.stdout.read()
    below = psutil.Process(process.pid).children(recursive=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        _, left = psutil.wait_procs(below, timeout=30)
        assert not left, [each.cmdline() for each in left]


def texts(port: str, names: tuple[str, ...]) -> dict[str, str]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0) as client:
        return {
            name: client.completions.create(model=name, prompt=PROMPT, max_tokens=20, temperature=0).choices[0].text
            for name in names
        }


def test_a_file_of_models_is_served_whole(home: Path, tmp_path: Path) -> None:
    (port,) = map(str, free_ports(1))
    file = tmp_path / "models.yaml"
    file.write_text(FILE)
    names = ("base", "other", *ADAPTERS)
    with serving(home, str(file), "--port", port):
        found = texts(port, names)
        listed = subprocess.run(
            ["curl", "-sf", f"http://127.0.0.1:{port}/v1/models"], capture_output=True, text=True, check=True
        )
    assert len(set(found.values())) == len(names)
    parents = {model["id"]: model["parent"] for model in json.loads(listed.stdout)["data"]}
    assert parents == {"base": None, "legal": "base", "medical": "base", "other": None}
    merged = tuple(f"model/{name}-merged@1" for name in ADAPTERS)
    with serving(home, *merged, "model/base@1", "--adapter", "model/legal@1", "--port", port):
        again = texts(port, ("legal-merged", "medical-merged", "base", "legal"))
    assert [again["legal-merged"], again["medical-merged"]] == [found["legal"], found["medical"]]
    assert (again["base"], again["legal"]) == (found["base"], found["legal"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model/legal@1"], "--adapter model/legal@1"),
        (["model/other@1", "--adapter", "model/legal@1"], "adapter of no model that is served"),
        (["model/other@1", "model/other@1"], "called 'other'"),
        (["models.yaml", "model/other@1"], "one file, or models"),
        (["nothing.yaml"], "cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_do(home: Path, arguments: list[str], said: str) -> None:
    done = run_ganymede(home, "serve", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())
