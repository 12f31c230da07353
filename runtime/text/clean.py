"""Prompt cleaning as the reference pipelines do it, without torch."""

from __future__ import annotations

import html
import re

import ftfy

from safelight.runtime.errors import InvalidRequest

_WHITESPACE = re.compile(r"\s+")


def clean_prompt(text: str, param: str = "prompt") -> str:
    """Repairs mojibake (ftfy), unescapes HTML entities twice, makes every run of whitespace one space.

    Follows diffusers' `prompt_clean` of the Wan pipelines. Raises InvalidRequest naming `param` for text that is not
    valid Unicode (lone surrogates cannot be sent to any other process).
    """
    check_unicode(text, param)
    unescaped = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _WHITESPACE.sub(" ", unescaped.strip()).strip()


def check_unicode(text: str, param: str) -> None:
    """Raises InvalidRequest naming `param` for a lone surrogate, which no other process could be sent."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} has a lone surrogate at character {error.start}; valid Unicode text is needed", param=param
        ) from error
