"""`kill -9` of any process, in any stage: the same command goes on, and the artifacts are those of a run left alone."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.store.artifacts import ArtifactStore, verify_files
from infra.deploy import ANSWER_TOKENS
from tests.faults.command import RECIPE, Command

QUESTION = "Open a file and return its lines."
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def digests(document: dict[str, object]) -> dict[str, str]:
    outcomes = document["outcomes"]
    assert isinstance(outcomes, list)
    return {o["stage"]: o["digest"] for o in outcomes}


def assert_whole(home: Path) -> None:
    """Whatever is published verifies, byte for byte."""
    store = ArtifactStore(home / "artifacts")
    for manifest in store.list():
        verify_files(store.get(manifest.ref))


def test_a_run_killed_in_every_stage_ends_with_the_artifacts_of_an_uninterrupted_one(tmp_path: Path) -> None:
    untouched = digests(Command(tmp_path / "untouched").finish())
    home = tmp_path / "killed"

    for stage in ("tokenizer", "corpus", "instructions"):
        run = Command(home)
        run.until(run.in_stage(stage))
        if stage == "corpus":
            run.until(lambda: any((home / "work").glob("corpus-tiny-corpus-*/*")))
        run.kill()
        assert_whole(home)

    run = Command(home)
    run.until(run.trained("pretrain", 10))
    run.kill_child("RayTrainWorker")  # replaced by Ray Train; the run goes on
    run.until(run.trained("pretrain", 40))
    run.kill()
    assert_whole(home)

    run = Command(home)
    run.until(run.trained("finetune", 10))
    run.kill()
    assert_whole(home)

    run = Command(home)
    run.until(run.trained("finetune", 25))
    run.kill_child("raylet/raylet")
    run.process.wait(timeout=120)
    assert run.process.returncode == 1
    message = Path(run.log.name).read_text()
    assert "Traceback" not in message
    assert_whole(home)

    for stage in ("evaluate", "register"):
        run = Command(home)
        run.until(run.in_stage(stage))
        run.kill()
        assert_whole(home)

    last = Command(home).finish()
    assert digests(last) == untouched
    assert not any((home / "artifacts" / ".staging").glob("*"))

    assert_deploy_survives(home, tmp_path)


def assert_deploy_survives(home: Path, folder: Path) -> None:
    """`deploy` publishes nothing: whatever was killed, the same command serves the same answers."""
    recipe = with_deploy(folder)
    answer = deployed(Command(home, recipe).finish())

    run = Command(home, recipe)
    run.until(lambda: any((home / "leases").glob("deploy-*/*.json")))
    run.kill()

    run = Command(home, recipe)
    run.until(lambda: any(run.children("ServeReplica")))
    run.kill()

    run = Command(home, recipe)
    run.kill_child("ServeReplica")  # replaced by Ray Serve; the run goes on
    assert deployed(run.finish()) == answer
    assert_whole(home)
    assert answer[1] == greedy_by_transformers(home, "model/tiny-finetune@1")


def greedy_by_transformers(home: Path, ref: str) -> str:
    """What a plain script makes of the published folder, asked what the endpoint was asked."""
    folder = ArtifactStore(home / "artifacts").get(ref).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**asked, max_new_tokens=ANSWER_TOKENS, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def with_deploy(folder: Path) -> Path:
    """The tiny recipe with a stage that serves the model and asks it something."""
    document = yaml.safe_load(RECIPE.read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serving = {"port": port}
    document["stages"]["deploy"] = {"model": "register", "question": QUESTION, "serving": serving}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))
    return recipe


def deployed(document: dict[str, object]) -> tuple[str, str]:
    """Digest of the model that was served, and what it answered."""
    outcomes = document["outcomes"]
    assert isinstance(outcomes, list)
    summary = outcomes[-1]["summary"]
    assert summary["answer_tokens"] > 0
    return summary["digest"], summary["answer"]
