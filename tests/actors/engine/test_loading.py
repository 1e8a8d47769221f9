"""One rule says which runner a folder gets; each runner refuses what is not its own."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.engine.encoder import EncoderEngine
from actors.engine.encodings import EncodeEvent, EncodeRequest
from actors.engine.engine import Engine
from actors.engine.loading import load_engine, runner_kind
from actors.engine.request import Completion, Request, TokenEvent
from actors.engine.seq2seq import Seq2SeqEngine
from actors.engine.stream import AsyncEngine
from configs.errors import ArtifactError, ConfigError, RequestError
from configs.schema.generation import Sampling

Make = Callable[..., Path]
GENERATE = Request("a", (5, 6, 7), Sampling(max_new_tokens=5, temperature=0))


@pytest.mark.parametrize(
    ("model_type", "architecture", "kind"),
    [
        ("llama", "LlamaForCausalLM", "decoder"),
        ("gpt2", "GPT2LMHeadModel", "decoder"),
        ("bert", "BertLMHeadModel", "decoder"),
        ("bert", "BertForMaskedLM", "encoder"),
        ("modernbert", "ModernBertModel", "encoder"),
        ("roberta", None, "encoder"),
        ("t5", "T5ForConditionalGeneration", "seq2seq"),
        ("bart", "BartForConditionalGeneration", "seq2seq"),
    ],
)
def test_the_architecture_decides(tmp_path: Path, model_type: str, architecture: str | None, kind: str) -> None:
    named = {} if architecture is None else {"architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | named))
    assert runner_kind(tmp_path) == kind


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [("llama", "LlamaForSequenceClassification"), ("marian", "MarianMTModel"), ("vit", "ViTForImageClassification")],
)
def test_what_no_runner_can_run_is_refused(tmp_path: Path, model_type: str, architecture: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture]}))
    with pytest.raises(ArtifactError, match=f"{architecture}, model_type {model_type}.*allowed: .*ForCausalLM"):
        load_engine(tmp_path)


def test_an_option_that_a_runner_does_not_have_is_refused(make_encoder: Make) -> None:
    with pytest.raises(ConfigError, match=r"run as encoder has no option cache_tokens; allowed: batch_tokens"):
        load_engine(make_encoder("bert"), cache_tokens=100)


def test_a_request_for_another_kind_of_model_is_refused(
    make_model: Make, make_seq2seq: Make, make_encoder: Make
) -> None:
    embed = EncodeRequest("a", "text", "embed")
    for folder, kind, request in (
        (make_model(), Engine, embed),
        (make_seq2seq("t5"), Seq2SeqEngine, embed),
        (make_encoder("bert"), EncoderEngine, GENERATE),
    ):
        engine = load_engine(folder, precision="fp32", device="cpu")
        assert isinstance(engine, kind)
        with pytest.raises(RequestError, match="this model") as caught:
            engine.submit(request)
        assert caught.value.param == "model"
        assert not engine.has_work


def test_every_runner_serves_coroutines(make_model: Make, make_seq2seq: Make, make_encoder: Make) -> None:
    async def events(engine: AsyncEngine, request: Request | EncodeRequest) -> list[TokenEvent | EncodeEvent]:
        return [event async for event in engine.stream(request)]

    async def run(engine: AsyncEngine, request: Request | EncodeRequest) -> list[list[TokenEvent | EncodeEvent]]:
        named = [type(request)(**(vars(request) | {"id": str(n)})) for n in range(9)]
        return await asyncio.gather(*(events(engine, one) for one in named))

    for folder in (make_model(), make_seq2seq("t5")):
        alone = load_engine(folder, precision="fp32").generate([GENERATE])[0]
        engine = AsyncEngine(load_engine(folder, precision="fp32", max_sequences=4))
        for mine in asyncio.run(run(engine, GENERATE)):
            assert Completion.of(mine).token_ids == alone.token_ids
        engine.close()
    folder = make_encoder("bert", "ForSequenceClassification")
    request = EncodeRequest("a", "any text", "classify")
    alone = load_engine(folder, precision="fp32").encode([request])[0]
    engine = AsyncEngine(load_engine(folder, precision="fp32"))
    for (event,) in asyncio.run(run(engine, request)):
        assert event.encoding.scores == pytest.approx(alone.encoding.scores, abs=1e-4)
    engine.close()
