"""Whether encoders and shards go together; asked before long work."""

from pathlib import Path
from typing import Any

from data_prep.shard_format import Manifest
from data_prep.tokenization import tokenizer_fingerprint
from potstill.errors import InputError
from pretrain.models import Encoder


def check_tokenizer(tokenizer: Any, source: str, folder: Path, manifest: Manifest) -> None:
    """Refuse a teacher that does not read the very token numbers that stand in the shards.

    Args:
        tokenizer: the teacher's. source: its folder or hub name. folder: that of the shards.

    Raises:
        InputError: another tokenizer.
    """
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint != manifest.tokenizer_fingerprint:
        raise InputError(
            f"--teacher {source} has another tokenizer than the shards in {folder} "
            f"(fingerprints {fingerprint[:12]} and {manifest.tokenizer_fingerprint[:12]}); shard "
            f"the corpus again with --tokenizer {source}"
        )


def check_positions(encoder: Encoder, who: str, manifest: Manifest) -> None:
    """Refuse a teacher or student (`who`) whose embeddings are too few for the shards' rows.

    Raises:
        InputError: fewer positions or tokens than the shards have.
    """
    if encoder.shape.positions < manifest.seq_length:
        raise InputError(
            f"the shards' seq_length is {manifest.seq_length}, but the {who} has only "
            f"{encoder.shape.positions} positions; shard with a smaller --seq_length"
        )
    if encoder.shape.vocab < manifest.vocab_size:
        raise InputError(
            f"the shards' vocabulary has {manifest.vocab_size} tokens, the {who}'s only "
            f"{encoder.shape.vocab}; shard with the {who}'s tokenizer"
        )
