"""Errors a user can cause.

Every error of this family is shown as one message without a traceback (``--debug`` shows it). A message names the file, line,
field or flag, the value found, and the remedy. Our own invariants use ``assert`` instead.
"""

from __future__ import annotations


class RmipoError(Exception):
    """A fault the user can mend. Base of all typed errors of this package."""


class ConfigError(RmipoError):
    """A flag, a YAML entry or a combination of them cannot work."""


class DataError(RmipoError):
    """Preference data, or a prepared data set, cannot be used."""


class ConversionError(RmipoError):
    """A Hugging Face checkpoint cannot be read, mapped or written."""


class CheckpointError(RmipoError):
    """A Megatron checkpoint is missing, incomplete or made for something else."""


class DirectoryTakenError(CheckpointError):
    """Another run writes, or has begun to write, checkpoints where this one does."""


class OutOfMemoryError(RmipoError):
    """A device, or the host without one, has no memory left for what a run asks of it. The first line stands for itself."""


class JudgeError(RmipoError):
    """The endpoint of a judge does not answer as it should, however often it is asked."""
