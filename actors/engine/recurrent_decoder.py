"""The forward pass of the LSTM baseline (`actors.recurrent`) over the tokens of one engine step.

The cache holds each position's hidden and cell states where a transformer's keys and values are, so that beginnings are
shared, rows move and sequences are preempted as with any other decoder. The weights of the input run over all tokens of
a step at once; the recurrence goes from token to token, over all sequences together.

Shape suffixes: N token of the step, S span, C width, G the four gates of C each, V vocabulary.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F

from actors.engine.cache import KVCache
from actors.engine.linear import Linear
from actors.engine.pretrained import load_modules
from actors.engine.scheduler import Span


class RecurrentDecoder:
    """Weights and forward pass. Holds no state between calls; the cache is the caller's."""

    MODEL_TYPE = "ganymede_lstm"
    """What `actors.recurrent` calls it; that module brings `transformers`."""

    def __init__(
        self, layers: Sequence[tuple[Linear, Linear]], *, embedding: torch.Tensor, head: Linear, context: int
    ) -> None:
        """
        Args:
            layers: what makes gates of a layer's input, and of its last hidden state.
            embedding: [V, C].
            head: logits of hidden states.
            context: most tokens of a sequence.
        """
        self.kind: Literal["lean", "modules", "recurrent"] = "recurrent"
        self.vocab, self._width = embedding.shape
        self.context = context
        self._layers = layers
        self._embedding = embedding
        self._head = head

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype, device: torch.device) -> Self:
        """Opens a model folder. Raises what `pretrained.load_modules` does."""
        from transformers import AutoModelForCausalLM

        model = load_modules(folder, AutoModelForCausalLM, dtype=dtype, device=device, attention="eager")
        recurrence, layers = model.model.recurrence, []
        for n in range(recurrence.num_layers):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            of_input, of_state, *biases = (getattr(recurrence, f"{name}_l{n}").detach() for name in names)
            layers.append((Linear(of_input, biases[0] + biases[1]), Linear(of_state, None)))
        return cls(
            layers,
            embedding=model.model.embedding.weight.detach(),
            head=Linear(model.lm_head.weight.detach(), None),
            context=model.config.max_position_embeddings,
        )

    def new_cache(self, tokens: int) -> KVCache:
        """An empty cache for this model. Raises `EngineError` if the device has no memory for it."""
        return KVCache(
            layers=len(self._layers), kv_heads=1, head_dim=self._width, capacity=tokens,
            dtype=self._head.dtype, device=self._head.device,
        )  # fmt: skip

    def run(self, spans: Sequence[Span], cache: KVCache, wanted: Sequence[int]) -> torch.Tensor:
        """See `modules.Decoder.run`."""
        device = self._head.device
        tokens = [token for span in spans for token in span.tokens]
        positions = [position for span in spans for position in range(span.start, span.stop)]
        rows = [span.row for span in spans for _ in span.tokens]
        tokens_N, positions_N, rows_N = torch.tensor([tokens, positions, rows], device=device)
        addresses = cache.addresses(rows_N, positions_N)
        order = _Order(spans, device)
        x_NC = F.embedding(tokens_N, self._embedding)
        for index, (of_input, of_state) in enumerate(self._layers):
            states_N2C = order.recur(of_input(x_NC), of_state, *order.begin(cache, index))
            cache.write(index, states_N2C, addresses)
            x_NC = states_N2C[:, 0]
        return self._head(x_NC[list(wanted)]).float()


class _Order:
    """Which tokens of a step's spans run at the same time: all first ones, all second ones and so on."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        firsts, first = [], 0
        for span in spans:
            firsts.append(first)
            first += len(span.tokens)
        # Longest first, so that those that go on are always the first ones.
        by_length = sorted(range(len(spans)), key=lambda n: -len(spans[n].tokens))
        lengths = [len(spans[n].tokens) for n in by_length]
        self._turns = [
            torch.tensor([firsts[n] + time for n, length in zip(by_length, lengths, strict=True) if length > time],
                         device=device)
            for time in range(lengths[0])
        ]  # fmt: skip
        starts = [[spans[n].row, max(spans[n].start - 1, 0), spans[n].start > 0] for n in by_length]
        self._rows_S, self._before_S, self._begun_S = torch.tensor(starts, device=device).t()

    def begin(self, cache: KVCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden and cell state [S, C] that each span begins with, those of the position before it or 0."""
        width = int(self._before_S.max()) + 1
        hidden_R1LC, cell_R1LC = cache.rows(layer, slice(None), width)
        begun_S1 = self._begun_S.bool()[:, None]
        hidden_SC, cell_SC = (part[self._rows_S, 0, self._before_S] for part in (hidden_R1LC, cell_R1LC))
        return hidden_SC.where(begun_S1, 0), cell_SC.where(begun_S1, 0)

    def recur(self, gates_NG: torch.Tensor, of_state: Linear, hidden: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
        """Hidden and cell states [N, 2, C] after each token, from what its input adds to the gates."""
        states_N2C = gates_NG.new_empty(len(gates_NG), 2, hidden.shape[1])
        for turn in self._turns:
            gates = gates_NG[turn]
            of_state.add_to(gates, hidden[: len(turn)])
            enter, keep, new, show = gates.chunk(4, dim=-1)
            cell = keep.sigmoid() * cell[: len(turn)] + enter.sigmoid() * new.tanh()
            hidden = show.sigmoid() * cell.tanh()
            states_N2C[turn] = torch.stack([hidden, cell], dim=1)
        return states_N2C
