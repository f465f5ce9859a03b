import dataclasses
import importlib.util

import pytest
import torch

from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import Experts, LatentAttention, LongRopeScaling, ModelArchitecture, Rope
from megatron_rmipo.model import transformer_engine
from megatron_rmipo.model.layers import activation_offloading
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.training.validation import refuse_profiling_beyond_the_end, validate

ARCH = ModelArchitecture(
    family="llama",
    num_layers=6,
    hidden_size=96,
    ffn_hidden_size=264,
    num_attention_heads=12,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=503,
    max_position_embeddings=2048,
    ropes=(Rope(1e4),),
    layernorm_epsilon=1e-5,
)
SPARSE = dataclasses.replace(
    ARCH, experts=Experts(num_experts=12, per_token=2, ffn_hidden_size=40, dense_layers=frozenset({0}), shared_ffn_hidden_size=80)
)
DISTRIBUTED = ("--use-distributed-optimizer",)
OFFLOAD = ("--fine-grained-activation-offloading",)
SELECTIVE = ("--recompute-granularity", "selective")
PRECISE = (*DISTRIBUTED, "--bf16", "--use-precision-aware-optimizer")
BASE = ("--data-path", "A", "--load-hf", "M")


def config_of(*argv: str) -> Config:
    return parse_arguments([*BASE, *argv])


def refusal(*argv: str, world_size: int = 1, architecture: ModelArchitecture = ARCH) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(config_of(*argv), architecture, world_size)
    return str(caught.value)


PP2 = ("--pipeline-model-parallel-size", "2")
FOUR_STAGES = (
    "would work: --pipeline-model-parallel-size 4 --account-for-embedding-in-pipeline-split "
    "--account-for-loss-in-pipeline-split, or --pipeline-model-parallel-size 1, 2, 3, 6"
)
TWO_CHUNKS = (
    "would work: --pipeline-model-parallel-size 2 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split "
    "--num-virtual-stages-per-pipeline-rank 2, or without these flags --pipeline-model-parallel-size 1, 2, 3, 6"
)


