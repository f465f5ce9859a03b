"""What the doctor finds on this machine, and what it says where something is wrong."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.doctor import cli, installed, kernels, machine, ranks
from megatron_rmipo.doctor.findings import Finding, attempt, verdict
from megatron_rmipo.errors import ConfigError


def test_kernels_of_this_machine_are_right() -> None:
    found = list(kernels.look_at_kernels())
    assert {one.name: one.status for one in found} == dict.fromkeys((one.name for one in found), "OK"), found
    assert {"log-probs fp32", "log-probs bf16", "sdpa fp32", "sdpa bf16", "optimizer step", "files"} <= {
        one.name for one in found
    }


def test_a_kernel_that_computes_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels._sees

    def without_the_last_key_of_the_prefix(num_tokens: int) -> torch.Tensor:
        mask = right(num_tokens)
        mask[61:80, 39] = False
        return mask

    monkeypatch.setattr(kernels, "_sees", without_the_last_key_of_the_prefix)
    monkeypatch.setattr("megatron.core.optimizer.Adam", torch.optim.Adam)  # the decay is in the gradient there
    status = {one.name: one.status for one in kernels.look_at_kernels()}
    assert [status[name] for name in ("sdpa fp32", "sdpa bf16", "optimizer step", "log-probs fp32")] == ["FAIL"] * 3 + ["OK"]
    assert kernels._error([torch.tensor([float("nan")])], [torch.ones(1)]) == float("inf")


def test_a_broken_installation_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def not_nvidias() -> None:
        raise ConfigError("apex: this 'apex' is not NVIDIA's. Remove it with 'pip uninstall apex'.")

    monkeypatch.setattr(installed, "check_environment", not_nvidias)
    real = installed._version
    monkeypatch.setattr(installed, "_version", lambda name: {"psutil": None, "torch": "9.9"}.get(name, real(name)))
    found = {one.name: one for one in installed.look_at_packages()}
    assert (found["apex"].status, found["psutil"].status, found["Python"].status) == ("FAIL", "FAIL", "OK")
    assert "pip install psutil" in found["psutil"].remedy
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(machine, "_LEAST_DISK_GIB", 1e9)
    there = {one.name: one for one in machine.look_at_machine(tmp_path)}
    assert (there["open files"].status, there["open files"].remedy) == ("WARN", "ulimit -n unlimited")
    assert there["disk"].status == "WARN"
    assert there["host"].status == "OK"


def test_what_raises_is_found_too() -> None:
    def look() -> Finding:
        raise RuntimeError("no kernel image is available\nand pages more")

    found = attempt("sdpa", look, "Try another torch")
    assert found.lines() == ["FAIL  sdpa                 RuntimeError: no kernel image is available. Try another torch"]


def test_exit_code_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("a", "OK", "x"), Finding("b", "WARN", "y " * 90, "do z")]
    monkeypatch.setattr(cli, "examine", lambda directory: iter(findings))
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("fit to train: 2 checks, 1 of them with a warning\n")
    assert max(map(len, shown.splitlines())) <= 130
    findings.append(Finding("c", "FAIL", "z"))
    assert cli.main(["--json"]) == 1
    told: Any = json.loads(capsys.readouterr().out)
    assert (told["fit"], [one["status"] for one in told["findings"]]) == (False, ["OK", "WARN", "FAIL"])
    assert verdict(findings).startswith("not fit to train: 1 of 3 checks failed")


@pytest.mark.dist
def test_two_ranks_meet_and_a_backend_that_is_not_there_says_why() -> None:
    (found,) = ranks.look_at_ranks()
    assert found.status == "OK", found
    assert found.text.startswith("2 ranks: sums, gathers, broadcasts right")
    lost = ranks._try_backend("nccl", 1)
    assert (lost.status, "NCCL_DEBUG=INFO" in lost.remedy) == ("FAIL", True), lost
