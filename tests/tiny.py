"""Tiny random models of every supported family, built in-process: three blocks, widths of a few dozen, a byte-level tokenizer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 288
_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_TOKENS = {name: _COMMON[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {
        **_GROUPED,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
        **_TOKENS,
    },
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **_TOKENS},
    "gpt_neox": _COMMON,
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **_TOKENS},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, **_TOKENS},
    "starcoder2": _GROUPED,
    "stablelm": _GROUPED,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**_GROUPED, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
}


def make_config(family: str, **changes: Any) -> Any:
    """The family's tiny config, with `changes` laid over it."""
    return AutoConfig.for_model(family, **{**{**FAMILIES, **EXPERTS}[family], **changes})


def make_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model in eval mode. Vectors (norms, biases) are random too, so that none of them can be forgotten unnoticed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)  # the default initialisation is so small that blocks barely change their inputs
    return model.to(dtype)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and beginning, end and padding tokens. It adds none of them by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a chat template, which wants a system message first or nowhere."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
        "{{ raise_exception('system comes first') }}{% endif %}"
        "{{ bos_token + message.role + '\n' + message.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
    )
    return tokenizer


def readable(model: PreTrainedModel) -> PreTrainedModel:
    """A Llama that, greedy, writes printable ASCII alone: no other token has a logit above 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = [token for token in range(VOCABULARY) if token >= 256 or not " " < alphabet[token] <= "~"]
    with torch.no_grad():
        model.lm_head.weight[others] = 0
    return model


def save_model(folder: Path, family: str = "llama", *, shard: str = "5GB", **options: Any) -> PreTrainedModel:
    """Save a tiny model and its tokenizer into `folder`; returns the model."""
    model = make_model(family, **options)
    model.save_pretrained(folder, max_shard_size=shard)
    make_tokenizer().save_pretrained(folder)
    return model


def save_sparse(folder: Path, family: str = "llama", **options: Any) -> PreTrainedModel:
    """Save a tiny model, about half of the entries of its matrices zeros at random, and its tokenizer; returns the model."""
    model = make_model(family, **options)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.masked_fill_(
                    torch.rand(parameter.shape, generator=draw) > 0.5, 0
                )  # a product would make some -0
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def two_four(model: PreTrainedModel, skip: str = "nothing") -> PreTrainedModel:
    """A Llama with two zeros in every four inputs of its blocks' linears, those called `skip` left out."""
    with torch.no_grad():
        for name, parameter in model.model.layers.named_parameters():
            if parameter.ndim == 2 and skip not in name:
                groups = parameter.view(len(parameter), -1, 4)
                groups.scatter_(2, groups.abs().argsort(dim=2)[..., :2], 0)
    return model


def make_text(words: int = 3000, seed: int = 0) -> str:
    """Prose-like nonsense, the same on every machine."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(200)]
    return " ".join(draw.choice(lexicon) for _ in range(words))
