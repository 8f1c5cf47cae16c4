"""Pages: who holds them, which prefix finds them, which one goes first."""

import random

import pytest

from jaxengine.host import page_pool
from jaxengine.host.page_pool import OutOfPages, PagePool

SIZE = 4


def manager(num_pages: int = 9, **options) -> PagePool:
    return PagePool(num_pages, SIZE, **options)


def put(blocks: PagePool, tokens: list[int], version: int = 0, salt: str = "") -> list[int]:
    """What a sequence does: take the cached front, allocate the rest, register what is full. Returns its block table."""
    pages = blocks.match(tokens, version, salt)
    blocks.share(pages)
    pages = pages + blocks.allocate(-(-len(tokens) // SIZE) - len(pages))
    for index in range(len(tokens) // SIZE):
        parent = pages[index - 1] if index else None
        blocks.register(pages[index], parent, tokens[index * SIZE : (index + 1) * SIZE], version, salt)
    return pages


def test_allocate_hands_out_each_page_once_and_never_the_scratch_page():
    blocks = manager()
    pages = blocks.allocate(8)
    assert sorted(pages) == list(range(1, 9)) and blocks.num_available == 0
    blocks.check_integrity([pages])


def test_allocate_takes_all_or_nothing():
    blocks = manager()
    held = blocks.allocate(5)
    with pytest.raises(OutOfPages, match="4 pages needed, 3 available"):
        blocks.allocate(4)
    assert blocks.num_available == 3
    blocks.check_integrity([held])


def test_a_page_is_free_again_when_its_last_holder_lets_go():
    blocks = manager()
    pages = blocks.allocate(2)
    blocks.share(pages)
    blocks.check_integrity([pages, pages])
    blocks.release(pages)
    blocks.check_integrity([pages])
    assert blocks.num_available == 6
    blocks.release(pages)
    blocks.check_integrity([])
    assert blocks.num_available == 8
    with pytest.raises(AssertionError, match="released more often than held"):
        blocks.release(pages)


def test_a_match_is_shared_with_its_holder_and_outlives_it():
    blocks = manager()
    first = put(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = put(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 10])
    assert second[:2] == first[:2] and second[2] != first[2]
    blocks.check_integrity([first, second])
    blocks.release(first)
    blocks.release(second)
    blocks.check_integrity([])
    assert blocks.match([1, 2, 3, 4, 5, 6, 7, 8, 9], 0, "") == first[:2]
    assert blocks.num_available == 8, "cached pages can be handed out"


@pytest.mark.parametrize("length, found", [(0, 0), (3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 2)])
def test_a_match_leaves_at_least_the_last_token(length, found):
    """Its logits are wanted, so it has to be computed."""
    blocks = manager()
    tokens = list(range(20))
    pages = put(blocks, tokens[:8])
    assert blocks.match(tokens[:length], 0, "") == pages[:found]


def test_a_match_ends_at_the_first_other_token():
    blocks = manager()
    pages = put(blocks, list(range(12)))
    assert blocks.match([0, 1, 2, 3, 99, *range(5, 13)], 0, "") == pages[:1]
    assert blocks.match([99, *range(1, 13)], 0, "") == []


def test_the_same_tokens_behind_another_front_are_other_content():
    blocks = manager()
    put(blocks, [1, 1, 1, 1, 7, 7, 7, 7])
    second = put(blocks, [2, 2, 2, 2, 7, 7, 7, 7])
    assert blocks.match([2, 2, 2, 2, 7, 7, 7, 7, 0], 0, "") == second
    assert blocks.match([7, 7, 7, 7, 0], 0, "") == []


@pytest.mark.parametrize("collide", [False, True], ids=["digests", "colliding digests"])
def test_versions_and_salts_never_hit_each_other(collide, monkeypatch):
    if collide:
        monkeypatch.setattr(page_pool, "chain_digest", lambda parent, tokens: b"same")
    homes = [(0, ""), (1, ""), (0, "a"), (1, "a"), (0, "b")]
    for home in homes:
        blocks = manager()
        pages = put(blocks, [1, 2, 3, 4], *home)
        assert [other for other in homes if blocks.match([1, 2, 3, 4, 5], *other)] == [home]
        assert blocks.match([1, 2, 3, 4, 5], *home) == pages


def test_a_collision_is_no_hit(monkeypatch):
    monkeypatch.setattr(page_pool, "chain_digest", lambda parent, tokens: b"same")
    blocks = manager()
    first = put(blocks, [1, 2, 3, 4, 5])
    assert blocks.match([9, 9, 9, 9, 5], 0, "") == []
    second = put(blocks, [9, 9, 9, 9, 5])
    assert not set(first) & set(second)
    assert blocks.match([9, 9, 9, 9, 5], 0, "") == second[:1], "the newer of two that collide is the one to be found"
    assert blocks.match([1, 2, 3, 4, 5], 0, "") == []
    blocks.check_integrity([first, second])


def test_a_child_is_found_through_its_own_parent_alone(monkeypatch):
    """Two chains whose second pages hold equal tokens and whose digests collide."""
    monkeypatch.setattr(page_pool, "chain_digest", lambda parent, tokens: tokens[:4])
    blocks = manager()
    put(blocks, [1, 1, 1, 1, 7, 7, 7, 7, 0])
    assert blocks.match([1, 2, 2, 2, 7, 7, 7, 7, 0], 0, "") == []
    second = put(blocks, [2, 2, 2, 2, 5])
    assert blocks.match([2, 2, 2, 2, 7, 7, 7, 7, 0], 0, "") == second[:1]


def test_the_oldest_goes_first_and_children_before_parents():
    blocks = manager()
    old, new = put(blocks, [1] * 12), put(blocks, [2] * 12)
    blocks.release(old)
    blocks.release(new)
    free = set(blocks.allocate(2))
    assert not free & {*old, *new}, "what nobody knows goes before what can be found again"
    evicted = [page for _ in range(6) for page in blocks.allocate(1)]
    assert evicted == [*reversed(old), *reversed(new)]
    assert blocks.match([1] * 13, 0, "") == []


def test_use_makes_a_chain_young_again():
    blocks = manager(7)
    old, new = put(blocks, [1] * 12), put(blocks, [2] * 12)
    blocks.release(old)
    blocks.release(new)
    found = blocks.match([1] * 13, 0, "")
    blocks.share(found)
    blocks.release(found)
    assert [page for _ in range(6) for page in blocks.allocate(1)] == [*reversed(new), *reversed(old)]


def test_a_held_chain_is_never_evicted():
    blocks = manager()
    held = put(blocks, [1] * 12)
    rest = blocks.allocate(5)
    with pytest.raises(OutOfPages):
        blocks.allocate(1)
    assert blocks.match([1] * 13, 0, "") == held
    blocks.check_integrity([held, rest])


def test_the_same_content_is_cached_once():
    """Two sequences that computed the same page side by side: the first stays the one to be found, the second's is plain."""
    blocks = manager()
    pages = blocks.allocate(2)
    for page in pages:
        blocks.register(page, None, [1, 2, 3, 4], 0, "")
    assert blocks.match([1, 2, 3, 4, 5], 0, "") == pages[:1]
    blocks.release(pages)
    blocks.check_integrity([])
    assert blocks.allocate(7)[0] == pages[1], "the plain one is free, not cached"
    assert blocks.match([1, 2, 3, 4, 5], 0, "") == pages[:1]


def test_a_page_behind_an_unregistered_one_is_not_registered():
    blocks = manager()
    parent, child = blocks.allocate(2)
    blocks.register(child, parent, [1, 2, 3, 4], 0, "")
    blocks.release([parent, child])
    blocks.check_integrity([])
    assert blocks.match([1, 2, 3, 4, 5], 0, "") == []


def test_discarded_pages_are_not_found_again():
    blocks = manager()
    held, cached = put(blocks, [1] * 8), put(blocks, [2] * 8)
    blocks.release(cached)
    blocks.discard(held + cached)
    assert blocks.match([1] * 9, 0, "") == blocks.match([2] * 9, 0, "") == []
    blocks.check_integrity([held])
    assert blocks.num_available == 6
    blocks.release(held)
    blocks.check_integrity([])


def test_a_chain_can_be_cached_again_after_its_parent_was_discarded():
    """The child of a discarded page stays where it is; it must not stand in the way of its successor."""
    blocks = manager()
    old = put(blocks, [1] * 8)
    blocks.discard(old[:1])
    new = put(blocks, [1] * 8)
    assert not set(old) & set(new)
    assert blocks.match([1] * 9, 0, "") == new
    blocks.release(old)
    blocks.release(new)
    blocks.check_integrity([])
    assert blocks.match([1] * 9, 0, "") == new


def test_clear_cache_forgets_everything_and_loses_nothing():
    blocks = manager()
    held, cached = put(blocks, [1] * 8), put(blocks, [2] * 8)
    blocks.release(cached)
    blocks.clear_cache()
    assert blocks.match([1] * 9, 0, "") == blocks.match([2] * 9, 0, "") == []
    blocks.check_integrity([held])
    assert len(blocks.allocate(6)) == 6


def test_without_caching_nothing_is_found_or_kept():
    blocks = manager(enable_prefix_caching=False)
    pages = put(blocks, [1] * 8)
    assert blocks.match([1] * 9, 0, "") == []
    blocks.release(pages)
    blocks.check_integrity([])
    assert sorted(blocks.allocate(8)) == list(range(1, 9))


DAMAGE = {
    "a count too high": (lambda b, t: b.share(t[:1]), "reference counts"),
    "a count too low": (lambda b, t: b.release(t[:1]), "reference counts"),
    "a held page that is free": (lambda b, t: b._free.append(t[0]), "two places"),
    "a held page that is cached": (lambda b, t: b._cached.update({t[0]: None}), "two places"),
    "a page free twice": (lambda b, t: b._free.append(b._free[0]), "two places"),
    "a lost page": (lambda b, t: b._free.pop(), "lost"),
    "a lost cached page": (lambda b, t: b._cached.popitem(), "lost"),
    "the scratch page handed out": (lambda b, t: b._free.__setitem__(0, 0), "lost"),
    "a cached page nobody knows": (lambda b, t: b._keys.pop(next(iter(b._cached))), "content is known"),
    "a free page with content": (lambda b, t: b._keys.update({b._free[0]: b._keys[t[0]]}), "content is known"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_integrity_finds_planted_damage(damage):
    blocks = manager()
    table = put(blocks, [1] * 8)
    blocks.release(put(blocks, [2] * 8))
    blocks.check_integrity([table])
    plant, message = DAMAGE[damage]
    plant(blocks, table)
    with pytest.raises(AssertionError, match=message):
        blocks.check_integrity([table])


@pytest.mark.parametrize("seed", range(20))
def test_random_use_keeps_every_invariant_and_finds_only_what_was_written(seed):
    """Few distinct tokens, so that prefixes repeat; `content` is what each page was last filled with."""
    rng = random.Random(seed)
    blocks, tables, content = manager(rng.randint(6, 20)), [], {}
    for _ in range(300):
        tokens, home = rng.choices([0, 1], k=rng.randint(1, 16)), (rng.randint(0, 1), rng.choice(["", "s"]))
        action = rng.random()
        if action < 0.5:
            found = blocks.match(tokens, *home)
            assert len(found) * SIZE < len(tokens)
            assert [content[page] for page in found] == [(home, tokens[: (i + 1) * SIZE]) for i in range(len(found))]
            if -(-len(tokens) // SIZE) <= blocks.num_available:
                tables.append(put(blocks, tokens, *home))
                content |= {page: (home, tokens[: (i + 1) * SIZE]) for i, page in enumerate(tables[-1])}
        elif action < 0.9 and tables:
            blocks.release(tables.pop(rng.randrange(len(tables))))
        elif action < 0.93 and tables:
            blocks.discard(rng.choice(tables))
        elif action < 0.94:
            blocks.clear_cache()
        blocks.check_integrity(tables)
