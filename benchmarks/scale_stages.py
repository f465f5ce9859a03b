"""The stages of a run of a given layout, one rank of each kind at a time: what grows with the number of ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.distrib_optimizer import Range
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from benchmarks.bench_flops import meta_policy
from benchmarks.scale_world import (
    RANKS_OF_A_HOST,
    CountedStore,
    FileLooks,
    Layout,
    Measured,
    Traffic,
    cost,
    cost_with_traffic,
    pretended_world,
)
from megatron_rmipo.checkpoint.facts import read_facts, told_facts
from megatron_rmipo.checkpoint.makers import KNOWN_FAMILIES
from megatron_rmipo.checkpoint.megatron.commit import write_tracker
from megatron_rmipo.checkpoint.megatron.common_state import CONTENT
from megatron_rmipo.checkpoint.megatron.directory import ASSETS_NAME, METADATA_NAME, checkpoint_path
from megatron_rmipo.checkpoint.megatron.matching import match_model
from megatron_rmipo.checkpoint.megatron.record import CheckpointRecord, read_record, write_record
from megatron_rmipo.checkpoint.settle import settle_source
from megatron_rmipo.checkpoint.shares.optimizer_pieces import pieces_of
from megatron_rmipo.checkpoint.shares.strategies import ReplicasInShares, TensorFiles
from megatron_rmipo.checkpoint.source import checkpoint_source, look_for_model
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.flops import forward_cost_model
from megatron_rmipo.objectives.pair_sums import PairSums, pair_logps
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.pair_losses import Prepared, RowLosses
from megatron_rmipo.passes.step_passes import PairMetrics, gather_pair_metrics
from megatron_rmipo.reports.metrics import summarize
from megatron_rmipo.reports.reporter import METRICS_FILE, Reporter
from megatron_rmipo.reports.summary import read_evaluations
from megatron_rmipo.runtime import rendezvous
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.torchrun import Launch

LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
STEP = 100
# Of each rank, torch writes as many.
FILES_OF_A_RANK = 2
LOGGED_STEPS = 10_000
OPTIMIZER_TENSORS = ("param", "exp_avg", "exp_avg_sq")


def make_checkpoint(directory: Path, num_ranks: int) -> Path:
    """A checkpoint that looks as whole as one of so many ranks, its tensors left out; the directory of checkpoints."""
    path = checkpoint_path(directory, STEP)
    (path / ASSETS_NAME).mkdir(parents=True)
    (path / ASSETS_NAME / "config.json").write_text(json.dumps(LLAMA_3_70B), encoding="utf-8")
    names = [f"__{rank}_{number}.distcp" for rank in range(num_ranks) for number in range(FILES_OF_A_RANK)]
    for name in (METADATA_NAME, "metadata.json", "common.pt", *names):
        (path / name).write_bytes(name.encode())
    write_record(path, CheckpointRecord(STEP, {"step": STEP}, Config().to_flat_dict()), {})
    write_tracker(directory, STEP)
    return directory


def _as_if_first_met() -> Any:
    """Ranks of processes of their own count their meetings from the first."""
    return patch.object(rendezvous, "_MEETINGS", itertools.count(1))


def walk_start(layout: Layout, checkpoints: Path, store: PairStore) -> dict[str, Measured]:
    """What ranks do before they are connected, all of them one after the other, the first one last."""
    shared, config = CountedStore(), Config()
    seen: dict[str, list[tuple[float, float, int]]] = defaultdict(list)

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        before, started = shared.moved_bytes[shared.rank], time.process_time()
        with FileLooks() as looks:
            yield
        seen[name].append((time.process_time() - started, shared.moved_bytes[shared.rank] - before, looks.count))

    for shared.rank in (*range(1, layout.ranks), 0):
        host, local_rank = divmod(shared.rank, RANKS_OF_A_HOST)
        with _as_if_first_met(), patch.object(socket, "gethostname", f"host{host}".__str__):
            meeting = rendezvous.Rendezvous()
            meeting.launch = Launch(shared.rank, layout.ranks, local_rank, RANKS_OF_A_HOST, "pretended:1")
            meeting._store = shared
            with phase("flags and environment compared"):
                meeting.compare(told_facts(config.to_flat_dict(), local_rank))
            with phase("the checkpoint looked for"):
                source = look_for_model("the model", partial(checkpoint_source, checkpoints), meeting.look_once)
            with phase("model and data compared"):
                meeting.compare(meeting.look_once("facts", partial(read_facts, config, source, [store])))
    measured = {}
    for name, ranks in seen.items():
        *others, first = ranks
        seconds, moved, files = zip(*(others or ranks), strict=True)
        measured[name] = Measured(statistics.mean(seconds), None, statistics.mean(moved), statistics.mean(files))
        if "compared" in name:
            measured[f"{name}: the first rank"] = Measured(first[0], None, first[1], first[2])
    return measured


def measure_checkpoint(groups: ProcessGroups, checkpoints: Path) -> dict[str, Measured]:
    """What the first rank does with the files of a checkpoint: decides for all, compares its share with their digests."""
    path = checkpoint_path(checkpoints, STEP)
    record = read_record(path)
    assert record is not None
    settle = partial(settle_source, partial(checkpoint_source, checkpoints), groups, verify=True)
    with Traffic(), FileLooks() as looks:
        settle()
    settled = cost_with_traffic(settle)
    return {
        "the checkpoint decided and checked: the first rank": dataclasses.replace(
            settled, files=looks.count, number=len(record.files)
        ),
        "its record read: one rank of a host": dataclasses.replace(
            cost(lambda: read_record(path)), moved_bytes=(path / "rmipo.json").stat().st_size, number=len(record.files)
        ),
        "its record written: the first rank": dataclasses.replace(
            cost(lambda: write_record(path, record, record.digests)), number=len(record.files)
        ),
    }


def measure_state(arch: ModelArchitecture, groups: ProcessGroups, folder: Path) -> dict[str, Measured]:
    """What a rank's part of the model says of itself, and to the other ranks when it is loaded into."""
    policy = meta_policy(arch, arch.num_layers, groups)
    state, parts = _described(policy, groups)
    made = cost(lambda: _described(policy, groups))
    stored = {part.key: _stored(part) for part in parts}
    compared = cost_with_traffic(lambda: match_model([dict(state)], stored, folder, groups.world))
    return {
        "state of a rank's model described": dataclasses.replace(made, number=len(parts)),
        "keys of a load compared": dataclasses.replace(compared, number=len(parts)),
    }


