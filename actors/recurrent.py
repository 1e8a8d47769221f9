"""The recurrent baseline: an LSTM language model that saves, opens and generates like any model of `transformers`.

Importing this module registers it with `AutoConfig` and `AutoModelForCausalLM`. Embedding, stacked LSTM and output
matrix are those of Zaremba et al. (2014), "Recurrent neural network regularization", with the output tied to the
embedding where asked (Press and Wolf 2017). Generation carries the state from token to token, so a token costs the
same however long the text before it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

_INIT_RANGE = 0.1

State = tuple[Tensor, Tensor]
"""Hidden and cell state, each [layers, rows, width]."""


class LstmConfig(PretrainedConfig):
    """Shape of an LSTM language model."""

    model_type = "ganymede_lstm"

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 256,
        num_hidden_layers: int = 2,
        max_position_embeddings: int = 256,
        dropout: float = 0.0,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        # Length of the rows it was trained on; the model itself reads on without a bound.
        self.max_position_embeddings = max_position_embeddings
        self.dropout = dropout
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


@dataclass
class LstmOutput(BaseModelOutput):
    """`last_hidden_state` [rows, length, width], and the state after the last token."""

    state: State | None = None


@dataclass
class LstmCausalOutput(CausalLMOutput):
    """`logits` [rows, length, vocabulary], and the state after the last token."""

    state: State | None = None


class LstmPreTrainedModel(PreTrainedModel):
    """What both models below share."""

    config_class = LstmConfig
    base_model_prefix = "model"
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Uniform in ±0.1 for the embedding, as in the paper, and in ±1/sqrt(width) for the LSTM."""
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.uniform_(module.weight, -_INIT_RANGE, _INIT_RANGE)
        elif isinstance(module, nn.LSTM):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -bound, bound)


class LstmModel(LstmPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.recurrence = nn.LSTM(
            config.hidden_size,
            config.hidden_size,
            config.num_hidden_layers,
            batch_first=True,
            dropout=config.dropout if config.num_hidden_layers > 1 else 0.0,
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.embedding = value

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, state: State | None = None, **_: Any
    ) -> LstmOutput:
        """Reads `input_ids` [rows, length] from `state` on (zeros unless given); padding [mask 0] is not read."""
        embedded = self.dropout(self.embedding(input_ids))
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        if mask is None or bool(mask.all()):
            hidden, state = self.recurrence(embedded, state)
        else:
            hidden, state = self._read_unpadded(embedded, mask.bool(), state)
        return LstmOutput(last_hidden_state=self.dropout(hidden), state=state)

    def _read_unpadded(self, embedded: Tensor, mask: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Moves the tokens of each row to its beginning, reads them, and moves what comes out back."""
        order = torch.argsort((~mask).long(), dim=1, stable=True)[:, :, None].expand(-1, -1, embedded.shape[2])
        lengths = mask.sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(embedded.gather(1, order), lengths, batch_first=True, enforce_sorted=False)
        read, state = self.recurrence(packed, state)
        hidden, _ = pad_packed_sequence(read, batch_first=True, total_length=embedded.shape[1])
        return torch.zeros_like(hidden).scatter(1, order, hidden), state


class LstmForCausalLM(LstmPreTrainedModel, GenerationMixin):
    """An LSTM language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012 - the base class's own form

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.model = LstmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output matrix."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the output matrix."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> LstmCausalOutput:
        """Logits of the token after each; with `labels` [rows, length] the mean loss, as other models give it."""
        output = self.model(input_ids, attention_mask, state)
        logits = self.lm_head(output.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return LstmCausalOutput(loss=loss, logits=logits, state=output.state)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: State | None = None, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """The whole prompt at first, then the last token and the state."""
        if state is not None:
            input_ids = input_ids[:, -1:]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "state": state}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return {**updated, "state": outputs.state}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


AutoConfig.register(LstmConfig.model_type, LstmConfig)
AutoModel.register(LstmConfig, LstmModel)
AutoModelForCausalLM.register(LstmConfig, LstmForCausalLM)
