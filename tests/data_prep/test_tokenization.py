"""Tokenizers: pieces give the tokens of the whole, special tokens never come from text."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizerFast

from data_prep.corpus import cut_fragments
from data_prep.readers import Fragment
from data_prep.tokenization import (
    TextEncoder,
    encoder_settings,
    load_tokenizer,
    pieces_change_tokens,
    save_tokenizer,
    special_ids,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)
from potstill.errors import InputError

TRICKY = [
    "one\n\ntwo  \n three",
    "tab\there \r\n\r\n win",
    "a " * 30_000,
    "naïve café\u00a0x\n日本語",
]


@pytest.fixture(scope="module")
def byte_level(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa-like tokenizer, in which whitespace counts."""
    folder = tmp_path_factory.mktemp("roberta")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(documents, 1000, special_tokens=special, show_progress=False)
    learner.save_model(str(folder))
    loaded = RobertaTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    loaded.save_pretrained(folder)
    return folder


def encoded(encoder: TextEncoder, text: str) -> list[int]:
    """Ids by way of pieces."""
    pieces = [piece.text for piece in cut_fragments(iter([Fragment(text, ends=True)]))]
    return np.concatenate(encoder.encode(pieces)).tolist()


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level"])
def test_pieces_give_the_tokens_of_the_whole_document(
    kind: str, tokenizer_folder: Path, byte_level: Path, documents: list[str]
) -> None:
    folder = tokenizer_folder if kind == "wordpiece" else byte_level
    encoder = TextEncoder(*encoder_settings(load_tokenizer(folder)))
    whole = AutoTokenizer.from_pretrained(folder)
    for text in [*documents[:25], *TRICKY]:
        expected = whole(text.strip(), add_special_tokens=False)["input_ids"]
        assert encoded(encoder, text) == expected
    assert not pieces_change_tokens(encoder)


def test_roberta_names_its_own_special_tokens(byte_level: Path) -> None:
    assert special_ids(load_tokenizer(byte_level)) == {"pad": 1, "cls": 0, "sep": 2, "mask": 4}


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level"])
def test_literal_special_tokens_stay_text(
    kind: str, tokenizer_folder: Path, byte_level: Path
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder if kind == "wordpiece" else byte_level)
    encoder = TextEncoder(*encoder_settings(tokenizer))
    text = "x " + " ".join(tokenizer.all_special_tokens) + " [SEP][MASK]</s>y"
    forbidden = set(special_ids(tokenizer).values())
    found = encoded(encoder, text)
    assert not forbidden & set(found)
    assert "mask" in tokenizer.decode(found)


def test_a_model_that_matches_the_literal_itself_gets_it_broken() -> None:
    vocabulary = {
        "<pad>": 0,
        "<s>": 1,
        "</s>": 2,
        "<mask>": 3,
        "<unk>": 4,
        "hi": 5,
        "<": 6,
        "s>": 7,
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad": "<pad>", "cls": "<s>", "sep": "</s>", "mask": "<mask>", "unk": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, **{f"{name}_token": token for name, token in names.items()}
    )
    encoder = TextEncoder(*encoder_settings(tokenizer))
    assert encoder.encode(["hi <s> hi", "hi"])[0].tolist() == [5, 6, 7, 5]


def with_normalizer(normalizer: normalizers.Normalizer) -> TextEncoder:
    """An encoder whose model knows the literal `<s>`, behind that normaliser."""
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2, "hi": 3, "<": 4, "s>": 5}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.normalizer = normalizer
    return TextEncoder(inner.to_str(), {"<pad>": 0, "<s>": 1})


def test_a_special_token_that_a_normaliser_makes_stays_text() -> None:
    encoder = with_normalizer(normalizers.NFKC())
    assert encoder.encode(["hi ＜s＞ hi"])[0].tolist() == [3, 4, 5, 3]


def test_a_special_token_that_cannot_be_broken_is_left_out() -> None:
    encoder = with_normalizer(normalizers.Replace("< ", "<"))
    assert encoder.encode(["hi <s> hi"])[0].tolist() == [3, 3]


def test_the_fingerprint_belongs_to_the_tokenizer_not_to_its_folder(
    tokenizer_folder: Path, byte_level: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "again")) == tokenizer_fingerprint(
        tokenizer
    )
    assert tokenizer_fingerprint(load_tokenizer(byte_level)) != tokenizer_fingerprint(tokenizer)


