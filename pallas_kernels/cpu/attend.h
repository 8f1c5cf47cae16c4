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
constexpr int64_t MOST_HEADS = 16;  // that a thread attends together

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

// `rows` queries from `first` on.
template <class T>
inline void take_queries(const Queries& queries, int64_t first, int64_t rows, Rounded<T>& rounded) {
  const int64_t height = ceil_to(rows, 16), chunks = ceil_div(queries.width, CHUNK);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      Lanes halves[2];
      for (int64_t half = 0; half < 2; half++) {
        const int64_t at = chunk * CHUNK + half * LANES;
        const Lanes x = widen_some(queries.at(first + i) + at, std::max<int64_t>(queries.width - at, 0));
        halves[half] = where_nan(x, set(std::numeric_limits<float>::quiet_NaN()), x);
      }
      Products<T>::put(rounded[chunk][i], halves[0], halves[1]);
    }
  for (int64_t i = rows; i < height; i++)
    for (int64_t chunk = 0; chunk < chunks; chunk++) std::memset(rounded[chunk][i], 0, sizeof(rounded[chunk][i]));
}

struct Task {  // a run's queries of some neighbouring key heads; of one, where they are more than ROWS
  Run run;
  int64_t head, heads;
  Queries first;  // those of the first head
  const int32_t* table;
  Queries of(int64_t h) const {
    Queries queries = first;
    queries.q += h * first.group * first.width;
    return queries;
  }
  int64_t splits() const { return ceil_div(first.longest(), SPLIT); }
};

struct Softmaxes {  // of a task's heads, one after the other
  float* memory;
  int64_t queries, width;
  static int64_t floats(int64_t queries, int64_t width) { return ceil_to(Softmax::floats(queries, width), LANES); }
  Softmax of(int64_t h) const { return Softmax::at(memory + h * floats(queries, width), queries, width); }
};

// What a thread keeps between calls.
template <class T>
struct Own {
  Band<T> band;
  Rounded<T> q[MOST_HEADS];
};
template <class T>
inline Own<T>& own_memory() {
  static thread_local Scratch own;
  return *(Own<T>*)own.floats(sizeof(Own<T>) / sizeof(float));
}

