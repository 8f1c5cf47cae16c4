// Rows times weights. Included by a body, inside its namespace.
//
// The order of a sum along K is AMX's: of 32 inputs the even and the odd members are summed apart, each from zero by
// fused multiply-adds, the two sums are added, and that is added to the running sum. It holds for all types of weights,
// and does not know how many rows there are, how many threads, or which outputs are computed together.
//
// Lanes are outputs. Weights are read as they lie, 16 outputs by 32 inputs at a time, and turned into a panel of 32
// inputs by 16 outputs, which stays in the first cache while all rows of a band are multiplied with it.

// -- panels of weights ------------------------------------------------------------------------------------------------

using Panel = float[2][16][WIDTH];  // even and odd inputs, outputs

inline void transpose8(__m256 r[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  }
}

// 8 outputs, whose weights lie `stride` apart, at columns [at, at + 8) of the panel.
inline void fill8(const BF16* w, int64_t stride, Panel& panel, int at) {
  const __m256 high_half = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff0000));
  for (int k = 0; k < DEPTH; k += 16) {
    __m256 pairs[8];
    for (int n = 0; n < 8; n++) pairs[n] = _mm256_loadu_ps((const float*)(w + n * stride + k));
    transpose8(pairs);
    for (int i = 0; i < 8; i++) {
      const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(pairs[i]), 16);
      _mm256_store_ps(&panel[0][k / 2 + i][at], _mm256_castsi256_ps(shifted));
      _mm256_store_ps(&panel[1][k / 2 + i][at], _mm256_and_ps(pairs[i], high_half));
    }
  }
}

template <class T>  // float and F16
inline void fill8(const T* w, int64_t stride, Panel& panel, int at) {
  for (int k = 0; k < DEPTH; k += 8) {
    __m256 inputs[8];
    for (int n = 0; n < 8; n++) inputs[n] = widen8(w + n * stride + k);
    transpose8(inputs);
    for (int i = 0; i < 8; i++) _mm256_store_ps(&panel[i % 2][(k + i) / 2][at], inputs[i]);
  }
}

// Ask for the weights that come soon, and for the next outputs', of which the first ones come without notice.
template <class T>
inline void fetch_next(const T* w, int64_t stride, int64_t k) {
  for (int n = 0; n < WIDTH; n++) {
    _mm_prefetch((const char*)(w + n * stride + k) + 256, _MM_HINT_T0);
    _mm_prefetch((const char*)(w + (WIDTH + n) * stride + k), _MM_HINT_T1);
  }
}

// Weights [.., stride] of `outputs` <= 16 outputs from w on, inputs [k, k + 32) of which `inputs` exist; zeros elsewhere.
template <class T>
inline void fill(const T* w, int64_t stride, int64_t outputs, int64_t k, int64_t inputs, Panel& panel) {
  if (outputs == WIDTH && inputs - k >= DEPTH) {
    fetch_next(w, stride, k);
    fill8(w + k, stride, panel, 0);
    fill8(w + 8 * stride + k, stride, panel, 8);
    return;
  }
  T padded[WIDTH * DEPTH] = {};
  for (int64_t n = 0; n < outputs; n++)
    std::memcpy(padded + n * DEPTH, w + n * stride + k, std::min<int64_t>(DEPTH, inputs - k) * sizeof(T));
  fill8(padded, DEPTH, panel, 0);
  fill8(padded + 8 * DEPTH, DEPTH, panel, 8);
}

// -- products ---------------------------------------------------------------------------------------------------------

// R rows times a panel, added to their running sums.
template <int R>
inline void multiply(const Panel& panel, const float* x, float* sums) {
  Lanes even[R], odd[R];
  for (int r = 0; r < R; r++) even[r] = odd[r] = set(0.0f);
  for (int i = 0; i < 16; i++) {
    const Lanes w = load(panel[0][i]);
    for (int r = 0; r < R; r++) even[r] = fma(set(x[r * DEPTH + i]), w, even[r]);
  }
  for (int i = 0; i < 16; i++) {
    const Lanes w = load(panel[1][i]);
    for (int r = 0; r < R; r++) odd[r] = fma(set(x[r * DEPTH + 16 + i]), w, odd[r]);
  }
  for (int r = 0; r < R; r++) store(sums + r * WIDTH, load(sums + r * WIDTH) + (even[r] + odd[r]));
}

constexpr int64_t ROWS_AT_ONCE = 6;

