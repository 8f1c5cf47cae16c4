"""What the rows of a step ask for: the host picks the step that is compiled for it (engine/step_variants.py).

What nobody in a step asks for is not in its program, where it would change no bit.
"""

import enum

from jaxengine.sampling_params import SamplingParams


class Needs(enum.IntEnum):
    """Each includes those before it."""

    PLAIN = 0  # a token of softmax(logits / temperature) or the likeliest one, and its logprob
    CUT = 1  # top-k, top-p, min-p
    ALL = 2  # token rules, grammars, min_tokens, penalties; likeliest tokens, raw logprobs, entropies

    def __str__(self) -> str:
        return ("", " with top-k and top-p", " with all that can be asked")[self]


def needs_of(sampling: SamplingParams) -> Needs:
    """What a request with these parameters asks for."""
    may_stop_early = sampling.min_tokens and (sampling.stop_token_ids or not sampling.ignore_eos)
    changes = sampling.has_token_rules or sampling.structure or may_stop_early or sampling.has_penalties
    told = sampling.tells_logprobs or sampling.prompt_logprobs is not None
    if changes or told or sampling.raw_logprobs or sampling.entropy:
        return Needs.ALL
    is_cut = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    return Needs.CUT if is_cut and not sampling.greedy else Needs.PLAIN