def test_two_copies_of_a_real_tokenizer_have_one_fingerprint(
    real_data: Path, real_teacher: Path, tmp_path: Path
) -> None:
    vocabulary = load_tokenizer(real_data / "vocab" / "bert-base-uncased")
    vocabulary.save_pretrained(tmp_path)
    folders = (real_teacher, tmp_path)
    found = {tokenizer_fingerprint(load_tokenizer(folder)) for folder in folders}
    assert found == {tokenizer_fingerprint(vocabulary)}


def changed_copy(folder: Path, copy: Path, part: str, change: dict[str, object]) -> Path:
    """The tokenizer of `folder` with other fields in one part of its tokenizer.json."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    fields[part] |= change
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(fields)), **tokenizer.special_tokens_map
    ).save_pretrained(copy)
    return copy


def test_another_normaliser_or_other_merges_make_another_fingerprint(
    tokenizer_folder: Path, byte_level: Path, tmp_path: Path
) -> None:
    merges = json.loads((byte_level / "tokenizer.json").read_text())["model"]["merges"]
    changes: list[tuple[Path, str, dict[str, object]]] = [
        (tokenizer_folder, "normalizer", {"lowercase": False}),
        (tokenizer_folder, "normalizer", {"strip_accents": False}),
        (byte_level, "pre_tokenizer", {"add_prefix_space": True}),
        (byte_level, "model", {"merges": merges[:-1]}),
    ]
    for number, (folder, part, change) in enumerate(changes):
        same = load_tokenizer(changed_copy(folder, tmp_path / f"same{number}", part, {}))
        other = load_tokenizer(changed_copy(folder, tmp_path / f"other{number}", part, change))
        assert same.get_vocab() == other.get_vocab()
        assert tokenizer_fingerprint(same) != tokenizer_fingerprint(other), change


def test_a_folder_with_a_model_but_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(InputError, match=f"{tmp_path}: no tokenizer in it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", [Path("shards/tokenizer"), "~/tokenizer", "./x", "a/b/c"])
def test_a_missing_folder_is_never_asked_of_the_hub(
    name: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(InputError, match="tokenizer folder .* does not exist"):
        load_tokenizer(name)


def test_a_revision_and_no_foreign_code_reach_the_library(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = AutoTokenizer.from_pretrained, []

    def listen(name: str, **settings: object) -> object:
        asked.append(settings)
        return real(name)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", listen)
    load_tokenizer(tokenizer_folder)
    load_tokenizer(tokenizer_folder, revision="v2")
    assert [settings["revision"] for settings in asked] == ["main", "v2"]
    assert not any(settings["trust_remote_code"] for settings in asked)


def test_learning_twice_gives_the_same_vocabulary_and_keeps_words(
    documents: list[str], tokenizer_folder: Path, tmp_path: Path
) -> None:
    again = train_tokenizer(lambda: reversed(documents), 2000, tmp_path / "again")
    first = load_tokenizer(tokenizer_folder)
    assert again.get_vocab() == first.get_vocab()
    assert vocabulary_size(again) == 2000
    assert [again.convert_ids_to_tokens(i) for i in range(5)] == [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    ]  # fmt: skip
    assert again.tokenize("The Function returns") == ["the", "function", "returns"]
    unknown = Counter(again(" ".join(documents))["input_ids"])[again.unk_token_id]
    assert unknown == 0


def test_a_slow_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n日\n")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic"}'
    )
    with pytest.raises(InputError, match="BertJapaneseTokenizer.*no fast version"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_the_tokens_that_rows_need_is_refused(tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "hi": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no pad_token, cls_token, sep_token, mask_token"):
        load_tokenizer(tmp_path)


def test_an_empty_corpus_or_tiny_size_cannot_be_learned_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text"):
        train_tokenizer(lambda: iter([" "]), 1000, tmp_path / "x")
    with pytest.raises(InputError, match="200 or more"):
        train_tokenizer(lambda: iter(["text"]), 10, tmp_path / "x")


def test_the_same_tokenizer_is_the_same_bytes_on_and_off_line(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    """The library writes down whether it was allowed to look at the hub."""
    for local in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=local)
        save_tokenizer(tokenizer, tmp_path / str(local))
    names = sorted(path.name for path in (tmp_path / "True").iterdir())
    assert names
    for name in names:
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()
