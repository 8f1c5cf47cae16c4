"""Bugs, each one small and easily made, as patches of the real host half; and what the simulation says of it."""

from collections.abc import Callable

import pytest

from jaxengine.host import page_pool
from jaxengine.host.page_pool import PagePool, chain_digest, root_digest
from jaxengine.host.sample import Sample
from jaxengine.host.scheduler import Scheduler

PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {}


def found_by(message: str):
    """Registers a bug together with the message (a regular expression) under which it has to be found."""

    def register(plant):
        PLANTED[plant.__name__] = plant, message
        return plant

    return register


def around(patch: pytest.MonkeyPatch, owner: type, name: str):
    """Decorator: the function takes the method's place and gets the original as its first argument."""
    original = getattr(owner, name)
    return lambda body: patch.setattr(owner, name, lambda self, *arguments: body(original, self, *arguments))


# -- pages -------------------------------------------------------------------------------------------------------------


@found_by("reference counts differ|released more often")
def a_reference_count_is_skipped(patch):
    @around(patch, PagePool, "share")
    def share(original, blocks, pages):
        original(blocks, list(pages)[:-1])


@found_by("in two places")
def a_page_is_freed_twice(patch):
    """Discarding frees a page that is held, and its holder frees it again."""

    @around(patch, PagePool, "discard")
    def discard(original, blocks, pages):
        original(blocks, pages)
        blocks._free += [page for page in pages if blocks._holders[page]]


@found_by("content is known|holds other tokens")
def an_evicted_page_can_still_be_found(patch):
    patch.setattr(PagePool, "_evict", lambda blocks: blocks._cached.popitem(last=False)[0])


@found_by("failed sequence's pages")
def a_failed_page_stays_in_the_cache(patch):
    patch.setattr(PagePool, "discard", lambda blocks, pages: None)


@found_by(r"a prompt finds \d+ pages where \d+ were computed")
def a_page_that_is_computed_twice_ends_its_chain(patch):
    """The second of equal pages stays without a key, and so does every page after it."""

    @around(patch, PagePool, "register")
    def register(original, blocks, page, parent, tokens, version, salt):
        before = blocks._keys[parent].digest if parent in blocks._keys else root_digest(version, salt)
        if chain_digest(before, page_pool._content(tokens)) not in blocks._by_digest:
            original(blocks, page, parent, tokens, version, salt)


# -- hashes ------------------------------------------------------------------------------------------------------------


@found_by("one digest names two prefixes|a prompt finds")
def the_hash_leaves_out_the_parent(patch):
    """The comparison of parents after the hash still saves every answer, so only the names tell."""
    patch.setattr(page_pool, "chain_digest", lambda parent, tokens: chain_digest(b"", tokens))


@found_by("reads what is not its own|another version or salt|a prompt finds")
def a_hit_compares_the_tokens_alone(patch):
    def match(blocks, tokens, version, salt, known=None):
        pages, size = [], blocks.page_size
        for start in range(0, len(tokens) - size, size):
            content = page_pool._content(tokens[start : start + size])
            found = [page for page, key in blocks._keys.items() if key.tokens == content]
            if not blocks.caching or not found:
                break
            pages.append(found[0])
        return pages

    patch.setattr(PagePool, "match", match)


@found_by("another version or salt|starts nowhere|holds other tokens|a prompt finds")
def the_hash_leaves_out_the_version(patch):
    patch.setattr(page_pool, "root_digest", lambda version, salt: root_digest(0, salt))


@found_by("another version or salt|a prompt finds")
def the_hash_leaves_out_the_salt(patch):
    patch.setattr(page_pool, "root_digest", lambda version, salt: root_digest(version, ""))


# -- edges of pages ----------------------------------------------------------------------------------------------------


@found_by("has no page|reads what is not its own|too few or too many")
def a_page_too_few_at_the_edge(patch):
    @around(patch, Scheduler, "_grow")
    def grow(original, scheduler, sample, num_tokens):
        return original(scheduler, sample, num_tokens - 1)


@found_by("a chunk that is empty|a prompt finds")
def a_hit_takes_the_last_token_too(patch):
    @around(patch, PagePool, "match")
    def match(original, blocks, tokens, version, salt, known=None):
        return original(blocks, [*tokens, 0], version, salt)


@found_by("holds other tokens|offered too early")
def a_page_is_offered_before_its_last_token_is_computed(patch):
    @around(patch, Scheduler, "register_pages")
    def register_pages(original, scheduler, sample):
        sample.num_computed += 1
        original(scheduler, sample)
        sample.num_computed -= 1


# -- forks -------------------------------------------------------------------------------------------------------------


@found_by("written twice")
def forks_share_the_page_that_is_partly_filled(patch):
    @around(patch, Scheduler, "_fork")
    def fork(original, scheduler, plan, chunk):
        original(scheduler, plan, chunk)
        for sample in chunk.forks if plan.copies else ():
            own, sample.pages[-1] = sample.pages[-1], chunk.sample.pages[-1]
            scheduler.page_pool.release([own])
            scheduler.page_pool.share(sample.pages[-1:])
        plan.copies.clear()


