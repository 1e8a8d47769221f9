"""One rule says which runner a folder gets; each runner refuses what is not its own."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, LlamaConfig

from actors.engine.encoder import EncoderEngine
from actors.engine.encodings import EncodeEvent, EncodeRequest
from actors.engine.engine import Engine
from actors.engine.loading import load_engine, runner_kind
from actors.engine.pretrained import read_config
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


def test_a_llama_runs_without_the_modules_of_transformers(make_model: Make) -> None:
    program = (
        "import sys; from pathlib import Path; from actors.engine.loading import load_engine; "
        "from actors.engine.request import Request; from configs.schema.generation import Sampling; "
        "engine = load_engine(Path(sys.argv[1])); "
        "done = engine.generate([Request('a', (5, 6, 7), Sampling(max_new_tokens=4))]); "
        "print(*done[0].token_ids, 'transformers.modeling_utils' in sys.modules)"
    )
    folder = make_model()
    output = subprocess.run([sys.executable, "-c", program, str(folder)], check=True, capture_output=True, text=True)
    *tokens, imported = output.stdout.split()
    engine = Engine.load(folder, decoder="modules")
    [expected] = engine.generate([Request("a", (5, 6, 7), Sampling(max_new_tokens=4))])
    assert (tuple(map(int, tokens)), imported) == (expected.token_ids, "False")


def test_what_a_config_leaves_to_defaults_is_what_transformers_says(make_model: Make, tmp_path: Path) -> None:
    folder = make_model()
    said = json.loads((folder / "config.json").read_bytes())
    assert isinstance(read_config(folder), SimpleNamespace)
    for missing in ("head_dim", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k != missing}))
        config = read_config(tmp_path)
        assert isinstance(config, LlamaConfig)
        assert getattr(config, missing) == getattr(AutoConfig.from_pretrained(tmp_path), missing)


def test_a_cache_that_nobody_bounds_stays_within_memory(make_model: Make) -> None:
    assert Engine.load(make_model(), max_sequences=3).cache_tokens == 3 * 96
    wide = make_model(max_position_embeddings=2**22)
    assert Engine.load(wide, max_sequences=8).cache_tokens == 2**32 // (2 * 2 * 2 * 16 * 4)
