"""The page that a model artifact carries about itself: what it is, what it learned from, its numbers and its limits.

A pure function of what it is given, without times and places, so equal models carry equal pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.recurrent import LstmConfig
from pipelines.training.models import AUTO_CLASSES, Head

_HUB_TAGS: dict[Head, str] = {
    "causal": "text-generation",
    "masked": "fill-mask",
    "seq2seq": "text2text-generation",
    "classify": "text-classification",
    "tag": "token-classification",
}
"""What the Hugging Face hub calls the task of each kind of model."""
_LIMITS: dict[Head, str] = {
    "causal": "It continues texts like those it learned from. What it states may be false, whatever it sounds like.",
    "masked": "It fills in masks, and is a start for fine-tuning; it neither classifies nor writes texts.",
    "seq2seq": "What it writes may say things that its source does not, and leave out what matters. It was scored by "
    "likeness to references, which does not measure truth.",
    "classify": "It gives one of its classes for every text, for one that belongs to none of them too. Its "
    "probabilities are not calibrated.",
    "tag": "It knows the types of names above and no other, and takes words as its training data split them.",
}
_COMMON_LIMITS = (
    "Longer inputs have to be cut. The numbers hold for texts like the held-out ones; on others it was not measured. "
    "It was not examined for bias or harmful content, and the licences of its data hold for it."
)
_NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge": "ROUGE",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
}
_LANGUAGE_MODELS: tuple[Head, ...] = ("causal", "masked")


@dataclass(frozen=True)
class Card:
    """What the page says."""

    title: str
    head: Head
    model_type: str
    """As in config.json."""
    context_length: int
    """Longest input in tokens."""
    contract: str | None
    """Hash of the text contract."""
    facts: Mapping[str, str]
    """What it is and what it learned from."""
    numbers: Mapping[str, float]
    """Scores on held-out data; `validation_loss` is in nats per target."""
    signatures: Mapping[str, str]
    """How scores were made, where a package says so."""
    adapter: str | None = None
    """Folder of the artifact with low-rank adapters that were trained."""
    merged: bool = True
    """Whether the artifact holds a whole model, and not adapters alone."""

    def text(self) -> str:
        """The page, as Markdown with the header that the Hugging Face hub reads."""
        facts = [(name, value) for name, value in self.facts.items()]
        facts.append(("Longest input", f"{self.context_length:,} tokens"))
        if self.contract is not None:
            facts.append(("Text contract", f"`{self.contract}`"))
        numbers = [(_named(name), _shown(value)) for name, value in self._all_numbers().items()]
        numbers += [(f"{_named(name)} signature", f"`{value}`") for name, value in self.signatures.items()]
        library = "transformers" if self.merged else "peft"
        return (
            "\n\n".join(
                [
                    f"---\nlibrary_name: {library}\npipeline_tag: {_HUB_TAGS[self.head]}\n---",
                    f"# {self.title}",
                    _table(facts),
                    "## Numbers\nOn held-out data, which no step of the training saw.",
                    _table(numbers),
                    "![Loss over the steps](loss.png)",
                    f"## Limits\n{_LIMITS[self.head]} {_COMMON_LIMITS}",
                    f"## Use\n{self._use()}",
                ]
            )
            + "\n"
        )

    def _all_numbers(self) -> dict[str, float]:
        numbers = dict(self.numbers)
        if self.head in _LANGUAGE_MODELS and numbers.get("validation_loss", math.inf) < 20.0:
            numbers["perplexity_of_hidden_tokens" if self.head == "masked" else "perplexity_per_token"] = math.exp(
                numbers["validation_loss"]
            )
        return numbers

    def _use(self) -> str:
        first = "After `import actors.recurrent` it" if self.model_type == LstmConfig.model_type else "It"
        auto = AUTO_CLASSES[self.head].__name__
        opens = [f"{first} opens with `{auto}.from_pretrained` and `AutoTokenizer.from_pretrained`."] * self.merged
        if self.adapter is not None:
            opens.append(f'The adapters alone open with `PeftModel.from_pretrained(base, ".../{self.adapter}")`.')
        return "\n".join(opens)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(
        ["|  |  |", "|---|---|", *(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows)]
    )


def _shown(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value < 10.0 else f"{value:.2f}"


def _named(figure: str) -> str:
    """A figure's name for people."""
    return _NAMES.get(figure) or figure.replace("_", " ").capitalize()
