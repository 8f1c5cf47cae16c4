"""Pages of the KV cache: which are held, which can be shared, which goes next. Plain Python.

A page is free, held (reference count above 0) or cached. A cached page has no holder, but its tokens are known, and a
request with the same prefix may take it again. Full pages are found by a hash chained over token ids, weights version
and cache salt; a hit compares the tokens and the parent page as well, so that a collision cannot serve another prompt's
pages.

Several pages may have one content, because a prompt's last token is always computed and its page with it: equal prompts
that end with a page have a twin each. They share one key, so that what follows any of them follows all. Twins are held:
one that loses its last holder is free unless it is the only one, and a cached page that gets a twin is free at once.
"""

import dataclasses
import hashlib
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class OutOfPages(Exception):
    """No page is free or evictable."""


@dataclasses.dataclass(frozen=True)
class PageKey:
    """Identity of a full page's content, the same object for all pages that have it.

    `uid` is new for every content that becomes known, so that a child names this very parent.
    """

    uid: int
    digest: bytes
    parent: int | bytes  # uid of the content before it; a first page's is the root digest
    tokens: bytes


@dataclasses.dataclass
class PrefixDigests:
    """(digest, content) of each full page of one sample's tokens, found once: the sample may wait for many steps."""

    root: bytes
    pages: list[tuple[bytes, bytes]] = dataclasses.field(default_factory=list)


def chain_digest(parent: bytes, tokens: bytes) -> bytes:
    """Hash of a page's tokens on top of its parent's hash."""
    return hashlib.blake2b(tokens, key=parent, digest_size=16).digest()


def root_digest(version: int, salt: str) -> bytes:
    """Where a chain starts: pages of another weights version or salt can never be reached."""
    return hashlib.blake2b(f"{version}:{salt}".encode(), digest_size=16).digest()


