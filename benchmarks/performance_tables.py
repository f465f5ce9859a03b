"""Which figures of which entries docs/performance.md shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Row = Mapping[str, str]
MIB, GIB = 1 / 2**20, 1 / 2**30


@dataclasses.dataclass(frozen=True)
class Figure:
    """One column.

    Attributes:
        title: over the column.
        column: of the CSV file.
        over: the column it is divided by.
        scale: factor, for the unit.
        form: how the number is written.
    """

    title: str
    column: str
    over: str | None = None
    scale: float = 1.0
    form: str = ".2f"

    @property
    def columns(self) -> tuple[str, ...]:
        """Those it reads."""
        return (self.column,) if self.over is None else (self.column, self.over)

    def text(self, row: Row) -> str:
        """The figure of a row; empty where the row does not have it."""
        values = [row.get(name) for name in self.columns]
        if not all(values):
            return ""
        numbers = [float(value) for value in values if value]
        return format(self.scale * numbers[0] / (numbers[1] if self.over else 1.0), self.form)


@dataclasses.dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        file: of entries.
        settings: title -> format string over the columns; entries that agree in all of them are of one setting.
        figures: what was measured.
        needs: a column without which an entry does not belong here.
        only: column -> the value that an entry of this table has in it.
    """

    file: str
    settings: Mapping[str, str]
    figures: tuple[Figure, ...]
    needs: str | None = None
    only: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def takes(self, row: Row) -> bool:
        """Whether an entry belongs here."""
        return bool(self.needs is None or row.get(self.needs)) and all(
            row.get(name) == value for name, value in self.only.items()
        )

    def setting(self, row: Row) -> tuple[str, ...]:
        """An entry's settings as they are shown."""
        return tuple(form.format_map(row) for form in self.settings.values())


_MODEL = {
    "lengths": "{lengths}",
    "shrink": "{shrink}",
    "pairs": "{pairs}",
    "model": "H {hidden_size}, L {num_layers}, V {vocab_size}",
    "bf16": "{bf16}",
}
_RECOMPUTE = {"they recompute": "{baseline_recompute}"}
_MICROBATCH = {"micro-batch, ours / theirs": "{tokens_per_microbatch} tokens / {baseline_pairs_per_microbatch} pairs"}

