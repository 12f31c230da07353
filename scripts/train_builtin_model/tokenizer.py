"""The tokenizer: one piece per known word, single characters for all else, case folded.

A T5 tokenizer whose Unigram vocabulary is written down rather than trained. Folding of case travels in the
precompiled character map that the T5 format has room for, so that tokenizer.json alone gives the same ids.
"""

from __future__ import annotations

import io
import re
import string
import tempfile
from pathlib import Path

from transformers import T5Tokenizer

from train_builtin_model import captions
from train_builtin_model.vocab import BACKGROUND_SYNONYMS, BACKGROUNDS, RECOLOURS, Vocabulary

WORD_SCORE, CHARACTER_SCORE, START_SCORE, UNKNOWN_SCORE = -5.0, -10.0, -8.0, -20.0


def vocabulary_words(vocabulary: Vocabulary) -> list[str]:
    """All words of the captions, sorted."""
    texts = [*BACKGROUNDS, *RECOLOURS, "brown"]
    texts += [name for names in BACKGROUND_SYNONYMS.values() for name in names]
    for subject in vocabulary.subjects:
        texts += [subject.noun, subject.plural, *subject.synonyms]
    found = set(re.findall(r"[^\s,.]+", " ".join(texts).lower()))
    return sorted(found | captions.all_words())


def case_folding_map() -> bytes:
    """A sentencepiece character map that sends A-Z to a-z and keeps all else."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "rules.tsv"
        rules.write_text("".join(f"{ord(c):X}\t{ord(c.lower()):X}\n" for c in string.ascii_uppercase))
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([string.ascii_lowercase] * 20), model_writer=out, vocab_size=30,
            model_type="unigram",
            normalization_rule_tsv=str(rules), hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(out.getvalue())
    return bytes(model.normalizer_spec.precompiled_charsmap)


def build_tokenizer(vocabulary: Vocabulary) -> T5Tokenizer:
    """<pad> 0, </s> 1, <unk> 2, the bare word start, words, characters."""
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", UNKNOWN_SCORE), ("\u2581", START_SCORE)]
    pieces += [("\u2581" + word, WORD_SCORE) for word in vocabulary_words(vocabulary)]
    characters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    pieces += [(c, CHARACTER_SCORE) for c in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, _spm_precompiled_charsmap=case_folding_map(), model_max_length=512)
