"""``python -m megatron_rmipo.train``: the trainer, started by torchrun or alone."""

from megatron_rmipo.training.main import main

# Saving a checkpoint starts a process that imports this module again, so nothing may happen at import.
if __name__ == "__main__":
    raise SystemExit(main())
