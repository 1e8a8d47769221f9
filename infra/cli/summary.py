"""What a run leaves on the terminal: every stage with its sizes and speeds, the scores before and after, the
endpoint's answer, and the commands that go on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from infra.cli.output import duration, figure, print_table, size

if TYPE_CHECKING:
    from pipelines.runner import Outcome, RunReport


def _count(noun: str) -> Callable[[Any], str]:
    return lambda value: f"{figure(value)} {noun}"


def _sum(noun: str) -> Callable[[Any], str]:
    return lambda counts: f"{figure(sum(counts.values()))} {noun}"


_TRAINING: Sequence[tuple[str, Callable[[Any], str]]] = (
    ("parameters", _count("parameters")),
    ("steps", _count("steps")),
    ("tokens_seen", _count("tokens")),
    ("tokens_per_second", _count("tokens/s")),
    ("first_validation_loss", lambda value: f"validation loss {figure(value)}"),
    ("validation_loss", lambda value: f"-> {figure(value)}"),
    ("bits_per_byte", _count("bits/byte")),
    ("validation_accuracy", lambda value: f"accuracy {figure(value)}"),
    ("validation_macro_f1", lambda value: f"F1 {figure(value)}"),
    ("validation_span_f1", lambda value: f"span F1 {figure(value)}"),
    ("bleu", _count("BLEU")),
    ("chrf", _count("chrF")),
    ("rouge_l", _count("ROUGE-L")),
)
_FIGURES: Mapping[str, Sequence[tuple[str, Callable[[Any], str]]]] = {
    "tokenizer": (
        ("sample_bytes", lambda value: f"learned from {size(value)}"),
        ("vocab_size", _count("entries")),
        ("bytes_per_token", _count("bytes/token")),
    ),
    "corpus": (
        ("files", _count("files")),
        ("train.tokens", _count("tokens to train")),
        ("validation.tokens", _count("held out")),
        ("megabytes_per_second", _count("MB/s")),
    ),
    "instructions": (("pairs.train", _sum("pairs to train")), ("pairs.heldout", _sum("held out"))),
    "examples": (("examples.train", _count("examples to train")), ("examples.heldout", _count("held out"))),
    "baseline": (
        ("method", str),
        ("accuracy", lambda value: f"accuracy {figure(value)}"),
        ("span_f1", lambda value: f"span F1 {figure(value)}"),
    ),
    "pretrain": _TRAINING,
    "finetune": _TRAINING,
    "compare": (
        (
            "models",
            lambda models: "; ".join(f"{name}: perplexity {figure(m['perplexity'])}" for name, m in models.items()),
        ),
    ),
    "evaluate": (("pairs", _sum("answers a model")),),
    "sweep": (("recommendation.sentences", " ".join),),
    "register": (
        ("name", lambda value: str(value)),
        ("version", lambda value: f"version {value}"),
        ("aliases", lambda value: f"alias {', '.join(value)}"),
    ),
    "deploy": (("url", lambda value: str(value)),),
}
"""Of each kind's summary, what is worth a line, by dotted path."""


_WIDTH = 90
"""Characters of an example on its line."""


def print_summary(report: RunReport) -> None:
    """Prints everything on standard output."""
    rows = [
        (o.stage, f"{o.status} in {duration(o.seconds)}", o.ref or "", ", ".join(_worth_saying(o)))
        for o in report.outcomes
    ]
    typer.echo()
    print_table(("stage", "", "artifact", "figures of the run that made it"), rows)
    for outcome in report.outcomes:
        if outcome.kind == "evaluate":
            _print_scores(outcome.summary)
            _print_examples(outcome.summary)
        if outcome.kind == "register":
            _print_gate(outcome.summary)
        if outcome.kind == "deploy":
            _print_answer(outcome.summary)
    registered = [o.summary for o in report.outcomes if o.kind == "register"]
    if registered:
        _print_next(registered[-1])


def _worth_saying(outcome: Outcome) -> Iterator[str]:
    for path, phrase in _FIGURES.get(outcome.kind, ()):
        value: Any = outcome.summary
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value:
            yield phrase(value)


def _print_scores(summary: Mapping[str, Any]) -> None:
    """Scores side by side, with the change from the first model to the last."""
    models: Mapping[str, Mapping[str, float]] = summary["models"]
    baseline, candidate = next(iter(models.values())), list(models.values())[-1]
    rows = [
        (metric, *(figure(scores[metric]) for scores in models.values()), f"{candidate[metric] - value:+.3g}")
        for metric, value in baseline.items()
    ]
    typer.echo()
    print_table(("on held-out data", *(f"# {label}" for label in models), "# change"), rows)


def _print_examples(summary: Mapping[str, Any]) -> None:
    """The first answers of each task, one a line, with what they were scored against."""
    labels = list(summary["models"])
    seen: set[str] = set()
    rows = []
    for example in summary["examples"]:
        if example["task"] not in seen:
            seen.add(example["task"])
            rows.append((f"asked ({example['task']})", _shortened(example["prompt"])))
            rows.append(("expected", _shortened(example["reference"])))
            rows.extend((label, _shortened(example["answers"][label]["text"])) for label in labels)
    typer.echo()
    print_table(("answers", ""), rows)


def _shortened(text: str) -> str:
    """`text` on one line, its middle left out if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH // 2]} ... {line[-_WIDTH // 2 :]}"


def _print_gate(summary: Mapping[str, Any]) -> None:
    gate = summary["gate"]
    verdict = "passed" if gate["passed"] else "did not pass: not made champion"
    typer.echo(f"\nGate {verdict}: {'; '.join(gate['reasons'])}")


def _print_answer(summary: Mapping[str, Any]) -> None:
    if summary.get("answer") is not None:
        typer.echo(f"\nAsked over HTTP: {summary['question']}\nAnswered: {str(summary['answer']).strip()}")


def _print_next(registered: Mapping[str, Any]) -> None:
    """Commands to go on with, ready to be copied."""
    alias = "champion" if "champion" in registered["aliases"] else "candidate"
    model = f"{registered['name']}@{alias}"
    commands = (
        ("ganymede up", "Ray dashboard, MLflow UI with the curves, and the endpoint, until ganymede down"),
        (f"ganymede serve {model}", "the endpoint alone, until Ctrl-C"),
        (f'ganymede generate {model} --chat --prompt "..."', "text in this terminal, without a server"),
    )
    typer.echo()
    print_table(("next", ""), commands)
