// Rows times weights. Included by a body, inside its namespace.
//
// The order of a sum along K is AMX's: of 32 inputs the even and the odd members are summed apart, each from zero by
// fused multiply-adds, the two sums are added, and that is added to the running sum. It holds for all types of weights,
// and does not know how many rows there are, how many threads, or which outputs are computed together.

using Sums = float[BAND][WIDTH];

// Up to 16 neighbouring outputs. The thread that computes them will probably take those `ahead` outputs further on next.
struct Group {
  int64_t first, count, ahead;
};

// sum_leaf by an instruction that takes bfloat16 on both sides.
inline void sum_bfloat16(const Product& p, const Rows& rows, int64_t leaf, int64_t first, int64_t count, const BF16* w,
                         const Group& group, Sums& sums);

#ifdef WITH_AVX512
// The blocks of some depths are turned, and all rows are multiplied with them. Meanwhile the weights of the outputs that
// come next are asked for, a few lines at a time: a core waits if it asks for many at once.
template <class Way, class T>
inline void sum_by(const Product& p, const Rows& rows, int64_t leaf, int64_t first, int64_t count, const T* w,
                   const Group& group, Sums& sums) {
  constexpr int64_t CHUNK = 16384 / sizeof(typename Way::Turned);  // a third of the first cache
  alignas(64) typename Way::Turned turned[CHUNK];
  T padded[WIDTH * DEPTH];
  std::memset(sums, 0, count * sizeof(sums[0]));
  // Of few rows few depths, so that arithmetic and reads of weights take turns quickly.
  const int64_t chunk = count <= ROWS_AT_ONCE / 2 ? 1 : count <= ROWS_AT_ONCE ? 4 : CHUNK;
  const int64_t turns = ceil_div(count, ROWS_AT_ONCE);
  const int64_t lines = ceil_div(WIDTH, turns);  // of each depth and turn
  for (int64_t from = 0; from < rows.depths; from += chunk) {
    const int64_t depths = std::min(chunk, rows.depths - from);
    for (int64_t depth = 0; depth < depths; depth++) {
      const int64_t k = (from + depth) * DEPTH;
      fetch_soon(w, p.inputs, k);
      Way::turn(block_of(w, p.inputs, group.count, k, p.inputs, padded), turned[depth]);
    }
    const T* next = w + group.ahead * p.inputs;
    for (int64_t r = 0; r < count; r += ROWS_AT_ONCE, next += lines * p.inputs)
      with_rows(std::min(count - r, ROWS_AT_ONCE), [&](auto size) {
        const auto* x = rows.at<typename Way::Number>(leaf, from, first + r);
        multiply<Way, size()>(depths, x, turned, sums[r], [&](int64_t depth) {
          fetch_next(next, p.inputs, (from + depth) * DEPTH, lines);
        });
      });
  }
}
#endif

// A leaf's sums of `count` prepared rows from `first` on and of a group, whose weights begin at element `w`.
template <class T>
inline void sum_leaf(const Product& p, const Rows& rows, int64_t leaf, int64_t first, int64_t count, int64_t w,
                     const Group& group, Sums& sums) {
  const T* weights = (const T*)p.w.data + w;
  if constexpr (HAS_BFLOAT16 && std::is_same_v<T, BF16>)
    if (p.rounds) return sum_bfloat16(p, rows, leaf, first, count, weights, group, sums);
#ifdef WITH_AVX512
  sum_by<Pairs>(p, rows, leaf, first, count, weights, group, sums);
#else
  std::memset(sums, 0, count * sizeof(sums[0]));
  alignas(64) Panel panel;
  T padded[WIDTH * DEPTH];
  for (int64_t depth = 0; depth < rows.depths; depth++) {
    fetch_soon(weights, p.inputs, depth * DEPTH);
    fetch_next(weights + group.ahead * p.inputs, p.inputs, depth * DEPTH, WIDTH);
    const Block<T> block = block_of(weights, p.inputs, group.count, depth * DEPTH, p.inputs, padded);
    fill8(block.w, block.stride, panel, 0), fill8(block.w + 8 * block.stride, block.stride, panel, 8);
    const float* x = rows.at(leaf, depth) + first * DEPTH;
    int64_t r = 0;  // parts of about the same number of rows, because few rows are few chains, which wait for one another
    for (int64_t parts = ceil_div(count, ROWS_AT_ONCE); parts > 0; parts--) {
      const int64_t size = ceil_div(count - r, parts);
      with_rows(size, [&](auto size) { multiply<size()>(panel, x + r * DEPTH, sums[r]); });
      r += size;
    }
  }
#endif
}

// Sums over leaves as sharding/leaves.py adds them, ((l0 + l1) + (l2 + l3)) + ..., with one partial sum a level kept.
constexpr int LEVELS = 8;

