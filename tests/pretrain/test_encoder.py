"""`encode` equals the library's own eager forward, and runs nothing that nobody asked for."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, DistilBertConfig, GPT2Config, ModernBertConfig

from potstill.errors import InputError
from pretrain.attention import (
    Attention,
    choose_attention,
    cpu_attention,
    plain_attention,
    sdpa_attention,
)
from pretrain.batches import Batch
from pretrain.encoder import PROJECTIONS, encode
from pretrain.features import Depth, Feature, depth_needed
from pretrain.model_folder import WEIGHTS
from pretrain.models import HEADS, Encoder, load_config, load_encoder
from pretrain.objectives import LayerPair, Settings, build_objective
from pretrain.step import Distillation
from pretrain.teacher import Teacher
from tests.pretrain.tiny import FAMILIES, leaf_modules, ragged_batch, tiny_config, tiny_encoder

LAYERS = 3
BACKENDS: dict[str, Attention] = {
    "plain": plain_attention,
    "sdpa": sdpa_attention,
    "cpu": cpu_attention,
}
PADDED, FULL = (9, 4, 1, 7), (6, 6)


def everything(layers: int = LAYERS) -> frozenset[Feature]:
    """Every feature that an encoder can give."""
    hidden = {Feature("hidden", at) for at in range(layers + 1)}
    projected = {Feature(kind, at) for kind in PROJECTIONS for at in range(1, layers + 1)}
    return frozenset(hidden | projected | {Feature("logits", "masked"), Feature("logits", "all")})


def library_forward(model: Any, batch: Batch) -> Any:
    """The library's own forward, with all it can return."""
    with torch.no_grad():
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.valid.long(),
            output_hidden_states=True,
            output_attentions=True,
        )


def attention_of(features: dict[Feature, Tensor], layer: int, valid: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) over real keys, from captured projections: (B, H, L, L)."""
    query, key = features[Feature("query", layer)], features[Feature("key", layer)]
    products = torch.einsum("bhid,bhjd->bhij", query, key) / query.shape[-1] ** 0.5
    return products.masked_fill(~valid[:, None, None, :], -torch.inf).softmax(-1)


def compare(features: dict[Feature, Tensor], theirs: Any, batch: Batch, tolerance: float) -> None:
    """Hidden states and attentions of all layers, at real tokens."""
    close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    valid = batch.valid
    for at, hidden in enumerate(theirs.hidden_states):
        found = features[Feature("hidden", at)]
        torch.testing.assert_close(found[valid], hidden[valid], **close)
    for at, probabilities in enumerate(theirs.attentions, start=1):
        found = attention_of(features, at, valid).transpose(1, 2)[valid]
        torch.testing.assert_close(found, probabilities.transpose(1, 2)[valid], **close)


@pytest.mark.parametrize("lengths", [PADDED, FULL], ids=["padded", "full"])
@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["f64", "f32"]
)
def test_features_equal_the_librarys_eager_forward(
    family: str, backend: str, lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    encoder = tiny_encoder(family, 7, LAYERS, dtype)
    model: Any = encoder.model
    batch = ragged_batch(lengths, model.config.pad_token_id)
    with torch.inference_mode():
        features = encode(model, batch, everything(), BACKENDS[backend])
    assert set(features) == everything()
    theirs = library_forward(model, batch)
    assert len(theirs.hidden_states) == LAYERS + 1 and len(theirs.attentions) == LAYERS
    compare(features, theirs, batch, tolerance)
    logits = theirs.logits.flatten(0, 1)
    assert len(batch.masked) >= batch.counts["masked"] > 1
    close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    masked, all_valid = features[Feature("logits", "masked")], features[Feature("logits", "all")]
    torch.testing.assert_close(masked, logits[batch.masked], **close)
    torch.testing.assert_close(all_valid, theirs.logits[batch.valid], **close)


@pytest.mark.parametrize("lengths", [PADDED, FULL], ids=["padded", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_librarys(family: str, lengths: tuple[int, ...]) -> None:
    """Also the way back: the training form of every backend, to the embeddings."""
    encoder = tiny_encoder(family, 8)
    model: Any = encoder.model
    batch = ragged_batch(lengths, model.config.pad_token_id)
    library = model(input_ids=batch.input_ids, attention_mask=batch.valid.long()).logits
    parameters = dict(model.named_parameters())
    weights = torch.randn(library[batch.valid].shape, dtype=torch.float64)
    loss = (library[batch.valid] * weights).sum()
    expected = torch.autograd.grad(loss, list(parameters.values()))
    for backend, attention in BACKENDS.items():
        logits = encode(model, batch, {Feature("logits", "all")}, attention)
        loss = (logits[Feature("logits", "all")] * weights).sum()
        found = torch.autograd.grad(loss, list(parameters.values()))
        for name, one, two in zip(parameters, found, expected, strict=True):
            assert torch.allclose(one, two, rtol=1e-8, atol=1e-8), (backend, name)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_projections_are_captured_before_dropout(family: str) -> None:
    encoder = tiny_encoder(family, 3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    batch = ragged_batch(PADDED)
    for attention in BACKENDS.values():
        calm = encode(encoder.model.eval(), batch, everything(), attention)
        wild = encode(encoder.model.train(), batch, everything(), attention)
        for kind in PROJECTIONS:
            assert torch.equal(wild[Feature(kind, 1)], calm[Feature(kind, 1)])
            assert not torch.allclose(wild[Feature(kind, 2)], calm[Feature(kind, 2)])
        assert not torch.allclose(wild[Feature("hidden", 1)], calm[Feature("hidden", 1)])


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_attention_dropout_keeps_the_mean(backend: str) -> None:
    """4,000 draws at p = 0.25: the mean is the attention without dropout, within 5 sigma."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 5, 3, requires_grad=True) for _ in range(3))
    mask = torch.tensor([True, True, False, True, True])[None, None, None]
    exact = BACKENDS[backend](query, key, value, mask, 0.0)
    many = [tensor.expand(4000, 1, 5, 3) for tensor in (query, key, value)]
    draws = BACKENDS[backend](many[0], many[1], many[2], mask.expand(4000, 1, 5, 5), 0.25)
    error = draws.std(0) / 4000**0.5
    assert (error > 1e-4).all()  # it did drop
    assert ((draws.mean(0) - exact[0]).abs() < 5 * error).all()


