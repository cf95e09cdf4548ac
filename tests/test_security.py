"""What no source of ours may do, found by reading them; and secrets, which are saved nowhere."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.demo.report import page
from potstill.charts import Line, line_chart
from potstill.secrets import HIDDEN, is_secret_name, redacted, redacted_command
from pretrain.environment import describe_environment

OURS = ("data_prep", "pretrain", "finetune", "potstill", "examples", "benchmarks", "tools", "tests")

# Calls by the end of their name: they run what they read, or give it to a shell.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "marshal.load"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "shelve.open", "joblib.load"),
    *("tarfile.open", "shutil.unpack_archive", "pd.read_pickle", "pandas.read_pickle"),
}
IMPORTS = {"import_module", "importlib.import_module"}
IMPORTS_WHAT_IT_IS_TOLD = "imports what it is told"
# Arguments: what a call must not be given, and what it must.
REFUSED_VALUES = {"trust_remote_code": True, "shell": True, "allow_pickle": True}
LOADERS = {
    "AutoConfig",
    "AutoTokenizer",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
}

ALLOWED = {
    ("pretrain/objectives/__init__.py", "importlib.import_module"): "--objective module.path:Class",
    ("tests/data_prep/test_shard_format.py", "pickle.loads"): "of what the test itself pickled",
}


def sources(repository: Path) -> Iterator[tuple[str, ast.Module]]:
    """Every Python file of ours, parsed, with its place in the repository."""
    for package in OURS:
        for path in sorted((repository / package).rglob("*.py")):
            yield str(path.relative_to(repository)), ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def given(call: ast.Call) -> dict[str | None, object]:
    """The keyword arguments of a call that stand there as constants."""
    return {
        word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)
    }


def faults(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(call, what is wrong with it)."""
    for name, call in calls(tree):
        words = given(call)
        if name in FORBIDDEN:
            yield name, "runs what it reads"
        if name in IMPORTS and not isinstance(call.args[0], ast.Constant):
            yield name, IMPORTS_WHAT_IT_IS_TOLD
        for word, value in REFUSED_VALUES.items():
            if words.get(word) is value:
                yield name, f"{word}={value}"
        if name.endswith("torch.load") and words.get("weights_only") is not True:
            yield name, "without weights_only=True"


def test_no_source_runs_what_it_reads(repository: Path) -> None:
    found = [
        f"{place}:{name} {fault}"
        for place, tree in sources(repository)
        for name, fault in faults(tree)
        if (place, name) not in ALLOWED
        if not (fault == IMPORTS_WHAT_IT_IS_TOLD and place.startswith("tests/"))  # its own tables
    ]
    assert not found, found


def test_every_exception_of_that_rule_is_still_needed(repository: Path) -> None:
    found = {(place, name) for place, tree in sources(repository) for name, _ in faults(tree)}
    assert set(ALLOWED) <= found


def test_models_of_others_are_opened_without_their_code(repository: Path) -> None:
    packages = ("data_prep/", "pretrain/", "finetune/", "potstill/")
    own_files = {"pretrain/export.py"}  # opens the folder that it has just written
    found = [
        f"{place}: {name}"
        for place, tree in sources(repository)
        if place.startswith(packages) and place not in own_files
        for name, call in calls(tree)
        if name.endswith(".from_pretrained") and name.split(".")[0] in LOADERS
        if given(call).get("trust_remote_code") is not False
    ]
    assert not found, found


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "os.system(line)",
        "subprocess.run(line, shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "importlib.import_module(name)",
    ],
)
def test_the_rule_notices(source: str) -> None:
    assert list(faults(ast.parse(source)))


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "apiKey", "API-KEY", "token", "hf_token", "accessToken", "HF_TOKEN"),
        *("WANDB_API_KEY", "password", "client_secret", "Authorization", "--hf-token", "passwd"),
    ],
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("tokens", "tokenizer", "pad_token", "mask_token_id", "flops_per_token", "token_type_ids"),
        *("tokens_per_second", "author", "monkey", "key", "max_tokens", "tokenizer_sha256"),
    ],
)
def test_ordinary_names_are_no_secrets(name: str) -> None:
    assert not is_secret_name(name)


def test_secrets_in_a_ds_config_are_hidden_and_all_else_stays() -> None:
    config = {
        "train_batch_size": 8,
        "comet": {"api_key": "abc", "enabled": True, "project": "mine"},
        "notes": ["https://me:pass@host/x?token=abc&page=1", "with hf_abcdefghijkl in it"],
        "password": {"of": {"anything": "x"}, "pin": 1234, "none": None},
    }
    assert redacted(config) == {
        "train_batch_size": 8,
        "comet": {"api_key": HIDDEN, "enabled": True, "project": "mine"},
        "notes": [f"https://{HIDDEN}@host/x?token={HIDDEN}&page=1", f"with {HIDDEN} in it"],
        "password": {"of": {"anything": HIDDEN}, "pin": HIDDEN, "none": None},
    }


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hf_token", "x", "--seed", "1"], ["--hf_token", HIDDEN, "--seed", "1"]),
        (["--api-key=x", "HF_TOKEN=y"], [f"--api-key={HIDDEN}", f"HF_TOKEN={HIDDEN}"]),
        (["--data=https://a:b@c"], [f"--data=https://{HIDDEN}@c"]),
        (["--tokenizer", "bert", "--objective", "0.5*kd+mlm"],) * 2,
    ],
)
def test_secrets_on_a_command_line_are_hidden(words: list[str], shown: list[str]) -> None:
    assert redacted_command(words) == shown


def test_the_environment_that_is_saved_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "--hf_token", "very-secret", "hf_abcdefgh12345678"])
    monkeypatch.setenv("HF_TOKEN", "also-secret")
    saved = json.dumps(describe_environment(world_size=1))
    assert "secret" not in saved and "abcdefgh" not in saved


SCRIPT = "<script>alert('x')</script>\"><svg onload=alert(1)>"


def test_a_chart_escapes_its_names() -> None:
    drawn = line_chart([Line(SCRIPT, [(0, 1.0), (1, 2.0)])], SCRIPT, SCRIPT)
    empty = line_chart([], SCRIPT, SCRIPT)
    assert "<script" not in drawn + empty and "<svg onload" not in drawn + empty
    assert "&lt;script&gt;" in drawn


def test_the_demos_page_escapes_models_labels_and_texts() -> None:
    curve = {"train": [(1, 3.0), (2, 2.0)], "validation": [(0, 4.0)]}
    shown = page(
        {
            "models": [{"name": SCRIPT, "parameters": 5, "accuracy": 0.5, "macro_f1": 0.25}],
            **dict.fromkeys(("note", "teacher", "student", "objective", "init"), SCRIPT),
            "corpus": {"megabytes": 1.0, "documents": 2, "tokens": 3},
            "ranks": SCRIPT,
            "export": {"max_abs_difference": 0.0},
            "curves": {"teacher": curve, "student": curve},
            "stages": [{"title": SCRIPT, "command": SCRIPT, "seconds": 1.0}],
            "environment": {SCRIPT: SCRIPT},
        }
    )
    assert "<script" not in shown and "<svg onload" not in shown