TABLES = {
    "step": Table(
        "results.csv",
        {"objective": "{objective}", **_MODEL, "TP": "{tensor_model_parallel_size}", **_RECOMPUTE, **_MICROBATCH},
        (
            Figure("pairs/s", "pairs", "ours_seconds_p50"),
            Figure("s, padded / ours", "baseline_seconds_p50", "ours_seconds_p50"),
            Figure("CPU s", "ours_cpu_seconds_p50"),
            Figure("CPU, padded / ours", "baseline_cpu_seconds_p50", "ours_cpu_seconds_p50"),
            Figure("FLOPs, padded / ours", "baseline_flops", "ours_flops"),
            Figure("peak, padded / ours", "baseline_peak_bytes", "ours_peak_bytes"),
            Figure("FLOPs, ours / least", "ours_flops", "minimum_flops", form=".3f"),
            Figure("% outside model and optimizer", "overhead_share", form=".2f", scale=100),
        ),
    ),
    "trl": Table(
        "results.csv",
        {"TRL": "{trl}", **_MODEL, **_RECOMPUTE, **_MICROBATCH},
        (
            Figure("CPU s, TRL", "trl_cpu_seconds_p50"),
            Figure("CPU s, ours", "ours_cpu_seconds_p50"),
            Figure("CPU, TRL / ours", "trl_cpu_seconds_p50", "ours_cpu_seconds_p50"),
            Figure("FLOPs, TRL / ours", "trl_flops", "ours_flops"),
            Figure("peak, TRL / ours", "trl_peak_bytes", "ours_peak_bytes"),
        ),
        needs="trl_seconds_p50",
    ),
    "simpo": Table(
        "results.csv",
        _MODEL,
        (
            Figure("CPU, RMiPO / SimPO", "ours_cpu_seconds_p50", "simpo_cpu_seconds_p50", form=".3f"),
            Figure("least FLOPs, RMiPO / SimPO", "minimum_flops", "simpo_minimum_flops", form=".3f"),
            Figure("FLOPs, RMiPO / SimPO", "ours_flops", "simpo_flops", form=".3f"),
            Figure("peak, RMiPO / SimPO", "ours_peak_bytes", "simpo_peak_bytes", form=".3f"),
        ),
        needs="simpo_seconds_p50",
    ),
    "flops": Table(
        "results_flops.csv",
        {"objective": "{objective}", "lengths": "{lengths}", "pairs": "{pairs}"},
        (
            Figure("counted TFLOP/pair", "flops_per_pair", scale=1e-12),
            Figure("least TFLOP/pair", "minimum_flops_per_pair", scale=1e-12),
            Figure("counted / least", "ratio", form=".4f"),
        ),
    ),
    "alone": Table(
        "results_alone.csv",
        {"lengths": "{lengths}", "pairs, counted / timed": "{batch_size} / {num_pairs}"},
        (
            Figure("FLOPs, rows / pass", "flops_rows", "flops_pass", form=".3f"),
            Figure("CPU, rows / pass", "cpu_seconds_rows_p50", "cpu_seconds_pass_p50", form=".3f"),
            Figure("FLOPs, pass / SimPO", "flops_pass", "flops_none", form=".3f"),
            Figure("CPU, pass / SimPO", "cpu_seconds_pass_p50", "cpu_seconds_none_p50", form=".3f"),
        ),
    ),
    "logprobs": Table(
        "results_logprobs.csv",
        {
            "method": "{method}",
            "tokens": "{tokens}",
            "scored": "{scored_share}",
            "vocabulary": "{vocab_size}",
            "hidden size": "{hidden_size}",
            "TP": "{tensor_model_parallel_size}",
        },
        (
            Figure("s", "seconds_p50"),
            Figure("CPU s", "cpu_seconds_p50"),
            Figure("peak MiB", "peak_bytes", scale=MIB, form=".0f"),
            Figure("GFLOP", "flops", scale=1e-9, form=".0f"),
            Figure("log-prob error", "logprob_error", form=".1e"),
            Figure("gradient error", "gradient_error", form=".1e"),
        ),
    ),
    "balance": Table(
        "results_balance.csv",
        {"lengths": "{lengths}", "pairs": "{batch_size}", "ranks": "{ranks}"},
        (
            Figure("max / mean, median", "imbalance_p50", form=".4f"),
            Figure("worst", "worst", form=".4f"),
            Figure("bound of the worst", "worst_bound", form=".4f"),
            Figure("ms", "milliseconds_p50"),
        ),
    ),
    "pipeline": Table(
        "results_pipeline.csv",
        {"PP": "{stages}", "DP": "{ranks}", "pairs": "{batch_size}"},
        (
            Figure("packs, before", "gradient_packs_before", form=".0f"),
            Figure("after", "gradient_packs_after", form=".0f"),
            Figure("gradient pass, before", "gradient_before", form=".0%"),
            Figure("after", "gradient_after", form=".0%"),
            Figure("unconditional pass, before", "unconditional_before", form=".0%"),
            Figure("after", "unconditional_after", form=".0%"),
            Figure("step, before", "step_before", form=".0%"),
            Figure("after", "step_after", form=".0%"),
            Figure("after, all even", "step_even_after", form=".0%"),
            Figure("time, after / before", "cost_after", "cost_before"),
            Figure("max / mean", "imbalance_after", form=".3f"),
        ),
        only={"lengths": "ultrafeedback", "model": "Llama-3-8B"},
    ),
    "preparing": Table(
        "results_data.csv",
        {"texts": "{source}"},
        (
            Figure("tokens", "tokens", form=".0f"),
            Figure("CPU s", "cpu_seconds_p50"),
            Figure("CPU s, encode_batch", "bare_cpu_seconds_p50"),
            Figure("CPU s, encode_batch_fast", "fast_cpu_seconds_p50"),
            Figure("encode_batch / preparing", "share_p50"),
            Figure("encode_batch_fast / preparing", "fast_share_p50"),
        ),
        only={"part": "preparing"},
    ),
    "loading": Table(
        "results_data.csv",
        {"lengths": "{source}", "pairs": "{batch_size}", "ranks": "{ranks}", "workers": "{num_workers}"},
        (
            Figure("CPU ms to make a batch", "build_cpu_ms_p50"),
            Figure("CPU ms of the trainer to take it", "own_cpu_ms_p50"),
            Figure("step, ms", "step_ms_p50", form=".0f"),
            Figure("wait, ms", "wait_ms_p50"),
            Figure("share of time waited", "share", form=".4f"),
        ),
        only={"part": "loading"},
    ),
    "scale_ranks": Table(
        "results_scale.csv",
        {"stage": "{stage}", "must grow with": "{growth}"},
        tuple(
            Figure(f"{title}, {layout}", f"{column}_{layout}", scale=scale, form=form)
            for title, column, scale, form in (
                ("CPU ms", "cpu_seconds", 1e3, ".1f"),
                ("KB", "moved_bytes", 1e-3, ".1f"),
                ("files", "files", 1.0, ".0f"),
            )
            for layout in ("8x1x1", "8x4x2", "8x4x32", "8x1x128")
        ),
        only={"part": "ranks"},
    ),
    "scale_pairs": Table(
        "results_scale.csv",
        {"stage": "{stage}", "order of pairs": "{order}", "pairs": "{pairs_small} / {pairs_large}"},
        (
            Figure("CPU s, few", "cpu_seconds_small", form=".3f"),
            Figure("CPU s, many", "cpu_seconds_large", form=".3f"),
            Figure("MB, few", "peak_bytes_small", scale=1e-6, form=".1f"),
            Figure("MB, many", "peak_bytes_large", scale=1e-6, form=".1f"),
        ),
        only={"part": "pairs"},
    ),
    "order": Table(
        "results_order.csv",
        {"pairs": "{num_pairs}"},
        (
            Figure("CPU s of a start", "start_cpu_seconds"),
            Figure("MB of a start", "start_peak_megabytes", form=".1f"),
            Figure("CPU ms of a batch's order", "order_cpu_ms"),
            Figure("CPU ms to cut it and lay it out", "build_cpu_ms"),
            Figure("MB of batches", "batches_peak_megabytes", form=".1f"),
            Figure("MB of a worker", "worker_megabytes", form=".1f"),
            Figure("CPU s, mismatched pairs", "mismatched_cpu_seconds"),
            Figure("MB, mismatched pairs", "mismatched_peak_megabytes", form=".1f"),
        ),
    ),
    "convert": Table(
        "results_convert.csv",
        {"direction": "{direction}", "model": "H {hidden_size}, L {num_layers}, V {vocab_size}"},
        (
            Figure("GB", "num_bytes", scale=1e-9),
            Figure("GB/s", "gb_per_second"),
            Figure("speed / a copy's", "speed_over_copy_p50"),
            Figure("peak memory / size", "memory_over_size"),
        ),
    ),
    "checkpoint": Table(
        "results_checkpoint.csv",
        {"DP": "{dp}", "form": "{form}"},
        (
            Figure("GB", "checkpoint_bytes", scale=1e-9),
            Figure("memory of a save / share", "memory_save_over_share"),
            Figure("memory of a load / share", "memory_load_over_share"),
            Figure("written / share", "written_over_share"),
            Figure("read / share", "read_over_share"),
            Figure("s a save stalls", "stall_sync_p50"),
            Figure("s with --async-save", "stall_background_p50"),
        ),
    ),
    "start": Table(
        "results_start.csv",
        {
            "ranks": "{ranks}",
            "TP": "{tensor_model_parallel_size}",
            "model": "H {hidden_size}, L {num_layers}, V {vocab_size}",
            "--hf-read": "{hf_read}",
        },
        (
            Figure("MB read", "read_bytes", scale=1e-6, form=".0f"),
            Figure("read / model", "read_over_model"),
            Figure("CPU s", "cpu_seconds_p50"),
            Figure("s", "seconds_p50"),
        ),
    ),
    "memory": Table(
        "results_memory.csv",
        {"layout": "{layout}", "stage": "{stage}"},
        (
            Figure("standing MB", "standing_bytes", scale=1e-6),
            Figure("estimated / standing", "standing_ratio", form=".3f"),
            Figure("pass MB", "peak_bytes", scale=1e-6),
            Figure("estimated / pass", "peak_ratio", form=".3f"),
            Figure("both, estimated / allocated", "total_ratio", form=".3f"),
        ),
    ),
    "lora": Table(
        "results_lora.csv",
        {
            "side": "{side}",
            "bf16": "{bf16}",
            "model": "H {hidden_size}, L {num_layers}, V {vocab_size}",
            "rank": "{rank}",
            "pairs": "{pairs}",
            "micro-batch, ours / theirs": "{tokens_per_microbatch} tokens / {pairs_per_microbatch} pairs",
            "rounds": "{repeats}",
        },
        (
            Figure("trained", "trained_share", form=".2%"),
            Figure("stays, MB", "standing_bytes", scale=1e-6, form=".0f"),
            Figure("/ full", "standing_over_full"),
            Figure("peak, MB", "peak_bytes", scale=1e-6, form=".0f"),
            Figure("peak / full", "peak_over_full"),
            Figure("resident, MB", "resident_bytes", scale=1e-6, form=".0f"),
            Figure("resident / full", "resident_over_full"),
            Figure("CPU s", "cpu_seconds_p50"),
            Figure("CPU / full", "cpu_over_full"),
            Figure("FLOPs / full", "flops_over_full"),
        ),
    ),
    "gpu": Table(
        "results_gpu.csv",
        {"method": "{method}", "lengths": "{lengths}", "layers": "{num_layers}", "pairs": "{num_pairs}"},
        (
            Figure("pairs/s", "pairs_per_second_p50"),
            Figure("model TFLOP/s", "tflops", form=".1f"),
            Figure("MFU", "mfu", form=".1%"),
            Figure("peak GiB", "peak_bytes", scale=GIB, form=".1f"),
            Figure("s before", "seconds_before", form=".3f"),
            Figure("s gradient", "seconds_gradient", form=".3f"),
            Figure("s forward", "seconds_forward", form=".3f"),
            Figure("s backward", "seconds_backward", form=".3f"),
            Figure("s head, forward", "seconds_head_forward", form=".3f"),
            Figure("s head, backward", "seconds_head_backward", form=".3f"),
            Figure("s optimizer", "seconds_optimizer", form=".3f"),
            Figure("s exposed communication", "seconds_communication", form=".3f"),
            Figure("pairs/s at 32 layers", "pairs_per_second_at_32_layers"),
            Figure("head TFLOP/s", "head_tflops", form=".1f"),
        ),
    ),
}
