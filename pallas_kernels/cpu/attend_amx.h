// Attention's products of bfloat16 by AMX. Included by a body, inside its namespace.
//
// TDPBF16PS is the definition of the order. Its left operand is a tile of rows, [16 rows, 16 pairs], its right one a side
// as it lies in the pages, [16 pairs, 16 lanes]. Tiles 0 to 3 are sums, of two tiles of rows by two groups of lanes, or of
// one by four.

struct alignas(64) RowTiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
  explicit RowTiles(int64_t queries) {  // of fewer than sixteen rows a product takes less time
    for (int tile = 0; tile < 8; tile++) rows[tile] = tile < 5 ? std::clamp<int64_t>(queries, 1, 16) : 16;
  }
};

struct InTiles {
  using Number = BF16;

  // Tiles are configured for as many queries as multiply one another's keys, and stay so while this is in scope.
  struct Ready {
    explicit Ready(int64_t queries) {
      const RowTiles config(queries);
      settle_memory(&config);
      _tile_loadconfig(&config);
    }
    ~Ready() { _tile_release(); }
    Ready(const Ready&) = delete;
  };

  static void put(BF16* out, Lanes first, Lanes second) {
    const __m512i odd_halves = _mm512_setr_epi32(
        0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015, 0x001b0019, 0x001f001d, 0x00230021,
        0x00270025, 0x002b0029, 0x002f002d, 0x00330031, 0x00370035, 0x003b0039, 0x003f003d);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(rounded_bits(first), odd_halves, rounded_bits(second)));
  }

  // As InRegisters has it.
  template <class S, class F>
  static void multiply(const Extents& extents, const BF16* rows, const S& side, float* sums, int64_t stride, bool are_new,
                       const F& fetch) {
    Spread<F> spread = {fetch, extents.groups * extents.chunks};
    const int64_t groups = extents.groups;
    int64_t n = 0;
    settle_memory(rows);
    if (extents.rows > 16) {
      for (; n + 2 <= groups; n += 2) two_tiles<2>(n, extents.chunks, rows, side, sums, stride, are_new, spread);
      if (n < groups) two_tiles<1>(n, extents.chunks, rows, side, sums, stride, are_new, spread);
    } else {
      for (; n + 4 <= groups; n += 4) one_tile<4>(n, extents.chunks, rows, side, sums, stride, are_new, spread);
      for (; n + 2 <= groups; n += 2) one_tile<2>(n, extents.chunks, rows, side, sums, stride, are_new, spread);
      if (n < groups) one_tile<1>(n, extents.chunks, rows, side, sums, stride, are_new, spread);
    }
    settle_memory(sums);
  }

 private:
  // A tile's number is part of the instruction.
#define WITH_SIDE(tile, group) \
  const Side<BF16> side_##group = side(chunk, first + group); \
  _tile_loadd(tile, side_##group.at, side_##group.stride * sizeof(BF16));

  // 32 rows times N groups from `first` on.
  template <int N, class S, class F>
  static void two_tiles(int64_t first, int64_t chunks, const BF16* rows, const S& side, float* sums, int64_t stride,
                        bool are_new, Spread<F>& spread) {
    float *upper = sums + first * LANES, *lower = upper + 16 * stride;
    const int64_t bytes = stride * sizeof(float);
    if (are_new) {
      _tile_zero(0);
      _tile_zero(2);
      if constexpr (N > 1) { _tile_zero(1); _tile_zero(3); }
    } else {
      _tile_loadd(0, upper, bytes);
      _tile_loadd(2, lower, bytes);
      if constexpr (N > 1) { _tile_loadd(1, upper + LANES, bytes); _tile_loadd(3, lower + LANES, bytes); }
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++, rows += ROWS * CHUNK) {
      _tile_loadd(4, rows, 64);
      WITH_SIDE(6, 0)
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, rows + 16 * CHUNK, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N > 1) {
        WITH_SIDE(7, 1)
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      spread.until(first * chunks + (chunk + 1) * N);
    }
    _tile_stored(0, upper, bytes);
    _tile_stored(2, lower, bytes);
    if constexpr (N > 1) { _tile_stored(1, upper + LANES, bytes); _tile_stored(3, lower + LANES, bytes); }
  }

  // Up to sixteen rows.
  template <int N, class S, class F>
  static void one_tile(int64_t first, int64_t chunks, const BF16* rows, const S& side, float* sums, int64_t stride,
                       bool are_new, Spread<F>& spread) {
    float* own = sums + first * LANES;
    const int64_t bytes = stride * sizeof(float);
    if (are_new) {
      _tile_zero(0);
      if constexpr (N > 1) _tile_zero(1);
      if constexpr (N > 2) { _tile_zero(2); _tile_zero(3); }
    } else {
      _tile_loadd(0, own, bytes);
      if constexpr (N > 1) { _tile_loadd(1, own + LANES, bytes); }
      if constexpr (N > 2) { _tile_loadd(2, own + 2 * LANES, bytes); _tile_loadd(3, own + 3 * LANES, bytes); }
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++, rows += ROWS * CHUNK) {
      _tile_loadd(4, rows, 64);
      WITH_SIDE(5, 0)
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (N > 1) {
        WITH_SIDE(6, 1)
        _tile_dpbf16ps(1, 4, 6);
      }
      if constexpr (N > 2) {
        WITH_SIDE(7, 2)
        _tile_dpbf16ps(2, 4, 7);
        WITH_SIDE(5, 3)
        _tile_dpbf16ps(3, 4, 5);
      }
      spread.until(first * chunks + (chunk + 1) * N);
    }
    _tile_stored(0, own, bytes);
    if constexpr (N > 1) { _tile_stored(1, own + LANES, bytes); }
    if constexpr (N > 2) { _tile_stored(2, own + 2 * LANES, bytes); _tile_stored(3, own + 3 * LANES, bytes); }
  }
#undef WITH_SIDE
};

template <class T>
using Products = std::conditional_t<std::is_same_v<T, BF16>, InTiles, InRegisters<T, Floats<T>>>;
