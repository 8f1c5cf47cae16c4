"""Writes a Qwen3 of a Hugging Face folder as the one file that llama.cpp opens; needs the package `gguf`.

Without safetensors beside config.json the weights are random, normal with a deviation of 0.02, and norms are one.
"""

import json
import pathlib
from collections.abc import Iterator

import gguf
import numpy as np

TYPES = {
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "float16": gguf.GGMLQuantizationType.F16,
    "float32": gguf.GGMLQuantizationType.F32,
}
SAFETENSORS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def write(folder: str, dtype: str, path: str) -> None:
    """Matrices in `dtype`, norms in float32, which llama.cpp wants them in; no tokenizer.

    Raises ValueError for another architecture, and for a RoPE that is scaled.
    """
    config = json.loads(pathlib.Path(folder, "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3")
    add_config(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    for name, array in read(files) if files else random_weights(config):
        own = names.get_name(name, try_suffixes=(".weight",))
        if own is None:
            raise ValueError(f"{name} has no name in llama.cpp's Qwen3")
        if array.ndim == 1:
            writer.add_tensor(own, array)
        else:
            writer.add_tensor(own, as_bytes(array, dtype), raw_dtype=TYPES[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_config(writer: gguf.GGUFWriter, config: dict) -> None:
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if config["architectures"] != ["Qwen3ForCausalLM"] or rope.get("rope_type", "default") != "default":
        raise ValueError(f"only a Qwen3 whose RoPE is not scaled is written, got {config['architectures']} and {rope}")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def read(files: list[pathlib.Path]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32) of all tensors; the format is at https://huggingface.co/docs/safetensors."""
    for file in files:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        body = np.memmap(file, np.uint8, "r", offset=8 + length)
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                yield name, as_float32(body[start:stop], SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])


def random_weights(config: dict) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    d, f, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = h * config["num_attention_heads"], h * config["num_key_value_heads"]
    layer = {"input_layernorm": [d], "post_attention_layernorm": [d], "self_attn.q_norm": [h], "self_attn.k_norm": [h]}
    layer |= {"self_attn.q_proj": [q, d], "self_attn.k_proj": [kv, d], "self_attn.v_proj": [kv, d]}
    layer |= {"self_attn.o_proj": [d, q], "mlp.gate_proj": [f, d], "mlp.up_proj": [f, d], "mlp.down_proj": [d, f]}
    shapes = {"model.embed_tokens": [config["vocab_size"], d], "model.norm": [d]}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = [config["vocab_size"], d]
    for name, shape in shapes.items():
        is_norm = len(shape) == 1
        array = np.ones(shape, np.float32) if is_norm else 0.02 * rng.standard_normal(shape, np.float32)
        yield f"{name}.weight", array


def as_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


def as_bytes(array: np.ndarray, dtype: str) -> np.ndarray:
    """The last axis as bytes; to bfloat16 by rounding to even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)
    return array.astype(dtype).view(np.uint8)
