// Rows as the products take them: normalised, and rounded. Included by a body, inside its namespace.

constexpr int64_t DEPTH = 32, WIDTH = 16;
constexpr int64_t BAND = 96;  // rows that use the same weights before others are read
#ifdef WITH_AVX512
constexpr int64_t ROWS_AT_ONCE = 8;  // whose sums are in registers
#else
constexpr int64_t ROWS_AT_ONCE = 6;
#endif

// 32 inputs of each row, zeros after a leaf's last one. Where a row is three, these are neighbours.
struct Rows {
  float* data;
  int64_t count, depths;
  static int64_t floats(int64_t count, int64_t depths) { return depths * ceil_to(count, 16) * DEPTH; }
  // All rows of one depth are together: [leaves, K / 32, rows, 32].
  template <class X = float>
  X* at(int64_t leaf, int64_t depth) const { return (X*)data + floats(count, leaf * depths + depth); }
  // All depths of eight rows are together: [leaves, rows / 8, K / 32, 8, 32].
  template <class X = float>
  X* at(int64_t leaf, int64_t depth, int64_t row) const {
    return at<X>(leaf, 0) + ((row / 8 * depths + depth) * 8 + row % 8) * DEPTH;
  }
};

// 1 / sqrt(mean(x^2) + eps).
inline Lanes norm_factor(const float* x, int64_t width, float eps) {
  Lanes squares = set(0.0f);
  for (int64_t k = 0; k < width; k += 16) {
    const Lanes v = widen_some(x + k, width - k);
    squares = fma(v, v, squares);
  }
  return set(1.0f / std::sqrt(sum(squares) / float(width) + eps));
}

inline void normalise(float* x, int64_t width, const Array& scale, float eps) {
  const Lanes factor = norm_factor(x, width, eps);
  for (int64_t k = 0; k < width; k += 16)
    narrow_some(x + k, widen_some(x + k, width - k) * factor * widen_some(scale, k, width - k), width - k);
}

// Whether the body has an instruction for weights of T that takes bfloat16 on both sides.
#if defined(WITH_AMX) || defined(WITH_DOTS)
template <class T>
constexpr bool takes_bfloat16 = std::is_same_v<T, BF16>;
#else
template <class T>
constexpr bool takes_bfloat16 = false;
#endif

inline bool is_fresh(const Product& p, int64_t m) { return !p.fresh || p.fresh[m] || m == 0; }

inline int64_t count_fresh(const Product& p) {
  int64_t count = 0;
  for (int64_t m = 0; m < p.live; m++) count += is_fresh(p, m);
  return count;
}

// Number `place` of the rows of x that are fresh.
inline int64_t fresh_row(const Product& p, int64_t place) {
  if (!p.fresh) return place;
  int64_t m = 0;
  while (place > 0) place -= is_fresh(p, ++m);
  return m;
}

// Where a prepared row begins in x, and what its norm multiplies it with.
struct Begin {
  int64_t at;
  Lanes factor;
};

inline Begin begin_of(const Product& p, int64_t place) {
  const int64_t at = fresh_row(p, place) * p.row_leaves() * p.inputs;
  return {at, p.norm ? norm_factor((const float*)p.x.data + at, p.inputs, p.eps) : set(1.0f)};
}

// take(part, the first 16 of 32 inputs, the others). A row whose float32 numbers are not to be rounded, and whose weights are
// bfloat16, becomes three rows of bfloat16, each of the eight bits that come next, which have the row as their exact sum.
// All its products are exact then.
template <class T, class F>
inline void for_each_part(const Product& p, const Begin& row, int64_t leaf, int64_t depth, const F& take) {
  const int64_t parts = p.parts();
  const bool is_rounded = parts > 1 || (p.rounds && !takes_bfloat16<T>);  // else not at all, or where it is put
  Lanes x[2];
  for (int half = 0; half < 2; half++) {
    const int64_t k = depth * DEPTH + half * 16, count = std::max<int64_t>(p.inputs - k, 0);
    x[half] = widen_some(p.x, row.at + leaf * p.inputs + k, count);
    if (p.norm) x[half] = x[half] * row.factor * widen_some(p.norm, k, count);
  }
  for (int64_t part = 0; part < parts; part++) {
    const Lanes first = is_rounded ? rounded_to<T>(x[0]) : x[0], second = is_rounded ? rounded_to<T>(x[1]) : x[1];
    take(part, first, second);
    x[0] = x[0] - first, x[1] = x[1] - second;
  }
}

#ifndef WITH_AMX  // which has its own for bfloat16
template <class T>
constexpr int64_t ROWS_PREPARED = 1;  // at once
inline void put_bfloat16(const Rows& rows, int64_t leaf, int64_t depth, int64_t row, Lanes first, Lanes second);
#endif

// The 32 inputs of a row to where the products of T want them.
template <class T>
inline void put(const Rows& rows, int64_t leaf, int64_t depth, int64_t row, Lanes first, Lanes second) {
#ifndef WITH_AMX
  if constexpr (takes_bfloat16<T>) return put_bfloat16(rows, leaf, depth, row, first, second);
#endif
#ifdef WITH_AVX512
  float* out = rows.at(leaf, depth, row);
  store(out, first), store(out + 16, second);
#else  // the even ones, then the odd ones
  float x[DEPTH], *out = rows.at(leaf, depth) + row * DEPTH;
  store(x, first), store(x + 16, second);
  for (int i = 0; i < 16; i++) out[i] = x[2 * i], out[16 + i] = x[2 * i + 1];
#endif
}

template <class T>
inline void prepare_row(const Product& p, const Rows& rows, int64_t place) {
  const Begin row = begin_of(p, place);
  for (int64_t leaf = 0; leaf < p.row_leaves(); leaf++)
    for (int64_t depth = 0; depth < rows.depths; depth++)
      for_each_part<T>(p, row, leaf, depth, [&](int64_t part, Lanes first, Lanes second) {
        put<T>(rows, leaf, depth, place * p.parts() + part, first, second);
      });
}
