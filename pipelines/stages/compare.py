"""Stage `compare`: decoders of any architecture side by side on one corpus."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from actors.store.artifacts import Artifact
from actors.text import Text
from configs.errors import ArtifactError, ContractError
from configs.schema.comparison import CompareConfig
from pipelines.corpus.loader import Loader
from pipelines.corpus.shards import CorpusIndex
from pipelines.evaluation.positions import doubling_means, draw_comparison, nats_by_position
from pipelines.stage import Progress, StageContext
from pipelines.training.models import context_length, load_model, parameter_count
from pipelines.training.publication import CURVE


class CompareStage:
    """Publishes report.json and comparison.png: both curves, and the perplexity by position in the context."""

    kind: ClassVar[str] = "compare"
    artifact_kind: ClassVar[str | None] = "report"
    code_version: ClassVar[int] = 1

    def sources(self, config: CompareConfig) -> Mapping[str, str]:
        """Everything comes from the store."""
        return {}

    def run(self, config: CompareConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Reads the same validation rows with every model.

        Raises:
            ArtifactError: a model does not say how it learned.
            ContractError: a model has another tokenizer than the corpus.
        """
        corpus = inputs["corpus"]
        models = {label: inputs[f"models.{label}"] for label in config.models}
        for label, model in models.items():
            _check(label, model, corpus)
        length = min(context_length(model.path) for model in models.values())
        loader = Loader.open(corpus.path, split="validation", row_tokens=length, batch_rows=1, seed=0)
        rows = loader.rows(config.rows)
        report: dict[str, Any] = {"rows": len(rows), "row_tokens": length, "models": {}}
        curves: dict[str, Any] = {}
        positions: dict[str, list[float]] = {}
        for number, (label, artifact) in enumerate(models.items()):
            model = load_model(artifact.path)

            def progress(done: int, before: int = number * len(rows)) -> None:
                context.progress(Progress(before + done, len(models) * len(rows), "rows"))

            positions[label] = nats_by_position(model, rows, progress).tolist()
            curves[label] = json.loads((artifact.path / CURVE).read_bytes())
            nats = math.fsum(positions[label]) / length
            report["models"][label] = {
                "digest": artifact.digest,
                "parameters": parameter_count(model),
                "nats_per_token": nats,
                "perplexity": math.exp(nats),
                "bits_per_byte": nats / math.log(2) / loader.bytes_per_token,
                "perplexity_by_position": doubling_means(positions[label]),
                "curve": curves[label],
            }
        (context.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
        draw_comparison(curves, positions, context.out / "comparison.png")
        context.run.log_file(context.out / "comparison.png")
        figures = {label: {k: m[k] for k in ("perplexity", "bits_per_byte")} for label, m in report["models"].items()}
        context.run.log_metrics({f"{label}/{k}": v for label, m in figures.items() for k, v in m.items()}, step=0)
        return {"rows": len(rows), "row_tokens": length, "models": figures}


def _check(label: str, model: Artifact, corpus: Artifact) -> None:
    contract = Text.load(model.path).contract
    expected = CorpusIndex.load(corpus.path).contract
    if contract is None or contract.hash != expected:
        raise ContractError(
            f"models.{label} cannot be read on {corpus.ref}: it has another tokenizer",
            received=None if contract is None else contract.hash,
            allowed=expected,
            next_step="compare models made with the corpus's tokenizer",
        )
    if not (model.path / CURVE).exists():
        raise ArtifactError(
            f"models.{label} does not say how it learned",
            received=str(model.ref),
            allowed=f"a model with {CURVE}, as pretrain and finetune publish it",
            next_step="train it again",
        )
