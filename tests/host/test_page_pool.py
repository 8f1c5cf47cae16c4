"""Pages: who holds them, which prefix finds them, which one goes first."""

import random

import pytest

from jaxengine.host import page_pool
from jaxengine.host.page_pool import OutOfPages, PagePool

SIZE = 4


def manager(num_pages: int = 9, **options) -> PagePool:
    return PagePool(num_pages, SIZE, **options)


def put(pool: PagePool, tokens: list[int], version: int = 0, salt: str = "") -> list[int]:
    """What a sequence does: take the cached front, allocate the rest, register what is full.

    Returns its block table.
    """
    pages = pool.match(tokens, version, salt)
    pool.share(pages)
    pages = pages + pool.take(-(-len(tokens) // SIZE) - len(pages))
    for index in range(len(tokens) // SIZE):
        parent = pages[index - 1] if index else None
        pool.register(pages[index], parent, tokens[index * SIZE : (index + 1) * SIZE], version, salt)
    return pages


def test_allocate_hands_out_each_page_once_and_never_the_scratch_page():
    pool = manager()
    pages = pool.take(8)
    assert sorted(pages) == list(range(1, 9)) and pool.num_available == 0
    pool.check_integrity([pages])


def test_allocate_takes_all_or_nothing():
    pool = manager()
    held = pool.take(5)
    with pytest.raises(OutOfPages, match="4 pages needed, 3 available"):
        pool.take(4)
    assert pool.num_available == 3
    pool.check_integrity([held])


def test_a_page_is_free_again_when_its_last_holder_lets_go():
    pool = manager()
    pages = pool.take(2)
    pool.share(pages)
    pool.check_integrity([pages, pages])
    pool.release(pages)
    pool.check_integrity([pages])
    assert pool.num_available == 6
    pool.release(pages)
    pool.check_integrity([])
    assert pool.num_available == 8
    with pytest.raises(AssertionError, match="released more often than held"):
        pool.release(pages)


def test_a_match_is_shared_with_its_holder_and_outlives_it():
    pool = manager()
    first = put(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = put(pool, [1, 2, 3, 4, 5, 6, 7, 8, 10])
    assert second[:2] == first[:2] and second[2] != first[2]
    pool.check_integrity([first, second])
    pool.release(first)
    pool.release(second)
    pool.check_integrity([])
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8, 9], 0, "") == first[:2]
    assert pool.num_available == 8, "cached pages can be handed out"


@pytest.mark.parametrize("length, found", [(0, 0), (3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 2)])
def test_a_match_leaves_at_least_the_last_token(length, found):
    """Its logits are wanted, so it has to be computed."""
    pool = manager()
    tokens = list(range(20))
    pages = put(pool, tokens[:8])
    assert pool.match(tokens[:length], 0, "") == pages[:found]


def test_a_match_ends_at_the_first_other_token():
    pool = manager()
    pages = put(pool, list(range(12)))
    assert pool.match([0, 1, 2, 3, 99, *range(5, 13)], 0, "") == pages[:1]
    assert pool.match([99, *range(1, 13)], 0, "") == []


def test_the_same_tokens_behind_another_front_are_other_content():
    pool = manager()
    put(pool, [1, 1, 1, 1, 7, 7, 7, 7])
    second = put(pool, [2, 2, 2, 2, 7, 7, 7, 7])
    assert pool.match([2, 2, 2, 2, 7, 7, 7, 7, 0], 0, "") == second
    assert pool.match([7, 7, 7, 7, 0], 0, "") == []


@pytest.mark.parametrize("collide", [False, True], ids=["digests", "colliding digests"])
def test_versions_and_salts_never_hit_each_other(collide, monkeypatch):
    if collide:
        monkeypatch.setattr(page_pool, "chain_digest", lambda parent, tokens: b"same")
    homes = [(0, ""), (1, ""), (0, "a"), (1, "a"), (0, "b")]
    for home in homes:
        pool = manager()
        pages = put(pool, [1, 2, 3, 4], *home)
        assert [other for other in homes if pool.match([1, 2, 3, 4, 5], *other)] == [home]
        assert pool.match([1, 2, 3, 4, 5], *home) == pages


def test_a_collision_is_no_hit(monkeypatch):
    monkeypatch.setattr(page_pool, "chain_digest", lambda parent, tokens: b"same")
    pool = manager()
    first = put(pool, [1, 2, 3, 4, 5])
    assert pool.match([9, 9, 9, 9, 5], 0, "") == []
    second = put(pool, [9, 9, 9, 9, 5])
    assert not set(first) & set(second)
    assert pool.match([9, 9, 9, 9, 5], 0, "") == second[:1], "the newer of two that collide is the one to be found"
    assert pool.match([1, 2, 3, 4, 5], 0, "") == []
    pool.check_integrity([first, second])


def test_a_child_is_found_through_its_own_parent_alone(monkeypatch):
    """Two chains whose second pages hold equal tokens and whose digests collide."""
    monkeypatch.setattr(page_pool, "chain_digest", lambda parent, tokens: tokens[:4])
    pool = manager()
    put(pool, [1, 1, 1, 1, 7, 7, 7, 7, 0])
    assert pool.match([1, 2, 2, 2, 7, 7, 7, 7, 0], 0, "") == []
    second = put(pool, [2, 2, 2, 2, 5])
    assert pool.match([2, 2, 2, 2, 7, 7, 7, 7, 0], 0, "") == second[:1]


def test_the_oldest_goes_first_and_children_before_parents():
    pool = manager()
    old, new = put(pool, [1] * 12), put(pool, [2] * 12)
    pool.release(old)
    pool.release(new)
    free = set(pool.take(2))
    assert not free & {*old, *new}, "what nobody knows goes before what can be found again"
    evicted = [page for _ in range(6) for page in pool.take(1)]
    assert evicted == [*reversed(old), *reversed(new)]
    assert pool.match([1] * 13, 0, "") == []


def test_use_makes_a_chain_young_again():
    pool = manager(7)
    old, new = put(pool, [1] * 12), put(pool, [2] * 12)
    pool.release(old)
    pool.release(new)
    found = pool.match([1] * 13, 0, "")
    pool.share(found)
    pool.release(found)
    assert [page for _ in range(6) for page in pool.take(1)] == [*reversed(new), *reversed(old)]


def test_a_held_chain_is_never_evicted():
    pool = manager()
    held = put(pool, [1] * 12)
    rest = pool.take(5)
    with pytest.raises(OutOfPages):
        pool.take(1)
    assert pool.match([1] * 13, 0, "") == held
    pool.check_integrity([held, rest])


def test_the_same_content_is_cached_once():
    """Two sequences that computed the same page side by side.

    The first stays the one to be found, the second's is plain.
    """
    pool = manager()
    pages = pool.take(2)
    for page in pages:
        pool.register(page, None, [1, 2, 3, 4], 0, "")
    assert pool.match([1, 2, 3, 4, 5], 0, "") == pages[:1]
    pool.release(pages)
    pool.check_integrity([])
    assert pool.take(7)[0] == pages[1], "the plain one is free, not cached"
    assert pool.match([1, 2, 3, 4, 5], 0, "") == pages[:1]


def test_what_follows_a_twin_is_found():
    """A second sequence computes the prompt's last page again, and goes on another way than the first."""
    pool = manager(20)
    first = put(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    second = put(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert first[0] == second[0] and first[1] != second[1], "its last token is computed, and the page with it"
    for table, answer in ((first, [9] * 4), (second, [8] * 4)):
        table += pool.take(1)
        pool.register(table[2], table[1], answer, 0, "")
    pool.check_integrity([first, second])
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8, *[9] * 5], 0, "") == first
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8, *[8] * 5], 0, "") == [*first[:2], second[2]]
    pool.release(first)
    pool.release(second)
    pool.check_integrity([])
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8, *[8] * 5], 0, "")[2:] == second[2:]


