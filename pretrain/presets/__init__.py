"""Papers' recipes: one JSON file each, and how such a file is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.errors import InputError
from pretrain.options import check_text, read_object, typed

PRESETS = Path(__file__).parent


def read_preset(name_or_file: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a preset: `{"about": …, "extends": NAME, "settings": {flag: value}}`.

    `extends`, which may be left out, names a preset whose settings stand under its own.

    Args:
        kinds: the types of all flags, by name.

    Raises:
        InputError: no such preset, malformed, keys that are no flags, or values of another type.
    """
    check_text("preset", name_or_file)
    path, ready = Path(name_or_file), sorted(p.stem for p in PRESETS.glob("*.json"))
    if name_or_file in ready:
        path = PRESETS / f"{name_or_file}.json"
    elif path.suffix != ".json" or not path.is_file():
        raise InputError(
            f"--preset {name_or_file}: not found; presets are {', '.join(ready)}, or give a file"
        )
    preset = read_object(path, "--preset", '{"about": …, "settings": {…}}')
    settings, base = preset.get("settings"), preset.get("extends")
    if not isinstance(settings, dict):
        raise InputError(f'--preset {path}: not a preset; it must have "settings": {{…}}')
    known = set(kinds) - {"preset", "local_rank"}
    if unknown := (set(settings) - known) | (set(preset) - {"about", "extends", "settings"}):
        raise InputError(f"--preset {path}: unknown settings {', '.join(sorted(unknown))}")
    if base is not None and base not in ready:
        raise InputError(f"--preset {path}: extends {base!r}, which is no preset of Potstill")
    own = {n: typed(f"--preset {path}: {n}", value, kinds[n]) for n, value in settings.items()}
    return (read_preset(base, kinds) if base else {}) | own
