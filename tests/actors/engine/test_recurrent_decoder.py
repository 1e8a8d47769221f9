"""The LSTM baseline through the engine: the tokens of its own `generate`, in any company."""

import random
from pathlib import Path

import pytest
import torch

from actors.engine.engine import Engine
from actors.engine.loading import load_engine
from actors.engine.request import Request
from actors.recurrent import LstmConfig, LstmForCausalLM
from configs.schema.generation import Sampling


@pytest.fixture(scope="module")
def folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = LstmForCausalLM(
        LstmConfig(vocab_size=512, hidden_size=48, num_hidden_layers=2, max_position_embeddings=96, eos_token_id=None)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    made = tmp_path_factory.mktemp("lstm")
    model.save_pretrained(made)
    for file in tokenizer_folder.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    return made


def prompt(length: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(5, 512) for _ in range(length))


def test_greedy_tokens_are_those_of_its_own_generate_with_shared_beginnings_and_preemption(folder: Path) -> None:
    model = LstmForCausalLM.from_pretrained(folder).eval()
    shared = prompt(30, 1)
    asked = [
        Request(str(n), shared[: 10 * (n % 4)] + prompt(3 + 5 * (n % 3), n), Sampling(max_new_tokens=30, temperature=0))
        for n in range(9)
    ]
    expected = []
    for request in asked:
        ids = torch.tensor([request.prompt_ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
        expected.append(tuple(out[0, ids.shape[1] :].tolist()))
    assert len(set(expected)) > 6
    for options in ({"max_sequences": 1}, {"max_sequences": 4, "prefill_tokens": 7, "cache_tokens": 150}):
        engine = load_engine(folder, precision="fp32", device="cpu", **options)
        assert isinstance(engine, Engine)
        assert engine.decoder_kind == "recurrent"
        assert [one.token_ids for one in engine.generate(asked)] == expected
    assert engine.preemptions > 0
    roomy = load_engine(folder, precision="fp32", device="cpu")
    first, again = (roomy.generate([asked[3]])[0] for _ in range(2))
    assert first.token_ids == again.token_ids == expected[3]
    assert (first.cached_tokens, again.cached_tokens) == (0, len(asked[3].prompt_ids) - 1)


def test_scores_equal_the_plain_forward_pass(folder: Path) -> None:
    model = LstmForCausalLM.from_pretrained(folder).eval()
    rows = torch.tensor([prompt(60, seed) for seed in range(5)])
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    torch.testing.assert_close(
        load_engine(folder, precision="fp32", device="cpu").score(rows), expected, atol=1e-4, rtol=0
    )