def _described(policy: Any, groups: ProcessGroups) -> tuple[dict[str, Any], list[ShardedTensor]]:
    """A model's sharded state, and the tensors that it is stored as."""
    state: dict[str, Any] = policy.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp, **CONTENT})
    built = [item.build() if isinstance(item, ShardedTensorFactory) else item for item in state.values()]
    return state, [part for item in built for part in nested_values([item]) if isinstance(part, ShardedTensor)]


def _stored(part: ShardedTensor) -> Any:
    return TensorStorageMetadata(TensorProperties(), torch.Size(part.global_shape), [])


def measure_save(arch: ModelArchitecture, groups: ProcessGroups) -> dict[str, Measured]:
    """What ranks tell of their tensors when they save: a rank to its replicas, and all to the first, which says what lies where.

    The ranks of other layers and shards are pretended to tell what those of this one's do.
    """
    policy = meta_policy(arch, arch.num_layers, groups)
    state, parts = _described(policy, groups)
    pieces = [_pieces_of_rank(policy, state, rank, groups.dp_size) for rank in range(groups.dp_size)]

    def deal() -> None:
        # Who writes what is noted in the description.
        own = {str(number): dataclasses.replace(part) for number, part in enumerate([*parts, *pieces[groups.dp_rank]])}
        if groups.dp_size > 1:
            ReplicasInShares(TensorFiles("torch_dist", 1), groups.dp).apply_saving_parallelization(own)

    # Of what replicas hold, each tensor is written once.
    written = {number: dataclasses.replace(part) for number, part in enumerate([*parts, *itertools.chain(*pieces)])}
    kept, _, _ = _replace_state_dict_keys_with_sharded_keys(written, True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(kept, False), is_coordinator=True)
    items = planner.create_local_plan().items
    results = [WriteResult(item.index, 1, _StorageInfo("__0_0.distcp", 0, 1)) for item in items]

    def tell(own: Any) -> Measured:
        told = [None] * (groups.tp_size * groups.pp_size)
        return dataclasses.replace(
            cost_with_traffic(lambda: dist.gather_object(own, told, group=groups.world)), number=len(items) * len(told)
        )

    return {
        "who writes what is dealt, at a first save": dataclasses.replace(
            cost_with_traffic(deal), number=len(parts) + len(pieces[groups.dp_rank])
        ),
        "plans of the first two saves told: the first rank": tell(SavePlan(items)),
        "what a save wrote told: the first rank": tell(results),
    }


