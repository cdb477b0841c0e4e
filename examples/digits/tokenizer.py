"""The word-level tokenizer that the language model and the Q-Former share; it knows the corpus and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = Regex(r"###|\w+(?:-\w+)*|[^\w\s]")


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose vocabulary is the special tokens and the words of `texts` in order of appearance.

    Words are lower-cased, accents and hyphens are kept, `###` is one token, `<s>` is put in front.
    """
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(WORDS, behavior="isolated")]
    )
    vocabulary = {token: number for number, token in enumerate(SPECIALS)}
    for text in texts:
        for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text)):
            vocabulary.setdefault(word, len(vocabulary))
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizer, split
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return wrap(core)


def wrap(core: Tokenizer, **settings: object) -> PreTrainedTokenizerFast:
    """Return the Hugging Face form of a tokenizer, with further `settings` such as the padding side."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(core.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        **settings,
    )
