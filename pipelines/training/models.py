"""Models to train: built from a config, or opened from a model folder, with the head that an objective needs.

Everything is a `transformers` model in and out, so that a folder written here opens in any tool that reads that format.
Weights are kept in fp32; bf16 comes from autocast in the loop. Initialisation is a function of the config and the seed
alone, of a new head on a model that stands as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
)

from actors.recurrent import LstmConfig
from configs.errors import ArtifactError, ConfigError
from configs.schema.model import Family, ModelConfig
from pipelines.training.architectures import architecture_config, initialise_llama

Head = Literal["causal", "masked", "seq2seq", "classify", "tag"]

AUTO_CLASSES: dict[Head, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classify": AutoModelForSequenceClassification,
    "tag": AutoModelForTokenClassification,
}
LANGUAGE_HEADS: dict[Family, Head] = {"decoder": "causal", "encoder": "masked", "encoder-decoder": "seq2seq"}
"""The head that each family is pretrained with."""
_DROPOUTS = (
    "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout", "dropout_rate", "embd_pdrop",
    "embedding_dropout", "hidden_dropout_prob", "mlp_dropout", "resid_pdrop",
)  # fmt: skip
"""What the configs of `transformers` call their dropout."""


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    eos_token_id: int,
    seed: int,
    head: Head | None = None,
    labels: Sequence[str] = (),
) -> nn.Module:
    """A freshly initialised model in fp32 on the CPU; equal arguments give equal weights.

    Args:
        head: what it ends in; the language model of its family unless given.
        labels: names of the classes of a head that classifies.

    Raises:
        ConfigError: the architecture has no such head.
    """
    head = head or LANGUAGE_HEADS[config.family]
    shape = architecture_config(config, vocab_size=vocab_size, eos_token_id=eos_token_id)
    _name_labels(shape, labels)
    _check_head(shape, head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AUTO_CLASSES[head].from_config(shape, attn_implementation=_attention(shape))
    if config.architecture == "llama" and head == "causal":
        initialise_llama(model, seed)
    return model


def build_skeleton(shape: Any, head: Head, labels: Sequence[str] = ()) -> nn.Module:
    """The model that `shape` describes, with `head` and without memory for its weights.

    Raises:
        ConfigError: its architecture has no such head.
    """
    _name_labels(shape, labels)
    _check_head(shape, head)
    with torch.device("meta"):
        return AUTO_CLASSES[head].from_config(shape, attn_implementation=_attention(shape))


def load_model(
    folder: Path, head: Head = "causal", *, labels: Sequence[str] = (), dropout: float = 0.0, seed: int = 0
) -> nn.Module:
    """The model of a model folder with `head`, in fp32 on the CPU; weights that the folder lacks come from `seed`.

    Raises:
        ArtifactError: the folder holds no model that `transformers` can open.
        ConfigError: its architecture has no such head.
    """
    shape = read_shape(folder)
    _name_labels(shape, labels)
    _check_head(shape, head)
    for name in _DROPOUTS:
        if hasattr(shape, name):
            setattr(shape, name, dropout)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AUTO_CLASSES[head].from_pretrained(
                folder,
                config=shape,
                dtype=torch.float32,
                attn_implementation=_attention(shape),
                local_files_only=True,
            )
    except (OSError, ValueError) as error:
        raise _unopenable(folder, error) from error


def read_shape(folder: Path) -> Any:
    """The `transformers` config of a model folder.

    Raises:
        ArtifactError: there is none that can be read.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _unopenable(folder, error) from error


def _unopenable(folder: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"no model can be opened in {folder}: {error}",
        allowed="a folder with config.json and model.safetensors",
        next_step="ganymede artifacts verify, or correct the folder",
    )


def _name_labels(shape: Any, labels: Sequence[str]) -> None:
    if labels:
        shape.id2label = dict(enumerate(labels))
        shape.label2id = {label: i for i, label in enumerate(labels)}


def _attention(shape: Any) -> str:
    return "eager" if shape.model_type == LstmConfig.model_type else "sdpa"


def _check_head(shape: Any, wanted: Head) -> None:
    # What an encoder-decoder classifies by is its last end token, which padding looks like in the models made here.
    possible: tuple[Head, ...] = ("seq2seq",) if shape.is_encoder_decoder else ("causal", "masked", "classify", "tag")
    allowed = [head for head in possible if type(shape) in AUTO_CLASSES[head]._model_mapping]
    if wanted not in allowed:
        raise ConfigError(
            f"a {shape.model_type} model cannot be trained this way",
            received=f"head {wanted!r}",
            allowed=", ".join(allowed),
            next_step="choose another architecture, or another task",
        )


def pretraining_head(folder: Path) -> Head:
    """The head of the language model that a model folder holds, by the family of its architecture."""
    shape = read_shape(folder)
    if shape.is_encoder_decoder:
        return "seq2seq"
    return "causal" if type(shape) in AutoModelForCausalLM._model_mapping and not _is_encoder(shape) else "masked"


