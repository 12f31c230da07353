"""Prompts for pipelines that bring their own tokenizers: nothing is tokenized here, only checked."""

from __future__ import annotations

from pathlib import Path

from safelight.configs.families.base import ModelSpec
from safelight.runtime.text.clean import check_unicode


class RawPrompts:
    """The worker's pipeline reads the prompts as they were written."""

    def encode_request(
        self, prompt: str, negative_prompt: str, sizes: tuple[tuple[int, int], ...] = ()
    ) -> dict[str, tuple[int, ...]]:
        """No ids. Raises InvalidRequest for text that is not valid Unicode."""
        check_unicode(prompt, "prompt")
        check_unicode(negative_prompt, "negative_prompt")
        return {}


def load_tokenizer(root: Path, spec: ModelSpec) -> RawPrompts:
    """Needs no file of the model."""
    return RawPrompts()
