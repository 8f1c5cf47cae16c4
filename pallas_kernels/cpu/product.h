// Rows times weights. Included by a body, inside its namespace.
//
// The order of a sum along K is AMX's: of 32 inputs the even and the odd members are summed apart, each from zero by
// fused multiply-adds, the two sums are added, and that is added to the running sum. It holds for all types of weights,
// and does not know how many rows there are, how many threads, or which outputs are computed together.

using Sums = float[BAND][WIDTH];

#ifdef WITH_AMX
inline void sum_by_tiles(const Product& p, const Rows& rows, int64_t leaf, int64_t first, int64_t count, int64_t w,
                         int64_t outputs, Sums& sums);  // tiles.h
#endif

// A leaf's sums of `count` prepared rows from `first` on and of up to 16 outputs, whose weights begin at element `w`.
template <class T>
inline void sum_leaf(const Product& p, const Rows& rows, int64_t leaf, int64_t first, int64_t count, int64_t w,
                     int64_t outputs, Sums& sums) {
#ifdef WITH_AMX
  if (by_tiles<T>(p)) return sum_by_tiles(p, rows, leaf, first, count, w, outputs, sums);
#endif
  const T* weights = (const T*)p.w.data + w;
  std::memset(sums, 0, count * sizeof(sums[0]));
  alignas(64) Panel panel;
  T padded[WIDTH * DEPTH];
#ifdef WITH_AVX512
  const auto block = [&](int64_t depth) {
    fetch_next(weights, p.inputs, depth * DEPTH);
    return block_of(weights, p.inputs, outputs, depth * DEPTH, p.inputs, padded);
  };
  if (count <= ROWS_AT_ONCE) {
    with_rows(count, [&](auto size) {
      multiply<size()>(rows.depths, rows.at(leaf, 0, first), sums[0],
                       [&](int64_t depth, const auto& f) { for_pairs(block(depth), f); });
    });
    return;
  }
  for (int64_t from = 0; from < rows.depths; from += CHUNK) {
    const int64_t depths = std::min(CHUNK, rows.depths - from);
    for (int64_t depth = 0; depth < depths; depth++)
      for_pairs(block(from + depth), [&](int i, Lanes w_first, Lanes w_second) {
        store(panel[depth][i][0], w_first), store(panel[depth][i][1], w_second);
      });
    for (int64_t r = 0; r < count; r += ROWS_AT_ONCE)
      with_rows(std::min(count - r, ROWS_AT_ONCE), [&](auto size) {
        multiply<size()>(depths, rows.at(leaf, from, first + r), sums[r], [&](int64_t depth, const auto& f) {
          for (int i = 0; i < 16; i++) f(i, load(panel[depth][i][0]), load(panel[depth][i][1]));
        });
      });
  }
#else
  for (int64_t depth = 0; depth < rows.depths; depth++) {
    fetch_next(weights, p.inputs, depth * DEPTH);
    const Block<T> block = block_of(weights, p.inputs, outputs, depth * DEPTH, p.inputs, padded);
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
inline void sum_tree(const Product& p, const Rows& rows, int64_t first, int64_t count, int64_t n, int64_t outputs,
                     Sums (&levels)[LEVELS]) {
  for (int64_t leaf = 0; leaf < p.leaves; leaf++) {
    int level = 0;
    for (int64_t bits = leaf; bits & 1; bits >>= 1) level++;
    Sums& own = levels[level];  // free: the sums of lower levels end up here
    float spare[BAND][WIDTH];
    sum_leaf<T>(p, rows, leaf, first, count, (leaf * p.outputs + n) * p.inputs, outputs, level ? spare : own);
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

// One band of rows times up to 16 outputs: number `group` of those of a section (of GATED a leaf, else everything).
template <class T>
inline void run_group(const Product& p, const Rows& rows, int64_t row, int64_t section, int64_t n, int64_t section_outputs,
                      int64_t columns) {
  const int64_t count = std::min(BAND, rows.count - row), outputs = std::min<int64_t>(WIDTH, section_outputs - n);
  const int64_t column = section * section_outputs + n;
  alignas(64) Sums levels[LEVELS];
  if (p.form == Form::GATED) {
    const int64_t gates = (section * p.outputs + n) * p.inputs, ups = gates + section_outputs * p.inputs;
    sum_leaf<T>(p, rows, 0, row, count, gates, outputs, levels[0]);
    sum_leaf<T>(p, rows, 0, row, count, ups, outputs, levels[1]);
    for (int64_t r = 0; r < count; r++)
      narrow_some((T*)p.y + (row + r) * columns + column, silu(load(levels[0][r])) * load(levels[1][r]), outputs);
    return;
  }
  int top = 0;
  if (p.form == Form::ADDED) {
    sum_tree<T>(p, rows, row, count, n, outputs, levels);
    while ((int64_t(1) << top) < p.leaves) top++;
  } else {
    sum_leaf<T>(p, rows, 0, row, count, n * p.inputs, outputs, levels[0]);
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
    static thread_local Scratch of_row;
    float* row = of_row.floats(leaves * p.inputs);
    for (int64_t m = task * few; m < std::min(count, (task + 1) * few); m++) prepare_row<T>(p, rows, m, row);
  });

  const int64_t groups = ceil_div(section_outputs, WIDTH), all = sections * groups;
  const int64_t each = std::min<int64_t>(std::max<int64_t>(all / (8 * threads.count()), 1), 8);  // groups to a task
  parallel(threads, ceil_div(all, each), [&](int64_t task) {
    const int64_t first = task * each, end = std::min(all, first + each);
    for (int64_t row = 0; row < count; row += BAND)
      for (int64_t g = first; g < end; g++)
        run_group<T>(p, rows, row, g / groups, g % groups * WIDTH, section_outputs, columns);
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
