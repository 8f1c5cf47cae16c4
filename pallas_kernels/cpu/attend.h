// Causal attention over pages. Included by a body, inside its namespace.
//
// The order: queries are rounded to bfloat16 where pages hold that, and scores are products in the order of
// attend_rows.h. Keys are taken TILE at a time from the start of the context by an online softmax, whose maximum is
// rounded up to a whole power of two, so that rescaling is exact. A query's weights are added up lane by lane, a lane
// every sixteenth key, then rounded as queries are, and multiplied with values in the same order as queries with keys.
// Every SPLIT keys a new softmax begins, and those are joined from the first to the last: so a long context may be shared
// among threads, and whether it was, how many queries stand beside a query, and the size of pages, make no difference.
// Sums are joined by an addition to 0 at the end, because one that is -0 becomes 0 where more keys that are not seen are
// added to it, with weights of 0.

constexpr int64_t SPLIT = 1024;

// One block's queries of one key head: query i is head i % group of token i / group.
struct Queries {
  int64_t count, group, start, width;
  const float* q;  // [tokens, all heads, width], at the first of them
  int64_t stride;  // between tokens
  int64_t length(int64_t i) const { return start + i / group + 1; }
  int64_t longest() const { return count ? length(count - 1) : 0; }
  const float* at(int64_t i) const { return q + i / group * stride + i % group * width; }
};

// Queries from `first` on, as many as there are up to ROWS.
template <class T>
inline void take_queries(const Queries& queries, int64_t first, Band<T>& band) {
  band.rows = std::min(queries.count - first, ROWS);
  const int64_t height = ceil_to(band.rows, 16), chunks = ceil_div(queries.width, CHUNK);
  for (int64_t i = 0; i < band.rows; i++)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      Lanes halves[2];
      for (int64_t half = 0; half < 2; half++) {
        const int64_t at = chunk * CHUNK + half * LANES;
        const Lanes x = widen_some(queries.at(first + i) + at, std::max<int64_t>(queries.width - at, 0));
        halves[half] = where_nan(x, set(std::numeric_limits<float>::quiet_NaN()), x);
      }
      Products<T>::put(band.q[chunk][i], halves[0], halves[1]);
    }
  for (int64_t i = band.rows; i < height; i++) {
    for (int64_t chunk = 0; chunk < chunks; chunk++) std::memset(band.q[chunk][i], 0, sizeof(band.q[chunk][i]));
    for (auto& weights : band.weights) std::memset(weights[i], 0, sizeof(weights[i]));
  }
}

// The softmax of every query over the keys of one split; empty for queries that end before it. `after` is the tile that
// the thread will probably take next.
template <class T>
inline void attend_split(const Pages& pages, const int32_t* table, int64_t head, const Queries& queries, int64_t split,
                         const Tile<T>& after, Band<T>& band, const Softmax& softmax) {
  const int64_t first = split * SPLIT;
  softmax.begin(queries.count);
  for (int64_t i = 0; i < queries.count; i += ROWS) {
    take_queries(queries, i, band);
    int64_t lengths[ROWS];
    for (int64_t j = 0; j < band.rows; j++) lengths[j] = queries.length(i + j);
    const int64_t last = std::min(first + SPLIT, lengths[band.rows - 1]);
    Tile<T> tile = locate<T>(pages, table, head, first, last);
    for (int64_t at = first; at < last; at += TILE) {
      Tile<T> next = {};  // only the first of these reads from memory
      if (at + TILE < last) next = locate<T>(pages, table, head, at + TILE, last);
      const bool is_last = at + TILE >= last && i + ROWS >= queries.count;
      take_tile(pages, tile, is_last ? after : i ? Tile<T>{} : next, at, lengths, band, softmax.from(i));
      tile = next;
    }
  }
}

// `into` with the softmax of one query over the keys that come after its own joined to it.
inline void join(const Softmax& into, const Softmax& next) {
  const float high = std::max(*into.highs, *next.highs);
  const Lanes own = exp2(set(*into.highs - high)), other = exp2(set(*next.highs - high));
  for (int64_t i = 0; i < into.width; i += LANES)
    store(into.sums + i, load(into.sums + i) * own + load(next.sums + i) * other);
  store(into.totals, load(into.totals) * own + load(next.totals) * other);
  *into.highs = high;
}
inline void join(const Queries& queries, int64_t split, const Softmax& into, const Softmax& next) {
  for (int64_t i = 0; i < queries.count; i++)
    if (queries.length(i) > split * SPLIT) join(into.from(i), next.from(i));
}

