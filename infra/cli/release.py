"""`ganymede promote` and `ganymede rollback`: which version of a model an alias of the registry stands for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli.output import Debug, Json, print_json
from infra.local import route_logs, state_home

if TYPE_CHECKING:
    from infra.promotion import Promotion

_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
Alias = Annotated[str, typer.Option("--to", metavar="ALIAS", help="Alias of the registry that is moved.")]


def promote(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="NAME@ALIAS, NAME@VERSION, or NAME, its newest.")],
    to: Alias = "champion",
    min_gain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCORE=GAIN",
            help="How much better than the model that has the alias, beyond noise: sst2.accuracy=0.01. Below 0: a loss "
            "that is put up with. Can be repeated. Unless given, some task must be better beyond noise.",
        ),
    ] = None,
    min_score: Annotated[
        list[str] | None,
        typer.Option(metavar="SCORE=VALUE", help="Least value of a score (of perplexities the most). Can be repeated."),
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="Must not get worse by more than noise. Can be repeated; all tasks without --min-gain unless given.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen and change nothing.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Moves an alias to a model if its evaluation says so; else says why not. Example: ganymede promote demo@candidate.

    Decides by the reports of ganymede evaluate on this model and on the one that has the alias, over the same items:
    differences are tested in pairs, and what is noise is neither a gain nor a loss. Exits with 1, and changes nothing,
    if a condition fails. ganymede rollback goes back.
    """
    from configs.schema.evaluation import Conditions
    from infra.promotion import promote

    _check_alias(to)
    conditions = Conditions(
        min_gain=_numbers("--min-gain", min_gain), min_score=_numbers("--min-score", min_score),
        guards=tuple(guard) if guard else None,
    )  # fmt: skip
    home = state_home()
    route_logs(home)
    result = promote(model, to, conditions, home=home, dry_run=dry_run)
    if as_json:
        print_json(_as_json(result))
    else:
        _tell(result)
    if not result.decision.passed:
        raise typer.Exit(1)


def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the model in the registry.")],
    to: Alias = "champion",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Puts an alias back to the version it stood for before. Example: ganymede rollback demo.

    The registry keeps where each alias was: every call goes one move further back, from any machine.
    """
    from actors.store.registry import Registry
    from actors.store.tracker import tracking_uri

    home = state_home()
    route_logs(home)
    _check_alias(to)
    left, now = Registry.open(tracking_uri(home)).roll_back(name, to)
    if as_json:
        print_json({"alias": to, "before": str(left), "model": str(now), "artifact": now.ref})
    else:
        typer.echo(f"{name}@{to} is {now} ({now.ref}) again; it was {left} ({left.ref})")


def _as_json(result: Promotion) -> dict[str, Any]:
    return {
        "model": str(result.candidate),
        "artifact": result.candidate.ref,
        "alias": result.alias,
        "before": str(result.holder) if result.holder else None,
        "passed": result.decision.passed,
        "moved": result.moved,
        "reasons": result.decision.reasons,
        "reports": result.reports,
    }


def _tell(result: Promotion) -> None:
    candidate, decision, before = result.candidate, result.decision, result.holder or "unset"
    if result.standing:
        typer.echo(f"{candidate} is {result.alias} already")
        return
    for reason in decision.reasons or ("no condition was set, and no model is held against it",):
        typer.echo(f"  {reason}")
    alias = f"{candidate.name}@{result.alias}"
    if result.moved:
        typer.echo(f"{alias} is {candidate} now; it was {before}")
    else:
        verdict = "passed" if decision.passed else "did not pass"
        typer.echo(f"the gate {verdict}, and nothing was changed: {alias} is {before}")


def _check_alias(alias: str) -> None:
    from configs.errors import InputError

    if not _ALIAS.fullmatch(alias):
        raise InputError(
            "--to is no alias", received=alias, allowed="letters, digits, - and _, a letter first, e.g. champion"
        )


def _numbers(option: str, given: list[str] | None) -> dict[str, float]:
    """`SCORE=NUMBER` by score."""
    from configs.errors import InputError

    found = {}
    for text in given or ():
        score, _, number = text.partition("=")
        try:
            found[score] = float(number)
        except ValueError:
            raise InputError(
                f"{option} takes a score and a number", received=text, allowed="SCORE=NUMBER, e.g. sst2.accuracy=0.01"
            ) from None
    return found
