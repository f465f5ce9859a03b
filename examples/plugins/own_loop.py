"""RMiPO in a training loop of your own: megatron.core's model, optimizer and schedule, and three calls of the plug-in.

    python examples/embedded/make_inputs.py --output work/inputs --train-pairs 256 --seed 1
    python tools/preprocess_preferences.py --input work/inputs/train.jsonl --tokenizer-model work/inputs/model \
        --output-prefix work/pairs
    torchrun --nproc-per-node 2 examples/plugins/own_loop.py --hf work/inputs/model --data work/pairs --tp 2

The same runs with --pp 2, with neither (each rank a replica), on one rank without torchrun, and on GPUs or without any.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig

from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin import PreferenceStep, attach, preference_batches
from megatron_rmipo.runtime.cpu import install_cpu_runtime
from megatron_rmipo.runtime.groups import ProcessGroups


def train(options: argparse.Namespace) -> list[float]:
    """The loop; the loss of each step."""
    start(options)
    hf = AutoConfig.from_pretrained(options.hf)
    model = build_model(hf, options)
    load_hf_weights(model, Path(options.hf), read_architecture(options.hf), groups=ProcessGroups.of_megatron())
    # From here on it takes packed rows as well as what it took before.
    attach(model, vocab_size=hf.vocab_size)
    model = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=options.lr, weight_decay=0.0), [model])

    objective = build_objective("rmipo", {})
    step = PreferenceStep(objective)
    batches = preference_batches(
        options.data,
        objective,
        global_batch_size=options.global_batch_size,
        num_microbatches=options.num_microbatches,
        total_pairs=options.steps * options.global_batch_size,
        context_token_id=hf.bos_token_id,
    )
    losses = []
    for number in range(options.steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=batches,
            model=[model],
            num_microbatches=options.num_microbatches,
            seq_length=1,  # rows tell their own
            micro_batch_size=1,
            forward_only=False,
        )
        updated, grad_norm, _ = optimizer.step()
        means = {name: float(values.nanmean()) for name, values in step.after_step(updated=updated).values.items()}
        losses.append(means["loss"])
        if torch.distributed.get_rank() == 0:
            print(f"step {number + 1}: loss {means['loss']:.6f}, margin {means['rewards/margins']:.4f}, gradient {grad_norm:.4f}")
    return losses


def start(options: argparse.Namespace) -> None:
    """Process groups, as any program on megatron.core makes them."""
    on_cpu = install_cpu_runtime()  # answers for CUDA where there is none; with one it touches nothing
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not torch.distributed.is_initialized():
        alone = {} if "RANK" in os.environ else {"init_method": "tcp://localhost:29531", "rank": 0, "world_size": 1}
        torch.distributed.init_process_group("gloo" if on_cpu else "nccl", **alone)
    parallel_state.initialize_model_parallel(options.tp, options.pp)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)


def build_model(hf: AutoConfig, options: argparse.Namespace) -> GPTModel:
    """This rank's part of a Llama by Megatron's own specification of its layers."""
    config = TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
        use_cpu_initialization=True,
        # Rows differ in length, and their losses are summed over pairs.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
    )
    multiple = 128 * options.tp
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=-(-hf.vocab_size // multiple) * multiple,
        max_sequence_length=hf.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=hf.rope_parameters["rope_theta"],
    )
    return model.cuda()


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--hf", required=True, help="directory of a Llama of Hugging Face's, its weights included")
    parser.add_argument("--data", required=True, help="PREFIX of prepared pairs")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size (default: %(default)s)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel size (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--global-batch-size", type=int, default=16, help="pairs of a step (default: %(default)s)")
    parser.add_argument("--num-microbatches", type=int, default=4, help="of a step on each rank (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate (default: %(default)s)")
    losses = train(parser.parse_args(argv))
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
