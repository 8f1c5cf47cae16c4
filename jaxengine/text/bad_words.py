"""Bad words as token ids."""

from jaxengine.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingParams
from jaxengine.text.tokenizer import Tokenizer


def with_token_ids(sampling: SamplingParams, tokenizer: Tokenizer | None, where: str) -> SamplingParams:
    """The parameters with their `bad_words` among their `bad_words_token_ids`.

    A word is ruled out as it stands at the beginning of a text and after a space, as in vLLM. Raises ValueError, naming
    the word and `where` it was given, for one without tokens and for one with too many, and where there is no
    tokenizer.
    """
    if not sampling.bad_words:
        return sampling
    if tokenizer is None:
        raise ValueError(f"{where} has bad_words, but the model has no tokenizer: use bad_words_token_ids")
    found = dict.fromkeys(sampling.bad_words_token_ids)
    for index, word in enumerate(sampling.bad_words):
        found |= dict.fromkeys(_spellings(word, tokenizer, f"bad_words[{index}]={word!r:.80} of {where}"))
    if len(found) > MAX_BAD_WORDS:
        raise ValueError(
            f"bad_words of {where} are {len(found)} sequences of tokens, with and without a space before them: "
            f"at most {MAX_BAD_WORDS} are possible"
        )
    return sampling.replace(bad_words=(), bad_words_token_ids=tuple(found))


def _spellings(word: str, tokenizer: Tokenizer, name: str) -> list[tuple[int, ...]]:
    """The word's tokens; and those after a space, where ruling out the former does not rule out these."""
    plain, spaced = (
        tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (word.lstrip(), " " + word.lstrip())
    )
    if not plain:
        raise ValueError(f"{name} has no tokens: leave it out")
    spellings = [plain] if spaced[-len(plain) :] == plain else [plain, spaced]
    for token_ids in spellings:
        if len(token_ids) > MAX_BAD_WORD_TOKENS:
            raise ValueError(f"{name} has {len(token_ids)} tokens: at most {MAX_BAD_WORD_TOKENS} are possible")
    return spellings


def each_with_token_ids(samplings: list[SamplingParams], tokenizer: Tokenizer | None) -> list[SamplingParams]:
    """`with_token_ids` of each; what stands several times in the list is tokenized once, and stays one object."""
    found: dict[int, SamplingParams] = {}
    for index, sampling in enumerate(samplings):
        if id(sampling) not in found:
            found[id(sampling)] = with_token_ids(sampling, tokenizer, f"sampling_params[{index}]")
    return [found[id(sampling)] for sampling in samplings]
