"""Small random language models without a tower, BLIP-2 and InstructBLIP. Processors are built in code.

The tokens around a text (which one stands in front, which one pads, whether there is one at all) are each family's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
)

from tests.models.tiny import LAYERS, PATCH, QUERIES, SIDE, TEXTS, WIDTH, _unsettle

VOCABULARY, CONTEXT = 300, 256
Built = tuple[PreTrainedModel, PreTrainedTokenizerFast]

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def words(special: tuple[str, ...], template: str = "$A", **roles: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges. `special` have the first numbers; `template` is what it puts around a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    around = [token for token in template.split() if token != "$A"]
    if around:
        numbered = [(token, special.index(token)) for token in around]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbered)
    return PreTrainedTokenizerFast(tokenizer_object=core, **roles)


def llama() -> Built:
    return _plain(LlamaForCausalLM, LlamaConfig, _llama_words(INST), num_key_value_heads=2)


def mistral() -> Built:
    return _plain(MistralForCausalLM, MistralConfig, _llama_words(INST), num_key_value_heads=2, sliding_window=16)


def qwen2() -> Built:
    return _plain(Qwen2ForCausalLM, Qwen2Config, _qwen_words(), num_key_value_heads=2)


def qwen3() -> Built:
    return _plain(Qwen3ForCausalLM, Qwen3Config, _qwen_words(), num_key_value_heads=2, head_dim=16)


def gemma() -> Built:
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = words(special, "<bos> $A", pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")
    tokenizer.chat_template = TURNS
    return _plain(GemmaForCausalLM, GemmaConfig, tokenizer, num_key_value_heads=1, head_dim=16)


def phi3() -> Built:
    special = ("<unk>", "<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer = words(special, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<unk>")
    tokenizer.chat_template = PHI
    return _plain(Phi3ForCausalLM, Phi3Config, tokenizer, num_key_value_heads=2)


def gpt2() -> Built:
    """It has no token to pad with, and nothing stands in front of a text."""
    tokenizer = words(("<|endoftext|>",), bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return _plain(GPT2LMHeadModel, GPT2Config, tokenizer)


def gpt_neox() -> Built:
    tokenizer = words(
        ("<|endoftext|>", "<|padding|>"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|padding|>",
    )
    return _plain(GPTNeoXForCausalLM, GPTNeoXConfig, tokenizer)


def opt() -> Built:
    return _plain(OPTForCausalLM, OPTConfig, _opt_words(), ffn_dim=48, word_embed_proj_dim=WIDTH)


def blip2_opt() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _opt_words()
    return _blip2(tokenizer, _opt_config(tokenizer))


def blip2_t5() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _t5_words()
    return _blip2(tokenizer, _t5_config(tokenizer))


def instructblip_opt() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _opt_words()
    return _instructblip(tokenizer, _opt_config(tokenizer))


def instructblip_t5() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _t5_words()
    return _instructblip(tokenizer, _t5_config(tokenizer))


def _llama_words(template: str | None) -> PreTrainedTokenizerFast:
    special = ("<unk>", "<s>", "</s>", "<pad>")
    tokenizer = words(special, "<s> $A", unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def _qwen_words() -> PreTrainedTokenizerFast:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = words(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def _opt_words() -> PreTrainedTokenizerFast:
    special = ("<s>", "<pad>", "</s>", "<unk>")
    return words(special, "</s> $A", bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def _t5_words() -> PreTrainedTokenizerFast:
    special = ("<pad>", "</s>", "<unk>")
    return words(special, "$A </s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _qformer_words() -> PreTrainedTokenizerFast:
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    return words(special, "[CLS] $A [SEP]", pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def _tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def _sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY + 8,  # a few rows without a word, as real ones have
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        **_tokens(tokenizer),
    }


def _plain(
    kind: type[PreTrainedModel], config: type[PreTrainedConfig], tokenizer: PreTrainedTokenizerFast, **own: Any
) -> Built:
    torch.manual_seed(0)
    model = kind(config(**{**_sizes(tokenizer), **own}))
    return _ready(model, tokenizer), tokenizer


def _opt_config(tokenizer: PreTrainedTokenizerFast) -> OPTConfig:
    return OPTConfig(ffn_dim=48, word_embed_proj_dim=WIDTH, **_sizes(tokenizer))


def _t5_config(tokenizer: PreTrainedTokenizerFast) -> T5Config:
    return T5Config(
        vocab_size=VOCABULARY + 8,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=LAYERS,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,  # Flan-T5's; transformers reads it as "do not scale the decoder's output"
        initializer_factor=0.25,  # T5's weights are large as they are: amplified, attention would see one token only
        decoder_start_token_id=tokenizer.pad_token_id,
        **_tokens(tokenizer),
    )


def _vision_sizes() -> dict[str, Any]:
    return {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": 0.02,  # the default is 1e-10
    }


def _qformer_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": 24,
        "cross_attention_frequency": 2,
        "max_position_embeddings": CONTEXT,
    }


def _blip2(tokenizer: PreTrainedTokenizerFast, text: PreTrainedConfig) -> tuple[PreTrainedModel, ProcessorMixin]:
    torch.manual_seed(0)
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = Blip2Processor(images, tokenizer, num_query_tokens=QUERIES)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**_vision_sizes()).to_dict(),
        qformer_config=Blip2QFormerConfig(**_qformer_sizes()).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _ready(Blip2ForConditionalGeneration(config), tokenizer), processor


def _instructblip(tokenizer: PreTrainedTokenizerFast, text: PreTrainedConfig) -> tuple[PreTrainedModel, ProcessorMixin]:
    torch.manual_seed(0)
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = InstructBlipProcessor(images, tokenizer, _qformer_words(), num_query_tokens=QUERIES)
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**_vision_sizes()).to_dict(),
        qformer_config=InstructBlipQFormerConfig(**_qformer_sizes()).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _ready(InstructBlipForConditionalGeneration(config), tokenizer), processor


def _ready(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    language = getattr(model, "language_model", model)
    if language.config.model_type == "t5":
        # transformers ties it in any T5 that was made from a configuration; loading Flan-T5's weights unties it.
        language.lm_head.weight = nn.Parameter(torch.randn_like(language.lm_head.weight) * 0.05)
    _unsettle(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):  # GPT-2's are not called norms
                module.weight.uniform_(0.25, 2.25)
                module.bias.normal_()
            elif getattr(module, "bias", None) is not None:
                module.bias.normal_(std=0.1)  # biases start from zero, where none can be missed
        for name, weight in model.named_parameters():
            # Attention that is nearly even would make all pictures the same mean of patches.
            if name.startswith(("vision_model", "qformer")) and weight.ndim > 1:
                weight.mul_(4.0)
    tokens = {name: number for name, number in _tokens(tokenizer).items() if number is not None}
    start = getattr(language.config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(**tokens, **({} if start is None else {"decoder_start_token_id": start}))
    # BLIP-2's `generate` asks its language model's own.
    language.generation_config = model.generation_config
    return model.eval()


BUILDERS: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "llama-llama": llama,
    "mistral-mistral": mistral,
    "qwen2-qwen2": qwen2,
    "qwen3-qwen3": qwen3,
    "gemma-gemma": gemma,
    "phi3-phi3": phi3,
    "gpt2-gpt2": gpt2,
    "gpt_neox-gpt_neox": gpt_neox,
    "opt-opt": opt,
    "blip2-opt": blip2_opt,
    "blip2_t5-t5": blip2_t5,
    "instructblip_opt-opt": instructblip_opt,
    "instructblip_t5-t5": instructblip_t5,
}
