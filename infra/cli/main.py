"""The entry point of `ganymede`: the commands, their errors and their exit codes."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from infra.cli import artifacts, corpus, doctor, evaluate, generate, inspect, jobs, keys, platform, prompt, release, run
from infra.cli.output import err, show_error, wants
from infra.local import quiet_environment

EPILOG = "Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. State lives in $GANYMEDE_HOME (.ganymede)."


class Commands(TyperGroup):
    """Runs a command and turns whatever it raises into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Raises `typer.Exit` with the documented code; usage errors stay typer's, with code 2."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if wants(ctx, "debug"):
                err().print_exception()
            show_interrupted()
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader of our output is gone (`| head`); the interpreter would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except Exception as error:  # noqa: BLE001 - the last place where an error can become a message
            raise typer.Exit(show_error(error, as_json=wants(ctx, "as_json"), debug=wants(ctx, "debug"))) from None


def show_interrupted() -> None:
    """Says that nothing is lost and how to go on."""
    command = shlex.join(["ganymede", *sys.argv[1:]])
    err().print(f"interrupted; what was finished is kept. To go on: {command}", markup=False)


app = typer.Typer(
    name="ganymede",
    cls=Commands,
    help="A generative-AI project from corpus to served model, on this machine or a Ray cluster. Start with: "
    "[bold]ganymede run demo[/bold]",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("generate")(generate.generate)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(evaluate.compare)
app.command("judge")(evaluate.judge)
app.command("promote")(release.promote)
app.command("rollback")(release.rollback)
app.command("up")(platform.up)
app.command("status")(platform.status)
app.command("down")(platform.down)
app.command("serve")(platform.serve)
app.command("submit")(jobs.submit)
app.command("doctor")(doctor.doctor)
app.add_typer(artifacts.app, name="artifacts")
app.add_typer(corpus.app, name="corpus")
app.add_typer(inspect.app, name="inspect")
app.add_typer(prompt.app, name="prompt")
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Runs the command line of this process."""
    quiet_environment()
    app()


if __name__ == "__main__":
    main()
