"""The model that a stage trains: built from scratch, or one that stands."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from configs.schema.base import Config, InputMarker

Architecture = Literal["llama", "gpt2", "bert", "roberta", "modernbert", "t5", "bart", "lstm"]
Family = Literal["decoder", "encoder", "encoder-decoder"]

FAMILY: dict[Architecture, Family] = {
    "llama": "decoder",
    "gpt2": "decoder",
    "lstm": "decoder",
    "bert": "encoder",
    "roberta": "encoder",
    "modernbert": "encoder",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
}
SIZES: dict[str, tuple[int, int]] = {
    "tiny": (128, 2),
    "mini": (256, 4),
    "small": (512, 4),
    "medium": (512, 8),
    "base": (768, 12),
}
"""Width and layers by name, as in the family of small models of Turc et al. 2019, "Well-read students learn better"."""
_HEAD_WIDTH = 64
_FEED_FORWARD_MULTIPLE = 32


def is_folder(start: str) -> bool:
    """Whether the start of a model is a folder, and not a stage or an artifact: folders begin with `/`, `.` or `~`."""
    return start.startswith(("/", ".", "~"))


class ModelConfig(Config):
    """A model to train; the vocabulary comes from the tokenizer."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    start: Annotated[str, InputMarker(unless=is_folder), Field(min_length=1)] | None = Field(None, alias="from")
    """A stage, an artifact (`model/name@version`) or a folder in Hugging Face format (beginning with `/`, `.` or `~`)
    whose weights training starts from. Nothing but `dropout` is then chosen here."""
    architecture: Architecture = "llama"
    size: Literal["tiny", "mini", "small", "medium", "base"] = "mini"
    """Width and layers: 128 x 2, 256 x 4, 512 x 4, 512 x 8 or 768 x 12."""
    context_length: Annotated[int, Field(ge=16)] = 256
    """Longest sequence in tokens; of an encoder-decoder, of either side."""
    hidden_size: Annotated[int, Field(ge=16)] | None = None
    """Width of the residual stream, or of an LSTM's state; as `size` says unless set."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """Layers, of an encoder-decoder on either side; as `size` says unless set."""
    heads: Annotated[int, Field(ge=1)] | None = None
    """Attention heads; one for each 64 of the width unless set."""
    kv_heads: Annotated[int, Field(ge=1)] | None = None
    """Key/value heads of a llama (grouped-query attention); as many as `heads` unless set."""
    intermediate_size: Annotated[int, Field(ge=16)] | None = None
    """Width of the feed-forward layers. Unless set 8/3 of the width, rounded up to 32, where they are gated (llama,
    modernbert), 4 times the width elsewhere."""
    tie_embeddings: bool = True
    """Input and output embeddings share their weights."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of activations that training leaves out. Which ones depends on the seed, the step and the place in the
    batch, so a resumed run leaves out the same; another split into micro-batches does not."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.start is not None:
            given = sorted(self.model_fields_set - {"start", "dropout"})
            if given:
                raise ValueError(f"a model that stands has its shape: leave out {', '.join(given)}, or from")
            return self
        if self.architecture != "lstm" and self.width % (2 * self.head_count):
            raise ValueError(f"hidden_size {self.width} must be a multiple of 2 x heads ({2 * self.head_count})")
        if self.kv_heads is not None and self.architecture != "llama":
            raise ValueError(f"kv_heads is for llama; {self.architecture} has one for each head")
        if self.kv_heads is not None and self.head_count % self.kv_heads:
            raise ValueError(f"heads {self.head_count} must be a multiple of kv_heads {self.kv_heads}")
        return self

    @property
    def family(self) -> Family:
        """Which kind of model the architecture is."""
        return FAMILY[self.architecture]

    @property
    def width(self) -> int:
        """`hidden_size`, chosen or derived."""
        return self.hidden_size or SIZES[self.size][0]

    @property
    def depth(self) -> int:
        """`layers`, chosen or derived."""
        return self.layers or SIZES[self.size][1]

    @property
    def head_count(self) -> int:
        """`heads`, chosen or derived."""
        return self.heads or max(1, self.width // _HEAD_WIDTH)

    @property
    def feed_forward(self) -> int:
        """`intermediate_size`, chosen or derived."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        if self.architecture in ("llama", "modernbert"):
            return -(-(8 * self.width // 3) // _FEED_FORWARD_MULTIPLE) * _FEED_FORWARD_MULTIPLE
        return 4 * self.width


def _from(value: Any) -> Any:
    """A model given by name alone is one to start from."""
    return {"from": value} if isinstance(value, str) else value


ModelChoice = Annotated[ModelConfig, BeforeValidator(_from)]
"""A `ModelConfig`, or the name of what to start from."""
