"""Prompts of Qwen-Image: a chat template around the text, as token ids of Qwen2's byte-level BPE.

Templates are those that the models were trained with (diffusers' QwenImagePipeline, QwenImageEditPipeline and
QwenImageEditPlusPipeline carry the same). The first `drop` tokens' embeddings are not read by the transformer, so they
count for nothing here. Each picture to edit stands in the text as one placeholder, repeated once for each of its
tokens; how many these are follows from its size, so no pixel is needed (`configs/families/qwen_pictures.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tokenizers import Tokenizer as Backend

from safelight.configs.families.base import ModelSpec
from safelight.configs.families.qwen_costs import MAX_EDIT_TEXT, MAX_TEXT, TEMPLATE_TOKENS
from safelight.configs.families.qwen_pictures import EDIT_RULES, MAX_RATIO, EditRule, Patches, Size, fitted
from safelight.runtime.errors import InvalidRequest, ModelError
from safelight.runtime.text.bpe import load_qwen2_bpe
from safelight.runtime.text.clean import check_unicode

_LOG = logging.getLogger(__name__)
PLACEHOLDER = "<|image_pad|>"
_CHAT = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{pictures}{text}<|im_end|>\n<|im_start|>assistant\n"
_DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
_ALTER = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
_PICTURE = f"<|vision_start|>{PLACEHOLDER}<|vision_end|>"


@dataclass(frozen=True, slots=True)
class Template:
    """`drop`: tokens before the user's part in Qwen2's vocabulary; `picture`: the text of the picture {number}."""

    system: str
    drop: int
    picture: str = ""

    def text(self, prompt: str, pictures: int) -> str:
        shown = "".join(self.picture.format(number=number) for number in range(1, pictures + 1))
        return _CHAT.format(system=self.system, pictures=shown, text=prompt)


# By the most pictures that a model takes.
TEMPLATES: Mapping[int, Template] = MappingProxyType(
    {
        0: Template(_DESCRIBE, TEMPLATE_TOKENS[0]),
        1: Template(_ALTER, TEMPLATE_TOKENS[1], _PICTURE),
        3: Template(_ALTER, TEMPLATE_TOKENS[3], "Picture {number}: " + _PICTURE),
    }
)


@dataclass(frozen=True, slots=True)
class QwenTokenizer:
    """`rule` and `patches` are None for a model that takes no pictures."""

    backend: Backend
    template: Template
    placeholder: int
    rule: EditRule | None = None
    patches: Patches | None = None

    def encode_request(
        self, prompt: str, negative_prompt: str, sizes: tuple[Size, ...] = ()
    ) -> dict[str, tuple[int, ...]]:
        """The `token_ids` of a GenerationRequest with pictures of `sizes`, the template's dropped tokens included.

        Raises InvalidRequest: text that is not valid Unicode or holds a placeholder, too much of it, or a picture of
        an extreme shape.
        """
        return {
            "prompt": self.encode(prompt, sizes),
            "negative": self.encode(negative_prompt, sizes, "negative_prompt"),
        }

    def encode(self, text: str, sizes: tuple[Size, ...] = (), param: str = "prompt") -> tuple[int, ...]:
        """Ids without padding. A prompt without pictures is cut as in the reference, with a warning."""
        check_unicode(text, param)
        ids = self.backend.encode(self.template.text(text, len(sizes))).ids
        if self.rule is None:
            most = self.template.drop + MAX_TEXT
            if len(ids) > most:
                _LOG.warning("%s is longer than %d tokens: the model reads its beginning only", param, MAX_TEXT)
            return tuple(ids[:most])
        if ids.count(self.placeholder) != len(sizes):
            raise InvalidRequest(
                f"{param} must not hold {PLACEHOLDER}: pictures come with image_path (images in the API)", param=param
            )
        counts = iter([self._tokens_of(size) for size in sizes])
        whole = [one for i in ids for one in ([i] * next(counts) if i == self.placeholder else [i])]
        if len(whole) - self.template.drop > MAX_EDIT_TEXT:
            raise InvalidRequest(
                f"{param}: at most {MAX_EDIT_TEXT} tokens with its pictures expected, got "
                f"{len(whole) - self.template.drop}; use a shorter text",
                param=param,
            )
        return tuple(whole)

    def _tokens_of(self, size: Size) -> int:
        """Of a picture as the text encoder sees it."""
        assert self.rule is not None, "this model takes pictures"
        assert self.patches is not None, "this model takes pictures"
        if max(size) > MAX_RATIO * min(size):
            raise InvalidRequest(
                f"a picture whose sides differ by at most {MAX_RATIO} times expected, got {size[0]}x{size[1]}",
                param="image_path",
            )
        rows, columns = self.patches.grid(fitted(size, self.rule.seen_area))
        return rows * columns


def load_tokenizer(root: Path, spec: ModelSpec) -> QwenTokenizer:
    """The tokenizer of the model directory `root`. Raises ModelError: missing, unreadable, or without a special token
    of the template."""
    path = root / "tokenizer"
    backend = load_qwen2_bpe(path)
    tokens = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", PLACEHOLDER)
    ids = {token: backend.token_to_id(token) for token in tokens}
    if missing := [token for token, one in ids.items() if one is None]:
        raise ModelError(f"{path} has no token {missing[0]}; a Qwen2.5-VL tokenizer is needed", param="model_path")
    most, placeholder = spec.images[1], int(ids[PLACEHOLDER] or 0)
    if not most:
        return QwenTokenizer(backend, TEMPLATES[0], placeholder)
    return QwenTokenizer(backend, TEMPLATES[most], placeholder, EDIT_RULES[most], Patches.of(spec.processor))
