"""A batch in parts, epochs that are asked about, and token ids that runs share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from data_prep.tokenization import load_tokenizer
from finetune import classifier as classifiers
from finetune.settings import DataSettings, RunSettings, TrainSettings
from finetune.token_cache import cached, key_of
from finetune.training import AskEveryEpoch
from finetune.trial import run_trial
from potstill.errors import InputError

FineTune = Callable[..., dict[str, Any]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A user's file of 24 rows of unlike lengths."""
    lines = [f"{'yes ' * (1 + row % 5)},1\n{'no ' * (1 + row % 4)},0\n" for row in range(12)]
    (tmp_path / "a.csv").write_text("sentence,label\n" + "".join(lines))
    return tmp_path / "a.csv"


def flags_for(model: Path, rows: Path) -> list[Any]:
    """A short training on the rows."""
    files = ["--train_file", rows, "--validation_file", rows]
    return ["--model", model, *files, "--lr", "5e-3", "--max_length", "32", "--epochs", "2"]


def test_a_batch_in_parts_trains_as_the_whole_one(
    fine_tune: FineTune, bert: Path, rows: Path, tmp_path: Path
) -> None:
    kept: list[Any] = []
    for parts in ("1", "2", "4"):
        output = tmp_path / parts
        batch = ["--batch_size", "8", "--accumulation", parts]
        result = fine_tune(*flags_for(bert, rows), *batch, output=output)
        kept.append((result["last"], load_file(output / "model/model.safetensors")))
    whole, weights = kept[0]
    assert whole["step"] == 2 * 24 // 8
    for last, other in kept[1:]:
        assert last["step"] == whole["step"]
        assert last["loss"]["validation"] == pytest.approx(whole["loss"]["validation"], abs=1e-4)
        for name, values in weights.items():
            torch.testing.assert_close(other[name], values, atol=2e-4, rtol=2e-3)


def trial(model: Path, rows: Path, output: Path, **more: Any) -> dict[str, Any]:
    """One trial of five epochs."""
    where = RunSettings(model=str(model), output=str(output), save_model=False, **more)
    data = DataSettings(train_file=str(rows), validation_file=str(rows), max_length=32)
    return run_trial(where, data, TrainSettings(lr=5e-3, batch_size=8, epochs=5))


def test_an_answer_of_false_ends_the_training_behind_that_epoch(
    bert: Path, rows: Path, tmp_path: Path
) -> None:
    heard: list[tuple[int, float | None]] = []

    def until_the_second(epoch: int, score: float | None) -> bool:
        heard.append((epoch, score))
        return epoch < 2

    where = RunSettings(model=str(bert), output=str(tmp_path / "run"), save_model=False)
    data = DataSettings(train_file=str(rows), validation_file=str(rows), max_length=32)
    settings = TrainSettings(lr=5e-3, batch_size=8, epochs=5)
    result = run_trial(where, data, settings, until_the_second)
    scores = [entry["scores"]["validation"]["accuracy"] for entry in result["epochs"]]
    assert heard == [(1, scores[0]), (2, scores[1])]
    assert result["last"]["epoch"] == 2
    texts = [line.split(",")[0] for line in rows.read_text().splitlines()[1:]]
    ids = load_tokenizer(bert)(texts)["input_ids"]
    assert result["train_tokens"] == 2 * sum(map(len, ids))  # of the epochs that there were
    again = run_trial(where, data, settings, until_the_second)
    assert again == result and len(heard) == 2  # finished: nothing is trained, nobody asked


def test_only_scores_of_the_main_split_are_asked_about() -> None:
    heard: list[tuple[int, float | None]] = []

    class Now:
        epoch, should_training_stop = 1.0, False

    def never(epoch: int, score: float | None) -> bool:
        heard.append((epoch, score))
        return False

    ask, state = AskEveryEpoch(never, "eval_matched_accuracy"), Now()
    ask.on_evaluate(None, state, state, {"eval_mismatched_accuracy": 0.5})
    assert heard == [] and not state.should_training_stop
    ask.on_evaluate(None, state, state, {"eval_matched_accuracy": None})
    assert heard == [(1, None)] and state.should_training_stop


def test_a_second_run_on_the_same_rows_does_not_tokenise(
    bert: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, made = tmp_path / "kept", []
    first = trial(bert, rows, tmp_path / "one", tokenised=str(kept))
    assert len(list(kept.glob("[!.]*"))) == 1  # training and validation rows are the same here
    monkeypatch.setattr(
        classifiers, "cached", lambda folder, key, make: cached(folder, key, made.append)
    )
    second = trial(bert, rows, tmp_path / "two", tokenised=str(kept))
    assert made == []
    assert second["epochs"] == first["epochs"]
    plain = trial(bert, rows, tmp_path / "three")
    assert plain["epochs"] == first["epochs"]


def test_other_rows_lengths_or_labels_have_ids_of_their_own() -> None:
    keys = {key_of(["a"], 1), key_of(["a"], 2), key_of(["b"], 1), key_of(["a", 1]), key_of("a", 1)}
    assert len(keys) == 5
    assert key_of({"x": 1, "y": 2}) == key_of({"y": 2, "x": 1})


def test_what_a_killed_run_left_of_the_same_token_ids_is_removed(tmp_path: Path) -> None:
    for name in (".mine.1.part", ".mine.2.old", ".other.1.part"):
        (tmp_path / name / "part").mkdir(parents=True)
    cached(tmp_path, "mine", lambda: Dataset.from_dict({"a": [1]}))
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [".mine.lock", ".other.1.part"]


def test_a_place_for_token_ids_that_is_no_folder_is_refused_at_once(
    rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"--tokenised {rows}: .* is no folder; give another one"):
        trial(tmp_path / "no model is looked at", rows, tmp_path / "run", tokenised=str(rows))


@pytest.mark.parametrize("damage", ["cut", "gone", "state"])
def test_damaged_token_ids_are_refused_with_the_folder_to_remove(
    bert: Path, rows: Path, tmp_path: Path, damage: str
) -> None:
    kept = tmp_path / "kept"
    trial(bert, rows, tmp_path / "one", tokenised=str(kept))
    (place,) = kept.glob("[!.]*")
    (file,) = place.glob("*.arrow")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "gone":
        file.unlink()
    else:
        (place / "state.json").write_text("{")
    with pytest.raises(InputError, match=f"{place}: damaged token ids .*remove the folder"):
        trial(bert, rows, tmp_path / "two", tokenised=str(kept))
