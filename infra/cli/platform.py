"""`ganymede up`, `status`, `down` and `serve`: Ray, MLflow and the endpoint on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from configs.errors import InputError
from infra.cli.output import Debug, Json, err, print_json, print_table, say
from infra.local import (
    local_ray_environment,
    logical_cpus,
    object_store_bytes,
    ray_session,
    route_logs,
    state_home,
)

if TYPE_CHECKING:
    from configs.schema.serving import CanaryConfig, ServingConfig
    from infra.platform import Platform
    from serving.calls import Offer

_MODELS = "NAME@ALIAS of the registry, model/NAME@VERSION, or a YAML file of models and settings. Can be repeated."
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="NAME@ALIAS",
        help="A fine-tuned adapter (lora.merge: false) that its base's replicas answer for too. Can be repeated.",
    ),
]  # fmt: skip
Canary = Annotated[
    str | None,
    typer.Option(metavar="NAME@ALIAS", help="Another version of the model, which gets a share of the requests."),
]
CanaryWeight = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", min=0.001, max=0.999,
        help="The canary's share of those who ask (the field user of requests; where it is missing, of the requests); "
        "0.1 unless given.",
    ),
]  # fmt: skip


def up(
    serve: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help=f"{_MODELS} The only registered champion if left out."),
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the endpoint; 8000 unless given.")] = None,
    dashboard_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Ray's dashboard.")] = 8265,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow's UI.")] = 5000,
    adapters: Adapters = None,
    canary: Canary = None,
    canary_weight: CanaryWeight = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Starts Ray, MLflow's UI and the endpoint on loopback; they outlive the terminal. Example: ganymede up.

    Where they run already, the endpoint is brought to what is asked for, without failing a request: another version
    (--serve demo@champion), a canary beside it (--serve demo@champion --canary demo@candidate), its end (without
    --canary).
    """
    from actors.store.tracker import tracking_uri
    from infra import platform
    from infra.deploy import cpus_needed

    asked = _Asked.read(serve or [], adapters, canary, canary_weight, port=port)
    home = state_home()
    route_logs(home)
    if not asked.config.models:
        champion = _champion(tracking_uri(home))
        if champion is not None:
            asked = _Asked.read([champion], adapters, canary, canary_weight, port=port)
        elif canary is not None or adapters:
            raise InputError("canaries and adapters need a model beside them", allowed="--serve NAME@ALIAS")
    offers = asked.find(home)
    if platform.running_platform(home) is None:
        platform.require_free_port(asked.config.port, "--port")
        local_ray_environment()
        with err().status("starting Ray and MLflow") as status:
            platform.start(
                home,
                dashboard_port=dashboard_port,
                mlflow_port=mlflow_port,
                tracking=tracking_uri(home),
                # beside the endpoint's, so that training still finds its own
                cpus=logical_cpus() + max(1, math.ceil(cpus_needed(offers))),
                object_store_bytes=object_store_bytes(),
                say=status.update,
            )
    else:
        say("the platform runs already")
    if offers:
        with ray_session(home):
            url = _start_endpoint(offers, asked.config, home)
        platform.record_endpoint(home, url, asked.named)
    else:
        say("no endpoint: no model is champion; ganymede up --serve NAME@ALIAS serves another")
    _show(platform.recorded_platform(home), as_json)


def status(as_json: Json = False, debug: Debug = False) -> None:
    """Says what runs and where. Example: ganymede status."""
    from infra.platform import recorded_platform

    _show(recorded_platform(state_home()), as_json)


def down(as_json: Json = False, debug: Debug = False) -> None:
    """Ends everything that up started; artifacts and runs are kept. Example: ganymede down."""
    from infra.platform import stop

    home = state_home()
    with err().status("stopping"):
        ended = stop(home)
    if as_json:
        print_json({"processes_ended": ended})
    else:
        typer.echo(f"{ended} processes ended" if ended else "nothing was running")


