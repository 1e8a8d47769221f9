"""Losses and rows: fused cross-entropy, supervised pairs, metrics files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from actors.text import Text
from configs.errors import ConfigError, ContractError, DataError
from configs.schema.model import ModelConfig
from configs.schema.training import TrainingConfig
from pipelines.corpus.tokenizer import END_OF_TURN, SPECIAL_TOKENS, save_tokenizer, train_tokenizer
from pipelines.training.cross_entropy import linear_cross_entropy
from pipelines.training.metrics import Follower, MetricsFile, read_metrics
from pipelines.training.models import build_model, hidden_states, save_model
from pipelines.training.objectives import Rows, SupervisedPairs, check_no_z_loss, padded_rows, token_loss
from pipelines.training.pairs import PairRows, render_pairs

PAIRS = [("What is it?", "A test."), ("Say one word, and say it slowly.", "Word"), ("a", "b c d"), ("long " * 60, "x")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["def area(radius): return radius ** 2\n" * 50], 300), folder)
    return Text.load(folder)


@pytest.fixture
def pairs(text: Text, tmp_path: Path) -> PairRows:
    source = tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in PAIRS))
    assert render_pairs(source, tmp_path / "rows", text, row_tokens=64) == 1
    return PairRows.open(tmp_path / "rows")


@pytest.mark.parametrize("z_loss", [0.0, 0.05])
def test_fused_cross_entropy_equals_the_plain_one(z_loss: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 8, requires_grad=True)  # several chunks, the last of them short
    weight = torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (300,))
    logits = hidden @ weight.T
    plain = F.cross_entropy(logits, targets, reduction="sum") + z_loss * logits.logsumexp(1).square().sum()
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    fused = linear_cross_entropy(hidden, weight, targets, z_loss)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(torch.autograd.grad(3 * fused, (hidden, weight)), expected, rtol=1e-4, atol=1e-5)


def test_z_loss_is_part_of_training_and_not_of_validation(pairs: PairRows) -> None:
    shape = ModelConfig(hidden_size=32, layers=1, heads=2, context_length=64)
    model = build_model(shape, vocab_size=300, eos_token_id=0, seed=1)
    plain, with_z = (
        SupervisedPairs(pairs, pairs, batch_rows=2, seed=1, validation_rows=2, z_loss=z_loss) for z_loss in (0.0, 0.1)
    )
    rows = plain.batch(0, 0, 1)
    assert with_z.loss(model, rows) > plain.loss(model, rows) + 1
    assert torch.equal(with_z.measure(model, rows), plain.measure(model, rows))
    with pytest.raises(
        ConfigError, match=r"training\.z_loss is for models that predict the next token, not for task tag"
    ):
        check_no_z_loss(TrainingConfig(steps=1, z_loss=0.1), "task tag")


def test_only_completions_and_their_end_token_are_targets(pairs: PairRows, text: Text) -> None:
    rows = padded_rows(pairs, range(3))
    for tokens, targets, (_, completion) in zip(rows.tokens, rows.targets, PAIRS, strict=False):
        learned = tokens[1:][targets].tolist()
        assert learned == [*text.encode(completion), SPECIAL_TOKENS.index(END_OF_TURN)]


def test_prompt_and_padding_tokens_do_not_change_the_targets_of_other_rows(pairs: PairRows) -> None:
    model = build_model(
        ModelConfig(hidden_size=32, layers=2, heads=2, context_length=64), vocab_size=300, eos_token_id=0, seed=1
    ).eval()
    together = token_loss(model, padded_rows(pairs, range(3)))
    apart = sum(token_loss(model, padded_rows(pairs, [i])) for i in range(3))
    torch.testing.assert_close(together, apart)


def test_a_document_in_a_packed_row_is_to_the_model_what_it_is_alone() -> None:
    """Hidden states, loss and gradients; rows of several documents, of one, and with padding."""
    config = ModelConfig(hidden_size=32, layers=2, heads=2, context_length=64)
    model = build_model(config, vocab_size=300, eos_token_id=0, seed=1)
    documents = [torch.randint(1, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 17, 7, 1, 31, 12)]
    rows_of = [documents[:4], documents[4:5], documents[5:]]
    tokens, positions = torch.zeros((2, 3, 35), dtype=torch.int64)
    targets = torch.zeros((3, 34), dtype=torch.bool)
    for row, held in enumerate(rows_of):
        lengths = [len(d) for d in held]
        lengths.append(35 - sum(lengths))
        tokens[row, : sum(lengths[:-1])] = torch.cat(held)
        positions[row] = torch.cat([torch.arange(n) for n in lengths])
        targets[row, : sum(lengths[:-1]) - 1] = positions[row, 1 : sum(lengths[:-1])] > 0
    packed = Rows(tokens, targets, positions[:, :-1])

    states = hidden_states(model, tokens[:, :-1], packed.position_ids)
    for row, held in enumerate(rows_of):
        begin = 0
        for document in held:
            alone = hidden_states(model, document[None])
            torch.testing.assert_close(states[row, begin : begin + len(document)], alone[0], rtol=1e-4, atol=1e-5)
            begin += len(document)
    mixed = hidden_states(model, tokens[:, :-1])
    assert not torch.allclose(mixed[0, 9:], states[0, 9:], atol=1e-2)

    def gradients(losses: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        return list(torch.autograd.grad(sum(losses, torch.zeros(())), list(model.parameters())))

    alone_rows = [Rows(d[None], torch.ones((1, len(d) - 1), dtype=torch.bool)) for d in documents if len(d) > 1]
    torch.testing.assert_close(
        gradients(token_loss(model, packed.part(row, row + 1)) for row in range(3)),
        gradients(token_loss(model, rows) for rows in alone_rows),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_every_pair_comes_once_an_epoch_whatever_the_number_of_ranks(pairs: PairRows) -> None:
    def seen(step: int, ranks: int) -> Counter[tuple[int, ...]]:
        objective = SupervisedPairs(pairs, pairs, batch_rows=6, seed=5, validation_rows=2)
        parts = [objective.batch(step, rank, ranks) for rank in range(ranks)]
        return Counter(tuple(row[row != 0].tolist()) for part in parts for row in part.tokens)

    assert seen(0, 1) == seen(0, 2) == seen(0, 3)
    assert set(seen(0, 1).values()) == {2}
    assert len(seen(3, 2)) == 3


def test_pairs_become_texts_or_conversations_as_asked(text: Text, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]
    answer = {"role": "assistant", "content": "radius"}
    plain, said = {"prompt": "def area(", "completion": " radius):"}, {"messages": [*turns, answer]}

    def rendered(record: dict[str, Any], *, chat: bool) -> tuple[list[int], int]:
        (tmp_path / "one.jsonl").write_text(json.dumps(record) + "\n")
        assert render_pairs(tmp_path / "one.jsonl", tmp_path / "rows", text, row_tokens=64, chat=chat) == 0
        row, prompt = PairRows.open(tmp_path / "rows")[0]
        return row.tolist(), prompt

    end = min(text.eos_token_ids)
    assert rendered(plain, chat=False) == ([*text.encode("def area( radius):"), end], len(text.encode("def area(")))
    user = [{"role": "user", "content": plain["prompt"]}]
    assert rendered(plain, chat=True)[1] == len(text.render_chat(user))
    row, prompt = rendered(said, chat=True)
    assert row[:prompt] == text.render_chat(turns)
    assert row == text.render_chat([*turns, answer], add_generation_prompt=False)
    for record, chat in ((said, False), ({"messages": turns}, True), ({"messages": [answer]}, True)):
        with pytest.raises(DataError, match="line 1, is no pair"):
            rendered(record, chat=chat)


def test_a_completion_that_changes_its_prompts_tokens_is_refused(text: Text, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "ret", "completion": "urn"}) + "\n")
    with pytest.raises(ContractError, match="do not stay as they were"):
        render_pairs(tmp_path / "one.jsonl", tmp_path / "rows", text, row_tokens=64, chat=False)


def test_a_line_that_is_no_pair_is_named(text: Text, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2"):
        render_pairs(tmp_path / "bad.jsonl", tmp_path / "rows", text, row_tokens=64)


def test_equal_seeds_build_equal_model_files(tmp_path: Path) -> None:
    config = ModelConfig(hidden_size=32, layers=2, heads=2, context_length=32)
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model = build_model(config, vocab_size=300, eos_token_id=0, seed=seed)
        save_model(model, tmp_path / name, eos_token_ids=(0, 4), pad_token_id=0)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1] != contents[2]
    assert set(contents[0]) == {"config.json", "generation_config.json", "model.safetensors"}


def test_a_follower_gives_each_step_once_when_the_file_is_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert list(follower.new_lines()) == []
    first = MetricsFile(path)
    first.append({"notice": "checkpoint damaged"})
    for step in (1, 2, 3):
        first.append({"step": step})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line.get("step") for line in follower.new_lines()] == [None, 1, 2, 3]
    second = MetricsFile(path)
    second.resumed(2)
    for step in (3, 4):
        second.append({"step": step})
    second.close()
    assert [line["step"] for line in follower.new_lines()] == [4]
    assert [line["step"] for line in read_metrics(path) if "step" in line] == [1, 2, 3, 4]
