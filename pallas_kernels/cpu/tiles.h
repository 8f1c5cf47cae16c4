// Products with bfloat16 weights by AMX. Included by a body, inside its namespace.
//
// TDPBF16PS is the definition of product.h's order. Its left operand is a tile of weights as they lie, 16 outputs by 32
// inputs; the right one is 16 rows, as pairs of inputs, [16 pairs, 16 rows, 2]. Tile 6 is the left, 7 the right, and 0 to
// 5 are the sums of a band's rows, [16 outputs, 16 rows].

// Rows lie as [.., rows / 16, 16 pairs, 16 rows, 2].
inline void put_bfloat16(const Rows& rows, int64_t leaf, int64_t depth, int64_t row, Lanes first, Lanes second) {
  BF16 narrowed[DEPTH];
  narrow(narrowed, first), narrow(narrowed + 16, second);
  BF16* out = rows.at<BF16>(leaf, depth) + row / 16 * 16 * DEPTH + row % 16 * 2;
  for (int i = 0; i < DEPTH; i += 2) std::memcpy(out + i * 16, narrowed + i, 2 * sizeof(BF16));
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define FOR_EACH_SUM(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)  // a tile's number is part of the instruction

// GROUPS times 16 rows from x on, a depth's rows `stride` numbers apart from the next one's.
template <int GROUPS>
inline void multiply_tiles(const BF16* w, int64_t inputs, const Group& group, const BF16* x, int64_t stride,
                           float (*c)[256]) {
#define ZERO(i) if constexpr (GROUPS > i) _tile_zero(i);
#define MULTIPLY(i) \
  if constexpr (GROUPS > i) { _tile_loadd(7, x + i * 16 * DEPTH, 64); _tile_dpbf16ps(i, 6, 7); }
#define STORE(i) if constexpr (GROUPS > i) _tile_stored(i, c[i], 64);
  FOR_EACH_SUM(ZERO)
  for (int64_t k = 0; k < inputs; k += DEPTH, x += stride) {
    fetch_next(w + group.ahead * inputs, inputs, k, WIDTH);
    if (group.count == WIDTH && inputs - k >= DEPTH) {
      fetch_soon(w, inputs, k);
      _tile_loadd(6, w + k, inputs * sizeof(BF16));
    } else {
      alignas(64) BF16 padded[WIDTH * DEPTH] = {};
      for (int64_t n = 0; n < group.count; n++)
        std::memcpy(padded + n * DEPTH, w + n * inputs + k, std::min<int64_t>(DEPTH, inputs - k) * sizeof(BF16));
      _tile_loadd(6, padded, 64);
    }
    FOR_EACH_SUM(MULTIPLY)
  }
  FOR_EACH_SUM(STORE)
#undef ZERO
#undef MULTIPLY
#undef STORE
}

inline void sum_bfloat16(const Product& p, const Rows& rows, int64_t leaf, int64_t first, int64_t count, const BF16* w,
                         const Group& group, Sums& sums) {
  static const TileConfig config;
  alignas(64) float c[BAND / 16][256];
  const BF16* x = rows.at<BF16>(leaf, 0) + first * DEPTH;
  const int64_t stride = rows.at<BF16>(leaf, 1) - rows.at<BF16>(leaf, 0);
  _tile_loadconfig(&config);
  switch (ceil_div(count, 16)) {
#define CASE(i) case i + 1: multiply_tiles<i + 1>(w, p.inputs, group, x, stride, c); break;
    FOR_EACH_SUM(CASE)
#undef CASE
  }
  _tile_release();
  for (int64_t r = 0; r < count; r += 8)  // [outputs, rows] becomes [rows, outputs]
    for (int n = 0; n < WIDTH; n += 8) {
      __m256 part[8];
      for (int i = 0; i < 8; i++) part[i] = _mm256_load_ps(&c[r / 16][(n + i) * 16 + r % 16]);
      transpose8(part);
      for (int i = 0; i < std::min<int64_t>(8, count - r); i++) _mm256_store_ps(&sums[r + i][n], part[i]);
    }
}
#undef FOR_EACH_SUM