@found_by(r"a prompt finds \d+ pages where \d+ were computed")
def a_fork_offers_discarded_pages_again(patch):
    """What a sibling's failure took out of the cache comes back with the next token of a fork."""

    @around(patch, Scheduler, "_fork")
    def fork(original, scheduler, plan, chunk):
        original(scheduler, plan, chunk)
        for sample in chunk.forks:
            sample.num_registered = 0


@found_by("reads what is not its own")
def the_copy_for_a_fork_is_left_out(patch):
    @around(patch, Scheduler, "_fork")
    def fork(original, scheduler, plan, chunk):
        original(scheduler, plan, chunk)
        plan.copies.clear()


@found_by("waits for nothing")
def siblings_wait_for_one_that_decodes(patch):
    @around(patch, Scheduler, "_waits_for_sibling")
    def waits(original, scheduler, sample):
        return not sample.drawn.token_ids and any(other.request is sample.request for other in scheduler.running)


# -- preemption and recovery -------------------------------------------------------------------------------------------


@found_by("overtaken|was left out")
def the_oldest_is_preempted(patch):
    @around(patch, Scheduler, "preempt")
    def preempt(original, scheduler, sample):
        oldest = scheduler.running[0]
        original(scheduler, sample if oldest.num_pending else oldest)


@found_by("tokens under way|another than alone|must be|computed than|written twice")
def results_under_way_are_forgotten_by_a_preemption(patch):
    @around(patch, Scheduler, "_grow")
    def grow(original, scheduler, sample, num_tokens):
        for victim in scheduler.running:
            victim.length = victim.num_tokens if victim.arrival > sample.arrival else victim.length
        return original(scheduler, sample, num_tokens)


@found_by("not aligned|one that waits holds something")
def a_restart_keeps_the_token_that_is_half_written(patch):
    @around(patch, Sample, "restart")
    def restart(original, sample):
        tokens = list(sample.drawn.token_ids)
        original(sample)
        sample.drawn.token_ids[:] = tokens


@found_by("a token that was delivered has changed")
def a_restart_drops_a_token_that_was_delivered(patch):
    @around(patch, Sample, "restart")
    def restart(original, sample):
        sample.num_recorded = max(sample.num_recorded - 1, 0)
        original(sample)


@found_by("a slot is lost")
def a_slot_is_lost(patch):
    @around(patch, Scheduler, "finish")
    def finish(original, scheduler, sample, reason, stop_reason=None):
        original(scheduler, sample, reason, stop_reason)
        if reason == "abort" and len(scheduler._free_slots) > 1:
            scheduler._free_slots.pop()


@found_by("waits for nothing")
def admission_wants_a_page_more_than_it_needs(patch):
    @around(patch, Scheduler, "_reserve")
    def reserve(original, scheduler):
        return original(scheduler) + 1


@found_by("is not served")
def a_long_prompt_starves_beside_the_decodes(patch):
    @around(patch, Scheduler, "_plan_running_prefills")
    def plan_running_prefills(original, scheduler, plan, samples, budget):
        return budget if plan.decoding else original(scheduler, plan, samples, budget)


@found_by("waits for nothing")
def a_head_that_was_refused_is_refused_again(patch):
    """Whatever became free since."""
    patch.setattr(
        Scheduler, "_is_refused_again", lambda scheduler, sample: (scheduler._refused or (None, 0))[0] is sample
    )


@found_by("reads what is not its own|has no page")
def pages_got_in_a_plan_that_was_given_up_are_not_sent(patch):
    """Results had to be collected first, and the plan after that finds the pages there."""

    @around(patch, Scheduler, "schedule")
    def schedule(original, scheduler):
        scheduler._grown = []
        return original(scheduler)


# -- weights -----------------------------------------------------------------------------------------------------------


@found_by("than alone|holds other tokens")
def pages_that_were_kept_are_offered_to_others(patch):
    @around(patch, Scheduler, "register_pages")
    def register_pages(original, scheduler, sample):
        kept, sample.has_old_pages = sample.has_old_pages, False
        original(scheduler, sample)
        sample.has_old_pages = kept


@found_by("than alone|reads what is not its own|holds other tokens|was overtaken")
def a_prefill_goes_on_under_new_weights(patch):
    @around(patch, Scheduler, "change_version")
    def change_version(original, scheduler, version, keep):
        halfway = [s for s in scheduler.running if not s.is_decoding]
        scheduler.running = [s for s in scheduler.running if s.is_decoding]
        original(scheduler, version, keep)
        scheduler.running = sorted([*scheduler.running, *halfway], key=lambda s: s.arrival)
        for sample in halfway:
            sample.version = version


@found_by("than alone|a token of weights")
def a_token_names_the_weights_before(patch):
    @around(patch, Scheduler, "change_version")
    def change_version(original, scheduler, version, keep):
        versions = {id(s): s.version for s in scheduler.running}
        original(scheduler, version, keep)
        for sample in scheduler.running:
            sample.version = versions[id(sample)]