@pytest.mark.parametrize(
    ("argv", "world_size"),
    [
        ((), 1),
        (("--tensor-model-parallel-size", "4", "--sequence-parallel"), 4),
        (("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "3"), 12),
        (("--pipeline-model-parallel-size", "3", "--min-microbatches-per-stage", "0"), 3),
        (("--context-parallel-size", "5", "--tensor-model-parallel-size", "4", "--sequence-parallel"), 40),
        (("--context-parallel-size", "2", "--cp-comm-type", "a2a", "--tensor-model-parallel-size", "2"), 4),
        (("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"), 3),
        (("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "6"), 1),
        (("--recompute-granularity", "selective"), 1),
        (("--recompute-granularity", "selective", "--recompute-modules", "layernorm", "mlp"), 1),
        ((*SELECTIVE, "--recompute-modules", "layernorm", "--context-parallel-size", "2"), 2),
        ((*SELECTIVE, "--context-parallel-size", "2", "--cp-comm-type", "a2a"), 2),
        ((*PRECISE, "--main-grads-dtype", "bf16", "--exp-avg-dtype", "fp8", "--exp-avg-sq-dtype", "fp16"), 1),
        (("--split", "99,1", "--eval-interval", "5", "--eval-pairs", "10"), 1),
        (("--valid-data-path", "0.5", "A", "1.5", "B"), 1),
        (("--save", "out", "--save-interval", "5", "--keep-last", "2", "--load", "out", "--finetune", "--no-load-optim"), 1),
        (("--lr-warmup-iters", "3", "--train-iters", "3", "--min-lr", "6e-7"), 1),
        (("--profile", "--train-iters", "12"), 1),
        (("--profile", "--profile-step-start", "0", "--profile-step-end", "1", "--profile-ranks", "0", "2"), 3),
    ],
)
def test_what_works_is_let_through(argv: tuple[str, ...], world_size: int) -> None:
    validate(config_of(*argv), ARCH, world_size)


def test_how_a_model_is_read_needs_a_model_that_is_read() -> None:
    validate(config_of("--hf-read", "each"), ARCH, 1)
    with pytest.raises(ConfigError, match="--hf-read each does nothing without --load-hf DIR or --reference-hf DIR"):
        validate(parse_arguments(["--data-path", "A", "--load", "S", "--hf-read", "each"]), ARCH, 1)


@pytest.mark.parametrize(
    ("argv", "world_size", "words"),
    [
        (("--tensor-model-parallel-size", "3"), 3, ["--tensor-model-parallel-size 3", "12", "4", "264", "would work: 1, 2, 4"]),
        (("--pipeline-model-parallel-size", "4"), 4, ["--pipeline-model-parallel-size 4", "6 layers", FOUR_STAGES]),
        (("--decoder-last-pipeline-num-layers", "2"), 1, ["--decoder-last-pipeline-num-layers 2", "one pipeline stage"]),
        (
            (*PP2, "--decoder-first-pipeline-num-layers", "2", "--account-for-loss-in-pipeline-split"),
            2,
            ["--decoder-first-pipeline-num-layers 2, --account-for-loss-in-pipeline-split", "exclude each other"],
        ),
        ((*PP2, "--decoder-first-pipeline-num-layers", "6"), 2, ["0 are left for 1 stages"]),
        ((*PP2, "--num-virtual-stages-per-pipeline-rank", "1"), 2, ["--num-virtual-stages-per-pipeline-rank 1", "at least 2"]),
        ((*PP2, "--num-virtual-stages-per-pipeline-rank", "2"), 2, ["3 layers are no multiple of 2 chunks", TWO_CHUNKS]),
        ((*PP2, "--num-layers-per-virtual-pipeline-stage", "3"), 2, ["3 layers of a stage would be one chunk"]),
        (
            (*PP2, "--num-layers-per-virtual-pipeline-stage", "1", "--num-virtual-stages-per-pipeline-rank", "3"),
            2,
            ["--num-layers-per-virtual-pipeline-stage 1 and --num-virtual-stages-per-pipeline-rank 3 both cut"],
        ),
        (
            (*PP2, "--num-layers-per-virtual-pipeline-stage", "1", "--decoder-last-pipeline-num-layers", "2"),
            2,
            ["--num-layers-per-virtual-pipeline-stage with --decoder-last-pipeline-num-layers 2", "give a number of chunks"],
        ),
        (("--tensor-model-parallel-size", "4"), 6, ["multiple of 4", "there are 6", "start 4"]),
        (("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "3"), 5, ["multiple of 6", "start 6", "1, 5"]),
        (("--tensor-model-parallel-size", "2", "--context-parallel-size", "3"), 8, ["CP 3", "multiple of 6", "start 6"]),
        (("--context-parallel-size", "0"), 1, ["--context-parallel-size 0", "at least 1"]),
        (
            ("--tensor-model-parallel-size", "2", "--context-parallel-size", "3", "--cp-comm-type", "a2a"),
            6,
            ["--cp-comm-type a2a", "6 query and 2 key/value heads", "would work: 1, 2", "--cp-comm-type all_gather"],
        ),
        (("--context-parallel-size", "2", "--cp-comm-type", "p2p"), 2, ["--cp-comm-type p2p", "all_gather would work"]),
        (("--cp-comm-type", "a2a"), 1, ["--cp-comm-type a2a does nothing at --context-parallel-size 1", "leave it out"]),
        (("--context-parallel-size", "2", "--global-batch-size", "3"), 8, ["--global-batch-size 3", "at least 4"]),
        (("--global-batch-size", "3"), 4, ["--global-batch-size 3", "at least 4"]),
        (("--min-microbatches-per-stage", "2"), 1, ["--min-microbatches-per-stage does nothing", "leave it out"]),
        (("--min-microbatches-per-stage", "-1", "--pipeline-model-parallel-size", "2"), 2, ["-1: must be at least 0"]),
        (("--seq-length", "2049"), 1, ["--seq-length 2049", "2048"]),
        (("--sequence-parallel",), 1, ["--sequence-parallel", "--tensor-model-parallel-size"]),
        (("--overlap-param-gather",), 1, ["--overlap-param-gather", "--use-distributed-optimizer"]),
        (("--recompute-granularity", "full"), 1, ["--recompute-method uniform --recompute-num-layers 1"]),
        (("--recompute-method", "uniform"), 1, ["--recompute-granularity full"]),
        (("--recompute-modules", "mlp"), 1, ["--recompute-modules belong to --recompute-granularity selective"]),
        ((*SELECTIVE, "--recompute-modules", "moe"), 1, ["moe: this model has no experts", "core_attn layernorm mlp"]),
        ((*SELECTIVE, "--recompute-modules", "mla_up_proj"), 1, ["mla_up_proj: this model's attention has no latents"]),
        (
            (*SELECTIVE, "--context-parallel-size", "2"),
            2,
            ["--recompute-granularity selective alone is that of core_attn", "computed anew without it", "work: layernorm mlp"],
        ),
        (
            (*SELECTIVE, "--recompute-modules", "core_attn", "--context-parallel-size", "2"),
            2,
            ["--recompute-modules core_attn: where keys", "computed anew without it; would work: layernorm mlp"],
        ),
        (("--num-distributed-optimizer-instances", "2"), 2, ["needs --use-distributed-optimizer"]),
        (
            (*DISTRIBUTED, "--num-distributed-optimizer-instances", "4"),
            6,
            ["4 does not divide the 6 ranks", "would work: 1, 2, 3, 6"],
        ),
        ((*OFFLOAD, "--offload-modules", "qkv_linear"), 1, ["--fine-grained-activation-offloading: Transformer Engine is not"]),
        (("--offload-modules", "core_attn"), 1, ["--offload-modules does nothing without --fine-grained-activation-offloading"]),
        (("--exp-avg-dtype", "bf16"), 1, ["--exp-avg-dtype does nothing without --use-precision-aware-optimizer"]),
        (("--use-precision-aware-optimizer",), 1, ["needs --use-distributed-optimizer and --bf16"]),
        (("--optimizer-offload-fraction", "0.5"), 1, ["--optimizer-offload-fraction does nothing without"]),
        ((*PRECISE, "--optimizer-cpu-offload"), 1, ["--optimizer-cpu-offload needs CUDA"]),
        (
            (
                "--recompute-granularity",
                "full",
                "--recompute-method",
                "block",
                "--recompute-num-layers",
                "4",
                "--pipeline-model-parallel-size",
                "2",
            ),
            2,
            ["--recompute-num-layers 4", "3 layers", "1 to 3"],
        ),
        (("--tokens-per-microbatch", "2047"), 1, ["--tokens-per-microbatch 2047", "--seq-length 2048", "4096"]),
        (("--split", "99"), 1, ["--split 99", "99,1"]),
        (("--split", "99,0"), 1, ["--split 99,0"]),
        (("--split", "99,1", "--valid-data-path", "B"), 1, ["--split 99,1 and --valid-data-path B both name held-out data"]),
        (("--valid-data-path", "A", "B", "C"), 1, ["--valid-data-path A B C", "0.7 A 0.3 B"]),
        (("--eval-interval", "5"), 1, ["--eval-interval", "--valid-data-path"]),
        (("--lr", "0"), 1, ["--lr 0"]),
        (("--lr", "1e-6", "--min-lr", "1e-5"), 1, ["--min-lr", "1e-06"]),
        (("--lr-warmup-fraction", "1"), 1, ["--lr-warmup-fraction 1"]),
        (("--lr-warmup-fraction", "0.1", "--lr-warmup-iters", "3"), 1, ["--lr-warmup-fraction 0.1 and --lr-warmup-iters 3"]),
        (("--lr-warmup-iters", "4", "--train-iters", "3"), 1, ["--lr-warmup-iters 4", "--train-iters 3"]),
        (("--adam-beta2", "1"), 1, ["--adam-beta2 1"]),
        (("--adam-eps", "0"), 1, ["--adam-eps 0"]),
        (("--clip-grad", "-1"), 1, ["--clip-grad -1", "at least 0"]),
        (("--train-iters", "3", "--epochs", "2"), 1, ["--train-iters 3", "--epochs 2"]),
        (
            ("--reference-hf", "R", "--reference-load", "C"),
            1,
            ["--reference-hf R and --reference-load C both name"],
        ),
        (("--epochs", "0"), 1, ["--epochs 0"]),
        (("--train-iters", "0"), 1, ["--train-iters 0", "at least 1"]),
        (("--save-interval", "5"), 1, ["--save-interval", "--save DIR"]),
        (("--no-load-rng",), 1, ["--no-load-rng", "--load DIR"]),
        (("--save-hf-dtype", "float32"), 1, ["--save-hf-dtype", "--save-hf DIR"]),
        (("--wandb-exp-name", "x"), 1, ["--wandb-exp-name", "--wandb-project"]),
        (("--eval-data", "data/chat"), 1, ["--eval-data data/chat: expected NAME=PREFIX"]),
        (("--keep-best", "loss", "--split", "9,1", "--eval-interval", "2"), 1, ["--keep-best needs --save DIR"]),
        (("--early-stop", "loss:2"), 1, ["--early-stop needs held-out data: --valid-data-path PREFIX"]),
        (("--early-stop", "loss:2", "--split", "9,1"), 1, ["--early-stop needs --eval-interval N"]),
        (("--early-stop", "loss", "--eval-interval", "2", "--split", "9,1"), 1, ["--early-stop loss: expected METRIC:PATIENCE"]),
        (
            ("--keep-best=-b:loss", "--save", "r", "--eval-interval", "2", "--eval-data", "a=data/chat"),
            1,
            ["--keep-best -b:loss: there is no held-out set b; there are: a:METRIC"],
        ),
        (
            ("--keep-best", "loss", "--save", "r", "--eval-interval", "2", "--eval-data", "a=data/chat"),
            1,
            ["--keep-best loss: there is no main held-out set; there are: a:METRIC"],
        ),
        (("--save-hf", "out", "--save-hf-from", "best"), 1, ["--save-hf-from best needs --keep-best METRIC and --save-hf DIR"]),
        (("--sample-interval", "2"), 1, ["--sample-interval does nothing without --sample-prompts FILE"]),
        (("--sample-prompts", "p", "--sample-temperature", "-1"), 1, ["--sample-temperature -1.0: must be 0 or more"]),
        (("--sample-prompts", "p", "--sample-length", "0"), 1, ["--sample-length 0: must be at least 1"]),
        (("--log-interval", "0"), 1, ["--log-interval 0"]),
        (("--tensor-model-parallel-size", "0"), 1, ["--tensor-model-parallel-size 0", "at least 1"]),
        (("--distributed-timeout-minutes", "0"), 1, ["--distributed-timeout-minutes 0"]),
        (("--async-save",), 1, ["--async-save does nothing without --save DIR"]),
        (("--save", "runs/a", "--async-save"), 1, ["--async-save does nothing without --save-interval N"]),
        (("--profile-step-start", "10"), 1, ["--profile-step-start does nothing without --profile"]),
        (("--profile-step-end", "3"), 1, ["--profile-step-end does nothing without --profile"]),
        (("--profile-ranks", "0"), 1, ["--profile-ranks does nothing without --profile"]),
        (
            ("--profile", "--profile-step-start", "12"),
            1,
            ["--profile-step-end 12", "--profile-step-start 12", "--profile-step-end 14 would"],
        ),
        (("--profile", "--profile-step-start", "-1"), 1, ["--profile-step-start -1", "at least 0"]),
        (
            ("--profile", "--train-iters", "11"),
            1,
            ["--profile-step-end 12", "11 steps", "--profile-step-start 9 --profile-step-end 11"],
        ),
        (("--profile", "--profile-ranks", "0", "2"), 2, ["--profile-ranks 0 2", "ranks 0 to 1 alone"]),
        (("--profile", "--profile-ranks", "-1"), 1, ["--profile-ranks -1", "rank 0 alone"]),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(argv: tuple[str, ...], world_size: int, words: list[str]) -> None:
    message = refusal(*argv, world_size=world_size)
    assert all(word in message for word in words), message
    # One fault each: none of the other checks may fire on the same flags.
    assert message.count("\n") == 1, message


def test_profiled_steps_beyond_a_length_that_the_data_tell_are_refused() -> None:
    config = config_of("--profile", "--epochs", "2")
    validate(config, ARCH, 1)
    refuse_profiling_beyond_the_end(config, 12)
    with pytest.raises(ConfigError, match=r"--profile-step-end 12 lies beyond the run's 11 steps.*--profile-step-end 11 would"):
        refuse_profiling_beyond_the_end(config, 11)
    refuse_profiling_beyond_the_end(config_of(), 1)


def test_a_history_of_memory_needs_an_allocator_that_keeps_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--record-memory-history needs CUDA" in refusal("--record-memory-history")


def test_nothing_to_start_from_and_no_data_are_both_named() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(parse_arguments([]), ARCH, 1)
    assert "--data-path" in str(caught.value)
    assert "--load-hf" in str(caught.value)


def test_all_faults_are_listed_at_once() -> None:
    message = refusal("--tensor-model-parallel-size", "3", "--pipeline-model-parallel-size", "4", "--lr", "0", world_size=7)
    assert message.count("\n  - ") == 4


def test_tensor_parallelism_goes_above_the_key_value_heads_by_a_multiple_of_them() -> None:
    four = config_of("--tensor-model-parallel-size", "4")
    arch = dataclasses.replace(ARCH, num_attention_heads=12, num_query_groups=6, ffn_hidden_size=120)
    for groups in (1, 2, 4):
        validate(four, dataclasses.replace(arch, num_query_groups=groups), 4)
    for groups, changes, words in (
        (6, {}, ["6 key/value heads", "would work: 1, 2, 3, 6, 12"]),
        (1, {"qk_norm_whole": True}, ["a norm over the keys of all heads needs a key/value head for each rank", "work: 1"]),
    ):
        changed = dataclasses.replace(arch, num_query_groups=groups, **changes)
        message = refusal("--tensor-model-parallel-size", "4", world_size=4, architecture=changed)
        assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("argv", "world_size"),
    [
        (("--expert-model-parallel-size", "6"), 12),
        (("--expert-model-parallel-size", "4", "--pipeline-model-parallel-size", "3"), 12),
        (("--expert-model-parallel-size", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel"), 4),
        (
            (
                *("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"),
                *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
            ),
            2,
        ),
        (("--moe-aux-loss-coeff", "0.01", "--moe-z-loss-coeff", "0.001", "--moe-router-dtype", "fp64"), 1),
    ],
)
def test_layouts_of_experts_that_work_are_let_through(argv: tuple[str, ...], world_size: int) -> None:
    validate(config_of(*argv), SPARSE, world_size)


@pytest.mark.parametrize(
    ("argv", "world_size", "words"),
    [
        (("--expert-model-parallel-size", "8"), 8, ["8 does not divide the model's 12 experts", "1, 2, 3, 4, 6, 12"]),
        (("--expert-model-parallel-size", "0"), 1, ["--expert-model-parallel-size 0", "at least 1"]),
        (
            ("--expert-tensor-parallel-size", "3"),
            3,
            ["--expert-tensor-parallel-size 3", "40 channels", "1, 2, 4, 5, 8, 10, 20, 40"],
        ),
        (("--expert-model-parallel-size", "4"), 6, ["EP 4 x expert TP 1, 4 ranks", "the 6 ranks", "multiple of 4", "1, 2, 3, 6"]),
        (("--tensor-model-parallel-size", "2"), 2, ["needs --sequence-parallel"]),
        (
            ("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1"),
            1,
            ["--recompute-method block", "uniform would work"],
        ),
        (("--moe-router-bias-update-rate", "0.1"), 1, ["--moe-router-bias-update-rate", "no score biases"]),
        (("--moe-aux-loss-coeff", "-1"), 1, ["--moe-aux-loss-coeff -1", "at least 0"]),
        (("--moe-flex-dispatcher-backend", "deepep"), 1, ["does nothing without --moe-token-dispatcher-type flex"]),
        (("--moe-token-dispatcher-type", "flex"), 1, ["needs CUDA", "alltoall would work"]),
        (("--moe-grouped-gemm",), 1, ["--moe-grouped-gemm: Transformer Engine is not installed"]),
        (("--moe-permute-fusion",), 1, ["--moe-permute-fusion: Transformer Engine is not installed"]),
    ],
)
def test_what_experts_cannot_work_with_is_refused(argv: tuple[str, ...], world_size: int, words: list[str]) -> None:
    message = refusal(*argv, world_size=world_size, architecture=SPARSE)
    assert all(word in message for word in words), message
    assert message.count("\n") == 1, message


def test_instances_of_the_distributed_optimizer_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = (*DISTRIBUTED, "--num-distributed-optimizer-instances", "3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    validate(config_of(*argv), ARCH, 6)
    # Of EP 4 over eight ranks two hold the same experts.
    message = refusal(*argv[:2], "4", "--expert-model-parallel-size", "4", world_size=8, architecture=SPARSE)
    assert (
        "4 does not divide the 8 ranks that hold the same weights, or the 2 that hold the same experts; would work: 1, 2"
        in message
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install einops" in refusal(*argv, world_size=6)


def test_what_the_host_keeps_of_the_optimizer_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--optimizer-cpu-offload needs --use-precision-aware-optimizer" in refusal("--optimizer-cpu-offload")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    message = refusal(*PRECISE, "--optimizer-cpu-offload", "--exp-avg-sq-dtype", "bf16", "--optimizer-offload-fraction", "0")
    assert "--exp-avg-sq-dtype does nothing with --optimizer-cpu-offload" in message
    assert "--optimizer-offload-fraction 0.0: must be greater than 0 and at most 1" in message
    # There is a GPU, but no FusedAdam for it.
    assert "--use-precision-aware-optimizer: Transformer Engine is not installed" in message


def test_activations_go_to_the_host_with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs --offload-modules" in refusal(*OFFLOAD)
    assert "attn_proj needs core_attn beside it" in refusal(*OFFLOAD, "--offload-modules", "attn_proj")
    assert "leave --transformer-impl local out" in refusal(*OFFLOAD, "--transformer-impl", "local")
    monkeypatch.setattr(transformer_engine, "transformer_engine_available", lambda: True)
    monkeypatch.delenv("NVTE_CPU_OFFLOAD_V1", raising=False)
    assert "NVTE_CPU_OFFLOAD_V1=1" in refusal(*OFFLOAD, "--offload-modules", "core_attn")
    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", "1")
    monkeypatch.setattr(activation_offloading, "IS_ANOTHER", False)
    validate(config_of(*OFFLOAD, "--offload-modules", "core_attn", "attn_proj"), ARCH, 1)
    monkeypatch.setattr(activation_offloading, "IS_ANOTHER", True)
    assert "is for megatron-core 0.16 so far" in refusal(*OFFLOAD, "--offload-modules", "core_attn")


def test_modules_of_experts_are_recomputed_where_they_are() -> None:
    recompute = (*SELECTIVE, "--recompute-modules")
    validate(config_of(*recompute, "core_attn", "layernorm", "mlp", "moe"), SPARSE, 1)
    assert "moe_act: needs --moe-grouped-gemm" in refusal(*recompute, "moe_act", architecture=SPARSE)
    assert "shared_experts is part of moe" in refusal(*recompute, "moe", "shared_experts", architecture=SPARSE)


def test_flags_of_experts_are_refused_for_a_model_without() -> None:
    message = refusal("--expert-model-parallel-size", "2", "--moe-aux-loss-coeff", "0.1", world_size=2)
    assert "--expert-model-parallel-size, --moe-aux-loss-coeff: this model has no experts; leave them out" in message


def test_soft_caps_are_not_for_transformer_engine() -> None:
    capped = dataclasses.replace(ARCH, attention_softcap=50.0)
    validate(config_of("--attention-backend", "sdpa"), capped, 1)
    refused = refusal("--attention-backend", "te", "--bf16", architecture=capped)
    assert "--attention-backend te caps no attention scores, and the model's are capped at 50; flex would" in refused
    assert "caps no attention scores" not in refusal("--attention-backend", "te", "--bf16")
    flags = ("--attention-backend", "te", "--bf16", "--context-parallel-size", "2")
    with_sinks = dataclasses.replace(ARCH, attention_sinks=True)
    words = "--attention-backend te knows no sinks at --context-parallel-size 2"
    assert words in refusal(*flags, world_size=2, architecture=with_sinks)
    assert words not in refusal(*flags, world_size=2)


def test_rotary_embeddings_that_depend_on_the_length_must_not() -> None:
    long = dataclasses.replace(ARCH, ropes=(Rope(1e4), Rope(1e4, LongRopeScaling((1.0,) * 4), 1.2, longest_sequence=700)))
    validate(config_of("--seq-length", "700"), long, 1)
    words = refusal("--seq-length", "701", architecture=long)
    assert "--seq-length 701 is longer than the model's original context of 700 tokens, beyond which its rotary" in words
    assert "up to 700 would work" in words
    assert "up to 700 would work" in refusal("--seq-length", "2049", architecture=long)


def test_latents_are_wide_enough_for_tensor_parallelism() -> None:
    latent = LatentAttention(q_lora_rank=None, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=4, v_head_dim=9)
    fitting = dataclasses.replace(ARCH, num_query_groups=12, latent=latent)
    validate(config_of("--tensor-model-parallel-size", "2"), fitting, 2)
    odd = dataclasses.replace(fitting, latent=dataclasses.replace(latent, q_lora_rank=21, qk_rope_head_dim=3))
    refused = refusal("--tensor-model-parallel-size", "2", world_size=2, architecture=odd)
    assert "latents of 21 and 15 channels" in refused
    assert "would work: 1, 3" in refused
