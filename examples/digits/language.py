"""Stage 2: a small Llama trained from scratch on the corpus. It never sees an image, and is frozen from here on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.digits.corpus import Document, DocumentMaker, all_words, load_facts
from examples.digits.tokenizer import SPECIALS, make_tokenizer

MAX_QUESTIONS = 8


@dataclass(frozen=True)
class LanguageOptions:
    """Size and training of the language model."""

    layers: int = 6
    width: int = 128
    heads: int = 4
    mlp_width: int = 256
    plain_steps: int = 200  # of bare facts, before
    steps: int = 420  # of full documents
    batch: int = 32
    rate: float = 1e-3


def cosine_rate(step: int, steps: int, warmup: int = 50) -> float:
    """Return the factor on the learning rate: linear warm-up, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the corpus."""
    return make_tokenizer(all_words(load_facts()))


def new_maker(tokenizer: PreTrainedTokenizerFast, seed: int) -> DocumentMaker:
    """Return a drawer of documents that uses `tokenizer`."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return DocumentMaker(load_facts(), encode, tokenizer.bos_token_id, list(range(len(SPECIALS), len(tokenizer))), seed)


def collate(documents: list[Document], pad: int) -> tuple[Int[Tensor, "n t"], Bool[Tensor, "n t"], Bool[Tensor, "n t"]]:
    """Pad documents on the right, where causal attention cannot see it. Returns ids, noise, learn."""
    longest = max(len(d.ids) for d in documents)
    ids = torch.full((len(documents), longest), pad)
    noise, learn = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for row, d in enumerate(documents):
        ids[row, : len(d.ids)] = torch.tensor(d.ids)
        noise[row, : len(d.ids)] = torch.tensor(d.noise)
        learn[row, : len(d.ids)] = torch.tensor(d.learn)
    return ids, noise, learn


def embed(
    model: LlamaForCausalLM, ids: Int[Tensor, "n t"], noise: Bool[Tensor, "n t"], generator: torch.Generator
) -> Float[Tensor, "n t d"]:
    """Return word embeddings, with Gaussian vectors of the words' own norm where `noise` says so."""
    words = model.get_input_embeddings().weight
    random = torch.randn(*ids.shape, words.shape[1], generator=generator) * words.detach().square().mean().sqrt()
    return torch.where(noise[..., None], random, words[ids])


def answer_logits(
    model: LlamaForCausalLM, embeddings: Float[Tensor, "n t d"], learn: Bool[Tensor, "n t"]
) -> Float[Tensor, "k v"]:
    """Return logits of the tokens marked in `learn`, each read one place before it."""
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, :-1][learn[:, 1:]])


def train_language(folder: Path, seed: int, options: LanguageOptions) -> dict[str, Any]:
    """Train the language model and save it with its tokenizer to `folder`; return its accuracy on fresh documents."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = new_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.width,
            intermediate_size=options.mlp_width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.heads,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )
    maker = new_maker(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    total = options.plain_steps + options.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_rate(step, total))
    bar = tqdm(range(total), desc=f"seed {seed}: language model")
    for step in bar:
        # One question count a batch, so that little of it is padding; every fourth batch is the study's own form.
        questions = 1 if step % 4 == 3 and step >= options.plain_steps else maker.random.randint(4, MAX_QUESTIONS)
        count = options.batch * 2 if questions == 1 else options.batch
        plain = step < options.plain_steps
        documents = [maker.document(questions, plain) for _ in range(count)]
        ids, noise, learn = collate(documents, tokenizer.pad_token_id)
        logits = answer_logits(model, embed(model, ids, noise, generator), learn)
        loss = torch.nn.functional.cross_entropy(logits, ids[learn])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return accuracy(model, tokenizer, seed + 1000)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, n: int = 1000) -> dict[str, float]:
    """Return the share of right first answer tokens on fresh documents of one question, by kind of question."""
    maker = new_maker(tokenizer, seed)
    generator = torch.Generator().manual_seed(seed)
    documents = [maker.document(1) for _ in range(n)]
    ids, noise, learn = collate(documents, tokenizer.pad_token_id)
    first = learn & (learn.cumsum(1) == 1)
    right = answer_logits(model, embed(model, ids, noise, generator), first).argmax(-1) == ids[first]
    kinds: dict[str, list[bool]] = {}
    for document, good in zip(documents, right.tolist(), strict=True):
        kinds.setdefault(document.kind, []).append(good)
    return {kind: sum(goods) / len(goods) for kind, goods in sorted(kinds.items())}
