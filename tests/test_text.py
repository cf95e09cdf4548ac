"""Texts of the user: what a line can hold, and what is a folder."""

from pathlib import Path

import pytest

from potstill.text import fits_a_line, means_a_folder


@pytest.mark.parametrize("text", ["می\u200cخواهم.txt", "10\u202f000 mots", "日本", "a b", "é"])
def test_names_of_any_language_fit_a_line(text: str) -> None:
    assert fits_a_line(text)


@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "\x00", "\x85", "\u2028", "\udcff"])
def test_what_breaks_a_line_or_is_no_utf8_does_not(text: str) -> None:
    assert not fits_a_line(text)


def test_only_one_slash_can_be_a_name_on_the_hub() -> None:
    assert not means_a_folder("bert-base-uncased") and not means_a_folder("owner/name")
    assert all(map(means_a_folder, ("./x", "/x", "~/x", "a/b/c", Path("owner/name"))))
