"""The model card of a trained model or adapter: what it was made from, how, and what that did to held-out pairs.

Form: the Hugging Face Hub's model cards, Markdown behind YAML that the Hub reads (``base_model``, ``datasets``, ``tags`` and the
like). Paths of the machine that trained are left out: what they end in names them.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import megatron_rmipo
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.store.manifest import Manifest
from megatron_rmipo.reports.held_out import Record, recorded
from megatron_rmipo.reports.reporter import evaluations_by_set

_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"(?:models|datasets)--([\w.-]+?)--([\w.-]+)")
_PACKAGES = ("megatron-core", "torch", "transformers")
_ARXIV_OF_RMIPO = "2604.24804"
# Name in an evaluation's record -> what a reader calls it.
_FIGURES = {
    "rewards/accuracies": "preference accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "reward of chosen responses",
    "rewards/rejected": "reward of rejected responses",
    "nll/chosen": "negative log-likelihood of chosen responses",
    "loss": "loss",
}
_TRAINING = (
    *("global_batch_size", "seq_length", "lr", "min_lr", "lr_decay_style", "lr_warmup_fraction", "lr_warmup_iters"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "seed", "bf16", "lora_plus_ratio", "quantize_base"),
)
# Of an adapter, by their names in PEFT's config.
_ADAPTER = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "target_parameters", "modules_to_save")


def model_card(
    config: Config,
    base: Path,
    data: Mapping[str, Manifest],
    records: Sequence[Record],
    *,
    step: int,
    consumed_pairs: int,
    layout: str,
    adapter: Mapping[str, Any] | None = None,
    is_merged: bool = True,
) -> str:
    """The card of a run's model, or of its adapter.

    Args:
        config: the run's.
        base: directory of the model it started from.
        data: prefix -> manifest of the data it was trained and evaluated on.
        records: those of metrics.jsonl, in order, evaluations of held-out pairs among them; of a set with fewer than two there
            is no table.
        step, consumed_pairs: how far it is.
        layout: the ranks, in words.
        adapter: where one was trained, its ``adapter_config.json``.
        is_merged: whether the card is of the model that it is merged into, and not of the adapter alone.
    """
    is_alone = adapter is not None and not is_merged
    saved = config.lora.save_adapter if is_alone else config.checkpoint.save_hf
    name = Path(saved or config.checkpoint.save or "model").name
    base_name, objective = hub_name(base), config.objective.objective
    by = f"trained on preferences with `{objective}` by megatron_rmipo on Megatron-Core"
    made = f"{base_name or base.name}, {by}{'' if adapter is None else '; what was trained is a LoRA adapter, merged into it'}."
    if is_alone:
        made = f"A LoRA adapter of {base_name or base.name}, {by}."
    flags = config.to_flat_dict()
    settings = {"steps": step, "pairs": consumed_pairs, **{key: flags[key] for key in _TRAINING if flags.get(key) is not None}}
    parts = [
        _front_matter(base_name, data.values(), objective, has_adapter=adapter is not None, is_alone=is_alone),
        f"# {name}",
        made,
        *(_use(base_name or f"path/to/{base.name}") if is_alone else ()),
        "## Data",
        _table(("data set", "from", "rows", "tokens", "chat template"), [_data_row(*one) for one in data.items()]),
        "## Objective",
        _table(("option", "value"), [("objective", objective), *config.objective.options.items()]),
        "## Training",
        _table(("setting", "value"), [*settings.items(), ("layout", layout)]),
        *(_adapter(adapter) if adapter is not None else ()),
        *_held_out(records),
        "## Versions",
        _table(("package", "version"), [("megatron_rmipo", megatron_rmipo.__version__), *map(_version, _PACKAGES)]),
    ]
    return "\n\n".join(parts) + "\n"


def hub_name(path: Path | str) -> str | None:
    """``owner/name`` of what lies in the Hub's cache, or is named so and is no path here; None for anything else."""
    cached = _CACHED.search(str(path))
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    text = str(path)
    return text if _ON_THE_HUB.fullmatch(text) and not text.startswith(".") and not Path(text).exists() else None


def _use(base: str) -> list[str]:
    code = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""]
    code += [f'base = AutoModelForCausalLM.from_pretrained("{base}")', 'model = PeftModel.from_pretrained(base, "path/to/this")']
    return ["## Use", "\n".join(("```python", *code, "```"))]


def _adapter(config: Mapping[str, Any]) -> list[str]:
    told = {name: config[name] for name in _ADAPTER if name in config}
    rows = [(name, ", ".join(value) if isinstance(value, list) else value) for name, value in told.items()]
    return ["## Adapter", _table(("field", "value"), rows)]


def _front_matter(
    base_name: str | None, manifests: Iterable[Manifest], objective: str, *, has_adapter: bool, is_alone: bool
) -> str:
    names = [hub_name(source["name"]) for manifest in manifests for source in manifest.sources if source.get("bytes") is None]
    datasets = list(dict.fromkeys(name for name in names if name is not None))
    tags = ["megatron-rmipo", "megatron-core", "preference-optimization", objective]
    tags += ["lora"] if has_adapter else []
    fields: dict[str, Any] = {"library_name": "peft" if is_alone else "transformers", "pipeline_tag": "text-generation"}
    if base_name is not None:
        fields |= {"base_model": base_name, "base_model_relation": "adapter" if is_alone else "finetune"}
    if datasets:
        fields["datasets"] = datasets
    fields["tags"] = tags + ([f"arxiv:{_ARXIV_OF_RMIPO}"] if objective == "rmipo" else [])
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _data_row(prefix: str, manifest: Manifest) -> tuple[object, ...]:
    # A name on the Hub stays whole, a path is private.
    names = [hub_name(source["name"]) or Path(source["name"]).name for source in manifest.sources]
    template = "the base model's" if manifest.template_name == "tokenizer" else manifest.template_name
    return Path(prefix).name, ", ".join(names), f"{manifest.num_pairs:,}", f"{manifest.num_tokens:,}", template


def _held_out(records: Sequence[Record]) -> list[str]:
    sets = evaluations_by_set(records)
    return [part for name, evaluations in sets.items() if len(evaluations) > 1 for part in _held_out_set(name, evaluations)]


def _held_out_set(name: str, evaluations: Sequence[Record]) -> list[str]:
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for metric, title in _FIGURES.items():
        before, after = recorded(first, metric), recorded(last, metric)
        if before is not None and after is not None:
            rows.append((title, before.text(), after.text()))
    pairs = f", {last['num_pairs']} held-out pairs" if "num_pairs" in last else ""
    note = f"Means with their standard errors at steps {first['step']} and {last['step']}{pairs}. No judge was asked."
    return [f"## Held-out pairs{f': {name}' if name else ''}", _table(("", "before", "after"), rows), note]


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _version(name: str) -> tuple[str, str]:
    return name, importlib.metadata.version(name)
