"""`ganymede doctor`: what this machine has and what follows from it."""

from __future__ import annotations

import typer

from infra.cli.output import Debug, Json, err, out, print_json
from infra.local import route_logs, state_home


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Says what this machine has, and what follows from it. Example: ganymede doctor."""
    from infra.doctor import examine

    home = state_home()
    route_logs(home)
    with err().status("looking at this machine"):
        findings = examine(home)
    if as_json:
        print_json([vars(f) for f in findings])
    else:
        from rich.table import Table
        from rich.text import Text

        colours = {"good": "green", "note": "yellow", "problem": "bold red"}
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            mark = Text(finding.verdict, style=colours[finding.verdict])
            table.add_row(mark, Text(finding.topic), Text(finding.fact), Text(finding.consequence, style="dim"))
        console = out()
        if not console.is_terminal:
            console.width = 10_000
        console.print(table)
    if any(f.verdict == "problem" for f in findings):
        raise typer.Exit(1)