def test_auto_takes_the_fused_kernel_except_in_training_on_a_cpu() -> None:
    assert choose_attention("auto", torch.device("cpu")) is cpu_attention
    assert choose_attention("auto", torch.device("cuda")) is sdpa_attention
    assert choose_attention("plain", torch.device("cuda")) is plain_attention
    assert choose_attention("sdpa", torch.device("cpu")) is sdpa_attention


@pytest.mark.parametrize(
    ("wanted", "depth"),
    [
        ({("hidden", 0)}, (0, None, False)),
        ({("query", 1)}, (0, 1, False)),
        ({("query", 6), ("key", 6)}, (5, 6, False)),
        ({("value", 3), ("hidden", 2)}, (2, 3, False)),
        ({("value", 3), ("hidden", 3)}, (3, None, False)),
        ({("query", 2), ("value", 4), ("hidden", 5)}, (5, None, False)),
        ({("query", 2), ("logits", "masked")}, (6, None, True)),
    ],
)
def test_depth_is_the_smallest_that_gives_all_features(wanted: set, depth: tuple) -> None:
    assert depth_needed({Feature(*w) for w in wanted}, 6) == Depth(*depth)


# What must run for each objective on layer k: whole layers, projections of layer k, the head.
NEEDED: dict[str, Callable[[int], tuple[int, tuple[str, ...], bool]]] = {
    "mlm": lambda k: (LAYERS, (), True),
    "kd": lambda k: (LAYERS, (), True),
    "vanilla-kd": lambda k: (LAYERS, (), True),
    "hid-cls": lambda k: (k, (), False),
    "hid-seq": lambda k: (k, (), False),
    "att-mse": lambda k: (k - 1, ("query", "key"), False),
    "att-kl": lambda k: (k - 1, ("query", "key"), False),
    "val-kl": lambda k: (k - 1, ("value",), False),
}


def needed_parts(encoder: Encoder, name: str, layer: int) -> tuple[str, ...]:
    """Prefixes of the modules that must run, and no others."""
    model: Any = encoder.model
    base = model.base_model_prefix
    whole, projections, head = NEEDED[name](layer)
    parts = [f"{base}.embeddings"]
    parts += [f"{base}.encoder.layer.{number}." for number in range(whole)]
    parts += [f"{base}.encoder.layer.{layer - 1}.attention.self.{kind}." for kind in projections]
    return (*parts, *(HEADS[model.config.model_type] if head else ()))


