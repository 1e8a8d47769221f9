"""`ganymede keys`: who may ask the endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infra.cli.output import Debug, Json, print_json, print_table, say
from infra.local import state_home

app = typer.Typer(help="API keys of the endpoint: add, list, revoke.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; it stands in the access log.")]


def _path() -> Path:
    return state_home() / "keys.json"


@app.command()
def add(
    name: Name,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model that it may ask (repeat for more); all if left out.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Prompt and answer tokens together; no limit if left out.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Makes a key and prints it, once; its hash is kept. Example: ganymede keys add ana --tokens-per-minute 20000."""
    from serving.keys import add_key

    secret = add_key(_path(), name, tuple(model or ()), tokens_per_minute)
    if as_json:
        print_json({"name": name, "key": secret})
        return
    typer.echo(secret)
    say("it is not shown again; an endpoint that asks for keys takes it from now on")


@app.command("list")
def list_(as_json: Json = False, debug: Debug = False) -> None:
    """Lists the keys by name. Example: ganymede keys list."""
    from serving.keys import read_keys

    keys = read_keys(_path())
    if as_json:
        print_json([key.model_dump(exclude={"sha256"}) for key in keys])
        return
    if not keys:
        say("there are no keys; ganymede keys add NAME makes one")
        return
    rows = [(k.name, ", ".join(k.models) or "all", str(k.tokens_per_minute or "no limit")) for k in keys]
    print_table(("name", "models", "# tokens a minute"), rows)


@app.command()
def revoke(name: Name, as_json: Json = False, debug: Debug = False) -> None:
    """Forgets a key; endpoints refuse it within a second. Example: ganymede keys revoke ana."""
    from serving.keys import revoke_key

    revoke_key(_path(), name)
    if as_json:
        print_json({"revoked": name})
    else:
        typer.echo(f"{name} is revoked")
