"""Masked, denoised and labelled rows: what is hidden, what is learned, and that no split of a batch changes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seqeval.metrics import f1_score, precision_score, recall_score
from sklearn.metrics import f1_score as class_f1_score
from torch import nn

from actors.text import Text
from configs.errors import ContractError, DataError
from configs.schema.model import ModelConfig
from configs.schema.training import TrainingConfig
from pipelines.corpus.loader import Loader
from pipelines.corpus.tokenizer import MASK, save_tokenizer, train_tokenizer
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.denoising import Denoising, corrupt
from pipelines.training.examples import ExampleRows, Framing, encode_examples
from pipelines.training.hardware import Hardware
from pipelines.training.labelled import IGNORED, LabelledRows
from pipelines.training.loop import Hooks, Trainer
from pipelines.training.masked import MaskedLanguageModel
from pipelines.training.masks import mask_ids
from pipelines.training.models import build_model
from pipelines.training.parallel import Ranks
from pipelines.training.tasks import Classification, Sequences, Tagging
from tests.pipelines.corpus.corpus_files import write_text_corpus

CPU = Hardware(torch.device("cpu"), "fp32", compile=False)
CONFIG = TrainingConfig(steps=4, batch_rows=8, micro_batch_rows=2, workers=1, checkpoint_every_seconds=1e9)
LENGTH = 48
SENTENCES = [
    ["Ada", "Lovelace", "met", "Babbage", "in", "London"],
    ["nobody", "slept"],
    ["the", "Thames", "rose", "again", "in", "January"],
    ["Kojima", "played", "guitar"],
]
TAGS = [
    ["B-PER", "I-PER", "O", "B-PER", "O", "B-LOC"],
    ["O", "O"],
    ["O", "B-LOC", "O", "O", "O", "O"],
    ["B-PER", "O", "O"],
]
TAG_NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": " ".join(s), "label": ("short", "long")[len(s) > 3]} for s in SENTENCES * 3],
    "tag": [{"words": w, "tags": t} for w, t in zip(SENTENCES, TAGS, strict=True)] * 3,
    "seq2seq": [{"prompt": " ".join(s), "completion": " ".join(s[::-1])} for s in SENTENCES * 3],
}
LABELS = {"classify": ["long", "short"], "tag": TAG_NAMES, "seq2seq": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with mask tokens, and a corpus made with it."""
    folder = tmp_path_factory.mktemp("world")
    texts = [f"{' '.join(s)} and {' '.join(t)}. " * 12 for s in SENTENCES for t in SENTENCES]
    tokenizer = train_tokenizer(texts, 320, masks=6)
    save_tokenizer(tokenizer, folder)
    write_text_corpus(folder, {"train": texts, "validation": texts[:3]}, tokenizer)
    return folder


def loaders(folder: Path) -> tuple[Loader, dict[str, Loader]]:
    train, validation = (
        Loader.open(folder, split=split, row_tokens=LENGTH, batch_rows=CONFIG.batch_rows, seed=3)
        for split in ("train", "validation")
    )
    return train, {"": validation}


def masked(folder: Path) -> MaskedLanguageModel:
    train, validation = loaders(folder)
    return MaskedLanguageModel(
        train, validation, row_tokens=LENGTH, validation_rows=4, seed=3, mask_id=mask_ids(folder)[0], end_of_text_id=0
    )


def denoising(folder: Path, style: Any) -> Denoising:
    return Denoising(
        *loaders(folder), style=style, row_tokens=LENGTH, validation_rows=4, seed=3, mask_ids=mask_ids(folder),
        end_of_text_id=0,
    )  # fmt: skip


def rows_of(folder: Path, task: Any, examples: list[dict[str, Any]], row_tokens: int = LENGTH) -> ExampleRows:
    source = folder / f"{task}-{row_tokens}.jsonl"
    source.write_text("".join(json.dumps(example) + "\n" for example in examples))
    framing = Framing.load(folder, classified=task != "seq2seq")
    encode_examples(source, source.with_suffix(""), framing, task=task, labels=LABELS[task], row_tokens=row_tokens)
    return ExampleRows.open(source.with_suffix(""))


def on_examples(kind: type[Any], task: str) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        rows = rows_of(folder, task, EXAMPLES[task])
        return kind(rows, rows, labels=LABELS[task], batch_rows=8, seed=3, validation_rows=7, pad=0)

    return make