@pytest.mark.parametrize("gone_first", [0, 1])
def test_a_content_is_found_as_long_as_one_twin_is_there(gone_first):
    pool = manager()
    tables = put(pool, [1] * 4), put(pool, [1] * 4)
    pool.release(tables[gone_first])
    pool.check_integrity([tables[1 - gone_first]])
    assert pool.num_available == 7, "the one that was let go is free"
    assert pool.match([1] * 5, 0, "") == tables[1 - gone_first]
    pool.release(tables[1 - gone_first])
    pool.check_integrity([])
    assert pool.match([1] * 5, 0, "") == tables[1 - gone_first]
    rest = pool.take(7)
    assert tables[1 - gone_first][0] not in rest and len(pool.match([1] * 5, 0, "")) == 1, "it is cached"


def test_a_cached_page_that_gets_a_twin_is_free():
    """Else an old page could be evicted before the pages that follow its twin."""
    pool = manager()
    old = put(pool, [1] * 4)
    pool.release(old)
    new = put(pool, [1] * 4)
    assert new != old and pool.match([1] * 5, 0, "") == new
    pool.check_integrity([new])
    assert pool.take(1) == old, "the last to be freed is the first to be taken"


def test_a_page_is_discarded_with_its_twins_and_what_follows_them():
    """What the one was computed from is in doubt, and a third may have read either."""
    pool = manager(20)
    first, second = put(pool, [1] * 8), put(pool, [1] * 8)
    third = put(pool, [1] * 8 + [2] * 5)
    assert third[:2] == first
    pool.discard(second[1:])
    assert pool.match([1] * 9, 0, "") == first[:1] and pool.match([1] * 8 + [2] * 5, 0, "") == first[:1]
    pool.check_integrity([first, second, third])
    for table in (first, second, third):
        pool.release(table)
    pool.check_integrity([])
    again = put(pool, [1] * 8 + [2] * 5)
    assert pool.match([1] * 8 + [2] * 5, 0, "") == again[:3], "the old page after the discarded one is in nobody's way"


