"""Where a model folder says how to draw: end tokens in several places, and sampling defaults of its own."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checkpoints.model_folder import GENERATION_FILE, read_generation_config
from jaxengine.base.arguments import flag, integer
from jaxengine.sampling_params import SamplingParams

log = logging.getLogger("jaxengine")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
DRAWING = ("temperature", "top_k", "top_p", "min_p")  # what a folder with do_sample false leaves unused


def end_tokens(hf: dict[str, Any]) -> tuple[int, ...]:
    """The end tokens that config.json or generation_config.json names, in its text_config too.

    One or a list; null and an empty list say nothing. Raises ValueError for what is no token id.
    """
    said = [place.get("eos_token_id") for place in (hf, hf.get("text_config")) if isinstance(place, dict)]
    lists = [value if isinstance(value, list) else [value] for value in said if value is not None]
    return _unique(integer("eos_token_id", token, 0) for tokens in lists for token in tokens)


def stop_set(vocab_size: int, sources: Iterable[tuple[str, Iterable[int]]]) -> tuple[int, ...]:
    """The union of the end tokens that each source names, in this order, as in vLLM.

    A token outside the vocabulary is never drawn: it is left out, and logged with its source.
    """
    named = [(where, token) for where, tokens in sources for token in tokens]
    for where, token in named:
        if token >= vocab_size:
            log.warning(
                "%s names end token %d, which the vocabulary 0 … %d has not: no sample ends with it",
                where,
                token,
                vocab_size - 1,
            )
    return _unique(token for _, token in named if token < vocab_size)


def sampling_defaults(folder: str | os.PathLike[str]) -> SamplingParams:
    """The parameters that generation_config.json recommends; what it leaves out is SamplingParams' own default.

    As in vLLM, `max_new_tokens` is `max_tokens`. Unlike there, `do_sample: false` means temperature 0, as in
    transformers. Raises ValueError naming the file for a value that SamplingParams refuses.
    """
    path = Path(folder) / GENERATION_FILE
    generation = {key: value for key, value in read_generation_config(folder).items() if value is not None}
    try:
        is_greedy = not flag("do_sample", generation.get("do_sample", True))
        kept = PENALTIES if is_greedy else (*PENALTIES, *DRAWING)
        said = {key: generation[key] for key in kept if key in generation}
        if is_greedy:
            said["temperature"] = 0.0
        if "max_new_tokens" in generation:
            said["max_tokens"] = integer("max_new_tokens", generation["max_new_tokens"], 1)
        return SamplingParams(**said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def log_defaults_not_taken(folder: str | os.PathLike[str]) -> None:
    """Log what generation_config.json recommends, for a call that said nothing and draws with SamplingParams().

    Nothing where that is the same. A value that cannot be meant is an error of whoever asks for it.
    """
    with contextlib.suppress(ValueError):
        recommended, plain = dataclasses.asdict(sampling_defaults(folder)), dataclasses.asdict(SamplingParams())
        others = [f"{name}={value!r}" for name, value in recommended.items() if value != plain[name]]
        if others:
            log.warning(
                "%s recommends %s. Without sampling_params a call draws from the model's own distribution, where vLLM "
                "takes what the folder recommends: give sampling_params=llm.get_default_sampling_params() for that, or "
                "SamplingParams(). This LLM says so once.",
                Path(folder) / GENERATION_FILE,
                ", ".join(others),
            )


def _unique(tokens: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(tokens))
