"""What is told of the model that a run leaves: that of the step whose weights it has."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_rmipo.config.schema import CheckpointConfig, Config, ModelConfig
from megatron_rmipo.data.store.chat_form import CarriedForm
from megatron_rmipo.training.outputs import beside_weights
from megatron_rmipo.training.progress import Progress
from tests.integration.data import CHAT


def test_a_card_is_of_the_step_that_is_exported_and_the_template_that_of_the_data(tmp_path: Path) -> None:
    config = Config(
        model=ModelConfig(load_hf=str(tmp_path / "base")), checkpoint=CheckpointConfig(save=str(tmp_path), save_hf="mine")
    )
    data = SimpleNamespace(manifests={}, chat=CarriedForm(CHAT, []))
    start = SimpleNamespace(progress=Progress(step=8, consumed_pairs=45))
    plan: Any = SimpleNamespace(config=config, data=data, start=start, source=SimpleNamespace(adapters=None))
    groups: Any = SimpleNamespace(tp_size=2, pp_size=1, cp_size=1, dp_size=3)
    assert "Held-out" not in (beside_weights(plan, groups).card or "Held-out")  # nothing is recorded yet
    (tmp_path / "logs").mkdir()
    # The last batch was short, and was evaluated after the checkpoint of its step was saved.
    places = [("eval", 0, 0), ("train", 2, 12), ("eval", 2, 12), ("eval", 4, 24), ("train", 8, 45)]
    records = [
        {"kind": kind, "step": step, "consumed_pairs": pairs, "rewards/accuracies": step / 10} for kind, step, pairs in places
    ]
    (tmp_path / "logs" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    best, last = beside_weights(plan, groups, 2), beside_weights(plan, groups)
    assert best.card is not None
    assert last.card is not None
    assert "| steps | 2 |\n| pairs | 12 |" in best.card
    assert "| preference accuracy | 0.000 | 0.200 |" in best.card
    assert "| steps | 8 |\n| pairs | 45 |" in last.card
    assert "| preference accuracy | 0.000 | 0.400 |" in last.card
    assert "TP 2 x PP 1 x CP 1 x DP 3" in best.card
    assert best.chat == CHAT
