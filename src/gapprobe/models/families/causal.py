"""Language models without a tower: what a vision-language model's own text tower can be compared with."""

from gapprobe.models.families.base import Family


def _row(name: str, architecture: str, blocks: str, final_norm: str, *parts: str) -> Family:
    middle, attention, mlp = parts or (Family.middle, Family.attention, Family.mlp)
    return Family(
        name=name,
        architectures=(architecture,),
        language_models=(name,),
        modality="text",
        blocks=blocks,
        final_norm=final_norm,
        unembedding="lm_head",
        middle=middle,
        attention=attention,
        mlp=mlp,
        placeholder="",
        prompt="{text}",
        processor_parts=(),  # the tokenizer is all there is
    )


FAMILIES = (
    _row("llama", "LlamaForCausalLM", "model.layers", "model.norm"),
    _row("mistral", "MistralForCausalLM", "model.layers", "model.norm"),
    _row("qwen2", "Qwen2ForCausalLM", "model.layers", "model.norm"),
    _row("qwen3", "Qwen3ForCausalLM", "model.layers", "model.norm"),
    _row("gemma", "GemmaForCausalLM", "model.layers", "model.norm"),
    _row("phi3", "Phi3ForCausalLM", "model.layers", "model.norm"),
    _row("gpt2", "GPT2LMHeadModel", "transformer.h", "transformer.ln_f", "ln_2", "attn", "mlp"),
    _row("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers", "gpt_neox.final_layer_norm", "", "attention", "mlp"),
    _row(
        "opt",
        "OPTForCausalLM",
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        "final_layer_norm",
        "self_attn",
        "fc2",
    ),
)
