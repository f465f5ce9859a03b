"""``PREFIX.json``: with which tokenizer and template a data set was made, what it holds and what was left out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rmipo.data.store.chat_form import ChatForm
from megatron_rmipo.errors import DataError

MANIFEST_VERSION = 1
PERCENTILES = (5, 25, 50, 75, 95, 99)
PARTS = ("prompt", "chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """What must agree between a data set and the model trained on it.

    Attributes:
        fingerprint: see :func:`megatron_rmipo.data.encoding.tokenize.tokenizer_fingerprint`.
        vocab_size: highest token id plus one, added tokens included.
        bos_token_id, eos_token_id: None where the tokenizer has none.
    """

    fingerprint: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None


@dataclasses.dataclass(frozen=True)
class FileDigest:
    """What a file held when it was written: sha256 of all of it, and a digest over samples, which is soon compared; in hex."""

    sha256: str
    sample: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """``PREFIX.json``: where a data set comes from and what it holds.

    ``has_rejected`` and what follows it are set by :meth:`PairStoreWriter.finalize`, and two of the counts in unpaired data.

    Attributes:
        tokenizer: the tokenizer that made the ids.
        tokenizer_name: the path or name given for it.
        template_name: ``tokenizer``, a built-in template's name, or the template file's name.
        template_hash: sha256 of the template's text.
        template_date: the date that a template was told which asks for it, empty for others; manifests without the field hold
            data of templates that were told none.
        chat: the form of conversations, for the model that is trained on them; None for texts that were rendered before, and in
            manifests without the field.
        bos: the ``--bos`` of these data; manifests without the field hold data with BOS, as ``always``.
        seq_length: most tokens of a prompt with its longer response.
        overlong: what was done with longer pairs.
        max_prompt_length: the prompt's limit of ``--overlong official``.
        format: the format of the rows.
        on_inverted: what was done with pairs whose chosen answer scores lower.
        sources: per input: its name, and its size in bytes where it is a file.
        counts: rows read, kept, truncated, and rejected by reason (``rejected/REASON``); in unpaired data also rows kept by
            label: ``desirable`` (chosen) and ``undesirable`` (rejected); ``inverted``: rows whose chosen answer scores lower.
        unread_columns: columns of the rows that were not read.
        has_rejected: False for supervised data, whose rejected sequences are all empty; manifests without the field hold pairs.
        unpaired: True for unpaired data, whose rows have a chosen or a rejected response each, not both (``has_rejected`` is True
            then, even if no row has the label false); manifests without the field hold other data.
        pair_columns: names of the numbers that stand beside each pair, in the order of the ``values`` file, which there is where
            there are any; manifests without the field have none.
        num_pairs, num_tokens: what the files hold.
        first_token_id: the token that every prompt begins with; None where they begin differently, and in manifests without the
            field.
        lengths: see :func:`summarize_lengths`.
        file_bytes: sizes of the ``bin``, ``idx`` and ``values`` files.
        file_digests: of the ``bin`` and ``idx`` files; manifests without the field say nothing of their content.
    """

    tokenizer: TokenizerInfo
    tokenizer_name: str = ""
    template_name: str = ""
    template_hash: str = ""
    template_date: str = ""
    chat: ChatForm | None = None
    bos: str = "always"
    seq_length: int = 0
    overlong: str = ""
    max_prompt_length: int | None = None
    format: str = ""
    on_inverted: str = "keep"
    sources: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    unread_columns: list[str] = dataclasses.field(default_factory=list)
    has_rejected: bool = True
    unpaired: bool = False
    pair_columns: list[str] = dataclasses.field(default_factory=list)
    num_pairs: int = 0
    num_tokens: int = 0
    first_token_id: int | None = None
    lengths: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    file_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    file_digests: dict[str, FileDigest] = dataclasses.field(default_factory=dict)
    version: int = MANIFEST_VERSION

    @property
    def kind(self) -> str:
        """What a document is called in messages: pairs, unpaired rows or supervised rows, in the plural."""
        if self.unpaired:
            return "unpaired rows"
        return "pairs" if self.has_rejected else "supervised rows"

    @property
    def file_kinds(self) -> tuple[str, ...]:
        """The files beside the manifest, as :func:`store_paths` names them."""
        return ("bin", "idx", "values") if self.pair_columns else ("bin", "idx")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            DataError: it is missing, unreadable, or of another version.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{path}: not found. Without its manifest the data set was never finished, or the prefix is wrong.\n"
                "Make it with tools/preprocess_preferences.py, and give the prefix without .bin, .idx or .json."
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{path}: not a readable manifest ({error}). Preprocess the data again.") from None
        if not isinstance(fields, dict) or fields.get("version") != MANIFEST_VERSION:
            found = fields.get("version") if isinstance(fields, dict) else type(fields).__name__
            raise DataError(f"{path}: version {found!r}, this code reads {MANIFEST_VERSION}. Preprocess the data again.")
        try:
            fields["tokenizer"] = TokenizerInfo(**fields["tokenizer"])
            fields["chat"] = ChatForm(**fields["chat"]) if fields.get("chat") is not None else None
            fields["file_digests"] = {kind: FileDigest(**its) for kind, its in fields.get("file_digests", {}).items()}
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not a manifest of preference pairs ({error}). Preprocess the data again.") from None

    def to_json(self) -> str:
        """The text of ``PREFIX.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def store_paths(prefix: str | Path) -> dict[str, Path]:
    """The files of a data set: ``bin``, ``idx``, ``json`` by their extension, and ``values``, which not all have."""
    return {kind: Path(f"{prefix}.{kind}") for kind in ("bin", "idx", "json")} | {"values": Path(f"{prefix}.values.npy")}


def length_columns(lengths: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[np.int32]]:
    """Tokens of prompt, chosen, rejected, and total (prompt with the longer response).

    Args:
        lengths: int32 ``[num_pairs, 3]``, at least one pair.

    Returns:
        A column ``[rows that have the part]`` for each part that any row has.
    """
    columns = {part: column[column > 0] for part, column in zip(PARTS, lengths.T, strict=True) if column.any()}
    return {**columns, "total": lengths[:, 0] + lengths[:, 1:].max(axis=1)}


def summarize_lengths(lengths: npt.NDArray[np.int32]) -> dict[str, dict[str, float]]:
    """Mean, max and percentiles of each of :func:`length_columns`: a response counts where there is one."""
    return {
        name: {
            "mean": round(float(column.mean()), 2),
            "max": int(column.max()),
            **{f"p{p}": round(float(np.percentile(column, p)), 1) for p in PERCENTILES},
        }
        for name, column in length_columns(lengths).items()
    }