def test_a_page_behind_an_unregistered_one_is_not_registered():
    pool = manager()
    parent, child = pool.take(2)
    pool.register(child, parent, [1, 2, 3, 4], 0, "")
    pool.release([parent, child])
    pool.check_integrity([])
    assert pool.match([1, 2, 3, 4, 5], 0, "") == []


def test_discarded_pages_are_not_found_again():
    pool = manager()
    held, cached = put(pool, [1] * 8), put(pool, [2] * 8)
    pool.release(cached)
    pool.discard(held + cached)
    assert pool.match([1] * 9, 0, "") == pool.match([2] * 9, 0, "") == []
    pool.check_integrity([held])
    assert pool.num_available == 6
    pool.release(held)
    pool.check_integrity([])


def test_a_chain_can_be_cached_again_after_its_parent_was_discarded():
    """The child of a discarded page stays where it is; it must not stand in the way of its successor."""
    pool = manager()
    old = put(pool, [1] * 8)
    pool.discard(old[:1])
    new = put(pool, [1] * 8)
    assert not set(old) & set(new)
    assert pool.match([1] * 9, 0, "") == new
    pool.release(old)
    pool.release(new)
    pool.check_integrity([])
    assert pool.match([1] * 9, 0, "") == new


def test_clear_cache_forgets_everything_and_loses_nothing():
    pool = manager()
    held, cached = put(pool, [1] * 8), put(pool, [2] * 8)
    pool.release(cached)
    pool.clear_cache()
    assert pool.match([1] * 9, 0, "") == pool.match([2] * 9, 0, "") == []
    pool.check_integrity([held])
    assert len(pool.take(6)) == 6


def test_without_caching_nothing_is_found_or_kept():
    pool = manager(enable_prefix_caching=False)
    pages = put(pool, [1] * 8)
    assert pool.match([1] * 9, 0, "") == []
    pool.release(pages)
    pool.check_integrity([])
    assert sorted(pool.take(8)) == list(range(1, 9))


def _cached_twin(pool: PagePool, table: list[int]) -> None:
    page, key = next(iter(pool._cached)), pool._keys[table[0]]
    pool._unregister(page)
    pool._keys[page] = key
    pool._twins[key.uid].append(page)


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
    "a twin that is not counted": (lambda b, t: b._twins[b._keys[t[0]].uid].append(t[1]), "share a key"),
    "a key that is not known": (lambda b, t: b._twins.pop(b._keys[t[0]].uid), "share a key"),
    "a cached page with a twin": (_cached_twin, "whose twin is held"),
    "a free page with content": (lambda b, t: b._keys.update({b._free[0]: b._keys[t[0]]}), "content is known"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_integrity_finds_planted_damage(damage):
    pool = manager()
    table = put(pool, [1] * 8)
    pool.release(put(pool, [2] * 8))
    pool.check_integrity([table])
    plant, message = DAMAGE[damage]
    plant(pool, table)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity([table])


@pytest.mark.parametrize("seed", range(20))
def test_random_use_keeps_every_invariant_and_finds_only_what_was_written(seed):
    """Few distinct tokens, so that prefixes repeat; `content` is what each page was last filled with."""
    rng = random.Random(seed)
    pool, tables, content = manager(rng.randint(6, 20)), [], {}
    for _ in range(300):
        tokens, home = rng.choices([0, 1], k=rng.randint(1, 16)), (rng.randint(0, 1), rng.choice(["", "s"]))
        action = rng.random()
        if action < 0.5:
            found = pool.match(tokens, *home)
            assert len(found) * SIZE < len(tokens)
            assert [content[page] for page in found] == [(home, tokens[: (i + 1) * SIZE]) for i in range(len(found))]
            if -(-len(tokens) // SIZE) <= pool.num_available:
                tables.append(put(pool, tokens, *home))
                content |= {page: (home, tokens[: (i + 1) * SIZE]) for i, page in enumerate(tables[-1])}
        elif action < 0.9 and tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        elif action < 0.93 and tables:
            pool.discard(rng.choice(tables))
        elif action < 0.94:
            pool.clear_cache()
        pool.check_integrity(tables)
