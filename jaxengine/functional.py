"""The functional face: weights in, outputs out."""
from collections.abc import Sequence
from typing import Any

from jaxengine.admission import params_of, prompts_of
from jaxengine.config import KV_TILE, ModelConfig
from jaxengine.llm import LLM
from jaxengine.models.params import Decoder
from jaxengine.outputs import RequestOutputs
from jaxengine.request import SamplingParams
from jaxengine.tokenizer import Tokenizer


def generate(params: Decoder, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *, key: Any,
             config: ModelConfig, tokenizer: Tokenizer | None = None, **engine: Any) -> RequestOutputs:
    """Complete prompts under `params`. Nothing is kept but compiled code, which depends on shapes alone: calls with other weights
    of the same config, and with the same engine keywords, compile nothing.

    Prompts are lists of token ids, or text where a tokenizer is given. `key` is a typed JAX key; draws depend on it, on the index of the
    prompt and of the sample, and on the position. Engine keywords are EngineConfig's.
    """
    batch = prompts_of(prompts)
    params_of(sampling_params, len(batch))  # refused before an engine is built
    if not batch:
        return RequestOutputs()
    engine.setdefault("num_pages", 2 * (-(-_context(config, engine) // KV_TILE) * 4) + 1)
    return LLM.from_params(config, params, tokenizer=tokenizer, **engine).generate(batch, sampling_params, key=key)


def _context(config: ModelConfig, engine: dict[str, Any]) -> int:
    return engine.get("max_model_len") or config.max_position_embeddings
