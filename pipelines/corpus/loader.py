"""Training batches from token shards.

The documents of a split are one stream of tokens, cut into rows of `row_tokens` inputs, each with the token that
follows; every token but the first is a target once an epoch. Rows are visited in an order that a keyed permutation
gives, another one each epoch. A batch is a pure function of (corpus, seed, step): there is no state to save, going to
any step costs the same, and the slices of all ranks, one after the other, are the same global batch for every number
of workers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import blake3
import numpy as np
import numpy.typing as npt

from configs.errors import DataError, InputError
from pipelines.corpus.shards import CorpusIndex, ShardReader, SplitRecord

Rows = npt.NDArray[np.int64]
_ROUNDS = 6


class Permutation:
    """A bijection of 0..size-1 in constant memory, chosen by `key`.

    A balanced Feistel network over the next even power of two of bits, at most 64, with values that fall outside
    walked along their cycle until they are inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, size: int, key: bytes) -> None:
        if not 0 < size <= 1 << 63:
            raise InputError("size of a permutation", received=size, allowed="1 to 2**63")
        self.size = size
        self._half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        material = blake3.blake3(key).digest(8 * _ROUNDS)
        self._round_keys = np.frombuffer(material, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: npt.ArrayLike) -> Rows:
        """Where `positions` go; same shape."""
        values = np.array(positions, dtype=np.uint64)
        outside = np.ones(values.shape, dtype=bool)
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside &= values >= np.uint64(self.size)
        return values.astype(np.int64)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Loader:
    """Batches of one split of a corpus."""

    def __init__(
        self,
        readers: list[ShardReader],
        record: SplitRecord,
        *,
        vocab_size: int,
        row_tokens: int,
        batch_rows: int,
        seed: int,
    ) -> None:
        self._readers = readers
        self._starts = np.concatenate([[0], np.cumsum([s.tokens for s in record.shards], dtype=np.int64)])
        self._row_tokens = row_tokens
        self._batch_rows = batch_rows
        self._seed = seed
        self._permutations: dict[int, Permutation] = {}
        self.vocab_size = vocab_size
        self.tokens = record.tokens
        self.bytes_per_token = record.text_bytes / record.tokens
        self.rows_per_epoch = (record.tokens - 1) // row_tokens

    @classmethod
    def open(cls, corpus: Path, *, split: str, row_tokens: int, batch_rows: int, seed: int) -> Self:
        """Opens `split` of the corpus in a folder; its shards are memory-mapped.

        Raises:
            ArtifactError: the folder holds no corpus.
            CorruptArtifactError: a shard is not what the index says.
            DataError: there is no such split, or it is shorter than one row.
        """
        index = CorpusIndex.load(corpus)
        record = index.splits.get(split)
        if record is None:
            raise DataError(f"{corpus} has no such split", received=split, allowed=", ".join(index.splits))
        if record.tokens <= row_tokens:
            raise DataError(
                f"split {split} of {corpus} is shorter than one row",
                received=f"{record.tokens} tokens",
                allowed=f"at least {row_tokens + 1}",
                next_step="take more text, a larger split.validation_fraction or a shorter context_length",
            )
        readers = [ShardReader.open(corpus, shard, index.block_bytes) for shard in record.shards]
        return cls(
            readers, record, vocab_size=index.vocab_size, row_tokens=row_tokens, batch_rows=batch_rows, seed=seed
        )

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Rows:
        """The rows of `rank` in the global batch of `step` (from 0): [batch_rows / world_size, row_tokens + 1].

        Raises:
            CorruptArtifactError: a shard is damaged where the batch lies.
            InputError: the batch cannot be divided so.
        """
        if self._batch_rows % world_size or not 0 <= rank < world_size or step < 0:
            raise InputError(
                "batch cannot be divided",
                received=f"step {step}, rank {rank} of {world_size}, batch_rows {self._batch_rows}",
                allowed="step >= 0, 0 <= rank < world_size, and a batch_rows that world_size divides",
                next_step="set training.batch_rows to a multiple of training.workers",
            )
        count = self._batch_rows // world_size
        first = step * self._batch_rows + rank * count
        return self._gather(self._order(np.arange(first, first + count, dtype=np.int64)))

    def rows(self, count: int) -> Rows:
        """`count` rows (all, if there are fewer) spread evenly over the split, in document order: for evaluation."""
        count = min(count, self.rows_per_epoch)
        return self._gather(np.arange(count, dtype=np.int64) * self.rows_per_epoch // count)

    def _order(self, samples: Rows) -> Rows:
        """Row numbers of global samples: sample k is position k mod rows of epoch k div rows."""
        epochs, positions = np.divmod(samples, self.rows_per_epoch)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = self._permutation(int(epoch))(positions[chosen])
        return result

    def _permutation(self, epoch: int) -> Permutation:
        if epoch not in self._permutations:
            key = f"{self._seed}/{epoch}".encode()
            self._permutations = {epoch: Permutation(self.rows_per_epoch, key)}
        return self._permutations[epoch]

    def _gather(self, rows: Rows) -> Rows:
        result = np.empty((len(rows), self._row_tokens + 1), dtype=np.int64)
        for target, row in zip(result, rows.tolist(), strict=True):
            begin = row * self._row_tokens
            shard = int(np.searchsorted(self._starts, begin, side="right")) - 1
            filled = 0
            while filled < len(target):
                offset = begin + filled - int(self._starts[shard])
                end = min(offset + len(target) - filled, int(self._starts[shard + 1] - self._starts[shard]))
                target[filled : filled + end - offset] = self._readers[shard].read(offset, end)
                filled += end - offset
                shard += 1
        return result