template <class T>
inline void sum_tree(const Product& p, const Rows& rows, int64_t first, int64_t count, const Group& group,
                     Sums (&levels)[LEVELS]) {
  for (int64_t leaf = 0; leaf < p.leaves; leaf++) {
    int level = 0;
    for (int64_t bits = leaf; bits & 1; bits >>= 1) level++;
    Sums& own = levels[level];  // free: the sums of lower levels end up here
    float spare[BAND][WIDTH];
    const int64_t w = (leaf * p.outputs + group.first) * p.inputs;
    sum_leaf<T>(p, rows, leaf, first, count, w, group, level ? spare : own);
    for (int below = 0; below < level; below++)
      for (int64_t r = 0; r < count; r++) {
        float* out = below == level - 1 ? own[r] : spare[r];
        store(out, load(levels[below][r]) + load(spare[r]));
      }
  }
}

inline void finish_row(const Product& p, int64_t m, int64_t column, int64_t columns, int64_t outputs, Lanes total) {
  float* y = (float*)p.y + m * columns + column;
  if (p.form == Form::ADDED) total = widen_some(p.residual + m * columns + column, outputs) + total;
  if (p.bias) total = total + widen_some(p.bias, column, outputs);
  narrow_some(y, total, outputs);
}

// One band of rows times a group of those of a section (of GATED a leaf, else everything).
template <class T>
inline void run_group(const Product& p, const Rows& rows, int64_t row, int64_t section, const Group& group,
                      int64_t section_outputs, int64_t columns) {
  const int64_t count = std::min(BAND, rows.count - row), n = group.first, outputs = group.count;
  const int64_t column = section * section_outputs + n;
  alignas(64) Sums levels[LEVELS];
  if (p.form == Form::GATED) {
    const int64_t gates = (section * p.outputs + n) * p.inputs, ups = gates + section_outputs * p.inputs;
    sum_leaf<T>(p, rows, 0, row, count, gates, group, levels[0]);
    sum_leaf<T>(p, rows, 0, row, count, ups, group, levels[1]);
    for (int64_t r = 0; r < count; r++)
      narrow_some((T*)p.y + (row + r) * columns + column, silu(load(levels[0][r])) * load(levels[1][r]), outputs);
    return;
  }
  int top = 0;
  if (p.form == Form::ADDED) {
    sum_tree<T>(p, rows, row, count, group, levels);
    while ((int64_t(1) << top) < p.leaves) top++;
  } else {
    sum_leaf<T>(p, rows, 0, row, count, n * p.inputs, group, levels[0]);
  }
  for (int64_t r = 0; r < count; r++) finish_row(p, row + r, column, columns, outputs, load(levels[top][r]));
}

// The first `count` rows of y are those of the fresh rows. Of each, `size` columns from `first` on go to the rows that they
// belong to, from the last row on, so that none is written over before it is read.
inline void spread_rows(const Product& p, int64_t count, int64_t columns, int64_t first, int64_t size) {
  float* y = (float*)p.y + first;
  for (int64_t m = p.live - 1, from = count - 1; m > from; m--) {
    std::memcpy(y + m * columns, y + from * columns, size * sizeof(float));
    from -= is_fresh(p, m);
  }
}

template <class T>
inline void product_of(Threads& threads, const Product& p) {
  const bool gated = p.form == Form::GATED, added = p.form == Form::ADDED;
  const int64_t sections = gated ? p.leaves : 1;
  const int64_t section_outputs = gated ? p.outputs / 2 : added ? p.outputs : p.leaves * p.outputs;
  const int64_t columns = sections * section_outputs;
  const int64_t bytes = gated ? sizeof(T) : sizeof(float);
  std::memset((char*)p.y + p.live * columns * bytes, 0, (p.zeros_to - p.live) * columns * bytes);
  if (p.live == 0) return;

  const int64_t leaves = added ? p.leaves : 1, depths = ceil_div(p.inputs, DEPTH);
  static thread_local Scratch of_rows;
  const int64_t count = count_fresh(p);
  const Rows rows{of_rows.floats(Rows::floats(count, leaves * depths)), count, depths};
  const int64_t few = ceil_div(count, 4 * threads.count());  // rows to a task
  parallel(threads, ceil_div(count, few), [&](int64_t task) {
    for (int64_t m = task * few; m < std::min(count, (task + 1) * few); m++) prepare_row<T>(p, rows, m);
  });

  const int64_t groups = ceil_div(section_outputs, WIDTH), all = sections * groups;
  const int64_t each = std::min<int64_t>(std::max<int64_t>(all / (8 * threads.count()), 1), 8);  // groups to a task
  parallel(threads, ceil_div(all, each), [&](int64_t task) {
    const int64_t first = task * each, end = std::min(all, first + each);
    for (int64_t row = 0; row < count; row += BAND)
      for (int64_t g = first; g < end; g++) {
        const int64_t n = g % groups * WIDTH, ahead = g + 1 < end ? WIDTH : (1 + (threads.count() - 1) * each) * WIDTH;
        run_group<T>(p, rows, row, g / groups, {n, std::min(WIDTH, section_outputs - n), ahead}, section_outputs, columns);
      }
    if (p.fresh) spread_rows(p, count, columns, first * WIDTH, std::min(end * WIDTH, columns) - first * WIDTH);
  });
}

inline void product(Threads& threads, const Product& p) {
  switch (p.w.type) {
    case Type::F32: return product_of<float>(threads, p);
    case Type::F16: return product_of<F16>(threads, p);
    case Type::BF16: return product_of<BF16>(threads, p);
  }
}
