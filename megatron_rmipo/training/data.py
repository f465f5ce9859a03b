"""The prepared data of a run, and whether it fits the model and the objective."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial

from megatron_rmipo.checkpoint.source import ModelSource, check_tokenizer
from megatron_rmipo.config.flags.data import parse_blend, parse_split
from megatron_rmipo.config.schema import Config, ObjectiveConfig, TrainingConfig
from megatron_rmipo.config.unknown_flags import flag_of
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.fitting import check_pairs_fit, largest_pair
from megatron_rmipo.data.encoding.context_token import ContextToken, find_context_token
from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.store.chat_form import CarriedForm, carried_form
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.fingerprint import collection_fingerprint
from megatron_rmipo.data.store.manifest import Manifest
from megatron_rmipo.data.store.mismatch import MismatchedStore
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.passes.needed_data import check_length, check_read, refuse_empty, refuse_mixed
from megatron_rmipo.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class HeldOutSet:
    """Pairs to evaluate on.

    Attributes:
        name: of ``--eval-data``; "" for the main set.
        pairs: prepared.
        num_pairs: how many of them are evaluated, the first ones.
    """

    name: str
    pairs: PairCollection
    num_pairs: int


@dataclasses.dataclass(frozen=True)
class RunData:
    """Prepared pairs of a run.

    Attributes:
        train: pairs to train on.
        held_out_sets: pairs to evaluate on, the main set first where there is one.
        context: what stands before a response in log p(y).
        fitting: layouts that :meth:`check_rows_fit` has let pass: a plan that is made again does not look again.
    """

    train: PairCollection
    held_out_sets: tuple[HeldOutSet, ...]
    context: ContextToken
    fitting: set[BatchLayout] = dataclasses.field(default_factory=set, compare=False, repr=False)

    @functools.cached_property
    def train_fingerprint(self) -> str:
        """Of the pairs to train on, see :func:`megatron_rmipo.data.store.fingerprint.collection_fingerprint`."""
        return collection_fingerprint(self.train)

    @functools.cached_property
    def held_out_fingerprints(self) -> dict[str, str]:
        """Of the pairs to evaluate on, by the name of their set."""
        return {one.name: collection_fingerprint(one.pairs) for one in self.held_out_sets}

    @property
    def collections(self) -> list[PairCollection]:
        """All of its pairs."""
        return [self.train, *(one.pairs for one in self.held_out_sets)]

    @property
    def manifests(self) -> dict[str, Manifest]:
        """Those of its data sets, by prefix."""
        return {store.prefix: store.manifest for pairs in self.collections for store in pairs.stores}

    @property
    def chat(self) -> CarriedForm:
        """As of :func:`megatron_rmipo.data.store.chat_form.carried_form`."""
        return carried_form(self.manifests.items())

    def run_length(self, training: TrainingConfig, progress: Progress) -> tuple[int, int]:
        """(pairs of the run, optimizer steps of the run), by ``--train-iters`` or ``--epochs``.

        Counted on from where the run stands: where its last batch was short, its pairs are no multiple of the batch any more.
        """
        batch_size = training.global_batch_size
        if training.train_iters is not None:
            steps_left = max(0, training.train_iters - progress.step)
            return progress.consumed_pairs + steps_left * batch_size, training.train_iters
        total_pairs = max(1, round((training.epochs or 1.0) * len(self.train)))
        pairs_left = max(0, total_pairs - progress.consumed_pairs)
        return total_pairs, progress.step + -(-pairs_left // batch_size)

    def check_rows_fit(self, layout: BatchLayout) -> None:
        """Refuse pairs that fit no pack.

        Raises:
            ConfigError: naming the largest, and the value that would work.
        """
        if layout not in self.fitting:
            for pairs in self.collections:
                check_pairs_fit(pairs, layout)
            self.fitting.add(layout)

    def largest_pair(self, layout: BatchLayout) -> int:
        """As of :func:`megatron_rmipo.data.batches.fitting.largest_pair`, of all collections."""
        return max(largest_pair(pairs, layout) for pairs in self.collections)


def open_data(config: Config, source: ModelSource, needs: LogpNeeds) -> RunData:
    """Open ``--data-path`` and the held-out pairs, and check that they fit the model.

    Args:
        config: the run's configuration.
        source: the model.
        needs: of the objective; where it reads mismatched pairs, they are made.

    Raises:
        ConfigError: no data is named, or a flag asks for more than there is.
        DataError: a data set is missing, incomplete, empty, made with another tokenizer, or without the responses that the
            objective needs, or the columns that it reads; or unpaired data is blended with pairs.
    """
    if not config.data.data_path:
        raise ConfigError("no data to train on: give --data-path PREFIX (of PREFIX.bin, .idx and .json).")
    tokenizer = load_tokenizer(str(source.assets))
    check = partial(_check_store, fingerprint=tokenizer.info.fingerprint, needs=needs, config=config, source=source)
    parts, weights = _open_blend(config.data.data_path, "--data-path", check)
    held_out = None
    if config.data.valid_data_path:
        held_out = PairCollection.combine(*_open_blend(config.data.valid_data_path, "--valid-data-path", check))
    elif config.data.split:
        # Each data set is split before it is blended: repeating one must not bring its held-out pairs into training.
        share = parse_split(config.data.split)[1]
        split_parts = [part.split(share) for part in parts]
        for (first, _), part in zip(split_parts, parts, strict=True):
            if len(first) == 0:
                raise DataError(
                    f"--split {config.data.split} leaves nothing to train on of the {len(part)} pairs of "
                    f"{part.stores[0].prefix}. Hold out less, or name held-out data with --valid-data-path."
                )
        parts = [first for first, _ in split_parts]
        held_out = PairCollection.combine([last for _, last in split_parts])
    train = PairCollection.combine(parts, weights)
    named = {} if held_out is None else {"": held_out}
    for name, prefix in config.evaluation.sets.items():
        (named[name],), _ = _open_blend([prefix], f"--eval-data {name}", check)
    stores = [store for pairs in (train, *named.values()) for store in pairs.stores]
    refuse_mixed(stores)
    context = find_context_token(tokenizer, [store.manifest for store in stores])
    most = config.training.eval_pairs
    sets = [HeldOutSet(name, pairs, min(len(pairs), most or len(pairs))) for name, pairs in named.items()]
    data = RunData(train, tuple(sets), context)
    made: dict[str, MismatchedStore] = {}
    for pairs in data.collections if needs.mismatched else []:
        pairs.match_anew(made)
    return data


def _open_blend(
    values: Sequence[str], flag: str, check: Callable[[PairStore, str], None]
) -> tuple[list[PairCollection], list[float] | None]:
    """The data sets a flag names, each checked, and their weights; None where there is one alone."""
    blend = parse_blend(values, flag)
    stores = [PairStore(prefix) for _, prefix in blend]
    for store in stores:
        check(store, flag)
    return [PairCollection([store]) for store in stores], [weight for weight, _ in blend] if len(blend) > 1 else None


def _check_store(store: PairStore, flag: str, *, fingerprint: str, needs: LogpNeeds, config: Config, source: ModelSource) -> None:
    refuse_empty(store, flag)
    check_tokenizer(store, flag, source, fingerprint)
    check_read(store, flag, needs, f"--objective {config.objective.objective}", lambda column: _reader(config.objective, column))
    check_length(store, config.data.seq_length)


def _reader(objective: ObjectiveConfig, column: str) -> str:
    """The flags by which a run reads a column beside its pairs; where none does, the objective, one of the user's own."""
    switches = {**objective.options, "pair_weight": objective.pair_weight}
    flags = [flag_of(name) for name, value in switches.items() if value is True and name.endswith(f"pair_{column}")]
    return " and ".join(flags) or f"--objective {objective.objective}"
