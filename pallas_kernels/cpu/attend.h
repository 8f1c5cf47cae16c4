// Causal attention over pages. Included by a body, inside its namespace.
//
// The order: a score is one chain of fused multiply-adds along the head, a lane a key. Keys are taken TILE at a time from
// the start of the context by an online softmax, whose maximum is rounded up to a whole power of two, so that rescaling
// is exact. A query's weighted values are one chain along its keys, a lane a number of the head. Every SPLIT keys a new
// softmax begins, and those are joined from the first to the last: so a long context may be shared among threads, and
// whether it was, how many queries stand beside a query, and the size of pages, make no difference.

constexpr int64_t SPLIT = 1024;

// One block's queries of one key head: query i is head i % group of token i / group.
struct Queries {
  int64_t count, group, start, width;
  const float* q;  // [tokens, all heads, width], at the first of them
  int64_t stride;  // between tokens
  int64_t length(int64_t i) const { return start + i / group + 1; }
  const float* at(int64_t i) const { return q + i / group * stride + i % group * width; }
};

template <int Q, class T>
inline void take_split(const Pages& pages, const int32_t* table, int64_t head, const Queries& queries, int64_t i,
                       int64_t first, int64_t end, const Tile<T>& after, Softmax* softmax) {
  const float* q[Q];
  int64_t lengths[Q], live = 0;
  for (int j = 0; j < Q; j++) q[j] = queries.at(i + j), lengths[j] = queries.length(i + j);
  const int64_t last = std::min(end, lengths[Q - 1]);
  Tile<T> tile = locate<T>(pages, table, head, first, last);
  for (int64_t at = first; at < last; at += TILE) {
    while (live < Q && lengths[live] <= at) live++;  // these have seen all their keys: the others go on alone
    const Tile<T> next = at + TILE < last ? locate<T>(pages, table, head, at + TILE, last) : after;
    if (live == 0) take_tile<Q>(pages, tile, next, q, lengths, at, softmax);
    else
      for (int64_t j = live; j < Q; j++) take_tile<1>(pages, tile, next, q + j, lengths + j, at, softmax + j);
    tile = next;
  }
}

// The softmax of every query over the keys of one split; empty for queries that end before it. `after` is the tile that
// the thread will probably take next.
template <class T>
inline void attend_split(const Pages& pages, const int32_t* table, int64_t head, const Queries& queries, int64_t split,
                         const Tile<T>& after, Softmax* softmax) {
  const int64_t first = split * SPLIT, end = first + SPLIT;
  for (int64_t i = 0; i < queries.count; i++) {
    softmax[i].high = MASKED, softmax[i].total = 0;
    std::memset(softmax[i].sums, 0, pages.value_width * sizeof(float));
  }
  int64_t i = 0;
  if constexpr (KEYS_AT_ONCE >= 16)
    for (; i + 8 <= queries.count; i += 8) take_split<8, T>(pages, table, head, queries, i, first, end, after, softmax + i);
  for (; i + 4 <= queries.count; i += 4) take_split<4, T>(pages, table, head, queries, i, first, end, after, softmax + i);
  for (; i + 2 <= queries.count; i += 2) take_split<2, T>(pages, table, head, queries, i, first, end, after, softmax + i);
  if (i < queries.count) take_split<1, T>(pages, table, head, queries, i, first, end, after, softmax + i);
}

// `into` with another one, of the keys that come after its own, joined to it; one of no keys changes no bit.
inline void join(Softmax& into, const Softmax& next, int64_t width) {
  if (next.total == 0) return;
  const float high = std::max(into.high, next.high);
  const Lanes own = exp2(set(into.high - high)), other = exp2(set(next.high - high));
  for (int64_t i = 0; i < width; i += 16)
    store(into.sums + i, load(into.sums + i) * own + load(next.sums + i) * other);
  alignas(64) float factors[2][16];
  store(factors[0], own), store(factors[1], other);
  into.total = into.total * factors[0][0] + next.total * factors[1][0], into.high = high;
}

struct Partials {  // softmaxes [queries], with their sums, in one piece of memory
  static int64_t floats(int64_t queries, int64_t width) { return queries * (width + sizeof(Softmax) / sizeof(float)); }
  static Softmax* at(float* memory, int64_t queries, int64_t width) {
    auto* softmax = (Softmax*)(memory + queries * width);
    for (int64_t i = 0; i < queries; i++) softmax[i].sums = memory + i * width;
    return softmax;
  }
};

