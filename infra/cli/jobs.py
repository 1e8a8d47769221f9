"""`ganymede submit` and `ganymede jobs`: recipes on a Ray cluster, through Ray Jobs."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.output import Debug, Json, err, print_json, print_table, say
from infra.local import route_logs, state_home

if TYPE_CHECKING:
    from infra.submit import Job, JobClient

app = typer.Typer(help="Jobs on a Ray cluster: list, logs, stop.", no_args_is_help=True)
Address = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The cluster's dashboard, http://host:8265; that of `ganymede up` if left out."),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The id that submit printed.")]


def submit(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A packaged recipe, or a YAML file below this folder.")
    ],
    address: Address = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As for run.")] = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="As for run.")] = None,
    start: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="As for run.")] = None,
    home: Annotated[
        str | None, typer.Option(help="State folder on the cluster, seen by all of its nodes; needed for a remote one.")
    ] = None,
    python: Annotated[str | None, typer.Option(help="Python on the cluster that has the packages installed.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the log; end with the job's exit code.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Runs a recipe as a Ray job. Example: ganymede submit demo --address http://127.0.0.1:8265 --follow."""
    from configs.load import load_recipe
    from infra.submit import cluster_python, recipe_job

    load_recipe(recipe, set_ or ())
    client = _connect(address)
    here = client.on_this_machine()
    arguments = [part for override in set_ or () for part in ("--set", override)]
    arguments += [part for option, value in (("--only", only), ("--from", start)) if value for part in (option, value)]
    entrypoint, runtime_env = recipe_job(
        recipe,
        arguments,
        folder=Path.cwd(),
        home=home or _home_of(client, here),
        python=python or cluster_python(here),
    )
    with err().status("packing and sending the working directory"):
        job_id = client.submit(entrypoint, runtime_env, {"recipe": recipe})
    if not follow:
        if as_json:
            print_json({"job": job_id, "address": client.address})
        else:
            typer.echo(job_id)
            say(f"follow it: ganymede jobs logs {job_id} --address {client.address} --follow")
        return
    say(f"job {job_id} at {client.address}; Ctrl-C stops following, not the job")
    _end_with(client.follow(job_id, _writer(as_json)), as_json)


@app.command("list")
def list_(address: Address = None, as_json: Json = False, debug: Debug = False) -> None:
    """Lists the jobs of a cluster. Example: ganymede jobs list --address http://127.0.0.1:8265."""
    jobs = _connect(address).list()
    if as_json:
        print_json([vars(job) for job in jobs])
        return
    rows = [(job.id, job.status, _clock(job.started_at), job.entrypoint) for job in jobs]
    print_table(("job", "state", "started", "command"), rows)


@app.command()
def logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it has ended; with its exit code.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prints what a job wrote. Example: ganymede jobs logs raysubmit_123 --follow."""
    client = _connect(address)
    client.job(job)
    if follow:
        _end_with(client.follow(job, _writer(as_json)), as_json)
    elif as_json:
        print_json({"job": job, "logs": client.logs(job)})
    else:
        sys.stdout.write(client.logs(job))


@app.command()
def stop(job: JobId, address: Address = None, as_json: Json = False, debug: Debug = False) -> None:
    """Ends a job; finished stages are kept. Example: ganymede jobs stop raysubmit_123."""
    client = _connect(address)
    client.job(job)
    stopped = client.stop(job)
    if as_json:
        print_json({"job": job, "stopped": stopped})
    else:
        typer.echo(f"{job} is told to stop" if stopped else f"{job} had ended already")


def _connect(address: str | None) -> JobClient:
    from configs.errors import InputError
    from infra.platform import running_platform
    from infra.submit import JobClient

    home = state_home()
    platform = running_platform(home)
    if address is None and platform is None:
        raise InputError(
            "--address is needed: no platform of this state folder runs",
            allowed="http://host:port of a cluster's dashboard",
            next_step="ganymede up starts a platform on this machine",
        )
    client = JobClient.connect(address or str(platform and platform.dashboard_url))
    route_logs(home)
    return client


def _home_of(client: JobClient, here: bool) -> str:
    """The state folder that a job gets when none is named: ours, if the cluster is on this machine."""
    from configs.errors import InputError

    if here:
        return str(state_home())
    raise InputError(
        f"--home is needed: {client.address} is another machine, and what a job leaves in its own folder is lost",
        received=os.environ.get("GANYMEDE_HOME"),
        allowed="a folder on storage that all nodes of the cluster share, e.g. --home /mnt/shared/ganymede",
    )


def _writer(as_json: bool) -> Callable[[str], object]:
    return (sys.stderr if as_json else sys.stdout).write


def _end_with(job: Job, as_json: bool) -> None:
    """Ends the command with the job's exit code, or 1 if it has none."""
    if as_json:
        print_json(vars(job))
    code = job.exit_code if job.exit_code is not None else int(job.status != "SUCCEEDED")
    if code:
        say(f"job {job.id} {job.status.lower()}: {job.message.partition(', last available logs')[0]}")
        raise typer.Exit(code if 0 < code < 256 else 1)


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
