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

// Blocks of one sequence that follow each other are attended together, as one with more tokens, because so its keys are
// read once.
struct Run {
  int64_t block, tokens, first_row, end_row;  // block: the first one; rows as Blocks has them
};
inline std::vector<Run> runs_of(const Blocks& blocks, int64_t most) {  // of at most so many blocks
  std::vector<Run> runs;
  int64_t count = 0;  // of blocks in the last one
  for (int64_t b = 0; b < blocks.live; b++) {
    const int64_t before = b - 1, first = blocks.first_row(b), end = blocks.end_row(b);
    const bool goes_on = b > 0 && count < most && blocks.count(b) > 0 && blocks.count(before) > 0 &&
                         blocks.slots[b] == blocks.slots[before] &&
                         blocks.starts[b] == blocks.starts[before] + blocks.count(before) &&
                         first == blocks.first_row(before) + blocks.count(before);
    if (goes_on) count++, runs.back().tokens += blocks.count(b), runs.back().end_row = end;
    else count = 1, runs.push_back({b, blocks.count(b), first, end});
  }
  return runs;
}

// One run's queries of one key head: query i is head i % group of token i / group.
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
      const bool is_last = at + TILE >= last;
      Tile<T> next = {};
      if (!is_last) next = locate<T>(pages, table, head, at + TILE, last);
      else if (i + ROWS >= queries.count) next = after;
      take_tile(pages, tile, next, i > 0 && !is_last, at, lengths, band, softmax.from(i));
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
inline void finish(const Attention& a, const Run& run, int64_t head, const Queries& queries, const Softmax& softmax) {
  const int64_t width = a.pages.key_width, group = queries.group;
  for (int64_t i = 0; i < (run.end_row - run.first_row) * group; i++) {
    T* y = (T*)a.y + ((run.first_row + i / group) * a.queries + head * group + i % group) * width;
    const bool is_live = i < queries.count;
    const Softmax own = softmax.from(i);
    const Lanes total = set(is_live ? sum(load(own.totals)) : 1.0f);
    for (int64_t at = 0; at < width; at += LANES) {
      const Lanes v = is_live ? load(own.sums + at) / total + set(0.0f) : set(0.0f);
      narrow_some(y + at, v, width - at);
    }
  }
}

template <class T>
inline Band<T>& own_band() {  // the thread's
  static thread_local Scratch own;
  return *(Band<T>*)own.floats(sizeof(Band<T>) / sizeof(float));
}

struct Task {  // a run's queries of a key head
  Run run;
  int64_t head;
  Queries queries;
  const int32_t* table;
  int64_t splits() const { return ceil_div(queries.longest(), SPLIT); }
};

template <class T>
inline void attend_all(Threads& threads, const Attention& a) {
  const Pages& pages = a.pages;
  const Blocks& blocks = a.blocks;
  const int64_t group = a.queries / pages.heads, width = pages.value_width;
  // As few tasks as that all threads end at about the same time.
  const std::vector<Run> runs =
      runs_of(blocks, std::clamp<int64_t>(blocks.live * pages.heads / (8 * threads.count()), 1, 8));
  const int64_t count = runs.size(), tasks = count * pages.heads;
  int64_t longest = 0, most = 0;
  for (const Run& run : runs) {
    if (run.tokens) longest = std::max<int64_t>(longest, blocks.starts[run.block] + run.tokens);
    most = std::max(most, run.tokens * group);
  }
  // Neighbours have the same keys where runs are of one sequence, or keys that lie next to each other.
  const auto task_of = [&](int64_t i) {
    const bool is_decode = most == group;
    const Run& run = runs[is_decode ? i / pages.heads : i % count];
    const int64_t head = is_decode ? i % pages.heads : i / count, stride = a.queries * pages.key_width;
    const float* q = a.q + run.first_row * stride + head * group * pages.key_width;
    const Queries queries = {run.tokens * group, group, blocks.starts[run.block], pages.key_width, q, stride};
    return Task{run, head, queries, run.tokens ? blocks.table(run.block) : nullptr};
  };
  using Ready = typename Products<T>::Ready;
  const int64_t splits = std::max<int64_t>(ceil_div(longest, SPLIT), 1);
  const int64_t floats = ceil_to(Softmax::floats(most, width), LANES);

  if (splits == 1 || tasks >= 4 * threads.count()) {  // enough to do for every thread
    parallel(threads, tasks, [&](int64_t i) {
      static thread_local Scratch own;
      float* memory = own.floats(2 * floats);
      const Softmax whole = Softmax::at(memory, most, width), next = Softmax::at(memory + floats, most, width);
      const Task task = task_of(i);
      const Ready ready(task.queries.count);
      for (int64_t split = 0; split < task.splits(); split++) {
        Tile<T> after = {};  // the first keys of the next split, or of the task that the thread will probably take next
        const bool is_last = split + 1 == task.splits();
        if (!is_last || i + threads.count() < tasks) {
          const Task then = is_last ? task_of(i + threads.count()) : task;
          const int64_t first = is_last ? 0 : (split + 1) * SPLIT;
          after = locate<T>(pages, then.table, then.head, first, then.queries.longest());
        }
        attend_split(pages, task.table, task.head, task.queries, split, after, own_band<T>(), split ? next : whole);
        if (split) join(task.queries, split, whole, next);
      }
      finish<T>(a, task.run, task.head, task.queries, whole);
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
    finish<T>(a, task.run, task.head, task.queries, whole);
  });
}

inline void attend(Threads& threads, const Attention& a) {
  switch (a.pages.type) {
    case Type::F32: return attend_all<float>(threads, a);
    case Type::F16: return attend_all<F16>(threads, a);
    case Type::BF16: return attend_all<BF16>(threads, a);
  }
}
