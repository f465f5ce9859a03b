"""``python -m megatron_rmipo.train``: the trainer, started by megatron_rmipo.launch, by torchrun or alone."""

# Saving a checkpoint starts a process that imports this module again, and that has no need of the trainer.
from megatron_rmipo.entry import train


def main() -> int:
    """Train as the command line says; returns the exit code."""
    return train()


if __name__ == "__main__":
    raise SystemExit(main())
