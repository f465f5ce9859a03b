"""``python -m megatron_rmipo.train``: the trainer, started by torchrun or alone."""


def main() -> int:
    """Train as the command line says; returns the exit code."""
    # Imported here: saving a checkpoint starts a process that imports this module again, and that has no need of the trainer.
    from megatron_rmipo.training.main import main as train

    return train()


if __name__ == "__main__":
    raise SystemExit(main())