def _is_encoder(shape: Any) -> bool:
    """BERT and its like can be opened as decoders too, which their config has to ask for."""
    return type(shape) in AutoModelForMaskedLM._model_mapping and not getattr(shape, "is_decoder", False)


def recompute_activations(model: nn.Module) -> None:
    """Has each layer keep its input alone and run again in the backward pass: the same gradients, less memory.

    Raises:
        ConfigError: the architecture cannot do that.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"training.activation_checkpointing: a {model.config.model_type} model cannot recompute its layers",
            received=True,
            allowed="false",
            next_step="lower training.micro_batch_rows to save memory",
        )
    model.activation_checkpointing_enable({"use_reentrant": False})


def context_length(folder: Path) -> int:
    """Longest sequence, in tokens, of the model in a model folder."""
    return window(read_shape(folder))


def window(shape: Any) -> int:
    """Longest sequence, in tokens, of a model of this `transformers` configuration.

    Raises:
        ArtifactError: it does not say.
    """
    length = getattr(shape, "max_position_embeddings", None) or getattr(shape, "n_positions", None)
    if length is None:
        raise ArtifactError(
            f"the {shape.model_type} model {shape.name_or_path} does not say how long its sequences may be",
            allowed="max_position_embeddings or n_positions in config.json",
            next_step="add the length it was trained on to config.json",
        )
    # RoBERTa counts positions from its padding id on.
    return int(length) - (shape.pad_token_id + 1 if shape.model_type == "roberta" else 0)


def set_generation(model: nn.Module, *, eos_token_ids: Iterable[int], pad_token_id: int) -> None:
    """Tells a model that generates what ends and what pads its texts; others are left alone."""
    if model.can_generate():
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(eos_token_ids),
            pad_token_id=pad_token_id,
            bos_token_id=None,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        )


def save_model(model: nn.Module, folder: Path, *, eos_token_ids: Iterable[int], pad_token_id: int) -> None:
    """Writes config.json, model.safetensors and, of a model that generates, generation_config.json.

    Equal weights give equal bytes.
    """
    set_generation(model, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id)
    model.save_pretrained(folder)


def hidden_states(model: nn.Module, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Final hidden states [rows, length, width] of right-padded token rows [rows, length].

    No attention mask: behind a causal mask no token sees the padding to its right. Of `position_ids`, `transformers`
    takes it that a sequence of its own begins wherever they do not go on by one, and attends to nothing before.
    """
    output: Tensor = model.base_model(input_ids=tokens, position_ids=position_ids, use_cache=False).last_hidden_state
    return output


def parameter_count(model: nn.Module) -> int:
    """Scalars of all weights; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def trained_count(model: nn.Module) -> int:
    """Scalars that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def training_flops(model: nn.Module, length: int) -> tuple[float, float]:
    """Floating-point operations of one training step, for rows of `length` positions: per position that the model runs
    over, and on top per target, as output matrix and heads see targets alone.

    Six per weight that takes part in a matrix product (an embedding lookup not), four if it is frozen and has no
    gradient, and 12 x layers x width x length for attention, half of that behind a causal mask (Chowdhery et al. 2022,
    appendix B).
    An encoder-decoder uses about half of its weights at each position, of input or output; a recurrent layer has no
    attention.
    """
    config = model.config
    embeddings = _embedding_ids(model)
    body = {id(p) for p in model.base_model.parameters()}
    output = model.get_output_embeddings()
    outer = {id(p): p for p in model.parameters() if id(p) not in body}
    if output is not None:
        outer[id(output.weight)] = output.weight
    inner = [p for p in model.parameters() if id(p) not in embeddings | outer.keys()]
    sides = 2 if config.is_encoder_decoder else 1
    causal = type(config) in AutoModelForCausalLM._model_mapping and not _is_encoder(config)
    attention = (6.0 if causal else 12.0) * config.num_hidden_layers * config.hidden_size * length
    if config.model_type == LstmConfig.model_type:
        attention = 0.0
    return _product_flops(inner) / sides + attention, _product_flops(outer.values())


def _product_flops(weights: Iterable[nn.Parameter]) -> float:
    return sum((6.0 if p.requires_grad else 4.0) * p.numel() for p in weights if p.ndim == 2)


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The two-dimensional weights between embeddings and head, by name; of a model with adapters none."""
    output = model.get_output_embeddings()
    outer = _embedding_ids(model) | (set() if output is None else {id(output.weight)})
    inner = {id(p) for p in model.base_model.parameters()}
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim == 2 and p.requires_grad and id(p) in inner and id(p) not in outer
    }
    return {} if any(".lora_" in name for name in matrices) else matrices


def _embedding_ids(model: nn.Module) -> set[int]:
    """Tables that are looked up: of tokens, positions and kinds of tokens."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