def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=_MODELS)],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="8000 unless given.")] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to bind, loopback unless given; 0.0.0.0 opens the endpoint to the network, and asks for API "
            "keys."
        ),
    ] = None,
    require_key: Annotated[
        bool, typer.Option("--require-key", help="Ask for API keys on loopback too (ganymede keys add NAME).")
    ] = False,
    adapters: Adapters = None,
    canary: Canary = None,
    canary_weight: CanaryWeight = None,
    debug: Debug = False,
) -> None:
    """Serves models with the OpenAI API until Ctrl-C. Example: ganymede serve demo@champion --port 8000.

    Several models share the endpoint: ganymede serve demo@champion sentiment@champion. What each of them has of its own
    (replicas, a canary, adapters) stands in a YAML file: ganymede serve models.yaml.
    """
    asked = _Asked.read(models, adapters, canary, canary_weight, port=port, host=host, require_key=require_key)
    home = state_home()
    route_logs(home)
    offers = asked.find(home)

    from infra.deploy import cpus_needed, stop_serving

    with ray_session(home, least_cpus=cpus_needed(offers)) as cluster:
        url = _start_endpoint(offers, asked.config, home)
        verb = "answer" if len(offers) + len(asked.adapters) > 1 else "answers"
        typer.echo(f"{asked.named} {verb} at {url} (OpenAI API); Ctrl-C ends it")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            say("stopping the endpoint")
        finally:
            if not cluster.embedded:
                stop_serving()


@dataclass(frozen=True)
class _Asked:
    """What a command is to serve."""

    config: ServingConfig
    adapters: tuple[str, ...]
    """Of any of the models; which of them, their manifests say."""
    canary: CanaryConfig | None
    """Of the model with its name."""

    @classmethod
    def read(
        cls, models: list[str], adapters: list[str] | None, canary: str | None, weight: float | None, **options: Any
    ) -> Self:
        """From a command's arguments; `options` that are None or False say nothing.

        Raises:
            ConfigError: a YAML file is not one of models.
            InputError: the arguments do not go together.
        """
        from configs.load import load_serving
        from configs.schema.serving import CanaryConfig, ServedModelConfig, ServingConfig

        if weight is not None and canary is None:
            raise InputError(
                "--canary-weight is of a canary", received=weight, allowed="together with --canary NAME@ALIAS"
            )
        files = [model for model in models if Path(model).suffix in (".yaml", ".yml")]
        if files and len(models) > 1:
            raise InputError(
                "a file of models says all that is served", received=" ".join(models), allowed="one file, or models"
            )
        if files:
            config = load_serving(files[0])
        else:
            config = ServingConfig(models=tuple(ServedModelConfig(model=model) for model in models))
        given = {"require_keys" if name == "require_key" else name: value for name, value in options.items() if value}
        share = None if canary is None else CanaryConfig(model=canary, weight=0.1 if weight is None else weight)
        return cls(config.model_copy(update=given), tuple(adapters or ()), share)

    @property
    def named(self) -> str:
        """For people."""
        names = [
            each.model
            + (f" with {each.canary.weight:.0%} for {each.canary.model}" if each.canary else "")
            + "".join(f" and {adapter}" for adapter in each.adapters)
            for each in self.config.models
        ]
        beside = f" with {self.canary.weight:.0%} for {self.canary.model}" if self.canary else ""
        return ", ".join([*names, *self.adapters]) + beside

    def find(self, home: Path) -> tuple[Offer, ...]:
        """The versions that it stands for now. Raises as `find_offers`."""
        with err().status(f"finding {self.named}"):
            from actors.store.artifacts import ArtifactStore
            from infra.served import find_offers

            store = ArtifactStore(home / "artifacts")
            return find_offers(self.config.models, store, home, adapters=self.adapters, canary=self.canary)


def _start_endpoint(offers: Sequence[Offer], config: ServingConfig, home: Path) -> str:
    """Serves on the connected Ray; returns the base URL for OpenAI clients once all models answer."""
    with err().status("starting the endpoint") as status:
        from infra.deploy import serve_offers

        return serve_offers(offers, config.within(home), say=status.update).url


def _champion(uri: str) -> str | None:
    """`NAME@champion` if exactly one model of the registry has a champion."""
    from actors.store.registry import Registry

    names = [entry.name for entry in Registry.open(uri).entries() if "champion" in entry.aliases]
    if len(names) > 1:
        say(f"several models have a champion: {', '.join(names)}")
    return f"{names[0]}@champion" if len(names) == 1 else None


def _show(platform: Platform | None, as_json: bool) -> None:
    """Services, addresses and whether they answer."""
    from infra.platform import services

    found = services(platform)
    if as_json:
        print_json({"ray_address": platform.ray_address if platform else None, "services": [vars(s) for s in found]})
        return
    if not found:
        typer.echo("nothing runs; ganymede up starts it")
        return
    print_table(("service", "state", "address"), [(s.name, s.state, s.url) for s in found])
