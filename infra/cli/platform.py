"""`ganymede up`, `status`, `down` and `serve`: Ray, MLflow and the endpoint on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    from configs.schema.serving import CanaryConfig
    from infra.platform import Platform

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
        str | None,
        typer.Option(metavar="NAME@ALIAS", help="Model to serve; the only registered champion if left out."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the endpoint.")] = 8000,
    dashboard_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Ray's dashboard.")] = 8265,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow's UI.")] = 5000,
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

    share = _share(canary, canary_weight)
    home = state_home()
    route_logs(home)
    if platform.running_platform(home) is None:
        platform.require_free_port(port, "--port")
        local_ray_environment()
        with err().status("starting Ray and MLflow") as status:
            platform.start(
                home,
                dashboard_port=dashboard_port,
                mlflow_port=mlflow_port,
                tracking=tracking_uri(home),
                cpus=logical_cpus() + 1,  # the endpoint's, so that training still finds its own beside it
                object_store_bytes=object_store_bytes(),
                say=status.update,
            )
    else:
        say("the platform runs already")
    model = serve or _champion(tracking_uri(home))
    if model is not None:
        with ray_session(home):
            url = _start_endpoint(model, home, port=port, host=platform.LOOPBACK, canary=share)
        beside = f" with {share.weight:.0%} for {share.model}" if share else ""
        platform.record_endpoint(home, url, f"{model}{beside}")
    elif share is not None:
        raise InputError("--canary needs a model beside it", received=share.model, allowed="--serve NAME@ALIAS")
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
    model: Annotated[str, typer.Argument(metavar="MODEL", help="NAME@ALIAS of the registry, or model/NAME@VERSION.")],
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to bind; 0.0.0.0 opens the endpoint to the network, and asks for API keys.")
    ] = "127.0.0.1",
    require_key: Annotated[
        bool, typer.Option("--require-key", help="Ask for API keys on loopback too (ganymede keys add NAME).")
    ] = False,
    canary: Canary = None,
    canary_weight: CanaryWeight = None,
    debug: Debug = False,
) -> None:
    """Serves a model with the OpenAI API until Ctrl-C. Example: ganymede serve demo@champion --port 8000."""

    share = _share(canary, canary_weight)
    home = state_home()
    route_logs(home)
    with ray_session(home) as cluster:
        from infra.deploy import stop_serving

        url = _start_endpoint(model, home, port=port, host=host, require_key=require_key, canary=share)
        typer.echo(f"{model} answers at {url} (OpenAI API); Ctrl-C ends it")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            say("stopping the endpoint")
        finally:
            if not cluster.embedded:
                stop_serving()


def _share(canary: str | None, weight: float | None) -> CanaryConfig | None:
    """The canary that was asked for."""
    from configs.schema.serving import CanaryConfig

    if canary is not None:
        return CanaryConfig(model=canary, weight=0.1 if weight is None else weight)
    if weight is not None:
        raise InputError("--canary-weight is of a canary", received=weight, allowed="together with --canary NAME@ALIAS")
    return None


def _start_endpoint(
    model: str, home: Path, *, port: int, host: str, canary: CanaryConfig | None, require_key: bool = False
) -> str:
    """Serves `model` on the connected Ray; returns the base URL for OpenAI clients once it answers."""
    with err().status(f"finding {model}") as status:
        from actors.store.artifacts import ArtifactStore
        from configs.schema.serving import ServingConfig
        from infra.deploy import serve_model
        from infra.served import find_model, with_canary

        store = ArtifactStore(home / "artifacts")
        served = with_canary(find_model(model, store, home), canary, store, home)
        config = ServingConfig(port=port, host=host, require_keys=require_key or None, canary=canary).within(home)
        endpoint = serve_model(served, config, say=status.update)
    return endpoint.url


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
