// Attention's products of bfloat16 by AMX. Included by a body, inside its namespace.
//
// TDPBF16PS is the definition of the order. Its left operand is a tile of rows, [16 rows, 16 pairs], its right one a side
// as it lies in the pages, [16 pairs, 16 lanes]. Tiles 0 to 3 are sums, of two tiles of rows by two groups of lanes, or of
// one by four.

struct InTiles {
  using Number = BF16;

  using Ready = Instructions;  // for as many queries as multiply one another's keys

  static void put(BF16* out, Lanes first, Lanes second) {
    _mm512_storeu_si512(out, rounded_words(first, second));
  }

  // As InRegisters has it.
  template <class S>
  static void multiply(const Extents& extents, const BF16* rows, const S& side, float* sums, int64_t stride, bool are_new,
                       Ahead<BF16>& ahead) {
    const int64_t groups = extents.groups;
    int64_t n = 0;
    settle_memory(rows);
    if (extents.rows > 16) {
      for (; n + 2 <= groups; n += 2) two_tiles<2>(n, extents, rows, side, sums, stride, are_new, ahead);
      if (n < groups) two_tiles<1>(n, extents, rows, side, sums, stride, are_new, ahead);
    } else {
      for (; n + 4 <= groups; n += 4) one_tile<4>(n, extents, rows, side, sums, stride, are_new, ahead);
      for (; n + 2 <= groups; n += 2) one_tile<2>(n, extents, rows, side, sums, stride, are_new, ahead);
      if (n < groups) one_tile<1>(n, extents, rows, side, sums, stride, are_new, ahead);
    }
    settle_memory(sums);
  }

 private:
  // A tile's number is part of the instruction.
#define WITH_SIDE(tile, group) \
  const Side<BF16> side_##group = side(chunk, first + group); \
  _tile_loadd(tile, side_##group.at, side_##group.stride * sizeof(BF16));

  // 32 rows times N groups from `first` on.
  template <int N, class S>
  static void two_tiles(int64_t first, const Extents& extents, const BF16* rows, const S& side, float* sums, int64_t stride,
                        bool are_new, Ahead<BF16>& ahead) {
    const int64_t groups = extents.groups, chunks = extents.chunks;
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
      ahead.until(first * chunks + (chunk + 1) * N, groups * chunks);
    }
    _tile_stored(0, upper, bytes);
    _tile_stored(2, lower, bytes);
    if constexpr (N > 1) { _tile_stored(1, upper + LANES, bytes); _tile_stored(3, lower + LANES, bytes); }
  }

  // Up to sixteen rows.
  template <int N, class S>
  static void one_tile(int64_t first, const Extents& extents, const BF16* rows, const S& side, float* sums, int64_t stride,
                       bool are_new, Ahead<BF16>& ahead) {
    const int64_t groups = extents.groups, chunks = extents.chunks;
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
      ahead.until(first * chunks + (chunk + 1) * N, groups * chunks);
    }
    _tile_stored(0, own, bytes);
    if constexpr (N > 1) { _tile_stored(1, own + LANES, bytes); }
    if constexpr (N > 2) { _tile_stored(2, own + 2 * LANES, bytes); _tile_stored(3, own + 3 * LANES, bytes); }
  }
#undef WITH_SIDE
};

template <class T>
using Products = std::conditional_t<std::is_same_v<T, BF16>, InTiles, InRegisters<T, Floats<T>>>;
