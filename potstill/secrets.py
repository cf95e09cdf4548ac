"""Secrets kept out of what is saved or printed: passwords, keys and tokens become "[redacted]"."""

import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "[redacted]"
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:api_?key|access_?key|private_?key|secret|password|passwd|passphrase|credentials?"
    r"|auth|authorization)(?:_|$)"
)
_TOKEN_NAME = re.compile(r"(?:^|_)token$")
# of a tokenizer and of counting: "pad_token", "flops_per_token"
_ORDINARY_TOKEN = re.compile(r"(?:^|_)(?:pad|cls|sep|mask|unk|bos|eos|special|per)_token$")
_SECRET_PARAMETER = re.compile(r"(?<=[?&;])([\w.-]+)=[^&;#\s]+")
_SECRET_TEXT = re.compile(
    r"(?<=://)[^/\s@]+(?=@)"  # user:password@host
    r"|(?<=\bBearer )\S+|(?<=\bBasic )\S+"
    r"|\bhf_\w{8,}|\bsk-[\w-]{16,}|\bgh[opsu]_\w{16,}|\bgithub_pat_\w+|\bglpat-[\w-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
)


def is_secret_name(name: str) -> bool:
    """Whether a key, flag or variable of this name holds a secret."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)  # accessToken
    plain = re.sub(r"[-.\s]", "_", parted).casefold()
    is_token = _TOKEN_NAME.search(plain) and not _ORDINARY_TOKEN.search(plain)
    return bool(is_token or _SECRET_NAME.search(plain))


def redacted(value: Any, name: str = "") -> Any:
    """`value`, JSON-like and any depth, without secrets; `name` is the key that it stands under.

    Under a secret's name all texts and numbers are hidden; anywhere else what looks like a secret:
    known forms of tokens, `user:password@` and `?token=…` in addresses.
    """
    if isinstance(value, dict):
        return {key: redacted(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner, name) for inner in value]
    if value in (None, "") or isinstance(value, bool):
        return value
    if is_secret_name(name):
        return HIDDEN
    return _without_secrets(value) if isinstance(value, str) else value


def redacted_command(words: Sequence[str]) -> list[str]:
    """A command line without secrets: `--hf_token X`, `--hf_token=X` and `HF_TOKEN=X` too."""
    shown, after = [], ""
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            shown.append(f"{name}={redacted(value, name)}" if _is_name(name) else redacted(word))
        else:
            shown.append(redacted(word, after))
        after = word if word.startswith("-") and not equals else ""
    return shown


def _is_name(text: str) -> bool:
    return re.fullmatch(r"-{0,2}[\w.-]+", text) is not None


def _without_secrets(text: str) -> str:
    def parameter(found: re.Match[str]) -> str:
        return f"{found[1]}={HIDDEN}" if is_secret_name(found[1]) else found[0]

    return _SECRET_PARAMETER.sub(parameter, _SECRET_TEXT.sub(HIDDEN, text))