def count_calls(model: torch.nn.Module) -> Counter[str]:
    """Counts calls of every leaf module from now on. Attention dropout is a function, no module."""
    calls: Counter[str] = Counter()
    for name, module in leaf_modules(model).items():
        if not name.endswith("attention.self.dropout"):
            calls[name] = 0
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("layer", [1, 2, LAYERS])
@pytest.mark.parametrize("name", list(NEEDED))
@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_nothing_behind_the_deepest_feature_runs_or_learns(
    family: str, name: str, layer: int
) -> None:
    student = tiny_encoder(family, 1, dtype=torch.float32)
    teacher = tiny_encoder(family, 2, dtype=torch.float32)
    objective = build_objective(name, Settings((LayerPair(layer, layer),)))
    batch = ragged_batch(PADDED, student.model.config.pad_token_id)  # type: ignore[union-attr, arg-type]
    module = Distillation(student, teacher.shape, objective, cpu_attention)
    source = Teacher(
        teacher, objective.teacher_features(), cpu_attention, torch.device("cpu"), torch.float32
    )
    calls = [count_calls(student.model)] + [count_calls(teacher.model)] * objective.uses_teacher
    module(batch, source.features(batch) if objective.uses_teacher else {}).sum().backward()
    parts = needed_parts(student, name, layer)
    for model_calls in calls:
        expected = {leaf: int(f"{leaf}.".startswith(parts)) for leaf in model_calls}
        assert model_calls == expected
        assert sum(expected.values()) > 2
    for parameter_name, parameter in student.model.named_parameters():
        in_front = parameter_name.startswith(parts)
        assert (parameter.grad is not None) == in_front, parameter_name
        if in_front and not parameter_name.endswith("key.bias"):  # softmax cancels that one
            assert parameter.grad.abs().max() > 0, parameter_name
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


@pytest.mark.parametrize(
    "config",
    [DistilBertConfig(), GPT2Config(), ModernBertConfig()],
    ids=lambda config: config.model_type,
)
def test_unsupported_architecture_is_refused_by_name(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).touch()
    match = f"--teacher .*'{config.model_type}' is not supported; supported are bert, roberta"
    with pytest.raises(InputError, match=match):
        load_config(str(tmp_path), "--teacher")


def test_decoder_is_refused(tmp_path: Path) -> None:
    tiny_config("bert", is_decoder=True).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(InputError, match="is_decoder"):
        load_config(str(tmp_path), "--student")


def test_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    tiny_encoder("electra", 1).model.save_pretrained(tmp_path)  # type: ignore[operator]
    tiny_config("bert").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="weights of the encoder are missing"):
        load_encoder(str(tmp_path), "--teacher")


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_encoder_loads_with_its_head(family: str, tmp_path: Path) -> None:
    encoder = tiny_encoder(family, 4, dtype=torch.float32)
    encoder.model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_encoder(str(tmp_path), "--teacher")
    assert loaded.trained_head and loaded.shape == encoder.shape
    state = loaded.model.state_dict()
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.fixture(scope="module")
def real_batch(real_data: Path) -> Batch:
    """Two full rows and a short one of real prose, in the real vocabulary."""
    corpus = parquet.ParquetFile(real_data / "corpus" / "wiki-00000-of-00002.parquet")
    texts = next(corpus.iter_batches(batch_size=3, columns=["text"])).column(0).to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(real_data / "vocab" / "bert-base-uncased")
    texts[1] = texts[1][:60]
    rows = tokenizer(texts, truncation=True, max_length=48, padding=True, return_tensors="pt")
    valid = rows["attention_mask"].bool()
    counts = {"sequences": 3, "tokens": int(valid.sum()), "pairs": 0, "masked": 0}
    nothing = torch.zeros(0, dtype=torch.int64)
    positions = valid.flatten().nonzero().squeeze(1)
    return Batch(rows["input_ids"], valid, nothing, nothing, bool(valid.all()), counts, positions)


def test_real_teacher_gives_the_librarys_features_on_real_text(
    real_teacher: Path, real_batch: Batch
) -> None:
    assert not real_batch.full
    teacher = load_encoder(str(real_teacher), "--teacher")
    assert not teacher.trained_head  # the checkpoint has none
    shape = teacher.shape
    assert (shape.layers, shape.hidden, shape.heads, shape.ffn) == (6, 384, 12, 1536)
    wanted = frozenset(feature for feature in everything(6) if feature.kind != "logits")
    source = Teacher(teacher, wanted, cpu_attention, torch.device("cpu"), torch.float32)
    library = AutoModel.from_pretrained(real_teacher, attn_implementation="eager").eval()
    theirs = library_forward(library, real_batch)
    compare(source.features(real_batch), theirs, real_batch, tolerance=2e-5)
