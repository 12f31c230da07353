"""Prompt cleaning and tokenization against the reference, and their independence from torch."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from safelight.configs.families.base import ModelSpec
from safelight.runtime.errors import InvalidRequest, ModelError
from safelight.runtime.text.clean import clean_prompt
from safelight.runtime.text.t5 import MAX_TOKENS, T5Tokenizer, load_tokenizer

SPEC = ModelSpec("wan", "custom", Path(), "text-to-video", defaults=None)  # type: ignore[arg-type]
_WORDS = "a the cat dog red blue house on in of and big small 猫 日本 привет שלום سلام é ñ ß"
WORDS = tuple(_WORDS.split())


def fixed_prompts() -> list[str]:
    return [
        "", " ", "\n\t\r", "a",
        "a cat", "  two   spaces\tand\ttabs\n", "\x00", "a\x00b", "\x01\x02\x1b[31mred\x07",
        "\u200b\u200d\ufeff", "\u00a0nbsp\u00a0",
        "\u3000wide\u3000space", "\x1c\x1d\x1e\x1f", "\x85next\u2028line\u2029",
        "😀", "👨‍👩‍👧‍👦 family", "🏳️‍🌈", "e\u0301 composed", "é",
        "ﬁ ligature", "Å Å Å", "①②③", "Ⅷ", "½",
        "שלום עולם", "مرحبا بالعالم", "\u202eRTL override\u202c", "日本語の猫",
        "猫", "ภาษาไทย", "हिन्दी", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
        "&amp;", "&amp;amp;", "&amp;amp;amp;", "&lt;b&gt;",
        "&nbsp;&nbsp;", "&#x41;&#66;", "&#0;", "&#xD800;", "&#x110000;",
        "&notanentity;", "&", "&&", "&amp", "<b>bold</b>",
        "a & b", "schÃ¶n", "âœ” No problems", "l’humanitÃ©", "Â£5",
        "</s>", "<pad>", "<unk>", "a </s> b", "</s></s></s>",
        "<extra_id_0>", "▁", "a▁b", "▁▁▁", "<0x41>", "[MASK]",
        "“quotes” ‘single’ «guillemets»", "…", "—",
        "--", "'; DROP TABLE jobs; --", "${jndi:ldap://x}", "../../etc/passwd",
        "%s%n%x", "{0.__class__}", "\\x41\\u0041", "\\", "\"",
        "`rm -rf`", "a" * 5000, "a " * 2000, "猫" * 700, " " * 9000,
        "a " * 511, "a " * 510, "a " * 512, "\u0301" * 300,
        "😀" * 600, "\U0010ffff", "\ufffd", "\ufffe", "A\u030a\u0323",
        "x\u0000\u0000y", "tab\tend\t", "\r\n", "end.",
        "UPPER lower", "123 456", "1e-6", "http://a.b/c?d=e&amp;f=g#h",
    ]  # fmt: skip


def random_prompts(count: int) -> list[str]:
    """Words, entities and code points from everywhere (no surrogates), with strange whitespace between them."""
    rng = random.Random(5)
    spaces = [" ", "  ", "\t", "\n", "\u00a0", "\u2003", "\u200b", ""]
    pieces = [*WORDS, "&amp;", "&lt;", "&#39;", "Ã©", "</s>", "▁", "😀", "\x00", "\x7f", "\u0301"]

    def piece() -> str:
        if rng.random() < 0.7:
            return rng.choice(pieces)
        point = rng.choice(
            (rng.randrange(0x20, 0x3000), rng.randrange(0x3000, 0xD800), rng.randrange(0xE000, 0x110000))
        )
        return chr(point)

    return ["".join(piece() + rng.choice(spaces) for _ in range(rng.randrange(1, 60))) for _ in range(count)]


PROMPTS = [*fixed_prompts(), *random_prompts(140)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 tokenizer as transformers saves it: a unigram model over letters and pieces of words."""
    from transformers import T5Tokenizer as Reference

    letters = sorted({c for word in WORDS for c in word} | {chr(c) for c in range(33, 127)} | set("▁é—…"))
    pieces = [("▁" + word, -4.0 - len(word) / 10) for word in WORDS]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((c, -6.0) for c in letters), *pieces]
    path = tmp_path_factory.mktemp("t5")
    Reference(vocab=vocab, extra_ids=4, model_max_length=512).save_pretrained(path / "tokenizer")
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> T5Tokenizer:
    return load_tokenizer(folder, SPEC)


