"""SimPO as TRL trains it: a step of its CPOTrainer with ``loss_type="simpo"``, over the same tokens.

Micro-batches are padded by TRL's collator once, before any step, so that what is timed is the trainer's ``training_step`` of each
and one optimizer step, as in its loop; no data loading, no callbacks, no logging. TRL is optional: ``pip install
'megatron-rmipo[bench]'``.

Left as TRL has it: the fused AdamW, the log-softmax over every token, the metrics it takes of logits and rewards. Set to what the
others do: fp32 and no activation recomputation unless asked for (TRL's own defaults are bf16 and full recomputation), gradients
kept between steps, the weight of the likelihood term 0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.padded_baseline import PaddedBaseline, Pair, StepResult

PAD = 0


class TrlBaseline:
    """One optimizer step of SimPO by TRL.

    TRL takes the mean over the pairs of a micro-batch, then over micro-batches: the mean over all pairs where every micro-batch
    holds as many.

    Args:
        model: a causal language model of transformers, fp32 weights.
        pairs: their number is a multiple of ``pairs_per_microbatch``.
        pairs_per_microbatch: how many pairs are padded to one length.
        bf16: compute under bfloat16 autocast.
        gradient_checkpointing: recompute activations in backward.
        learning_rate, max_grad_norm: of Adam with betas 0.9 and 0.999, and of clipping.
        output_dir: TRL asks for one; nothing is written there.

    Raises:
        SystemExit: TRL is not installed, or not in a version that has this trainer; or the pairs do not fill the micro-batches.
    """

    def __init__(
        self,
        model: Any,
        pairs: Sequence[Pair],
        *,
        pairs_per_microbatch: int,
        bf16: bool = False,
        gradient_checkpointing: bool = False,
        learning_rate: float = 1e-4,
        max_grad_norm: float = 1.0,
        output_dir: Path,
    ) -> None:
        if len(pairs) % pairs_per_microbatch:
            raise SystemExit(
                f"--num-pairs: TRL weighs micro-batches alike, so {len(pairs)} pairs do not fill micro-batches of "
                f"{pairs_per_microbatch} (--baseline-pairs-per-microbatch)"
            )
        config_class, trainer_class = _import_trl()
        config = config_class(
            output_dir=str(output_dir),
            loss_type="simpo",
            beta=PaddedBaseline.beta,
            simpo_gamma=PaddedBaseline.simpo_gamma,
            cpo_alpha=0.0,
            per_device_train_batch_size=pairs_per_microbatch,
            gradient_accumulation_steps=len(pairs) // pairs_per_microbatch,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=max_grad_norm,
            remove_unused_columns=False,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        self._trainer = trainer_class(
            model=model, args=config, train_dataset=_placeholder_dataset(), processing_class=_placeholder_tokenizer()
        )
        self._losses: list[Tensor] = []
        self._note_losses()
        self._prepare(config.gradient_accumulation_steps)
        features = [_features(pair) for pair in pairs]
        self._microbatches = [
            self._trainer.data_collator(features[first : first + pairs_per_microbatch])
            for first in range(0, len(pairs), pairs_per_microbatch)
        ]

    def step(self) -> StepResult:
        """Forward and backward of every micro-batch, clip, update."""
        trainer = self._trainer
        self._losses.clear()
        # Kept between steps, as those of the others are.
        trainer.optimizer.zero_grad(set_to_none=False)
        for inputs in self._microbatches:
            trainer.training_step(self._model, inputs)
        grad_norm = trainer.accelerator.clip_grad_norm_(self._model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        return StepResult(torch.cat(self._losses).float().cpu(), float(grad_norm))

    def _note_losses(self) -> None:
        # The trainer gives means alone; the losses of the pairs pass through here.
        compute = self._trainer.cpo_loss

        def noted(*arguments: Any, **options: Any) -> Any:
            losses, *rest = compute(*arguments, **options)
            self._losses.append(losses.detach())
            return losses, *rest

        self._trainer.cpo_loss = noted

    def _prepare(self, num_microbatches: int) -> None:
        """What ``train`` does before its first step."""
        trainer = self._trainer
        if trainer.args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainer.create_optimizer()
        self._model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = self._model
        trainer.current_gradient_accumulation_steps = num_microbatches


def _import_trl() -> tuple[Any, Any]:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.cpo import CPOConfig, CPOTrainer  # type: ignore[import-not-found]
    except ImportError as error:
        raise SystemExit(
            f"--trl: TRL's CPOTrainer cannot be imported ({error}). Run: pip install 'megatron-rmipo[bench]'"
        ) from error
    return CPOConfig, CPOTrainer


def _placeholder_dataset() -> Any:
    # The trainer wants text to tokenize when it is built; the pairs of the step are tokens already and never go there.
    import datasets

    return datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["a"], "rejected": ["a"]})


def _placeholder_tokenizer() -> Any:
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": PAD, "<s>": 1, "</s>": 2, "a": 3}, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="a"
    )


def _features(pair: Pair) -> dict[str, list[int]]:
    """A pair as the trainer's own tokenization gives it: labels -100 over the prompt."""
    prompt, chosen, rejected = pair
    features = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        tokens = prompt + response
        features[f"{name}_input_ids"] = tokens
        features[f"{name}_attention_mask"] = [1] * len(tokens)
        features[f"{name}_labels"] = [-100] * len(prompt) + response
    return features
