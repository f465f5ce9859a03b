"""Megatron-LM's pretraining on preference pairs: what a pretrain_gpt.py looks like with a preference objective.

Everything is Megatron-LM's (megatron-core 0.19.2, Python 3.12) but the lines with ``megatron_lm`` and ``preference``. See
docs/plugin/megatron_lm.md.
"""

import sys

from megatron_rmipo.errors import RmipoError
from megatron_rmipo.plugin.adapters import megatron_lm
from megatron_rmipo.runtime.megatron_training import install_cpu_training


def main() -> None:
    """Train as the command line says."""
    # Nothing where there is CUDA.
    install_cpu_training()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=megatron_lm.add_arguments)
    preference = megatron_lm.PreferenceTraining(args)
    model_config = gpt_config_from_args(args)
    model_config.post_wrap_hooks.append(preference.attach)
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        preference.datasets,
        ModelType.encoder_or_decoder,
        preference.forward_step,
    )


if __name__ == "__main__":
    try:
        main()
    except RmipoError as error:
        sys.exit(f"error: {error}")