def reference_ids(backend: Any, prompt: str) -> tuple[int, ...]:
    """What WanPipeline._get_t5_prompt_embeds keeps: the ids under the attention mask."""
    prompt_clean: Callable[[str], str] = import_module("diffusers.pipelines.wan.pipeline_wan").prompt_clean

    encoded = backend(
        [prompt_clean(prompt)],
        padding="max_length",
        max_length=512,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
    )
    return tuple(encoded.input_ids[0][: sum(encoded.attention_mask[0])])


def test_ids_equal_the_reference_on_hostile_prompts(folder: Path, tokenizer: T5Tokenizer) -> None:
    from transformers import T5Tokenizer as Reference

    backend = Reference.from_pretrained(folder / "tokenizer")
    assert len(PROMPTS) >= 200
    seen = set()
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        assert ids == reference_ids(backend, prompt), repr(prompt)
        assert ids[-1] == 1
        assert len(ids) <= MAX_TOKENS
        seen.add(ids)
    assert len(seen) > 150


def test_cleaning_equals_the_reference() -> None:
    prompt_clean: Callable[[str], str] = import_module("diffusers.pipelines.wan.pipeline_wan").prompt_clean

    for prompt in PROMPTS:
        assert clean_prompt(prompt) == prompt_clean(prompt), repr(prompt)


def test_a_trained_tokenizer_with_a_normalizer_is_read_as_its_file_says(tmp_path: Path) -> None:
    """Another layout of tokenizer.json: normalizer, Metaspace alone, pieces learned from text."""
    transformers: Any = import_module("transformers")
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([" ".join(WORDS[n:]) for n in range(len(WORDS))], trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    ours = load_tokenizer(tmp_path, SPEC)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer" / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    for prompt in PROMPTS:
        assert ours.encode(prompt) == reference_ids(theirs, prompt), repr(prompt)


def test_a_request_has_both_prompts(tokenizer: T5Tokenizer) -> None:
    ids = tokenizer.encode_request("a cat", "")
    assert ids == {"prompt": tokenizer.encode("a cat"), "negative": (1,)}


@pytest.mark.parametrize("text", ["\ud800", "a cat \udfff"])
def test_lone_surrogates_are_refused_by_name(tokenizer: T5Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        tokenizer.encode_request("a cat", text)
    assert caught.value.param == "negative_prompt"
    with pytest.raises(InvalidRequest, match="prompt"):
        tokenizer.encode_request(text, "")


def test_cutting_a_long_prompt_is_said_once(tokenizer: T5Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(tokenizer.encode("a " * 511)) == MAX_TOKENS
        assert not caplog.records
        assert len(tokenizer.encode("a " * 512)) == MAX_TOKENS
    assert [r.getMessage() for r in caplog.records] == [
        "prompt is longer than 512 tokens: the model reads its beginning only"
    ]


@pytest.mark.parametrize("content", [None, "", "not json", "{}", '{"version": "1.0"}', "\ufeff"])
def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "tokenizer").mkdir()
    if content is not None:
        (tmp_path / "tokenizer" / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path, SPEC)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    with pytest.raises(ModelError, match="T5"):
        load_tokenizer(tmp_path, SPEC)


def test_text_and_families_import_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from safelight.configs.families import FAMILIES\n"
        "from safelight.runtime.text.t5 import load_tokenizer\n"
        f"from safelight.configs.families.base import ModelSpec\n"
        f"spec = ModelSpec('wan', 'custom', Path(), '', None)\n"
        f"load_tokenizer(Path({str(folder)!r}), spec).encode_request('a cat &amp; dog', '')\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
