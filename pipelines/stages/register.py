"""Stage `register`: a model enters the registry as candidate, and becomes champion if the gate holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from actors.store.artifacts import Artifact, ArtifactStore
from actors.store.registry import Registry
from actors.store.tracker import tracking_uri
from configs.errors import ConfigError
from configs.schema.evaluation import RegisterConfig
from pipelines.evaluation.comparing import compare_answers
from pipelines.evaluation.gate import gate, measured
from pipelines.evaluation.lineage import ancestors
from pipelines.evaluation.report import Report
from pipelines.stage import Progress, StageContext

CANDIDATE, CHAMPION = "candidate", "champion"


class RegisterStage:
    """Acts every time, and to the same effect: one model has one version, whatever registers it again."""

    kind: ClassVar[str] = "register"
    artifact_kind: ClassVar[str | None] = None
    code_version: ClassVar[int] = 1

    def sources(self, config: RegisterConfig) -> Mapping[str, str]:
        """All data comes from artifacts."""
        return {}

    def run(self, config: RegisterConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Registers `model`; the summary gives name, version, aliases and the gate's reasons.

        Raises:
            ConfigError: the gate's labels do not fit the report, or the report's candidate is another model.
            TrackingError: the registry cannot be reached.
        """
        model, evaluation = inputs["model"], inputs["report"]
        report = Report.load(evaluation.path)
        for role, label in (("baseline", config.gate.baseline), ("candidate", config.gate.candidate)):
            if label not in report.models:
                raise ConfigError(
                    f"gate.{role} is no model of the report", received=label, allowed=", ".join(report.models),
                    next_step="use a label of evaluate.models",
                )  # fmt: skip
        compared = compare_answers(evaluation.path, config.gate.baseline, config.gate.candidate)
        decision = gate(measured(compared), config.gate.conditions)
        if report.models[config.gate.candidate].digest != model.digest:
            raise ConfigError(
                f"gate.candidate {config.gate.candidate!r} is not the model to be registered",
                received=str(model.ref),
                allowed=f"the model that {evaluation.ref} calls {config.gate.candidate!r}",
                next_step="make register.model and evaluate.models agree",
            )
        context.check_lease()
        registry = Registry.open(tracking_uri(context.home))
        entry = registry.register(
            config.name,
            ref=str(model.ref),
            digest=model.digest,
            run_id=model.manifest.tracking_run,
            tags={"ganymede.path": str(model.path), **lineage_tags([model, evaluation], context.store)},
            description="; ".join(decision.reasons),
        )
        registry.set_alias(config.name, CANDIDATE, entry.version)
        if decision.passed:
            registry.set_alias(config.name, CHAMPION, entry.version)
        entry = registry.resolve(f"{config.name}@{entry.version}")
        context.run.set_tags({"ganymede.registered": str(entry)})
        context.run.log_json(asdict(decision), "gate.json")
        context.progress(Progress(1, 1, "versions"))
        return {
            "name": entry.name,
            "version": entry.version,
            "model": entry.ref,
            "digest": entry.digest,
            "aliases": list(entry.aliases),
            "gate": {"passed": decision.passed, "reasons": list(decision.reasons)},
        }


def lineage_tags(artifacts: list[Artifact], store: ArtifactStore) -> dict[str, str]:
    """For `artifacts` and all they were made from: reference, digest and, where there is one, MLflow run."""
    tags: dict[str, str] = {}
    for ref, digest, manifest in ancestors([a.manifest for a in artifacts], store):
        key = ref.partition("@")[0].replace("/", ".")
        tags[f"ganymede.lineage.{key}"] = f"{ref} {digest}"
        if manifest is not None and manifest.tracking_run is not None:
            tags[f"ganymede.run.{key}"] = manifest.tracking_run
    return tags
