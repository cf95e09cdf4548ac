"""The student: fresh from a shape, from teacher layers, or from a checkpoint of its own."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForMaskedLM, BertConfig

from data_prep.shard_format import Manifest
from potstill.errors import InputError
from pretrain.config import StudentConfig
from pretrain.model_config import check_memory
from pretrain.model_folder import MOST_LAYERS
from pretrain.models import HEADS, Encoder, check_local, load_encoder, shape_of
from pretrain.student.depth import layers_to_copy


def build_student(
    settings: StudentConfig, teacher: Encoder | None, manifest: Manifest, seed: int
) -> Encoder:
    """Make the student; the same on every rank, since it depends only on these arguments.

    Raises:
        InputError: sizes that do not fit each other, the teacher or the shards.
    """
    if settings.student:
        check_local(settings.student, "--student")
        student = load_encoder(settings.student, "--student")
        _set_dropout(student.model, settings.dropout)
        return student
    config = _student_config(settings, teacher, manifest)
    _check_sizes(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    trained_head = False
    if settings.init != "random":
        if teacher is None:
            raise InputError(f"--init {settings.init} copies teacher layers: give --teacher")
        copy_layers(model, teacher, settings.init)
        trained_head = teacher.trained_head
    _set_dropout(model, settings.dropout)
    return Encoder(model, shape_of(config), trained_head, settings.init)


def _student_config(settings: StudentConfig, teacher: Encoder | None, manifest: Manifest) -> Any:
    """The teacher's config (or BERT's) with the sizes that were asked for."""
    if teacher is None:
        config: Any = BertConfig(
            vocab_size=manifest.vocab_size,
            pad_token_id=manifest.special_ids["pad"],
            max_position_embeddings=max(512, manifest.seq_length),
        )
        default_layers = config.num_hidden_layers
    else:
        own: Any = teacher.model.config
        config = type(own).from_dict(own.to_dict())
        default_layers = (teacher.shape.layers + 1) // 2
    config.num_hidden_layers = settings.student_layers or default_layers
    old_hidden = config.hidden_size
    config.hidden_size = settings.student_hidden or config.hidden_size
    config.num_attention_heads = settings.student_heads or config.num_attention_heads
    config.intermediate_size = settings.student_ffn or (
        config.intermediate_size * config.hidden_size // old_hidden
    )
    config.architectures = None
    return config


def _check_sizes(config: Any) -> None:
    """Refuse sizes that do not go together, or that this machine cannot hold."""
    hidden, heads, layers = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_hidden_layers,
    )
    if hidden % heads:
        raise InputError(
            f"--student_hidden {hidden} is not a multiple of --student_heads {heads}: heads must "
            "divide the hidden size"
        )
    if config.intermediate_size < 1:
        raise InputError(f"--student_hidden {hidden}: nothing is left of the ffn: --student_ffn")
    if layers > MOST_LAYERS:
        raise InputError(f"--student_layers {layers} is more than {MOST_LAYERS}")
    check_memory(config, "the student")


def copy_layers(model: nn.Module, teacher: Encoder, init: str) -> None:
    """Copy embeddings, chosen layers and (if it was trained) the MLM head of the teacher.

    Raises:
        InputError: the widths differ.
    """
    ours: Any = model
    theirs: Any = teacher.model
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        wanted, given = getattr(theirs.config, name), getattr(ours.config, name)
        if wanted != given:
            raise InputError(
                f"--init {init} copies whole teacher layers, but {name} differs: student {given}, "
                f"teacher {wanted}; use --init random for a student of another width"
            )
    chosen = layers_to_copy(init, ours.config.num_hidden_layers, theirs.config.num_hidden_layers)
    pairs = [(ours.base_model.embeddings, theirs.base_model.embeddings)]
    if hasattr(theirs.base_model, "embeddings_project"):
        pairs.append((ours.base_model.embeddings_project, theirs.base_model.embeddings_project))
    layers = theirs.base_model.encoder.layer
    pairs += [
        (own, layers[number - 1])
        for own, number in zip(ours.base_model.encoder.layer, chosen, strict=True)
    ]
    if teacher.trained_head:
        pairs += [(getattr(ours, n), getattr(theirs, n)) for n in HEADS[theirs.config.model_type]]
    for own, other in pairs:
        own.load_state_dict(other.state_dict())
    ours.tie_weights()


def _set_dropout(model: nn.Module, probability: float | None) -> None:
    """Set all dropout probabilities, in the config too, where `--dropout` was given."""
    if probability is None:
        return
    config: Any = model.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = probability
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