def _pieces_of_rank(policy: Any, state: dict[str, Any], dp_rank: int, dp_size: int) -> list[ShardedTensor]:
    """A data-parallel rank's pieces of the optimizer's state: of an even stretch of all parameters."""
    total = sum(parameter.numel() for parameter in policy.parameters())
    first, last = (total * rank // dp_size for rank in (dp_rank, dp_rank + 1))
    held, begins = {}, 0
    for parameter in policy.parameters():
        low, high = max(first - begins, 0), min(last - begins, parameter.numel())
        if low < high:
            held[parameter] = {"param": Range(low, high)}
        begins += parameter.numel()

    def states(parameter: Any) -> dict[str, torch.Tensor]:
        return dict.fromkeys(OPTIMIZER_TENSORS, torch.empty(held[parameter]["param"].size, device="meta"))

    optimizer: Any = SimpleNamespace(
        gbuf_ranges=[{torch.bfloat16: [{"param_map": held}]}],
        distributed_optimizer_instance_id=0,
        _get_main_param_and_optimizer_states=states,
    )
    return [piece for some in pieces_of(optimizer, state).values() for piece in some]


def measure_metrics(groups: ProcessGroups, num_pairs: int, folder: Path) -> dict[str, Measured]:
    """What a rank of the last stage tells the others of its pairs, and what the first rank writes of them."""
    generator = torch.Generator().manual_seed(1)
    own = max(1, num_pairs // groups.dp_size)
    sums = [PairSums(-100 * torch.rand(own, 2, generator=generator) - 1, torch.full((own, 2), 100.0)) for _ in range(2)]
    output = build_objective("rmipo", {})(pair_logps(sums[0], mean_chosen_length=torch.tensor(100.0), unconditional=sums[1]))
    report = RowLosses(output.losses, torch.arange(own), {"loss": output.losses, **output.metrics}, output.distributions)

    def gather() -> PairMetrics:
        return gather_pair_metrics([report], num_pairs, Prepared(), groups)

    gathered = cost_with_traffic(gather, repeats=3)
    with Traffic():
        found = gather()
    with Reporter(folder, total_steps=10, stream=io.StringIO()) as reporter:
        logged = cost(lambda: reporter.log("train", {"step": 1, **summarize(found.values, found.distributions)}), repeats=3)
    return {
        "a step's metrics gathered": dataclasses.replace(gathered, number=len(found.values)),
        "a step's metrics written: the first rank": logged,
        f"a log of {LOGGED_STEPS:,} steps read": _cost_of_reading(folder),
    }


def _cost_of_reading(folder: Path) -> Measured:
    """Of a log with so many records like those that are in it, and two evaluations."""
    path = folder / METRICS_FILE
    line = path.read_text(encoding="utf-8").splitlines()[0]
    evaluation = line.replace('"train"', '"eval"')
    path.write_text("\n".join([*[line] * LOGGED_STEPS, evaluation, evaluation, ""]), encoding="utf-8")
    return cost(lambda: read_evaluations(folder))


def measure_batches(arch: ModelArchitecture, groups: ProcessGroups, num_pairs: int, store: PairStore) -> dict[str, Measured]:
    """A batch of a data-parallel rank, from the order of the pairs to rows, without the workers that do it ahead of the step."""
    pairs = PairCollection([store])
    layout = BatchLayout(
        groups.dp_rank, groups.dp_size, 16384, forward_cost_model(arch), unconditional="bos", bos_token_id=128000
    )
    order, builder = PairOrder(len(pairs), 1), BatchBuilder(pairs, layout)
    indices: np.ndarray = order.batch(0, num_pairs, len(pairs))
    built = builder.build(indices)
    return {
        "a batch cut and laid out": dataclasses.replace(
            cost(lambda: builder.build(indices)), number=len(built.conditional) + len(built.unconditional)
        )
    }


def measure_ranks(layout: Layout, folder: Path, num_pairs: int, prefix: str) -> dict[str, Measured]:
    """Every stage of a run of this layout, by name."""
    checkpoints, store = make_checkpoint(folder / "run", layout.ranks), PairStore(prefix)
    arch = read_architecture(KNOWN_FAMILIES.assets_of(checkpoints, STEP))
    measured = walk_start(layout, checkpoints, store)
    started = time.process_time()
    with _counted_groups() as made, pretended_world(layout, layout.ranks - 1) as groups:
        measured["process groups made"] = Measured(time.process_time() - started, number=len(made))
        stages: list[Callable[[], dict[str, Measured]]] = [
            partial(measure_batches, arch, groups, num_pairs, store),
            partial(measure_metrics, groups, num_pairs, folder / "logs"),
            partial(measure_state, arch, groups, folder),
        ]
        for stage in stages:
            measured |= stage()
    with pretended_world(layout, 0) as groups:
        measured |= measure_save(arch, groups) | measure_checkpoint(groups, checkpoints)
    return measured


@contextlib.contextmanager
def _counted_groups() -> Iterator[list[None]]:
    """One entry for each process group that is made meanwhile."""
    made: list[None] = []
    make = dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(None)
        return make(*args, **kwargs)

    with patch.object(dist, "new_group", counted):
        yield made
