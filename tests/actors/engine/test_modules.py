"""Every decoder architecture gives the tokens and logits of transformers; what cannot is refused."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.engine.engine import Engine
from actors.engine.request import Request
from configs.errors import ArtifactError
from configs.schema.generation import Sampling

_LLAMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.2,
}  # fmt: skip

LEAN = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window-beyond-context": ("mistral", {"sliding_window": 96}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-biased": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
}
MODULES = {
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2-window": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "gpt2": (
        "gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96, "n_inner": 96, "initializer_range": 0.2},
    ),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {"pad_token_id": 0, "sliding_window": 9}),
    "gemma2": ("gemma2", {
        "head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 24,
    }),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 8, "layer_types": [
        "sliding_attention", "full_attention"]}),
    "granite": ("granite", {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
}  # fmt: skip


def save(folder: Path, kind: str, options: dict, tokenizer_folder: Path) -> Path:
    torch.manual_seed(1)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    shape = ({} if kind == "gpt2" else _LLAMA) | special | {"vocab_size": 512} | options
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = [0, 4]
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def prompts() -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(5, 512, (length,), generator=draw).tolist()) for length in (1, 2, 9, 30, 50, 5)]


def check_against_transformers(folder: Path, engine: Engine) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    greedy = Sampling(max_new_tokens=20, temperature=0)
    asked = [Request(str(n), prompt, greedy) for n, prompt in enumerate(prompts())]
    for request, completion in zip(asked, engine.generate(asked), strict=True):
        ids = torch.tensor([request.prompt_ids])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert list(completion.token_ids) == expected[0, ids.shape[1] :].tolist()
    rows = torch.tensor([prompts()[4], prompts()[4][::-1]])
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    torch.testing.assert_close(engine.score(rows), nats, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*LEAN, *MODULES])
def test_tokens_and_logits_are_those_of_transformers(
    tmp_path: Path, tokenizer_folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = save(tmp_path, *(LEAN | MODULES)[name], tokenizer_folder)
    engine = Engine.load(folder, max_sequences=4, prefill_tokens=20, precision="fp32", device="cpu")
    assert engine.decoder_kind == ("lean" if name in LEAN else "modules")
    assert [("lean decoder" in m, "own modules" in m) for m in caplog.messages if str(folder) in m] == [
        (name in LEAN, name in MODULES)
    ]
    check_against_transformers(folder, engine)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_both_decoders_give_the_same(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    folder = save(tmp_path, *LEAN[name], tokenizer_folder)
    check_against_transformers(
        folder, Engine.load(folder, max_sequences=4, precision="fp32", device="cpu", decoder="modules")
    )


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, "0 of its 2 layers attend"),
        ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, "0 of its 2 layers attend"),
        ("gpt_oss", {"num_local_experts": 2, "head_dim": 16, "num_experts_per_tok": 1}, "logits over the cache differ"),
    ],
)
def test_what_needs_more_than_causal_attention_is_refused(
    tmp_path: Path, tokenizer_folder: Path, kind: str, options: dict, reason: str
) -> None:
    folder = save(tmp_path, kind, options, tokenizer_folder)
    with pytest.raises(ArtifactError, match=f"not supported by the engine.*{reason}") as caught:
        Engine.load(folder, precision="fp32", device="cpu")
    print(caught.value)