// The softmax of every query over the keys of one split; empty for queries that end before it. `after` is the tile that
// the thread will probably take next. A tile is taken by one head after the other, because those lie side by side in a
// page, and memory is read faster so.
template <class T>
inline void attend_split(const Pages& pages, const Task& task, int64_t split, const Tile<T>& after,
                         const Softmaxes& all) {
  Own<T>& own = own_memory<T>();
  Band<T>& band = own.band;
  const Queries& queries = task.first;
  const int64_t first = split * SPLIT;
  for (int64_t h = 0; h < task.heads; h++) all.of(h).begin(queries.count);
  for (int64_t i = 0; i < queries.count; i += ROWS) {
    band.rows = std::min(queries.count - i, ROWS);
    for (int64_t h = 0; h < task.heads; h++) take_queries<T>(task.of(h), i, band.rows, own.q[h]);
    for (auto& chunk : band.weights)
      std::memset(chunk + band.rows, 0, (ceil_to(band.rows, 16) - band.rows) * sizeof(chunk[0]));
    int64_t lengths[ROWS];
    for (int64_t j = 0; j < band.rows; j++) lengths[j] = queries.length(i + j);
    const int64_t last = std::min(first + SPLIT, lengths[band.rows - 1]);
    Tile<T> tile = locate<T>(pages, task.table, task.head, first, last);
    for (int64_t at = first; at < last; at += TILE)
      for (int64_t h = 0; h < task.heads; h++) {
        const bool is_last_head = h + 1 == task.heads, is_last = at + TILE >= last && is_last_head;
        const int64_t head = task.head + (is_last_head ? 0 : h + 1), then = at + (is_last_head ? TILE : 0);
        Tile<T> next = {};
        if (!is_last) next = locate<T>(pages, task.table, head, then, last);
        else if (i + ROWS >= queries.count) next = after;
        band.q = &own.q[h];
        take_tile(pages, tile, next, i > 0 && !is_last, at, lengths, band, all.of(h).from(i));
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
inline void attend_all(Threads& threads, const Attention& a) {
  const Pages& pages = a.pages;
  const Blocks& blocks = a.blocks;
  const int64_t group = a.queries / pages.heads, width = pages.value_width, some = 8 * threads.count();
  // As few tasks as that all threads end at about the same time.
  const std::vector<Run> runs = runs_of(blocks, std::clamp<int64_t>(blocks.live * pages.heads / some, 1, 8));
  int64_t longest = 0, total = 0, most = 0;
  for (const Run& run : runs) {
    const int64_t length = run.tokens ? blocks.starts[run.block] + run.tokens : 0;
    longest = std::max(longest, length), total += length, most = std::max(most, run.tokens * group);
  }
  const int64_t count = runs.size(), splits = std::max<int64_t>(ceil_div(longest, SPLIT), 1);
  const int64_t least = most > ROWS ? pages.heads : ceil_div(some * longest, std::max<int64_t>(total, 1));
  const int64_t heads = std::min(ceil_div(pages.heads, std::clamp<int64_t>(least, 1, pages.heads)), MOST_HEADS);
  const int64_t parts = ceil_div(pages.heads, heads), tasks = count * parts;
  // Neighbours have the same keys where runs are of one sequence, or keys that lie next to each other.
  const auto task_of = [&](int64_t i) {
    const bool is_decode = most == group;
    const Run& run = runs[is_decode ? i / parts : i % count];
    const int64_t head = (is_decode ? i % parts : i / count) * heads, stride = a.queries * pages.key_width;
    const float* q = a.q + run.first_row * stride + head * group * pages.key_width;
    const Queries queries = {run.tokens * group, group, blocks.starts[run.block], pages.key_width, q, stride};
    const int32_t* table = run.tokens ? blocks.table(run.block) : nullptr;
    return Task{run, head, std::min(heads, pages.heads - head), queries, table};
  };
  using Ready = typename Products<T>::Ready;
  const int64_t floats = heads * Softmaxes::floats(most, width);

  if (splits == 1 || tasks >= 4 * threads.count()) {  // enough to do for every thread
    parallel(threads, tasks, [&](int64_t i) {
      static thread_local Scratch own;
      float* memory = own.floats(2 * floats);
      const Softmaxes whole = {memory, most, width}, next = {memory + floats, most, width};
      const Task task = task_of(i);
      const Ready ready(task.first.count);
      for (int64_t split = 0; split < task.splits(); split++) {
        Tile<T> after = {};  // the first keys of the next split, or of the task that the thread will probably take next
        const bool is_last = split + 1 == task.splits();
        if (!is_last || i + threads.count() < tasks) {
          const Task then = is_last ? task_of(i + threads.count()) : task;
          const int64_t first = is_last ? 0 : (split + 1) * SPLIT;
          after = locate<T>(pages, then.table, then.head, first, then.first.longest());
        }
        attend_split(pages, task, split, after, split ? next : whole);
        for (int64_t h = 0; split && h < task.heads; h++) join(task.first, split, whole.of(h), next.of(h));
      }
      for (int64_t h = 0; h < task.heads; h++) finish<T>(a, task.run, task.head + h, task.first, whole.of(h));
    });
    return;
  }
  static thread_local Scratch of_all;
  float* memory = of_all.floats(tasks * splits * floats);
  const auto softmaxes = [&](int64_t i, int64_t split) {
    return Softmaxes{memory + (i * splits + split) * floats, most, width};
  };
  parallel(threads, tasks * splits, [&](int64_t i) {
    const Task task = task_of(i / splits);
    if (i % splits >= task.splits()) return;
    const Ready ready(task.first.count);
    attend_split<T>(pages, task, i % splits, {}, softmaxes(i / splits, i % splits));
  });
  parallel(threads, tasks, [&](int64_t i) {
    const Task task = task_of(i);
    for (int64_t h = 0; h < task.heads; h++) {
      const Softmax whole = softmaxes(i, 0).of(h);
      for (int64_t split = 1; split < task.splits(); split++) join(task.first, split, whole, softmaxes(i, split).of(h));
      finish<T>(a, task.run, task.head + h, task.first, whole);
    }
  });
}

inline void attend(Threads& threads, const Attention& a) {
  switch (a.pages.type) {
    case Type::F32: return attend_all<float>(threads, a);
    case Type::F16: return attend_all<F16>(threads, a);
    case Type::BF16: return attend_all<BF16>(threads, a);
  }
}
