"""What a run would need and take, told instead of run: nothing is started, and no device is looked at."""

from __future__ import annotations

import dataclasses

from megatron_rmipo.checkpoint.adapter_source import with_adapter_said
from megatron_rmipo.checkpoint.source import find_model
from megatron_rmipo.command import DONE
from megatron_rmipo.config.flag_problems import planning_problems, refuse
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import OutOfMemoryError
from megatron_rmipo.planning.hardware import read_cluster
from megatron_rmipo.planning.lengths import of_collection
from megatron_rmipo.planning.plan import Planner
from megatron_rmipo.planning.report import ESTIMATED, describe_layout
from megatron_rmipo.planning.workload import Workloads
from megatron_rmipo.runtime.rendezvous import Rendezvous
from megatron_rmipo.training.outputs import check_outputs
from megatron_rmipo.training.plan import plan_run


def dry_run(config: Config, rendezvous: Rendezvous) -> int:
    """Refuse what a run with these flags would refuse, and say what it would need and take. Each rank is alone; the first speaks.

    Args:
        config: the flags.
        rendezvous: knows this process's place, and is not used to meet. Its ranks stand for the GPUs where ``--gpus`` is unset.

    Raises:
        RmipoError: a fault the user can mend.
        OutOfMemoryError: the layout does not fit.
    """
    config = with_adapter_said(config)
    planning, launch = config.planning, rendezvous.launch
    refuse(list(planning_problems(planning)))
    gpus = planning.gpus or launch.world_size
    nodes = None if planning.gpus else max(1, launch.world_size // launch.local_world_size)
    cluster = read_cluster(planning, gpus, nodes)
    plan = plan_run(config, find_model(config), gpus)
    check_outputs(config, plan.source)
    arch, pairs = plan.source.arch, plan.data.train
    lengths = of_collection(pairs)
    loads = Workloads(arch, plan.objective.needs, lengths)
    # Batches are no larger than what is left of the run.
    size = min(config.training.global_batch_size, plan.total_pairs)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=size))
    found = Planner(arch, config, loads).estimate(config, cluster)
    if launch.rank == 0:
        title = f"{plan.source.directory}, {config.objective.objective}, {lengths}"
        print("\n".join([title, f"on {cluster}. {ESTIMATED}", "", *describe_layout(found, plan.total_pairs, "run")]), flush=True)
    if not found.fits:
        raise OutOfMemoryError(f"the layout does not fit: {found.memory_line}. tools/plan_layout.py finds one that does.")
    return DONE