template <class T>
inline void finish(const Attention& a, int64_t block, int64_t head, int64_t group, int64_t live, const Softmax& softmax) {
  const int64_t width = a.pages.key_width, first = a.blocks.first_row(block);
  for (int64_t i = 0; i < (a.blocks.end_row(block) - first) * group; i++) {
    T* y = (T*)a.y + ((first + i / group) * a.queries + head * group + i % group) * width;
    const Softmax own = softmax.from(i);
    const Lanes total = set(i < live ? sum(load(own.totals)) : 1.0f);
    for (int64_t at = 0; at < width; at += LANES) {
      const Lanes v = i < live ? load(own.sums + at) / total + set(0.0f) : set(0.0f);
      narrow_some(y + at, v, width - at);
    }
  }
}

template <class T>
inline Band<T>& own_band() {  // the thread's
  static thread_local Scratch own;
  return *(Band<T>*)own.floats(sizeof(Band<T>) / sizeof(float));
}

template <class T>
inline void attend_all(Threads& threads, const Attention& a) {
  const Pages& pages = a.pages;
  const Blocks& blocks = a.blocks;
  const int64_t group = a.queries / pages.heads, most = blocks.tokens * group, width = pages.value_width;
  using Ready = typename Products<T>::Ready;
  struct Task {
    int64_t block, head;
    Queries queries;
    const int32_t* table;
    int64_t splits() const { return ceil_div(queries.longest(), SPLIT); }
  };
  // Neighbours have the same keys where blocks are of one sequence, or keys that lie next to each other.
  const auto task_of = [&](int64_t i) {
    const int64_t block = blocks.tokens > 1 ? i % blocks.live : i / pages.heads;
    const int64_t head = blocks.tokens > 1 ? i / blocks.live : i % pages.heads;
    const float* q = a.q + (blocks.first_row(block) * a.queries + head * group) * pages.key_width;
    const Queries queries = {blocks.count(block) * group, group, blocks.starts[block], pages.key_width, q,
                             a.queries * pages.key_width};
    return Task{block, head, queries, queries.count ? blocks.table(block) : nullptr};
  };
  int64_t longest = 0;
  for (int64_t b = 0; b < blocks.live; b++)
    if (blocks.counts[b] > 0) longest = std::max<int64_t>(longest, blocks.starts[b] + blocks.counts[b]);
  const int64_t tasks = blocks.live * pages.heads, splits = std::max<int64_t>(ceil_div(longest, SPLIT), 1);
  const int64_t floats = ceil_to(Softmax::floats(most, width), LANES);

  if (splits == 1 || tasks >= 4 * threads.count()) {  // enough to do for every thread
    parallel(threads, tasks, [&](int64_t i) {
      static thread_local Scratch own;
      float* memory = own.floats(2 * floats);
      const Softmax whole = Softmax::at(memory, most, width), next = Softmax::at(memory + floats, most, width);
      const Task task = task_of(i);
      if (task.queries.count == 0) return finish<T>(a, task.block, task.head, group, 0, whole);
      const Ready ready(task.queries.count);
      for (int64_t split = 0; split < task.splits(); split++) {
        const bool is_last = split + 1 == task.splits();
        // The first keys of what comes next, which is another task's that the thread will probably take.
        const int64_t i_next = i + threads.count();
        const Task then = !is_last || i_next >= tasks ? task : task_of(i_next);
        const Tile<T> after = is_last && i_next >= tasks ? Tile<T>{} : locate<T>(pages, then.table, then.head, is_last ? 0 : (split + 1) * SPLIT, then.queries.longest());
        attend_split(pages, task.table, task.head, task.queries, split, after, own_band<T>(), split ? next : whole);
        if (split) join(task.queries, split, whole, next);
      }
      finish<T>(a, task.block, task.head, group, task.queries.count, whole);
    });
    return;
  }
  static thread_local Scratch of_all;
  float* memory = of_all.floats(tasks * splits * floats);
  parallel(threads, tasks * splits, [&](int64_t i) {
    const Task task = task_of(i / splits);
    if (i % splits >= task.splits()) return;
    const Ready ready(task.queries.count);
    const Softmax part = Softmax::at(memory + i * floats, most, width);
    attend_split(pages, task.table, task.head, task.queries, i % splits, {}, own_band<T>(), part);
  });
  parallel(threads, tasks, [&](int64_t i) {
    const Task task = task_of(i);
    float* own = memory + i * splits * floats;
    const Softmax whole = Softmax::at(own, most, width);
    for (int64_t split = 1; split < task.splits(); split++)
      join(task.queries, split, whole, Softmax::at(own + split * floats, most, width));
    finish<T>(a, task.block, task.head, group, task.queries.count, whole);
  });
}

inline void attend(Threads& threads, const Attention& a) {
  switch (a.pages.type) {
    case Type::F32: return attend_all<float>(threads, a);
    case Type::F16: return attend_all<F16>(threads, a);
    case Type::BF16: return attend_all<BF16>(threads, a);
  }
}
