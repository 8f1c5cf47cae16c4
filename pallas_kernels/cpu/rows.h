// Rows as the products take them: normalised, and rounded. Included by a body, inside its namespace.

constexpr int DEPTH = 32, WIDTH = 16;
constexpr int64_t BAND = 96;  // rows that use the same weights before others are read
#ifdef WITH_AVX512
constexpr int64_t ROWS_AT_ONCE = 8;  // whose sums are in registers
#else
constexpr int64_t ROWS_AT_ONCE = 6;
#endif

// 32 inputs of each row, zeros after a leaf's last one.
struct Rows {
  float* data;
  int64_t count, depths;
  static int64_t floats(int64_t count, int64_t depths) { return depths * ceil_to(count, 16) * DEPTH; }
  // All rows of one depth are together: [leaves, K / 32, rows, 32].
  float* at(int64_t leaf, int64_t depth) const { return data + floats(count, leaf * depths + depth); }
  // All depths of eight rows are together: [leaves, rows / 8, K / 32, 8, 32].
  float* at(int64_t leaf, int64_t depth, int64_t row) const {
    return at(leaf, 0) + ((row / 8 * depths + depth) * 8 + row % 8) * DEPTH;
  }
};

// x / sqrt(mean(x^2) + eps) · scale.
inline void normalise(float* x, int64_t width, const Array& scale, float eps) {
  Lanes squares = set(0.0f);
  for (int64_t k = 0; k < width; k += 16) {
    const Lanes v = widen_some(x + k, width - k);
    squares = fma(v, v, squares);
  }
  const Lanes factor = set(1.0f / std::sqrt(sum(squares) / float(width) + eps));
  for (int64_t k = 0; k < width; k += 16)
    narrow_some(x + k, widen_some(x + k, width - k) * factor * widen_some(scale, k, width - k), width - k);
}

#ifdef WITH_AMX
inline void put_pairs(const float* x, float* rows, int64_t place);  // tiles.h
#endif

// Whether AMX multiplies: it takes bfloat16 on both sides.
template <class T>
inline bool by_tiles(const Product& p) {
#ifdef WITH_AMX
  return std::is_same_v<T, BF16> && p.rounds;
#else
  return false;
#endif
}

// The 32 inputs x of a row, as the products of T want them.
template <class T>
inline void put(const Product& p, const float* x, const Rows& rows, int64_t leaf, int64_t depth, int64_t row) {
#ifdef WITH_AMX
  if (by_tiles<T>(p)) return put_pairs(x, rows.at(leaf, depth), row);
#endif
#ifdef WITH_AVX512
  std::memcpy(rows.at(leaf, depth, row), x, DEPTH * sizeof(float));
#else  // the even ones, then the odd ones
  float* out = rows.at(leaf, depth) + row * DEPTH;
  for (int i = 0; i < 16; i++) out[i] = x[2 * i], out[16 + i] = x[2 * i + 1];
#endif
}

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

// `row` is a thread's own memory, as wide as x and padded to DEPTH.
template <class T>
inline void prepare_row(const Product& p, const Rows& rows, int64_t place, float* row) {
  const int64_t width = p.form == Form::ADDED ? p.leaves * p.inputs : p.inputs, m = fresh_row(p, place);
  for (int64_t k = 0; k < width; k += 16) narrow_some(row + k, widen_some(p.x, m * width + k, width - k), width - k);
  if (p.norm) normalise(row, width, p.norm, p.eps);
  const int64_t leaves = width / p.inputs;
  for (int64_t leaf = 0; leaf < leaves; leaf++)
    for (int64_t depth = 0; depth < rows.depths; depth++) {
      alignas(64) float here[DEPTH];
      for (int i = 0; i < DEPTH; i += 16) {
        const int64_t k = depth * DEPTH + i;
        const Lanes v = widen_some(row + leaf * p.inputs + k, std::max<int64_t>(p.inputs - k, 0));
        store(here + i, p.rounds ? rounded_to<T>(v) : v);
      }
      put<T>(p, here, rows, leaf, depth, place);
    }
}
