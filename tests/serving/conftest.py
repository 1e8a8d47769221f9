"""A tiny Llama with random weights and a byte-level BPE, in the published form: any tool opens the folder."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.text import make_contract
from configs.schema.serving import ServingConfig
from infra.deploy import Endpoint, serve_model, stop_serving
from infra.local import quiet_environment, ray_session
from infra.platform import free_ports
from serving.calls import Offer, ServedModel
from serving.catalogue import Entry, entries
from serving.metrics import Metrics
from serving.openai.routes import create_api
from serving.replica import EngineReplica

SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT_LENGTH = 16384
"""Long, so that a request can be caught in the middle of its answer."""


def make_model(folder: Path, *, template: str | None = TEMPLATE, special: tuple[str, ...] = (), seed: int = 7) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[*SPECIAL, *special], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["def open(path, mode): return the file at the path"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    fast.chat_template = template
    fast.save_pretrained(folder)

    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT_LENGTH, tie_word_embeddings=False,
        initializer_range=0.5, bos_token_id=None, eos_token_id=[0, 4], pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    # Some other token's logit is above 0, so a greedy answer goes on until it is cut.
    model.lm_head.weight.data[[0, 4]] = 0
    model.generation_config = GenerationConfig(eos_token_id=[0, 4], pad_token_id=0)
    model.save_pretrained(folder)
    (folder / "contract.json").write_text(make_contract(folder).model_dump_json())
    return folder


def served(folder: Path) -> ServedModel:
    return ServedModel(
        name="tiny", folder=str(folder), ref="model/tiny-finetune@3", digest="ab" * 32, version=3, alias="champion",
        created=1_700_000_000,
    )  # fmt: skip


def local_endpoint(folder: Path, **settings: Any) -> AbstractContextManager[str]:
    """A server on loopback over one replica in this process, without Ray; its URL."""
    return endpoint_of(folder, served(folder), **settings)


@contextmanager
def real_endpoint(folder: Path, home: Path, **settings: Any) -> Iterator[Endpoint]:
    """The endpoint as users have it: HAProxy, ingress and replicas on an embedded Ray, state in `home`."""
    quiet_environment()
    (home / "logs").mkdir()
    (port,) = free_ports(1)
    with ray_session(home):
        yield serve_model(served(folder), ServingConfig(port=port, precision="fp32", **settings), say=lambda _: None)
        stop_serving()


def endpoint_of(folder: Path, model: ServedModel, **settings: Any) -> AbstractContextManager[str]:
    """The same for a model that says of itself what `model` does."""
    config = ServingConfig(precision="fp32", **settings)
    return offered([Offer(replace(model, folder=str(folder)), config)], config)


@contextmanager
def offered(offers: Sequence[Offer], config: ServingConfig) -> Iterator[str]:
    """The same for several models."""
    metrics = Metrics([offer.model for offer in offers])
    catalogue: dict[str, Entry] = {}
    replicas: list[EngineReplica] = []
    for offer in offers:
        own = [EngineReplica(version.replicated, offer.settings) for version in offer.model.versions]
        catalogue |= entries(offer, own[0], own[-1], metrics)
        replicas += own
    api = create_api(catalogue, config, metrics)
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        for replica in replicas:
            replica.close()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("served-model"))


@pytest.fixture(scope="session")
def plain_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a chat template."""
    return make_model(tmp_path_factory.mktemp("plain-model"), template=None)
