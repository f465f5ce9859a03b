"""Held-out pairs in the loops of other programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.plugin.batches import Microbatch, PreferenceBatches


class HeldOutBatches(Iterator[Microbatch]):
    """The same held-out pairs at every evaluation, as an iterator without an end.

    Args:
        begin: an evaluation's micro-batches, from the first pair on.
    """

    def __init__(self, begin: Callable[[], PreferenceBatches]) -> None:
        self._begin, self._current = begin, begin()

    def peek(self) -> RankBatch:
        """As of :meth:`megatron_rmipo.plugin.batches.PreferenceBatches.peek`."""
        try:
            return self._current.peek()
        except StopIteration:
            self._current = self._begin()
            return self._current.peek()

    def __next__(self) -> Microbatch:
        self.peek()
        return next(self._current)


def pairs_of_evaluation(pairs: PairCollection, num_batches: int, batch_size: int, *, named: tuple[str, str, str]) -> int:
    """Pairs that an evaluation takes.

    Args:
        pairs: the held-out ones.
        num_batches: of an evaluation.
        batch_size: pairs of each.
        named: what the program calls ``num_batches``, ``batch_size``, and what names the pairs.

    Raises:
        ConfigError: there are fewer.
    """
    wanted = num_batches * batch_size
    if wanted > len(pairs):
        number, size, data = named
        most = len(pairs) // batch_size
        raise ConfigError(
            f"{number} {num_batches} x {batch_size} pairs: {data} has {len(pairs)}. Give {number} {most}, or a smaller {size}."
        )
    return wanted
