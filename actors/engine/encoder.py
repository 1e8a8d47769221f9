"""Encoders: classes, labelled words and spans, and embeddings, in batches of texts of like length.

The model runs through `transformers`' own modules. Guarantees: every submitted request that is not cancelled ends
exactly once; its result is that of the text alone (up to rounding), whatever it shared a batch with; a text longer
than the model's window is refused, or cut where the request says so. The contract is the generating engine's (submit,
cancel, step, has_work), so that `stream.AsyncEngine` runs either. A model does one task, which its architecture names.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor: B text, T token, C hidden, V label

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F

from actors.engine.batching import LengthQueue
from actors.engine.encodings import (
    Classification,
    Embedding,
    EncodeEvent,
    EncodeRequest,
    Encoding,
    Piece,
    Pooling,
    Tagging,
    Task,
    spans,
)
from actors.engine.kernels import kernels_kind
from actors.engine.linear import pack
from actors.engine.padding import padded, present
from actors.engine.pretrained import (
    Precision,
    check_vocabulary,
    load_modules,
    placement,
    read_config,
    refuse_int8,
)
from actors.engine.runner import check_kind, run_to_end
from actors.engine.shortage import in_parts, no_memory
from actors.text import ModelInput, Text
from configs.errors import ArtifactError, EngineError, OverloadedError, RequestError

MODEL_TYPES = ("bert", "distilbert", "modernbert", "roberta", "xlm-roberta")
"""What is run by this module: encoders whose results were compared with the plain forward pass."""

_TASKS: dict[str, tuple[Task, str]] = {
    "ForSequenceClassification": ("classify", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("tag", "AutoModelForTokenClassification"),
}
"""By the end of an architecture's name; any other embeds."""


_Read = tuple[EncodeRequest, ModelInput]
"""A request and its text as the model reads it."""


