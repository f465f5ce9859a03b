from __future__ import annotations

from pathlib import Path

import yaml

from megatron_rmipo.data.store.manifest import Manifest, TokenizerInfo
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.publishing.model_card import hub_name, model_card

SNAPSHOT = Path("/home/me/.cache/huggingface/hub/models--meta-llama--Llama-3-8B/snapshots/0a1b")


def test_the_card_says_what_the_hub_and_its_readers_ask_for(tmp_path: Path) -> None:
    tokenizer = TokenizerInfo("f", 100, 1, 2)
    sources = [{"name": "HuggingFaceH4/ultrafeedback_binarized", "bytes": None}, {"name": "/secret/a|b.jsonl", "bytes": 7}]
    data = {"/secret/data/uf": Manifest(tokenizer, template_name="llama3", sources=sources, num_pairs=61135, num_tokens=7)}
    before = {"kind": "eval", "step": 0, "num_pairs": 256, "rewards/accuracies": 0.5, "rewards/accuracies/se": 0.031}
    after = {"kind": "eval", "step": 477, "num_pairs": 256, "rewards/accuracies": 0.75, "rewards/accuracies/se": 0.027}
    config = parse_arguments(["--objective", "simpo", "--beta", "2.5", "--save-hf", "/secret/work/mine", "--bf16"])
    chat = [{**record, "kind": "eval/chat", "num_pairs": 64} for record in (before, after)]
    records = [before, chat[0], {"kind": "train", "step": 477}, after, chat[1]]
    card = model_card(config, SNAPSHOT, data, records, step=477, consumed_pairs=61056, layout="TP 4")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "meta-llama/Llama-3-8B",
        "base_model_relation": "finetune",
        "datasets": ["HuggingFaceH4/ultrafeedback_binarized"],
        "tags": ["megatron-rmipo", "megatron-core", "preference-optimization", "simpo"],
    }
    assert "secret" not in card, "a path of the machine"
    rows = ("# mine", "| beta | 2.5 |", "| steps | 477 |", "| bf16 | True |", "a\\|b.jsonl | 61,135 | 7 | llama3 |")
    figures = (
        "| preference accuracy | 0.500 +- 0.031 | 0.750 +- 0.027 |",
        "## Held-out pairs\n",
        "steps 0 and 477, 256 held-out pairs",
        "## Held-out pairs: chat\n",
        "steps 0 and 477, 64 held-out pairs",
        "TP 4",
        "| torch |",
    )
    assert [row for row in (*rows, *figures) if row not in text] == []
    alone = model_card(config, tmp_path, {}, [after], step=1, consumed_pairs=1, layout="")
    assert "Held-out" not in alone
    assert "base_model" not in alone


def test_the_card_of_an_adapter_and_of_what_it_is_merged_into(tmp_path: Path) -> None:
    made = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "/secret/model"}
    config = parse_arguments(["--objective", "dpo", "--save-hf", "/secret/whole", "--save-adapter", "/secret/small"])
    of = {"step": 1, "consumed_pairs": 8, "layout": "TP 1", "adapter": made}
    _, front, text = model_card(config, SNAPSHOT, {}, [], **of, is_merged=False).split("---\n", 2)
    fields = yaml.safe_load(front)
    assert (fields["library_name"], fields["base_model_relation"]) == ("peft", "adapter")
    assert fields["base_model"] == "meta-llama/Llama-3-8B"
    assert "lora" in fields["tags"]
    said = ("# small\n", "A LoRA adapter of meta-llama/Llama-3-8B", "| r | 8 |", "| target_modules | q_proj, v_proj |")
    used = 'base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3-8B")'
    assert [words for words in (*said, used, "PeftModel.from_pretrained(base") if words not in text] == []
    assert "secret" not in text
    private = model_card(config, tmp_path, {}, [], **of, is_merged=False)
    assert "base_model" not in private
    assert str(tmp_path) not in private
    whole = model_card(config, SNAPSHOT, {}, [], **of)
    assert "base_model_relation: finetune" in whole
    assert [words for words in ("# whole\n", "merged into it", "| r | 8 |") if words not in whole] == []
    assert "PeftModel" not in whole


def test_names_on_the_hub(tmp_path: Path) -> None:
    assert hub_name(SNAPSHOT) == "meta-llama/Llama-3-8B"
    assert hub_name("owner/name.v1") == "owner/name.v1"
    assert hub_name(tmp_path) is None
    assert hub_name("./name") is None
