"""The model that ships as "calc": its configuration, its tokenizer and its chat template."""

import json
from pathlib import Path

import tokenizers

from jaxengine.config import ModelConfig

PAD, START, END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=256 + len(SPECIAL_TOKENS),
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    qk_norm=True,
    eos_token_ids=(256 + SPECIAL_TOKENS.index(END),),
)


def build_tokenizer() -> tokenizers.Tokenizer:
    """One token for each byte, and the special tokens: every text can be encoded, and each digit is a token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def chat_prompt(content: str) -> str:
    """What the chat template makes of one user message."""
    return f"{START}user\n{content}{END}\n{START}assistant\n"


def write_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template, as transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG.max_position_embeddings,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 1.0,
            "eos_token_id": tokenizer.token_to_id(END),
            "pad_token_id": tokenizer.token_to_id(PAD),
        },
    )


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