class EncoderEngine:
    """Reads many texts at once. Made by `EncoderEngine.load`. Not thread-safe."""

    def __init__(
        self, model: Any, text: Text, *, task: Task, pooling: Pooling, batch_tokens: int, max_queued: int
    ) -> None:
        self.text = text
        self.task = task
        """What the model does; requests for anything else are refused."""
        self.pooling = pooling
        """How an embedding is made where the request does not say."""
        self.context_length = _window(model)
        """Most tokens of a text, those included that the tokenizer puts around it."""
        self.labels: tuple[str, ...] = tuple(model.config.id2label[n] for n in sorted(model.config.id2label))
        """Names of the classes, or of the words' labels; without meaning for embeddings."""
        self.kernels = kernels_kind(model.dtype, model.device)
        """What runs the products: `compiled` functions, or `torch`."""
        self._model = model
        self._max_queued = max_queued
        self._queue = LengthQueue(batch_tokens)
        self._waiting: dict[str, _Read] = {}

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        batch_tokens: int = 2048,
        max_queued: int = 1024,
        precision: Precision = "auto",
        device: str = "auto",
    ) -> Self:
        """Opens a model folder.

        Args:
            folder: `config.json`, safetensors weights and a fast tokenizer.
            batch_tokens: tokens of a batch, padding included.
            max_queued: requests that may wait before `submit` refuses.
            precision: `auto` is bf16 on a GPU and on processors with bf16 arithmetic, fp32 elsewhere.
            device: a torch device; `auto` is the first GPU if there is one.

        Raises `ArtifactError` for a folder that is not a supported model, `ContractError` if its tokenizer is not the
        one it was trained with.
        """
        text, config = Text.load(folder), read_config(folder)
        if config.model_type not in MODEL_TYPES:
            raise ArtifactError(
                f"{folder / 'config.json'}: this model_type is not run as an encoder",
                received=config.model_type,
                allowed=", ".join(MODEL_TYPES),
            )
        check_vocabulary(folder, text.vocab_size, config)
        architecture = (config.architectures or [""])[0]
        task, auto_class = next(
            (found for end, found in _TASKS.items() if architecture.endswith(end)), ("embed", "AutoModel")
        )
        # Embeddings do not pass through the pooler, which checkpoints of masked language models do not have.
        optional = ("pooler.",) if task == "embed" else ()
        refuse_int8(precision, folder, "an encoder")
        dtype, where = placement(precision, device)
        import transformers

        model = load_modules(folder, getattr(transformers, auto_class), dtype=dtype, device=where, optional=optional)
        pack(model)
        pooling = _read_pooling(folder)
        return cls(model, text, task=task, pooling=pooling, batch_tokens=batch_tokens, max_queued=max_queued)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting)

    def submit(self, request: EncodeRequest) -> None:
        """Queues a request. Raises `RequestError` if it cannot be served, `OverloadedError` if the queue is full."""
        self._add(request, bounded=True)

    def cancel(self, request_id: str) -> None:
        """Drops a request at once, without an event; one that has ended already is no error."""
        if self._waiting.pop(request_id, None) is not None:
            self._queue.remove(request_id)

    def step(self) -> list[EncodeEvent]:
        """Runs one batch, in parts if the device has no memory for all of it at once; its requests' events."""
        batch = [self._waiting.pop(key) for key in self._queue.take()]
        began = time.monotonic()
        events = in_parts(self._run, batch, _failed) if batch else []
        return [replace(event, began=began) for event in events]

    def encode(self, requests: Sequence[EncodeRequest]) -> list[EncodeEvent]:
        """Runs requests to their end, however many; events in the order of the requests.

        Raises `RequestError` before anything runs if one of them cannot be served, and `EngineError` if other
        requests are in flight (their events would be lost).
        """
        return [event for (event,) in run_to_end(self, requests, partial(self._add, bounded=False))]

    def _add(self, request: EncodeRequest, *, bounded: bool) -> None:
        self._check(request)
        if bounded and len(self._queue) >= self._max_queued:
            raise OverloadedError(
                "the request queue is full",
                received=f"{len(self._queue)} requests waiting",
                allowed=f"{self._max_queued} waiting",
                next_step="try again later, or raise max_queued or the number of replicas",
            )
        read = self.text.encode_input(request.text, request.pair)
        if len(read.token_ids) > self.context_length:
            if not request.truncate:
                raise RequestError(
                    "the text is longer than the model's window",
                    param="text",
                    received=f"{len(read.token_ids)} tokens",
                    allowed=f"at most {self.context_length} tokens",
                    next_step="shorten the text, or set truncate to have its end left out",
                )
            read = self.text.encode_input(request.text, request.pair, window=self.context_length)
        self._waiting[request.id] = (request, read)
        self._queue.add(request.id, len(read.token_ids))

    def _check(self, request: EncodeRequest) -> None:
        check_kind(request, EncodeRequest, "is an encoder, which reads texts and does not generate any")
        if request.id in self._waiting:
            raise RequestError("a request with this id is in flight", param="id", received=request.id)
        if request.task != self.task:
            raise RequestError(
                f"this model does not {request.task}",
                param="task",
                received=request.task,
                allowed=self.task,
                next_step="ask a model whose architecture ends in ForSequenceClassification (classify) or "
                "ForTokenClassification (tag), or any other encoder (embed)",
            )
        if request.task == "tag" and request.pair is not None:
            raise RequestError("words are labelled in one text, not in a pair", param="pair")
        if not request.text:
            raise RequestError("the text is empty", param="text", allowed="at least one character")

    @torch.inference_mode()
    def _run(self, batch: Sequence[_Read]) -> list[EncodeEvent]:
        output, mask_BT = self._forward([read for _, read in batch])
        result = (output.last_hidden_state if self.task == "embed" else output.logits).float()
        # Whatever stands at padding is nobody's.
        rows = [row[mask] if row.dim() > 1 else row for row, mask in zip(result, mask_BT, strict=True)]
        return [self._event(request, read, row) for (request, read), row in zip(batch, rows, strict=True)]

    def _forward(self, reads: Sequence[ModelInput]) -> tuple[Any, torch.Tensor]:
        """The model's output for some texts, padded on the right; and where tokens are, [B, T]."""
        config, device = self._model.config, self._model.device
        tokens = [read.token_ids for read in reads]
        mask_BT = present(tokens, device)
        inputs = {
            "input_ids": padded(tokens, config.pad_token_id or 0, device),
            "attention_mask": mask_BT.long(),
        }
        if getattr(config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = padded([read.type_ids for read in reads], 0, device)
        return self._model(**inputs), mask_BT

    def _event(self, request: EncodeRequest, read: ModelInput, row: torch.Tensor) -> EncodeEvent:
        count = len(read.token_ids)
        if not bool(row.isfinite().all()):
            error = EngineError(
                "the model's output is not finite numbers",
                next_step="check the model's weights; in bf16, try precision fp32",
            )
            return EncodeEvent(request.id, None, count, read.truncated, "error", error)
        if self.task == "embed":
            encoding: Encoding = _embedding(row, request.pooling or self.pooling, request.normalize)
        elif self.task == "tag":
            encoding = self._tagging(row, read)
        else:
            encoding = self._classification(row)
        return EncodeEvent(request.id, encoding, count, read.truncated)

    def _classification(self, logits_V: torch.Tensor) -> Classification:
        kind = self._model.config.problem_type
        if kind == "regression":
            scores_V = logits_V
        elif kind == "multi_label_classification" or len(logits_V) == 1:
            scores_V = logits_V.sigmoid()
        else:
            scores_V = logits_V.softmax(-1)
        scores = dict(zip(self.labels, scores_V.tolist(), strict=True))
        return Classification(max(scores, key=scores.__getitem__), scores)

    def _tagging(self, logits_TV: torch.Tensor, read: ModelInput) -> Tagging:
        best_T, labels_T = (values.tolist() for values in logits_TV.softmax(-1).max(-1))
        pieces: list[Piece] = []
        last: int | None = None
        for word, (start, end), label, best in zip(read.words, read.offsets, labels_T, best_T, strict=True):
            if word is None:
                continue
            if word == last:
                piece = pieces[-1]
                pieces[-1] = Piece(piece.start, end, piece.label, piece.probability)
            else:
                pieces.append(Piece(start, end, self.labels[label], best))
            last = word
        return Tagging(tuple(pieces), spans(pieces))


def _failed(read: _Read, message: str) -> list[EncodeEvent]:
    """The event of a text that there is no memory for."""
    request, tokens = read
    count = len(tokens.token_ids)
    error = no_memory(f"{count} tokens", message, "shorten the text, or give the process more memory")
    return [EncodeEvent(request.id, None, count, tokens.truncated, "error", error)]


def _embedding(hidden_TC: torch.Tensor, pooling: Pooling, normalize: bool) -> Embedding:
    vector_C = hidden_TC[0] if pooling == "cls" else hidden_TC.mean(0)
    if normalize:
        vector_C = F.normalize(vector_C, dim=0)
    return Embedding(tuple(vector_C.tolist()))


def _window(model: Any) -> int:
    """Most tokens of a text: the positions that the model has weights for, or was made for."""
    positions = next((m for name, m in model.named_modules() if name.endswith("position_embeddings")), None)
    if positions is None:
        return int(model.config.max_position_embeddings)
    # RoBERTa counts positions from the one after the padding token's.
    first = 0 if positions.padding_idx is None else positions.padding_idx + 1
    return int(positions.num_embeddings) - first


def _read_pooling(folder: Path) -> Pooling:
    """What sentence-transformers' files in the folder say, `mean` where there are none.

    Raises `ArtifactError` for what is not done here, as its embeddings would silently differ.
    """
    modules = folder / "modules.json"
    types = [m["type"].rsplit(".", 1)[-1] for m in json.loads(modules.read_bytes())] if modules.is_file() else []
    path = folder / "1_Pooling" / "config.json"
    settings = json.loads(path.read_bytes()) if path.is_file() else {"pooling_mode_mean_tokens": True}
    modes = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
    known: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    unknown = sorted(set(types) - {"Transformer", "Pooling", "Normalize"})
    if unknown or len(modes) != 1 or modes[0] not in known:
        raise ArtifactError(
            f"{folder}: this way to make an embedding is not supported",
            received=", ".join(unknown or modes),
            allowed="Transformer, Pooling and Normalize, with pooling by mean or cls",
            next_step="run this model with sentence-transformers",
        )
    return known[modes[0]]
