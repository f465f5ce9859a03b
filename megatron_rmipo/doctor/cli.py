"""Command line of ``tools/doctor.py``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_rmipo.command import DONE, FAULT_OF_USER, add_debug_flag
from megatron_rmipo.doctor.findings import Finding, verdict
from megatron_rmipo.doctor.installed import look_at_packages
from megatron_rmipo.doctor.kernels import look_at_kernels
from megatron_rmipo.doctor.machine import look_at_machine
from megatron_rmipo.doctor.ranks import look_at_ranks
from megatron_rmipo.runtime.cpu import install_cpu_runtime

_DESCRIPTION = """\
Say whether this machine is fit to train: versions, GPUs, disk; log-probs, attention, optimizer beside float64; ranks that meet.
Links between the ranks of a run are measured by the trainer's --check-links. Exit code 1 where a check fails."""


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="doctor.py", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument(
        "--directory", type=Path, default=Path(), metavar="DIR", help="where runs would write (default: the current one)"
    )
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    flags = build_parser().parse_args(argv)
    findings = []
    for finding in examine(flags.directory):
        findings.append(finding)
        if not flags.json:
            print("\n".join(finding.lines()), flush=True)
    fit = all(finding.status != "FAIL" for finding in findings)
    if flags.json:
        print(json.dumps({"fit": fit, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=2))
    else:
        print(verdict(findings))
    return DONE if fit else FAULT_OF_USER


def examine(directory: Path) -> Iterator[Finding]:
    """Everything, one after the other, as it is found.

    Args:
        directory: where runs would write.
    """
    yield from look_at_packages()
    yield from look_at_machine(directory)
    install_cpu_runtime()
    yield from look_at_kernels()
    yield from look_at_ranks()
