"""Which of two answers is better, said by a third model.

A judge leans towards a place and not only towards an answer (Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and
Chatbot Arena", 2023, section 3.3), so that it sees every pair twice, in both orders. A model wins an item only if both
verdicts are for it; whatever else the judge says, or fails to say, is a tie. How often the two verdicts agree, and how
often the place decided, stands beside the result.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from configs.schema.tasks import Answering
from pipelines.evaluation.asking import Row
from pipelines.evaluation.endpoints import Endpoint
from pipelines.evaluation.resampling import Difference, compare, mean
from pipelines.evaluation.stored_report import Record, StoredReport

JUDGEMENTS = "judgements.parquet"
Verdict = Literal["first", "second", "tie", "none"]
"""Which model; `none` where the judge gave no verdict."""
_VERDICT = re.compile(r"verdict\W+(A|B|tie)\b", re.IGNORECASE)
_PROMPT = """Two answers to one request are held against each other. {criterion}
Neither their order nor their length matters. Say briefly why, and end with a line that is one of `Verdict: A`, \
`Verdict: B` and `Verdict: tie`.

## Request
{prompt}

## Answer A
{a}

## Answer B
{b}
"""


class Judgement(Record):
    """One item, both answers, and what the judge said of them."""

    item: str
    prompt: str
    answers: tuple[str, str]
    """The first model's, and the second's."""
    said: tuple[str, str]
    """By the judge, with the first model's answer as A, and as B; empty where the answers are equal."""
    verdicts: tuple[Verdict, Verdict]
    error: str | None = None
    """Why there is a verdict less."""

    @property
    def winner(self) -> Verdict:
        """Whom both verdicts are for, or else `tie`."""
        one, other = self.verdicts
        return one if one == other and one != "none" else "tie"

    @property
    def asked(self) -> bool:
        """Whether the judge had to be asked: of equal answers neither is better."""
        return self.answers[0] != self.answers[1]


class JudgeReport(StoredReport):
    """What a judge makes of two models."""

    made_by: ClassVar[str] = "`ganymede judge` or a stage of kind judge"
    format: Literal[1] = 1
    task: str
    models: tuple[str, str]
    """Digests of the two reports."""
    judge: dict[str, Any]
    """What the endpoint says of it."""
    criterion: str
    items: int
    identical: int
    """Items whose answers are equal: ties that nobody was asked about."""
    wins: tuple[int, int]
    ties: int
    unjudged: int
    """Items that lack a verdict, among the ties."""
    share: Difference
    """Each model's share of the items, a tie being half a one for each."""
    agreement: float | None
    """Share of the items with two verdicts whose verdicts are the same; None where there is none."""
    kappa: float | None
    """Cohen's kappa of the two verdicts; None where chance alone would make them agree."""
    shown_first: float | None
    """Share of the verdicts for one answer that went to the one shown first: 0.5 is a judge without a leaning."""


def judge_pairs(
    judge: Endpoint, criterion: str, pairs: Sequence[tuple[Row, Row]], answering: Answering
) -> list[Judgement]:
    """What the judge says of the two models' rows of the same items. Raises what `Endpoint.generate` raises."""
    answers = [(one.response.texts[:1] or ("",))[0] for pair in pairs for one in pair]
    shown = list(zip(answers[::2], answers[1::2], strict=True))
    prompts = [
        _PROMPT.format(criterion=criterion, prompt=pair[0].prompt, a=a, b=b)
        for pair, (first, second) in zip(pairs, shown, strict=True)
        if first != second
        for a, b in ((first, second), (second, first))
    ]
    responses = iter(judge.generate([[{"role": "user", "content": prompt}] for prompt in prompts], answering))
    found = []
    for (row, _), both in zip(pairs, shown, strict=True):
        if both[0] == both[1]:
            found.append(
                Judgement(item=row.item, prompt=row.prompt, answers=both, said=("", ""), verdicts=("tie", "tie"))
            )
            continue
        said = [next(responses), next(responses)]
        texts = tuple((one.texts or ("",))[0] for one in said)
        found.append(
            Judgement(
                item=row.item, prompt=row.prompt, answers=both, said=(texts[0], texts[1]),
                verdicts=(read_verdict(texts[0], ("first", "second")), read_verdict(texts[1], ("second", "first"))),
                error=next((one.error for one in said if one.error), None),
            )
        )  # fmt: skip
    return found


def read_verdict(said: str, shown: tuple[Verdict, Verdict]) -> Verdict:
    """The last verdict in what a judge said, when `shown` were answers A and B; `none` if it gave none."""
    plain = said.strip().strip("`*.").upper()
    last = plain if plain in ("A", "B", "TIE") else next(reversed(_VERDICT.findall(said)), "").upper()
    return {"A": shown[0], "B": shown[1], "TIE": "tie"}.get(last, "none")


def summed_up(
    judgements: Sequence[Judgement], *, task: str, models: tuple[str, str], judge: dict[str, Any], criterion: str
) -> JudgeReport:
    """The report of at least one judgement."""
    winners = Counter(one.winner for one in judgements)
    points = np.array([{"first": 0.0, "second": 1.0}.get(one.winner, 0.5) for one in judgements])
    sums = [np.stack([share, np.ones_like(points)], axis=1) for share in (1 - points, points)]
    whole = [one.verdicts for one in judgements if one.asked and "none" not in one.verdicts]
    decided = [
        (verdict, place)
        for one in judgements
        for verdict, place in zip(one.verdicts, ("first", "second"), strict=True)
        if verdict in ("first", "second")
    ]
    return JudgeReport(
        task=task,
        models=models,
        judge=judge,
        criterion=criterion,
        items=len(judgements),
        identical=sum(not one.asked for one in judgements),
        wins=(winners["first"], winners["second"]),
        ties=winners["tie"],
        unjudged=sum("none" in one.verdicts for one in judgements),
        share=compare(sums[0], sums[1], mean),
        agreement=_rounded(np.mean([a == b for a, b in whole])) if whole else None,
        kappa=_kappa(whole),
        shown_first=_rounded(np.mean([verdict == place for verdict, place in decided])) if decided else None,
    )


def _kappa(verdicts: Sequence[tuple[Verdict, Verdict]]) -> float | None:
    """Cohen, "A coefficient of agreement for nominal scales" (1960)."""
    count = len(verdicts)
    one, other = (Counter(pair[side] for pair in verdicts) for side in (0, 1))
    chance = sum(one[verdict] * other[verdict] for verdict in one) / count**2 if count else 1.0
    if chance == 1.0:
        return None
    return _rounded((sum(a == b for a, b in verdicts) / count - chance) / (1 - chance))


def _rounded(value: Any) -> float:
    return round(float(value), 6)