OBJECTIVES: Mapping[str, tuple[Any, Any, Callable[[Path], Any]]] = {
    "masked bert": ("bert", None, masked),
    "masked roberta": ("roberta", None, masked),
    "masked modernbert": ("modernbert", None, masked),
    "spans t5": ("t5", None, lambda folder: denoising(folder, "spans")),
    "whole bart": ("bart", None, lambda folder: denoising(folder, "whole")),
    "classify bert": ("bert", "classify", on_examples(Classification, "classify")),
    "classify gpt2": ("gpt2", "classify", on_examples(Classification, "classify")),
    "tag modernbert": ("modernbert", "tag", on_examples(Tagging, "tag")),
    "seq2seq bart": ("bart", None, on_examples(Sequences, "seq2seq")),
}


def make_model(folder: Path, architecture: Any, head: Any, labels: list[str]) -> nn.Module:
    config = ModelConfig(architecture=architecture, hidden_size=32, layers=2, heads=2, context_length=LENGTH)
    size = Text.load(folder).vocab_size
    return build_model(config, vocab_size=size, eos_token_id=0, seed=5, head=head, labels=labels)


def trainer(
    folder: Path,
    name: str,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    micro: int = 2,
    **changes: Any,
) -> tuple[Trainer, Any, list[Mapping[str, float]]]:
    architecture, head, make = OBJECTIVES[name]
    objective = make(folder)
    model = make_model(folder, architecture, head, LABELS.get(name.split()[0], []))
    lines: list[Mapping[str, float]] = []
    hooks = Hooks(lines.append, lambda step: None, lambda text: None, lambda step: None, lambda: False)
    config = CONFIG.model_copy(update={"micro_batch_rows": micro, **changes})
    checkpoints = Checkpoints(folder / f"{name}-checkpoints")
    made = Trainer(model, objective, config, hardware=CPU, ranks=ranks, checkpoints=checkpoints, hooks=hooks)
    return made, objective, lines


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_split_of_a_batch_gives_the_same_gradient(folder: Path, name: str) -> None:
    def gradient(ranks: int, micro: int) -> torch.Tensor:
        total = torch.zeros(0)
        for rank in range(ranks):
            part, objective, _ = trainer(folder, name, Ranks(rank, ranks), micro)
            part.accumulate(objective.batch(2, rank, ranks))
            total = torch.cat([part.buffer.extra[:1], part.buffer.gradients]) + (total if rank else 0)
        return total[1:] / total[0]

    whole = gradient(1, 8)
    assert whole.abs().sum() > 0
    for ranks, micro in ((1, 3), (2, 2), (4, 1)):
        torch.testing.assert_close(gradient(ranks, micro), whole, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_validation_figures_do_not_depend_on_micro_batches(folder: Path, name: str) -> None:
    one, many = (trainer(folder, name, micro=micro)[0].evaluate() for micro in (8, 1))
    assert one.keys() == many.keys()
    assert one["validation_loss"] > 0
    for key, value in one.items():
        assert many[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("name", ["masked bert", "spans t5"])
def test_training_learns(folder: Path, name: str) -> None:
    run, _, lines = trainer(folder, name, micro=8, steps=60, eval_every_steps=30)
    before = run.evaluate()
    run.run()
    assert lines[-1]["validation_loss"] < 0.75 * before["validation_loss"]
    assert lines[-1]["validation_accuracy"] > before["validation_accuracy"]


def test_a_batch_names_its_samples_in_the_order_of_its_rows(folder: Path) -> None:
    objective = on_examples(Classification, "classify")(folder)
    source = [json.loads(line) for line in (folder / f"classify-{LENGTH}.jsonl").read_text().splitlines()]
    framing = Framing.load(folder, classified=True)
    for rank in range(2):
        batch = objective.batch(1, rank, 2)
        for row, name in zip(batch.tokens, objective.samples(1, rank, 2), strict=True):
            text = source[int(name.removeprefix("train.jsonl line ")) - 1]["text"]
            ids, _ = framing.frame(framing.encode(text), LENGTH)
            assert row[: len(ids)].tolist() == ids


def test_masking_follows_the_published_shares_and_depends_on_seed_step_and_row_alone(folder: Path) -> None:
    objective = masked(folder)
    batches = [objective.batch(step, 0, 1) for step in range(40)]
    again = [objective.batch(3, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.tokens for part in again]), batches[3].tokens)
    tokens = torch.cat([batch.tokens for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    hidden = labels != IGNORED
    train, _ = loaders(folder)
    true = torch.cat([torch.from_numpy(train.batch(step)[:, :-1]) for step in range(40)])
    assert torch.equal(labels[hidden], true[hidden])
    assert torch.equal(tokens[~hidden], true[~hidden])
    assert not (labels == 0).any()
    assert hidden.float().mean().item() == pytest.approx(0.15, abs=0.01)
    became_mask = tokens[hidden] == mask_ids(folder)[0]
    stayed = tokens[hidden] == labels[hidden]
    assert became_mask.float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert stayed.float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_hidden_spans_and_what_is_shown_make_up_the_row() -> None:
    tokens = np.arange(100, 300)
    masks = tuple(range(1, 90))
    shown, targets = corrupt(tokens, np.random.default_rng(1), style="spans", mask_ids=masks, end=0)
    spans: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if token < 100:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    rebuilt = [t for s in shown[:-1].tolist() for t in (spans[s] if s < 100 else [s])]
    assert rebuilt == tokens.tolist()
    assert sum(map(len, spans.values())) == 30
    assert list(spans) == list(range(1, 11))
    assert shown[-1] == targets[-1] == 0

    shown, targets = corrupt(tokens, np.random.default_rng(1), style="whole", mask_ids=masks, end=0)
    assert targets.tolist() == [*tokens.tolist(), 0]
    assert (shown == 1).sum() == 20
    assert len(shown) == 200 - 60 + 20 + 1


def test_span_corruption_needs_a_mask_for_every_span(folder: Path, tmp_path: Path) -> None:
    train, validation = loaders(folder)
    with pytest.raises(ContractError, match=r"2 hidden spans.*received '1 mask tokens"):
        Denoising(
            train, validation, style="spans", row_tokens=LENGTH, validation_rows=4, seed=3, mask_ids=(1,),
            end_of_text_id=0,
        )  # fmt: skip
    save_tokenizer(train_tokenizer(["plain text"] * 9, 300), tmp_path)
    with pytest.raises(ContractError, match="has no token that stands for hidden text"):
        mask_ids(tmp_path)


def test_mask_tokens_come_last_and_transformers_knows_the_first(folder: Path) -> None:
    from transformers import AutoTokenizer

    ids = mask_ids(folder)
    assert ids == tuple(range(Text.load(folder).vocab_size - 6, Text.load(folder).vocab_size))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (MASK, ids[0])


def test_a_word_is_tagged_at_its_first_token_and_nowhere_else(folder: Path) -> None:
    rows = rows_of(folder, "tag", EXAMPLES["tag"])
    text = Text.load(folder)
    for (tokens, labels), words, tags in zip([rows[i] for i in range(4)], SENTENCES, TAGS, strict=True):
        assert tokens[0] == tokens[-1] == 0
        assert text.decode(tokens.tolist()) == " ".join(words)
        starts = np.flatnonzero(labels != IGNORED)
        assert [TAG_NAMES[labels[start]] for start in starts] == tags
        ends = [*starts[1:], len(tokens) - 1]
        pieces = [text.decode(tokens[a:b].tolist()).strip() for a, b in zip(starts, ends, strict=True)]
        assert pieces == words
    assert rows.truncated == 0
    assert rows_of(folder, "tag", EXAMPLES["tag"], row_tokens=8).truncated > 0


def test_classes_and_spans_are_scored_as_the_packages_of_the_field_do(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 2, (40, 1), generator=generator)
    predicted = torch.randint(0, 2, (40,), generator=generator)
    rows = LabelledRows(torch.zeros(40, 4), torch.ones(40, 4, dtype=torch.bool), labels)
    objective = on_examples(Classification, "classify")(folder)
    right = float((predicted == labels[:, 0]).sum())
    figures = objective.figures([1.0, 40.0, right, *objective.tally(rows, predicted).tolist()])
    assert figures["validation_accuracy"] == right / 40
    assert figures["validation_macro_f1"] == pytest.approx(class_f1_score(labels[:, 0], predicted, average="macro"))

    labels = torch.randint(0, 5, (30, 9), generator=generator)
    labels[torch.rand(30, 9, generator=generator) < 0.3] = IGNORED
    wanted = labels != IGNORED
    guesses = torch.where(torch.rand(30, 9, generator=generator) < 0.6, labels, labels.roll(1, 1).clamp(min=0))
    rows = LabelledRows(torch.zeros(30, 9), torch.ones(30, 9, dtype=torch.bool), labels)
    figures = on_examples(Tagging, "tag")(folder).figures(
        [1.0, 1.0, 1.0, *on_examples(Tagging, "tag")(folder).tally(rows, guesses[wanted]).tolist()]
    )
    true, found = (
        [[TAG_NAMES[i] for i in row[mask].tolist()] for row, mask in zip(values, wanted, strict=True)]
        for values in (labels, guesses)
    )
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert figures[f"validation_span_{name}"] == pytest.approx(score(true, found)), name


def test_a_record_of_another_task_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"tag-48\.jsonl, line 1, is no example of task tag"):
        rows_of(folder, "tag", EXAMPLES["classify"])