template <class T>
inline void finish(const Attention& a, int64_t block, int64_t head, int64_t group, int64_t live, const Softmax* softmax) {
  const int64_t width = a.pages.key_width, first = a.blocks.first_row(block);
  for (int64_t i = 0; i < (a.blocks.end_row(block) - first) * group; i++) {
    T* y = (T*)a.y + ((first + i / group) * a.queries + head * group + i % group) * width;
    for (int64_t at = 0; at < width; at += 16) {
      const Lanes v = i < live ? load(softmax[i].sums + at) / set(softmax[i].total) : set(0.0f);
      narrow_some(y + at, v, width - at);
    }
  }
}

template <class T>
inline void attend_all(Threads& threads, const Attention& a) {
  const Pages& pages = a.pages;
  const Blocks& blocks = a.blocks;
  const int64_t group = a.queries / pages.heads, most = blocks.tokens * group, width = pages.value_width;
  auto queries_of = [&](int64_t block, int64_t head) {
    const float* q = a.q + (blocks.first_row(block) * a.queries + head * group) * pages.key_width;
    return Queries{blocks.count(block) * group, group, blocks.starts[block], pages.key_width, q,
                   a.queries * pages.key_width};
  };
  int64_t longest = 0;
  for (int64_t b = 0; b < blocks.live; b++)
    if (blocks.counts[b] > 0) longest = std::max<int64_t>(longest, blocks.starts[b] + blocks.counts[b]);
  const int64_t tasks = blocks.live * pages.heads, splits = std::max<int64_t>(ceil_div(longest, SPLIT), 1);
  const int64_t floats = ceil_to(Partials::floats(most, width), 16);
  auto splits_of = [&](const Queries& queries) {
    return queries.count ? ceil_div(queries.length(queries.count - 1), SPLIT) : 0;
  };

  auto after = [&](int64_t task) {  // the first keys of the task that a thread will probably take next
    task += threads.count();
    const int64_t block = task / pages.heads;
    if (task >= tasks || blocks.counts[block] <= 0) return Tile<T>{};
    return locate<T>(pages, blocks.table(block), task % pages.heads, 0, blocks.starts[block] + blocks.counts[block]);
  };

  if (splits == 1 || tasks >= 4 * threads.count()) {  // enough to do for every thread
    parallel(threads, tasks, [&](int64_t task) {
      static thread_local Scratch own;
      float* memory = own.floats(2 * floats);
      Softmax *whole = Partials::at(memory, most, width), *next = Partials::at(memory + floats, most, width);
      const int64_t block = task / pages.heads, head = task % pages.heads;
      const Queries queries = queries_of(block, head);
      for (int64_t split = 0; split < splits_of(queries); split++) {
        attend_split<T>(pages, blocks.table(block), head, queries, split, after(task), split ? next : whole);
        for (int64_t i = 0; split && i < queries.count; i++) join(whole[i], next[i], width);
      }
      finish<T>(a, block, head, group, queries.count, whole);
    });
    return;
  }
  static thread_local Scratch of_all;
  float* memory = of_all.floats(tasks * splits * floats);
  parallel(threads, tasks * splits, [&](int64_t i) {
    const int64_t task = i / splits, block = task / pages.heads, head = task % pages.heads;
    const Queries queries = queries_of(block, head);
    Softmax* part = Partials::at(memory + i * floats, most, width);
    if (i % splits < splits_of(queries))
      attend_split<T>(pages, blocks.table(block), head, queries, i % splits, {}, part);
  });
  parallel(threads, tasks, [&](int64_t task) {
    const int64_t block = task / pages.heads, head = task % pages.heads;
    const Queries queries = queries_of(block, head);
    float* own = memory + task * splits * floats;
    Softmax* whole = Partials::at(own, most, width);
    for (int64_t split = 1; split < splits_of(queries); split++)
      for (int64_t i = 0; i < queries.count; i++)
        join(whole[i], Partials::at(own + split * floats, most, width)[i], width);
    finish<T>(a, block, head, group, queries.count, whole);
  });
}

inline void attend(Threads& threads, const Attention& a) {
  switch (a.pages.type) {
    case Type::F32: return attend_all<float>(threads, a);
    case Type::F16: return attend_all<F16>(threads, a);
    case Type::BF16: return attend_all<BF16>(threads, a);
  }
}
