"""Where a served model comes from, as `find_model` reads it off the store, and the endpoint tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.store.artifacts import Artifact, ArtifactStore
from configs.artifacts import Identity, Ref
from configs.errors import ArtifactError
from infra.served import find_model
from tests.serving.conftest import endpoint_of


def publish(store: ArtifactStore, ref: str, run: str | None, **inputs: Artifact) -> Artifact:
    out = store.staging(Ref.parse(ref), "owner")
    (out / "content.txt").write_text(ref)
    return store.publish(
        out, ref=Ref.parse(ref), identity=Identity("k", 1, {"ref": ref}, {}, {}), config={}, inputs=inputs, summary={},
        tracking_run=run, fence=lambda: None,
    )  # fmt: skip


def test_the_endpoint_tells_what_its_model_was_made_from_and_how_it_was_judged(
    tmp_path: Path, model_folder: Path
) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    corpus = publish(store, "corpus/demo@1", "run-corpus")
    base = publish(store, "model/demo-pretrain@1", "run-pretrain", corpus=corpus)
    model = publish(store, "model/demo-finetune@2", "run-finetune", model=base)
    report = publish(store, "report/demo@1", "run-evaluate", **{"models.after": model, "models.before": base})
    publish(store, "report/other@1", None, **{"models.after": base})
    served = find_model("model/demo-finetune@2", store, tmp_path)
    assert served.digest == model.digest
    with endpoint_of(model_folder, served) as url:
        lineage: dict[str, Any] = httpx.get(f"{url}/v1/models/demo-finetune").json()["lineage"]
    assert lineage == {
        "run": "run-finetune",
        "made_from": [
            {"ref": "model/demo-pretrain@1", "digest": base.digest, "run": "run-pretrain"},
            {"ref": "corpus/demo@1", "digest": corpus.digest, "run": "run-corpus"},
        ],
        "reports": [{"ref": "report/demo@1", "digest": report.digest, "run": "run-evaluate"}],
    }


def test_an_ancestor_that_was_removed_is_still_named(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    corpus = publish(store, "corpus/demo@1", "run-corpus")
    publish(store, "model/demo@1", None, corpus=corpus)
    store.remove(corpus.ref)
    lineage = find_model("model/demo@1", store, tmp_path).lineage
    assert [(each.ref, each.digest, each.run) for each in lineage.made_from] == [("corpus/demo@1", corpus.digest, None)]
    with pytest.raises(ArtifactError, match="model"):
        find_model("corpus/demo@1", store, tmp_path)
