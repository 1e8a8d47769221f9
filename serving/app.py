"""The Ray Serve application: which deployments there are, how many replicas, and how they are replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.deployment import Application, Deployment
from ray.serve.schema import LoggingConfig

import actors
import configs
import serving
from configs.schema.serving import OF_ONE_MODEL, ModelSettings, ServingConfig
from serving.autoscaling import Aim, WorkPolicy
from serving.calls import Offer, ServedModel
from serving.ingress import Ingress
from serving.replica import EngineReplica

APP_NAME = "ganymede"
CANARY_APP_PREFIX = "ganymede-canary-"
LOGGING = LoggingConfig(encoding="JSON", log_level="WARNING", enable_access_log=False)
"""To files of the Ray session only; neither prompts nor answers are logged."""

INGRESS_REQUESTS = 4096
"""Requests the ingress holds open; HAProxy's own limit on connections."""
BUSY_SHARE = 0.75
"""Replicas are added when their requests fill more than this share of the sequences they decode together."""
UPSCALE_SECONDS = 5.0
"""More replicas have to be wanted for this long before they are started."""
DOWNSCALE_SECONDS = 600.0
"""Fewer have to be wanted for this long before one ends."""


def canary_app_name(model: str) -> str:
    """The application that holds the canary of a model."""
    return f"{CANARY_APP_PREFIX}{model}"


def build_canary(canary: ServedModel, settings: ModelSettings, *, side_by_side: bool) -> Application:
    """The replicas of a canary. An application of its own, so that it can be there before requests are sent to it and
    end after the last of them; the arguments are as for `build_app`.
    """
    return _engines("canary", canary, settings, side_by_side=side_by_side)


def build_app(offers: Sequence[Offer], config: ServingConfig, *, side_by_side: Callable[[Offer], bool]) -> Application:
    """The application that serves `offers`; `serve.run` starts it, or replaces the one that runs.

    Args:
        offers: the models, each of another name; the canaries of those that have one run already.
        config: of the endpoint.
        side_by_side: whether an update of a model starts new replicas before it ends old ones, which takes room for one
            more of them; else old ones end first, and a single replica's requests wait meanwhile.
    """
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=INGRESS_REQUESTS,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=max(offer.settings.drain_limit_seconds for offer in offers),
        logging_config=LOGGING,
    )
    engines = {
        offer.model.name: _engines(
            f"engine-{offer.model.name}", offer.model, offer.settings, side_by_side=side_by_side(offer)
        )
        for offer in offers
    }
    canaries = {
        offer.model.name: serve.get_app_handle(canary_app_name(offer.model.name))
        for offer in offers
        if offer.model.canary is not None
    }
    return ingress.bind(tuple(offers), engines, canaries, config)


def _engines(name: str, model: ServedModel, config: ModelSettings, *, side_by_side: bool) -> Application:
    """The replicas of one version."""
    sequences = config.max_sequences
    aim = Aim(first_token_seconds=config.first_token_seconds, sequences=sequences, busy_share=BUSY_SHARE)
    engines: Deployment = serve.deployment(
        EngineReplica,
        name=name,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(config.cpus_per_replica)))}},
        },
        # The engine's own queue decides what is refused; Serve's limit only has to be out of its way.
        max_ongoing_requests=2 * (sequences + config.max_queued),
        max_surge_percent=100 if side_by_side else 0,
        max_constructor_retry_count=2,
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=config.drain_limit_seconds,
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.replicas_min,
            max_replicas=config.replicas_max,
            # Whether the model can be served is seen when it is deployed, not when it is first asked.
            initial_replicas=max(1, config.replicas_min),
            downscale_to_zero_delay_s=config.idle_seconds,
            target_ongoing_requests=max(1.0, BUSY_SHARE * sequences),
            upscale_delay_s=UPSCALE_SECONDS,
            downscale_delay_s=DOWNSCALE_SECONDS,
            policy=AutoscalingPolicy(policy_function=WorkPolicy, policy_kwargs=asdict(aim)),
        ),
        logging_config=LOGGING,
    )
    # Without a version of ours, Ray Serve restarts every replica whenever anything of the application changes: a canary
    # that comes or goes would have the stable version loaded anew. No public option of Ray Serve names versions.
    return engines.options(version=_version(model, config), _internal=True).bind(model.replicated, config)


def _version(model: ServedModel, settings: ModelSettings) -> str:
    """Of a replica: two of one version need not be told apart. Model, settings and code are in it."""
    digest = blake2b(digest_size=16)
    own = settings.model_dump_json(include=ModelSettings.model_fields.keys() - OF_ONE_MODEL)
    digest.update(f"{model.digest} {model.folder} {own}".encode())
    for package in (actors, configs, serving):
        for path in sorted(Path(package.__path__[0]).rglob("*.[pch]*")):
            if path.suffix in (".py", ".c", ".h"):
                digest.update(path.read_bytes())
    return digest.hexdigest()
