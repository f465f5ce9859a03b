"""Tensors put together by the ranks that write them, at layouts of up to 16 ranks: threads whose sends wait for who receives."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rmipo.checkpoint.hf import gathering
from megatron_rmipo.checkpoint.hf.checked_weights import open_weights
from megatron_rmipo.checkpoint.hf.gathering import GatheredTensors
from megatron_rmipo.checkpoint.hf.shards import fill_shard, rank_shape
from megatron_rmipo.checkpoint.hf.shared_writing import ShareWriter, share_files
from megatron_rmipo.checkpoint.hf.writer import plan_model_files
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.parameter_names import TensorId
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.tensors import tensors_of
from tests.checkpoint.models import write_hf_model

PATIENCE_SECONDS = 20
MAX_SHARD_BYTES = 40000


class Layout(NamedTuple):
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1


class Group:
    """Some of the threads, by rank among all."""

    def __init__(self, members: Sequence[int], own: int) -> None:
        self.members, self._own = list(members), own

    def rank(self) -> int:
        return self.members.index(self._own)

    def size(self) -> int:
        return len(self.members)


class Wire:
    """What :mod:`torch.distributed` is to the code under test."""

    def __init__(self) -> None:
        self._lock, self._queues = threading.Lock(), dict[Any, queue.Queue[Any]]()

    def _queue(self, group: Group, source: int, target: int) -> queue.Queue[Any]:
        with self._lock:
            key = tuple(group.members), group.members[source], group.members[target]
            return self._queues.setdefault(key, queue.Queue())

    def _put(self, value: Any, group: Group, target: int) -> threading.Event:
        taken = threading.Event()
        self._queue(group, group.rank(), target).put((value, taken))
        return taken

    def _take(self, group: Group, source: int) -> Any:
        value, taken = self._queue(group, source, group.rank()).get(timeout=PATIENCE_SECONDS)
        taken.set()
        return value

    def send(self, tensor: Tensor, *, group: Group, group_dst: int) -> None:
        assert tensor.dtype == torch.uint8
        assert self._put(tensor.clone(), group, group_dst).wait(PATIENCE_SECONDS), "nobody receives"

    def recv(self, tensor: Tensor, *, group: Group, group_src: int) -> None:
        received = self._take(group, group_src)
        assert received.shape == tensor.shape
        tensor.copy_(received)

    def gather(self, tensor: Tensor, parts: list[Tensor] | None, *, group: Group, group_dst: int) -> None:
        if group.rank() != group_dst:
            self.send(tensor, group=group, group_dst=group_dst)
            return
        assert parts is not None
        parts[group_dst].copy_(tensor)
        for source in set(range(group.size())) - {group_dst}:
            self.recv(parts[source], group=group, group_src=source)

    def all_gather_object(self, values: list[Any], value: Any, *, group: Group) -> None:
        for target in range(group.size()):
            self._put(value, group, target)
        values[:] = [self._take(group, source) for source in range(group.size())]

    def get_backend(self, group: Group) -> str:
        return "gloo"


def groups_of(rank: int, layout: Layout) -> Any:
    """As Megatron-Core lays ranks out: tensor-parallel ones are neighbours, pipeline stages far apart."""
    stage_size = layout.tp * layout.dp
    stage, place = divmod(rank, stage_size)
    first, (dp_rank, tp_rank) = stage * stage_size, divmod(place, layout.tp)
    block, inside = divmod(place, layout.ep * layout.etp)
    ep_rank, etp_rank = divmod(inside, layout.etp)
    block_first = first + block * layout.ep * layout.etp
    return SimpleNamespace(
        pp=Group([place + number * stage_size for number in range(layout.pp)], rank),
        tp=Group([first + dp_rank * layout.tp + number for number in range(layout.tp)], rank),
        ep=Group([block_first + number * layout.etp + etp_rank for number in range(layout.ep)], rank),
        expert_tp=Group([block_first + ep_rank * layout.etp + number for number in range(layout.etp)], rank),
        dp_cp=Group([first + number * layout.tp + tp_rank for number in range(layout.dp)], rank),
        pp_rank=stage,
        dp_rank=dp_rank,
        tp_rank=tp_rank,
    )


def shards_of(hf: Path, arch: ModelArchitecture, groups: Any, layout: Layout) -> dict[TensorId, Tensor]:
    """What a rank of a layout holds; the last stage of a tied model holds the embedding, too."""
    files, family, held = open_weights(hf, arch), FAMILIES[arch.family], {}
    for rule, place in tensors_of(arch):
        stage = place.layer * layout.pp // arch.num_layers if place.layer is not None else layout.pp - 1
        stages = {0, layout.pp - 1 if arch.tied_embeddings else 0} if rule.megatron == family.embedding else {stage}
        group = groups.expert_tp if rule.per_expert else groups.tp
        experts = arch.experts.num_experts // layout.ep if arch.experts else 1
        if groups.pp_rank in stages and (not rule.per_expert or place.expert // experts == groups.ep.rank()):  # type: ignore[operator]
            shape = rank_shape(rule, arch, group.size(), arch.vocab_size + -arch.vocab_size % (2 * group.size()))
            assert shape is not None, rule
            held[rule.megatron, place] = torch.empty(shape)
            fill_shard(held[rule.megatron, place], files, rule, place, arch, group.rank(), group.size())
    return held


def write_on_all(hf: Path, out: Path, arch: ModelArchitecture, layout: Layout) -> list[list[str]]:
    """Write a model; which files each rank wrote."""

    def write(rank: int) -> list[str]:
        groups, done = groups_of(rank, layout), list[int]()
        tensors = GatheredTensors(shards_of(hf, arch, groups, layout), arch, groups)
        dtypes = {name: holder.dtype for (name, _), holder in tensors.holders.items()}
        stages = {key: holder.stage for key, holder in tensors.holders.items()}
        shares = share_files(plan_model_files(arch, dtypes, MAX_SHARD_BYTES, stages), groups.pp_rank, layout.dp, layout.tp)
        work: Any = SimpleNamespace(add=done.append, goes_on=lambda: True)
        ShareWriter(out, arch, tensors, work).write(shares)
        own = [share.file.plan for share in shares if share.writer == (groups.dp_rank, groups.tp_rank)]
        assert sum(done) == sum(tensor.num_bytes for plan in own for tensor in plan.tensors)
        return [plan.name for plan in own]

    num_ranks = layout.tp * layout.pp * layout.dp
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(write, range(num_ranks)))


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("llama31", Layout()),
        ("llama31", Layout(tp=2, pp=2, dp=2, etp=2)),
        ("llama32_tied", Layout(pp=2, dp=3)),
        ("gemma3", Layout(tp=2, pp=2, etp=2)),
        ("mixtral", Layout(tp=2, pp=2, dp=2, ep=2)),
        ("mixtral", Layout(dp=2, ep=2)),
        ("qwen2_moe", Layout(tp=2, dp=4, ep=2, etp=2)),
        ("qwen2_moe", Layout(tp=2, dp=2, ep=2, etp=1)),
        ("gpt_oss", Layout(tp=2, pp=2, dp=2, ep=2, etp=2)),
        ("deepseek_v3", Layout(tp=2, pp=2, dp=2, ep=2)),
    ],
)
def test_every_layout_writes_what_it_was_cut_from(
    kind: str, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "dist", Wire())
    hf, out = write_hf_model(tmp_path / "hf", kind), tmp_path / "out"
    out.mkdir()
    written = write_on_all(hf, out, read_architecture(hf), layout)
    names = [name for own in written for name in own]
    assert sorted(names) == sorted(path.name for path in out.iterdir())
    assert all(written), "a rank has written nothing"
    expected = {name: tensor for path in hf.glob("*.safetensors") for name, tensor in load_file(path).items()}
    found = {name: tensor for path in out.iterdir() for name, tensor in load_file(path).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tensor_that_nobody_holds_is_named(tmp_path: Path) -> None:
    hf = write_hf_model(tmp_path / "hf", "llama31")
    arch, groups = read_architecture(hf), groups_of(0, Layout())
    held = shards_of(hf, arch, groups, Layout())
    del held[next(key for key in held if "linear_fc2" in key[0])]
    with pytest.raises(ConversionError, match="No rank's model holds decoder"):
        GatheredTensors(held, arch, groups)