// In parts of about the same number of rows, because few rows are few chains, which wait for one another.
inline void multiply_all(const Panel& panel, const float* x, int64_t rows, float* sums) {
  for (int64_t parts = ceil_div(rows, ROWS_AT_ONCE); parts > 0; parts--) {
    const int64_t size = ceil_div(rows, parts);
    switch (size) {
      case 1: multiply<1>(panel, x, sums); break;
      case 2: multiply<2>(panel, x, sums); break;
      case 3: multiply<3>(panel, x, sums); break;
      case 4: multiply<4>(panel, x, sums); break;
      case 5: multiply<5>(panel, x, sums); break;
      case 6: multiply<6>(panel, x, sums); break;
    }
    rows -= size, x += size * DEPTH, sums += size * WIDTH;
  }
}

using Sums = float[BAND][WIDTH];

#ifdef WITH_AMX
inline void sum_by_tiles(const Product& p, const Rows& rows, int64_t leaf, int64_t first, int64_t count, int64_t w,
                         int64_t outputs, Sums& sums);  // tiles.h
#endif

// A leaf's sums of `count` prepared rows from `first` on and of up to 16 outputs, whose weights begin at element `w`.
template <class T>
inline void sum_leaf(const Product& p, const Rows& rows, int64_t leaf, int64_t first, int64_t count, int64_t w,
                     int64_t outputs, Sums& sums) {
  std::memset(sums, 0, count * sizeof(sums[0]));
#ifdef WITH_AMX
  if constexpr (std::is_same_v<T, BF16>) return sum_by_tiles(p, rows, leaf, first, count, w, outputs, sums);
#endif
  alignas(64) Panel panel;
  for (int64_t depth = 0; depth < rows.depths; depth++) {
    fill((const T*)p.w.data + w, p.inputs, outputs, depth * DEPTH, p.inputs, panel);
    multiply_all(panel, rows.at(leaf, depth) + first * DEPTH, count, sums[0]);
  }
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
  const int64_t size = std::min(rows.band(), rows.count - row), outputs = std::min<int64_t>(WIDTH, section_outputs - n);
  const int64_t first = row * rows.parts, count = size * rows.parts, column = section * section_outputs + n;
  alignas(64) Sums levels[LEVELS];
  if (p.form == Form::GATED) {
    const int64_t gates = (section * p.outputs + n) * p.inputs, ups = gates + section_outputs * p.inputs;
    sum_leaf<T>(p, rows, 0, first, count, gates, outputs, levels[0]);
    sum_leaf<T>(p, rows, 0, first, count, ups, outputs, levels[1]);
    for (int64_t r = 0; r < size; r++)
      narrow_some((T*)p.y + (row + r) * columns + column, silu(load(levels[0][r])) * load(levels[1][r]), outputs);
    return;
  }
  int top = 0;
  if (p.form == Form::ADDED) {
    sum_tree<T>(p, rows, first, count, n, outputs, levels);
    while ((int64_t(1) << top) < p.leaves) top++;
  } else {
    sum_leaf<T>(p, rows, 0, first, count, n * p.inputs, outputs, levels[0]);
  }
  for (int64_t r = 0; r < size; r++) {
    Lanes total = load(levels[top][r]);
    if (rows.parts == 3) total = total + (load(levels[0][size + r]) + load(levels[0][2 * size + r]));
    finish_row(p, row + r, column, columns, outputs, total);
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
  const Rows rows{of_rows.floats(Rows::floats(p.live, leaves * depths, p.parts)), p.live, depths, p.parts};
  const int64_t few = ceil_div(p.live, 4 * threads.count());  // rows to a task
  parallel(threads, ceil_div(p.live, few), [&](int64_t task) {
    static thread_local Scratch of_row;
    float* row = of_row.floats(leaves * p.inputs);
    for (int64_t m = task * few; m < std::min(p.live, (task + 1) * few); m++) prepare_row<T>(p, rows, m, row);
  });

  const int64_t groups = ceil_div(section_outputs, WIDTH), all = sections * groups;
  const int64_t each = std::min<int64_t>(std::max<int64_t>(all / (8 * threads.count()), 1), 8);  // groups to a task
  parallel(threads, ceil_div(all, each), [&](int64_t task) {
    for (int64_t row = 0; row < p.live; row += rows.band())
      for (int64_t g = task * each; g < std::min(all, (task + 1) * each); g++)
        run_group<T>(p, rows, row, g / groups, g % groups * WIDTH, section_outputs, columns);
  });
}

inline void product(Threads& threads, const Product& p) {
  switch (p.w.type) {
    case Type::F32: return product_of<float>(threads, p);
    case Type::F16: return product_of<F16>(threads, p);
    case Type::BF16: return product_of<BF16>(threads, p);
  }
}