class PagePool:
    """Reference counts, free pages and the prefix cache. Page 0 is scratch and never handed out."""

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_pages, self.page_size, self.caching = num_pages, page_size, enable_prefix_caching
        self._free = list(range(num_pages - 1, 0, -1))
        self._holders = [0] * num_pages
        self.births = [0] * num_pages  # how often a page was handed out: (page, births) names one content for ever
        self._cached: OrderedDict[int, None] = OrderedDict()  # without a holder, oldest first
        self._keys: dict[int, PageKey] = {}  # page -> its content, for full registered pages
        self._twins: dict[int, list[int]] = {}  # uid -> the pages with that content; the first is handed out
        self._by_digest: dict[bytes, PageKey] = {}
        self._prefixes: weakref.WeakKeyDictionary[object, PrefixDigests] = weakref.WeakKeyDictionary()
        self._next_uid = 1
        self.num_gained = 0  # how often known content got a holder: a page was registered, or taken out of the cache

    @property
    def num_available(self) -> int:
        """Pages that `take` can hand out."""
        return len(self._free) + len(self._cached)

    def take(self, count: int) -> list[int]:
        """`count` pages with one holder each; raises OutOfPages and takes none where fewer are available."""
        if count > self.num_available:
            raise OutOfPages(f"{count} pages needed, {self.num_available} available")
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if not self._free:
            self._free.append(self._evict())
        page = self._free.pop()
        self._holders[page] = 1
        self.births[page] += 1
        return page

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self._unregister(page)
        return page

    def _unregister(self, page: int) -> None:
        """The page's content is not known any more; its twins, if any, still have it."""
        key = self._keys.pop(page)
        twins = self._twins[key.uid]
        twins.remove(page)
        if not twins:
            del self._twins[key.uid]
            if self._by_digest.get(key.digest) is key:
                del self._by_digest[key.digest]

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each page; a cached page is held again."""
        for page in pages:
            if page in self._cached:
                del self._cached[page]
                self.num_gained += 1
            self._holders[page] += 1

    def num_held(self, pages: Iterable[int]) -> int:
        """How many of the pages have a holder."""
        return sum(self._holders[page] > 0 for page in pages)

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer for each page. Children go before parents, so that a chain is evicted from its end."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} released more often than held"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._let_go(page)

    def _let_go(self, page: int) -> None:
        """A page lost its last holder: it is free, or cached if it is the only one with a known content."""
        if page in self._keys and len(self._twins[self._keys[page].uid]) == 1:
            self._cached[page] = None
            return
        if page in self._keys:
            self._unregister(page)
        self._free.append(page)

    def discard(self, pages: Iterable[int]) -> None:
        """Take what these pages hold out of the prefix cache: no new request will read them, their twins or what
        follows them.
        """
        for key in [self._keys[page] for page in pages if page in self._keys]:
            for page in list(self._twins.get(key.uid, ())):
                self._drop(page)

    def _drop(self, page: int) -> None:
        """The page is not found any more, and free where nobody holds it."""
        self._unregister(page)
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def clear_cache(self) -> None:
        """Forget every cached prefix."""
        self.discard(list(self._keys))

    def match(self, tokens: Sequence[int], version: int, salt: str, owner: object | None = None) -> list[int]:
        """The longest run of cached pages that hold the front of `tokens`, at most all but the last token.

        Takes no holder.

        `owner` is the sample whose tokens they are. Its tokens only grow, so what was hashed for it stays valid until
        another version of the weights runs.
        """
        if not self.caching:
            return []
        pages: list[int] = []
        root = root_digest(version, salt)
        known, parent, digest = self._prefix_of(owner, root).pages, root, root
        for index, start in enumerate(range(0, len(tokens) - self.page_size, self.page_size)):
            if index == len(known):
                content = _content(tokens[start : start + self.page_size])
                known.append((chain_digest(digest, content), content))
            digest, content = known[index]
            key = self._by_digest.get(digest)
            if key is None or key.tokens != content or key.parent != parent:
                break
            pages.append(self._twins[key.uid][0])
            parent = key.uid
        return pages

    def _prefix_of(self, owner: object | None, root: bytes) -> PrefixDigests:
        if owner is None:
            return PrefixDigests(root)
        prefix = self._prefixes.get(owner)
        if prefix is None or prefix.root != root:
            prefix = self._prefixes[owner] = PrefixDigests(root)
        return prefix

    def register(self, page: int, parent: int | None, tokens: Sequence[int], version: int, salt: str) -> None:
        """Make a full page findable.

        `parent` is the page before it; a page whose parent is not registered stays unfound.
        """
        parent_key = self._keys.get(parent) if parent is not None else None
        if not self.caching or page in self._keys or (parent is not None and parent_key is None):
            return
        content, root = _content(tokens), root_digest(version, salt)
        before, digest = (parent_key.uid, parent_key.digest) if parent_key else (root, root)
        digest = chain_digest(digest, content)
        key = self._by_digest.get(digest)
        if key is None or (key.parent, key.tokens) != (before, content):
            key = self._by_digest[digest] = PageKey(self._next_uid, digest, before, content)
            self._next_uid += 1
        twins = self._twins.setdefault(key.uid, [])
        self._keys[page] = key
        self.num_gained += 1
        twins.append(page)
        if twins[0] in self._cached:  # the only one until now
            self._drop(twins[0])

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert the invariants: counts equal holders, no page in two places, free + cached + held = total, twins have
        one key and are held.
        """
        held = [0] * self.num_pages
        for table in tables:
            for page in table:
                held[page] += 1
        assert held == self._holders, "reference counts differ from the block tables"
        free, cached = set(self._free), set(self._cached)
        in_use = {page for page, count in enumerate(held) if count}
        in_two_places = len(free) < len(self._free) or free & cached or (free | cached) & in_use
        assert not in_two_places, "a page is in two places"
        is_lost = len(free) + len(cached) + len(in_use) != self.num_pages - 1 or 0 in free | cached | in_use
        assert not is_lost, "a page is lost"
        assert cached <= set(self._keys) and not free & set(self._keys), "cached pages are those whose content is known"
        twins = sorted((page, uid) for uid, pages in self._twins.items() for page in pages)
        assert twins == sorted((page, key.uid) for page, key in self._keys.items()), "twins are those that share a key"
        is_spare = any(len(pages) > 1 and cached.intersection(pages) for pages in self._twins.values())
        assert not is_spare, "a page is cached whose twin is held"


def _content(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()
