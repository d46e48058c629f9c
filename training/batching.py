"""Batches that mean the same on one process and on many.

`GlobalBatchSampler` decides which examples one optimizer step (or one micro-step of gradient accumulation) sees
*globally*: the composition depends on the data, the seed and the epoch, never on the number of processes. Each global
batch is then yielded as `num_splits` consecutive sub-batches, which is the order in which accelerate's
`BatchSamplerShard` deals batches to ranks, so rank r of N gets the r-th part of every global batch. With a loss that is
a sum over tokens divided by the global number of tokens (Trainer's `num_items_in_batch`), N processes follow the loss
curve of one.

Two measures of size:

* `tokens`: a budget for the padded cost of the global batch, (longest source + longest target) x examples. Examples are
  sorted by length once and cut into pools of neighbours; inside a pool they are shuffled in each epoch and cut into
  batches, and the batches of all pools are shuffled. Because pools never change, every epoch has the same number of
  batches; Trainer relies on that for its arithmetic of epochs, schedules and resuming. (Sorting inside shuffled pools,
  as fairseq does, packs a little tighter, but the number of batches changes from epoch to epoch.)
* `examples`: a plain number of examples, in random order. The last batches are evened out (sizes differ by at most one)
  instead of leaving a rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["GlobalBatchSampler", "SetEpochCallback", "padding_share"]


class GlobalBatchSampler(Sampler[list[int]]):
    """A batch sampler, deterministic in (seed, epoch), whose global batches do not depend on the number of processes.

    Args:
        lengths: For every example its length, or its (source, target) lengths.
        tokens: Budget of a global batch in padded tokens; excludes `examples`.
        examples: Number of examples of a global batch; excludes `tokens`.
        num_splits: Into how many sub-batches each global batch is dealt: the number of processes.
        seed: Together with the epoch it determines the order.
        pool_batches: Width of a pool in batches. More mixes better, fewer pads less.
        shuffle: False keeps the sorted (tokens) or given (examples) order, for evaluation.

    Raises:
        ValueError: If the budget cannot hold the longest example, or if a global batch has fewer examples than
            there are processes.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Sequence[tuple[int, ...]],
        *,
        tokens: int | None = None,
        examples: int | None = None,
        num_splits: int = 1,
        seed: int = 0,
        pool_batches: int = 4,
        shuffle: bool = True,
    ) -> None:
        if (tokens is None) == (examples is None):
            raise ValueError(f"give exactly one of tokens and examples, got tokens={tokens}, examples={examples}")
        counts = {"tokens": tokens, "examples": examples, "num_splits": num_splits, "pool_batches": pool_batches}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if len(lengths) == 0:
            raise ValueError("there are no examples to make batches of")
        self._lengths = np.asarray(lengths, dtype=np.int64).reshape(len(lengths), -1)
        self.num_splits = num_splits
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        # accelerate reads these two: batches of varying size, nothing dropped.
        self.batch_size = None
        self.drop_last = False
        if tokens is not None:
            self._pools = self._make_pools(tokens, pool_batches)
        else:
            count = -(-len(lengths) // (examples or 1))
            self._pools = [(np.arange(len(lengths)), count)]
        smallest = min(len(members) // count for members, count in self._pools)
        if smallest < num_splits:
            raise ValueError(
                f"a global batch of {smallest} example(s) cannot be dealt to {num_splits} processes: "
                f"raise the batch size ({f'tokens={tokens}' if tokens is not None else f'examples={examples}'}), "
                f"shorten the longest examples or use fewer processes"
            )

    def _make_pools(self, tokens: int, pool_batches: int) -> list[tuple[np.ndarray, int]]:
        """Cut the examples, sorted by length, into pools of neighbours. Return each with its number of batches."""
        longest = int(self._lengths.sum(axis=1).max())
        if longest > tokens:
            raise ValueError(
                f"the longest example has {longest} tokens (source + target) and a batch may have {tokens}: "
                f"raise the token budget or lower the maximum lengths"
            )
        order = self._snake_order(tokens, pool_batches)
        lengths = self._lengths[order]
        pools: list[tuple[np.ndarray, int]] = []
        start = 0
        while start < len(order):
            # Grow the pool while its examples, all padded to its longest, fit into `pool_batches` batches; no more can
            # ever fit than would at the length of the first.
            most = pool_batches * (tokens // max(1, int(lengths[start].sum()))) + 1
            peak = np.maximum.accumulate(lengths[start : start + most], axis=0).sum(axis=1).clip(min=1)
            fits = np.arange(1, len(peak) + 1) <= pool_batches * (tokens // peak)
            stop = start + (int(np.argmin(fits)) if not fits.all() else len(fits))
            if stop == len(order) and pools and stop - start < len(pools[-1][0]) // 2:
                # A rest too small to share out joins its neighbours.
                start -= len(pools.pop()[0])
            per_batch = tokens // max(1, int(lengths[start:stop].max(axis=0).sum()))
            pools.append((order[start:stop], -(-(stop - start) // per_batch)))
            start = stop
        return pools

    def _snake_order(self, tokens: int, pool_batches: int) -> np.ndarray:
        """Sorted by the first length in strips, inside a strip by the others, so neighbours are alike in all."""
        first = np.argsort(self._lengths[:, 0], kind="stable")
        if self._lengths.shape[1] == 1:
            return first
        pools = max(1.0, float(self._lengths.sum()) / (tokens * pool_batches))
        strips = max(1, round(pools**0.5))
        parts = []
        for number, strip in enumerate(np.array_split(first, strips)):
            by_rest = strip[np.lexsort(self._lengths[strip].T[1:])]
            parts.append(by_rest if number % 2 == 0 else by_rest[::-1])
        return np.concatenate(parts)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    @property
    def num_global_batches(self) -> int:
        """Number of global batches of an epoch, the same for every epoch and every number of processes."""
        return sum(count for _, count in self._pools)

    def __len__(self) -> int:
        return self.num_global_batches * self.num_splits

    def global_batches(self) -> list[np.ndarray]:
        """Return the global batches of the current epoch, in order."""
        rng = np.random.default_rng((self.seed, self.epoch))
        batches: list[np.ndarray] = []
        for members, count in self._pools:
            batches += np.array_split(rng.permutation(members) if self.shuffle else members, count)
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            for part in np.array_split(batch, self.num_splits):
                yield part.tolist()


class SetEpochCallback(TrainerCallback):
    """Sets the sampler's epoch, also inside the wrappers that accelerate puts around it when resuming."""

    def __init__(self, sampler: GlobalBatchSampler, accumulation: int) -> None:
        self.sampler = sampler
        self.updates_per_epoch = -(-sampler.num_global_batches // accumulation)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(state.global_step // self.updates_per_epoch)


def padding_share(sampler: GlobalBatchSampler) -> float:
    """Return the share of padding among all the positions that the sampler's current epoch computes."""
    positions = used = 0
    for batch in sampler:
        lengths = sampler._lengths[batch]
        positions += int(lengths.max(axis=0).sum()) * len(batch)
        used += int(lengths.sum())
    return 1 - used / positions
