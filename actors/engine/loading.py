"""Which runner a model folder gets, by its `config.json`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

from actors.engine import encoder, seq2seq
from actors.engine.encoder import EncoderEngine
from actors.engine.engine import Engine
from actors.engine.pretrained import read_config
from actors.engine.seq2seq import Seq2SeqEngine
from configs.errors import ArtifactError, ConfigError

RunnerKind = Literal["decoder", "seq2seq", "encoder"]
AnyEngine = Engine | Seq2SeqEngine | EncoderEngine

_RUNNERS: dict[RunnerKind, Any] = {"decoder": Engine, "seq2seq": Seq2SeqEngine, "encoder": EncoderEngine}
_CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How the architectures end that continue a text."""


def load_engine(folder: Path, **options: Any) -> AnyEngine:
    """Opens a model folder with the runner for its architecture, which is what `runner_kind` says.

    Args:
        folder: `config.json`, safetensors weights and tokenizer files.
        options: of the runner's `load`: `precision`, `device` and `max_queued` are every runner's.

    Raises `ConfigError` for an option that the runner does not have, `ArtifactError` for a model that none can run,
    and what the runner's `load` raises.
    """
    kind = runner_kind(folder)
    runner = _RUNNERS[kind]
    known = [name for name in inspect.signature(runner.load).parameters if name != "folder"]
    for name in options:
        if name not in known:
            raise ConfigError(f"a model run as {kind} has no option {name}", allowed=", ".join(known))
    return runner.load(folder, **options)


def runner_kind(folder: Path) -> RunnerKind:
    """`seq2seq` for encoder-decoders, `decoder` for causal language models, `encoder` for encoders of any task.

    Raises `ArtifactError` for what is none of these.
    """
    config = read_config(folder)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if config.is_encoder_decoder and config.model_type in seq2seq.MODEL_TYPES:
        return "seq2seq"
    if architecture.endswith(_CAUSAL):
        return "decoder"
    if config.model_type in encoder.MODEL_TYPES:
        return "encoder"
    raise ArtifactError(
        f"{folder / 'config.json'}: no runner for this architecture",
        received=f"{architecture or 'no architecture'}, model_type {config.model_type}",
        allowed=f"architectures that end in {' or '.join(_CAUSAL)}; encoder-decoders of type "
        f"{', '.join(seq2seq.MODEL_TYPES)}; encoders of type {', '.join(encoder.MODEL_TYPES)}",
        next_step="run this model with transformers",
    )
