// Products with bfloat16 weights by AMX. Included by a body, inside its namespace.
//
// TDPBF16PS is the definition of product.h's order. Its left operand is a tile of weights as they lie, 16 outputs by 32
// inputs; the right one is 16 rows, as pairs of inputs, [16 pairs, 16 rows, 2]. Tile 6 is the left, 7 the right, and 0 to
// 5 are the sums of a band's rows, [16 outputs, 16 rows].

// [16, 16] words of 32 bits; of each row of the result only the first `columns` where they are fewer.
inline void transpose16(const float* x, float* y, int64_t columns = 16) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_load_ps(x + i * 16);
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
      r[i + 2 * j + 1] = _mm512_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 16; i += 8)  // quarters of r[i + j] are columns j, 4 + j, 8 + j, 12 + j of four rows
    for (int j = 0; j < 4; j++) {
      t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_f32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
  const __mmask16 some = __mmask16((1u << columns) - 1);
  for (int j = 0; j < 8; j++) {
    _mm512_mask_storeu_ps(y + j * columns, some, _mm512_shuffle_f32x4(t[j], t[8 + j], 0x88));
    _mm512_mask_storeu_ps(y + (8 + j) * columns, some, _mm512_shuffle_f32x4(t[j], t[8 + j], 0xdd));
  }
}

// The rows of a tile: where there are fewer than 16 in all, no more, so that they take less of the caches.
inline int64_t tile_rows(int64_t count) { return std::min<int64_t>(count, 16); }

// Rows lie as they are read, [leaves, bands, K / 32, a band's tiles, 16 pairs, tile_rows, 2].
inline BF16* tile_of(const Rows& rows, int64_t leaf, int64_t depth, int64_t row) {
  const int64_t band = row / BAND * BAND, tiles = ceil_div(std::min(BAND, rows.count - band), 16);
  const int64_t before = band * rows.depths + (depth * tiles + (row - band) / 16) * tile_rows(rows.count);
  return rows.at<BF16>(leaf, 0) + before * DEPTH;
}

template <class T>
constexpr int64_t ROWS_PREPARED = takes_bfloat16<T> ? 16 : 1;  // at once

// At most 16 places.
inline void prepare_tiles(const Product& p, const Rows& rows, int64_t first, int64_t end) {
  const int64_t parts = p.parts(), count = (end - first) * parts, columns = tile_rows(rows.count);
  Begin begins[16];
  for (int64_t place = first; place < end; place++) begins[place - first] = begin_of(p, place);
  alignas(64) BF16 tiles[3 * 16 * DEPTH] = {};  // [rows, 32]
  for (int64_t leaf = 0; leaf < p.row_leaves(); leaf++)
    for (int64_t depth = 0; depth < rows.depths; depth++) {
      for (int64_t i = 0; i < end - first; i++)
        for_each_part<BF16>(p, begins[i], leaf, depth, [&](int64_t part, Lanes lower, Lanes upper) {
          BF16* row = tiles + (i * parts + part) * DEPTH;
          narrow(row, lower), narrow(row + 16, upper);
        });
      for (int64_t row = 0; row < count; row += 16)
        transpose16((float*)(tiles + row * DEPTH), (float*)tile_of(rows, leaf, depth, first * parts + row), columns);
    }
}

// Compilers do not know that the instructions for tiles read and write memory. What is written before this is in memory,
// at `at` too where nobody else knows its address, and what is read after it is read from there.
inline void settle_memory(const void* at) { asm volatile("" : : "r"(at) : "memory"); }

// While in scope the thread's tiles are whole, but for those up to the fourth, which have `rows` of 16 (of fewer a product
// takes less time), and for all except the left one, which have `columns` of 16. It takes a hundred cycles or two.
class Instructions {
 public:
  explicit Instructions(int64_t rows = 16, int64_t columns = 16) {
    Config config;
    for (int tile = 0; tile < 8; tile++) {
      config.rows[tile] = tile <= 4 ? std::clamp<int64_t>(rows, 1, 16) : 16;
      config.bytes[tile] = tile == 6 ? 64 : columns * sizeof(float);
    }
    settle_memory(&config);
    _tile_loadconfig(&config);
  }
  ~Instructions() { _tile_release(); }
  Instructions(const Instructions&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

#define FOR_EACH_SUM(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)  // a tile's number is part of the instruction

// GROUPS tiles of rows from x on, each of which has `columns`. Sums lie 16 rows apart.
template <int GROUPS>
inline void multiply_tiles(const BF16* w, int64_t inputs, const Group& group, const BF16* x, int64_t columns,
                           float* sums) {
#define ZERO(i) if constexpr (GROUPS > i) _tile_zero(i);
#define MULTIPLY(i) \
  if constexpr (GROUPS > i) { _tile_loadd(7, x + i * 16 * DEPTH, columns * sizeof(float)); _tile_dpbf16ps(i, 6, 7); }
#define STORE(i) if constexpr (GROUPS > i) _tile_stored(i, sums + i * 256, 64);
  // With one row a core reads on by itself where an output's inputs fill half a page, and asking takes time.
  const bool asks = columns > 1 || inputs * sizeof(BF16) < SMALL_PAGE / 2;
  FOR_EACH_SUM(ZERO)
  settle_memory(x);
  for (int64_t k = 0; k < inputs; k += DEPTH, x += GROUPS * columns * DEPTH) {
    if (asks) fetch_next(group, w, inputs, k, 0, WIDTH);
    if (group.count == WIDTH && inputs - k >= DEPTH) {
      _tile_loadd(6, w + k, inputs * sizeof(BF16));
    } else {
      alignas(64) BF16 padded[WIDTH * DEPTH] = {};
      for (int64_t n = 0; n < group.count; n++)
        std::memcpy(padded + n * DEPTH, w + n * inputs + k, std::min<int64_t>(DEPTH, inputs - k) * sizeof(BF16));
      settle_memory(padded);
      _tile_loadd(6, padded, 64);
      settle_memory(padded);
    }
    FOR_EACH_SUM(MULTIPLY)
  }
  FOR_EACH_SUM(STORE)
  settle_memory(sums);
#undef ZERO
#undef MULTIPLY
#undef STORE
}

// Sums are left as tiles, [rows / 16, 16 outputs, 16 rows].
inline void sum_bfloat16(const Product& p, const Rows& rows, int64_t leaf, int64_t first, int64_t count, const BF16* w,
                         const Group& group, Sums& sums) {
  const BF16* x = rows.at<BF16>(leaf, 0) + first * rows.depths * DEPTH;
  switch (ceil_div(count, 16)) {
#define CASE(i) case i + 1: multiply_tiles<i + 1>(w, p.inputs, group, x, tile_rows(rows.count), sums[0]); break;
    FOR_EACH_SUM(CASE)
#undef CASE
  }
}
#undef FOR_EACH_SUM

// Of a number of rows those that have sums, and sums made [rows, outputs].
template <class T>
inline int64_t rows_held(int64_t count) { return takes_bfloat16<T> ? ceil_to(count, 16) : count; }
template <class T>
inline void make_rows(Sums& sums, int64_t count) {
  if constexpr (takes_bfloat16<T>)
    for (int64_t r = 0; r < count; r += 16) transpose16(sums[r], sums[r]);
}
