// Rows times weights. Included by a body, inside its namespace.
//
// The order of a sum along K is AMX's: of 32 inputs the even and the odd members are summed apart, each from zero by
// fused multiply-adds, the two sums are added, and that is added to the running sum. It holds for all types of weights,
// and does not know how many rows there are, how many threads, or which outputs are computed together. Where float32 rows
// meet bfloat16 weights, each row is three (rows.h) whose results are added, the first to the sum of the others.

// A leaf's sums of `count` prepared rows from `first` on and of a group, whose weights begin at element `w`.
template <class T>
inline void sum_leaf(const Product& p, const Rows& rows, int64_t leaf, int64_t first, int64_t count, int64_t w,
                     const Group& group, Sums& sums) {
  const T* weights = (const T*)p.w.data + w;
#ifdef WITH_AVX512
  if constexpr (takes_bfloat16<T>) sum_bfloat16(p, rows, leaf, first, count, weights, group, sums);
  else sum_by<Pairs>(p, rows, leaf, first, count, weights, group, sums);
#else
  std::memset(sums, 0, count * sizeof(sums[0]));
  alignas(64) Panel panel;
  T padded[WIDTH * DEPTH];
  for (int64_t depth = 0; depth < rows.depths; depth++) {
    fetch_soon(weights, p.inputs, depth * DEPTH);
    fetch_next(group, weights, p.inputs, depth * DEPTH, 0, WIDTH);
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

#ifndef WITH_AMX
class Instructions {  // that have to be switched on
 public:
  Instructions(int64_t, int64_t) {}
};
inline int64_t tile_rows(int64_t count) { return count; }
template <class T>
inline int64_t rows_held(int64_t count) { return count; }
template <class T>
inline void make_rows(Sums&, int64_t) {}
#endif

// Sums over leaves as sharding/leaves.py adds them, ((l0 + l1) + (l2 + l3)) + ...: those of a few leaves, and of their
// pairs one partial sum a level.
struct Tree {
  alignas(64) Sums leaves[4], levels[LEVELS];
};

// Two leaves are added once the next one has been multiplied: by then what the instructions stored is there.
template <class T>
inline Sums& sum_tree(const Product& p, const Rows& rows, int64_t first, int64_t count, const Group& group, Tree& tree) {
  const auto add_pair = [&](int64_t pair) -> Sums& {
    int level = 0;
    while (pair >> level & 1) level++;  // the sums of lower levels end up in this one, which is free
    const Sums &even = tree.leaves[2 * pair % 4], &odd = tree.leaves[2 * pair % 4 + 1];
    for (int64_t r = 0; r < rows_held<T>(count); r++) {
      Lanes total = load(even[r]) + load(odd[r]);
      for (int below = 0; below < level; below++) total = load(tree.levels[below][r]) + total;
      store(tree.levels[level][r], total);
    }
    return tree.levels[level];
  };
  for (int64_t leaf = 0; leaf < p.leaves; leaf++) {
    const int64_t w = (leaf * p.outputs + group.first) * p.inputs;
    sum_leaf<T>(p, rows, leaf, first, count, w, group, tree.leaves[leaf % 4]);
    if (leaf > 0 && leaf % 2 == 0) add_pair(leaf / 2 - 1);
  }
  return p.leaves == 1 ? tree.leaves[0] : add_pair(p.leaves / 2 - 1);
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
  const int64_t parts = p.parts(), n = group.first, outputs = group.count;
  const int64_t count = std::min(BAND / parts, rows.count / parts - row);
  const int64_t column = section * section_outputs + n;
  Tree tree;
  if (p.form == Form::GATED) {
    const int64_t gates = (section * p.outputs + n) * p.inputs, ups = gates + section_outputs * p.inputs;
    Sums &y = tree.leaves[0], &ups_of_rows = tree.leaves[1];
    sum_leaf<T>(p, rows, 0, row, count, gates, group, y);
    sum_leaf<T>(p, rows, 0, row, count, ups, group, ups_of_rows);
    for (int64_t r = 0; r < rows_held<T>(count); r++) store(y[r], silu(load(y[r])) * load(ups_of_rows[r]));
    make_rows<T>(y, count);
    for (int64_t r = 0; r < count; r++) narrow_some((T*)p.y + (row + r) * columns + column, load(y[r]), outputs);
    return;
  }
  Sums* sums = &tree.leaves[0];
  if (p.form == Form::ADDED) sums = &sum_tree<T>(p, rows, row, count, group, tree);
  else sum_leaf<T>(p, rows, 0, row * parts, count * parts, n * p.inputs, group, *sums);
  make_rows<T>(*sums, count * parts);
  for (int64_t r = 0; r < count; r++) {
    const float(*own)[WIDTH] = *sums + r * parts;
    const Lanes total = parts == 1 ? load(own[0]) : load(own[0]) + (load(own[1]) + load(own[2]));
    finish_row(p, row + r, column, columns, outputs, total);
  }
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
inline void prepare_rows(const Product& p, const Rows& rows, int64_t first, int64_t end) {
#ifdef WITH_AMX
  if constexpr (takes_bfloat16<T>) {
    for (int64_t place = first; place < end; place += 16) prepare_tiles(p, rows, place, std::min(end, place + 16));
    return;
  }
#endif
  for (int64_t place = first; place < end; place++) prepare_row<T>(p, rows, place);
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

  const int64_t depths = ceil_div(p.inputs, DEPTH);
  static thread_local Scratch of_rows;
  const int64_t count = count_fresh(p), parts = p.parts();
  const Rows rows{of_rows.floats(Rows::floats(count * parts, p.row_leaves() * depths)), count * parts, depths};
  const int64_t few = ceil_to(ceil_div(count, 4 * threads.count()), ROWS_PREPARED<T>);  // rows to a task
  const int64_t groups = ceil_div(section_outputs, WIDTH), all = sections * groups;
  const int64_t each = std::min<int64_t>(std::max<int64_t>(all / (8 * threads.count()), 1), 8);  // groups to a task
  const auto place_of = [&](int64_t g) { return g / groups * p.outputs + g % groups * WIDTH; };  // among a leaf's outputs
  // Rows come first, and what is left of them when all are claimed is waited for: a thread that slept would be late.
  const int64_t preparations = ceil_div(count, few);
  std::atomic<int64_t> prepared{0};
  parallel(threads, preparations + ceil_div(all, each), [&](int64_t task) {
    if (task < preparations) {
      prepare_rows<T>(p, rows, task * few, std::min(count, (task + 1) * few));
      prepared.fetch_add(1, std::memory_order_release);
      return;
    }
    while (prepared.load(std::memory_order_acquire) < preparations) _mm_pause();
    const int64_t first = (task - preparations) * each, end = std::min(all, first + each);
    const Instructions instructions(16, tile_rows(rows.count));
    for (int64_t row = 0; row < count; row += BAND / parts)
      for (int64_t g = first; g < end; g++) {
        const int64_t n = g % groups * WIDTH, next = g + 1 < end ? g + 1 : end + (threads.count() - 1) * each;
        const int64_t ahead = row == 0 && next < all ? place_of(next) - place_of(g) : 0;
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
