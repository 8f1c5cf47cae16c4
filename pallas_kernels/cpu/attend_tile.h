// One tile of keys for some queries: scores, the online softmax, weighted values. Included by a body, inside its namespace.
// attend.h has the order of the sums, and gives each thread its tiles.

constexpr float MASKED = -1e30f;
#ifdef WITH_AVX512
constexpr int QUERIES_AT_ONCE = 2;  // of the softmax, whose steps are then neither few nor more than there are registers
#else
constexpr int QUERIES_AT_ONCE = 1;
#endif

// The softmax of queries over some keys so far: the weights' exponents, their sums, lane by lane of a tile's sixteens of
// keys, and the weighted sums of values. Memory is for whole tiles of sixteen queries.
struct Softmax {
  float *sums, *totals, *highs;  // [queries, width], [queries, 16], [queries]
  int64_t width;

  static int64_t floats(int64_t queries, int64_t width) { return ceil_to(queries, 16) * (width + LANES + 1); }
  static Softmax at(float* memory, int64_t queries, int64_t width) {
    float* totals = memory + ceil_to(queries, 16) * width;
    return {memory, totals, totals + ceil_to(queries, 16) * LANES, width};
  }
  Softmax from(int64_t query) const { return {sums + query * width, totals + query * LANES, highs + query, width}; }
  void begin(int64_t queries) const {
    std::memset(sums, 0, ceil_to(queries, 16) * width * sizeof(float));
    std::memset(totals, 0, queries * LANES * sizeof(float));
    std::fill(highs, highs + queries, MASKED);
  }
};

template <class T>
using Rounded = typename Products<T>::Number[WIDEST / CHUNK][ROWS][CHUNK];  // queries of one key head

// What a thread needs for up to ROWS queries of one key head, and a tile. Query i sees the tile's keys before seen[i].
template <class T>
struct Band {
  using Number = typename Products<T>::Number;
  const Rounded<T>* q;
  alignas(64) float scores[ROWS][TILE];
  alignas(64) Number weights[CHUNKS][ROWS][CHUNK];
  alignas(64) float sums[ROWS][WIDEST];  // of queries that see other values
  alignas(64) T keys[SIXTEENS][CHUNK * LANES];
  alignas(64) Values<T> values;
  int64_t rows, seen[ROWS], least, most;
};

// The first n lanes, and `others` in the place of the rest.
#ifdef WITH_AVX512
inline Lanes first_of(Lanes a, int64_t n, Lanes others) {
  const auto mask = __mmask16((1u << std::clamp<int64_t>(n, 0, LANES)) - 1);
  return {_mm512_mask_blend_ps(mask, others.v, a.v)};
}
#else
inline Lanes first_of(Lanes a, int64_t n, Lanes others) {
  alignas(64) static const float places[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return where_less(load(places), set(float(n)), a, others);
}
#endif

// The highest score of each query so far, rounded up; where it is new, what was summed is rescaled, which is exact.
template <bool ALL_SEEN, class T>
inline void raise(const Band<T>& band, const Softmax& softmax) {
  for (int64_t i = 0; i < band.rows; i++) {
    Lanes scores[SIXTEENS];
    for (int64_t n = 0; n < SIXTEENS; n++) {
      scores[n] = load(band.scores[i] + n * LANES);
      if (!ALL_SEEN) scores[n] = first_of(scores[n], band.seen[i] - n * LANES, set(MASKED));
    }
    const float top = maximum(max(max(scores[0], scores[1]), max(scores[2], scores[3])));
    const float before = softmax.highs[i], high = std::max(before, std::ceil(top));
    if (high == before) continue;
    const Lanes shrink = exp2(set(before - high));
    float *sums = softmax.sums + i * softmax.width, *totals = softmax.totals + i * LANES;
    for (int64_t at = 0; at < softmax.width; at += LANES) store(sums + at, load(sums + at) * shrink);
    store(totals, load(totals) * shrink), softmax.highs[i] = high;
  }
}

// Scores of Q queries from the i-th on become weights.
template <int Q, bool ALL_SEEN, class T>
inline void weigh(Band<T>& band, int64_t i, const Softmax& softmax) {
  Lanes weights[Q * SIXTEENS];
  for (int64_t q = 0; q < Q; q++)
    for (int64_t n = 0; n < SIXTEENS; n++)
      weights[q * SIXTEENS + n] = load(band.scores[i + q] + n * LANES) - set(softmax.highs[i + q]);
  exp2(weights);
  for (int64_t q = 0; q < Q; q++) {
    Lanes* own = weights + q * SIXTEENS;
    Lanes total = load(softmax.totals + (i + q) * LANES);
    for (int64_t n = 0; n < SIXTEENS; n++) {
      if (!ALL_SEEN) own[n] = first_of(own[n], band.seen[i + q] - n * LANES, set(0.0f));
      total = total + own[n];
    }
    store(softmax.totals + (i + q) * LANES, total);
    for (int64_t chunk = 0; chunk < CHUNKS; chunk++)
      Products<T>::put(band.weights[chunk][i + q], own[2 * chunk], own[2 * chunk + 1]);
  }
}

// The online softmax: scores of a tile become weights.
template <bool ALL_SEEN, class T>
inline void reweigh(Band<T>& band, const Softmax& softmax, Ahead<T>& ahead) {
  raise<ALL_SEEN>(band, softmax);
  const int64_t all = band.rows;
  ahead.until(1, 2);
  int64_t i = 0;
  for (; i + QUERIES_AT_ONCE <= all; i += QUERIES_AT_ONCE) {
    weigh<QUERIES_AT_ONCE, ALL_SEEN>(band, i, softmax);
    ahead.until(all + i + QUERIES_AT_ONCE, 2 * all);
  }
  for (; i < all; i++) weigh<1, ALL_SEEN>(band, i, softmax);
  ahead.until(1, 1);
}

template <class T>
inline void score(const Pages& pages, const Tile<T>& tile, Band<T>& band, Ahead<T>& ahead) {
  const int64_t groups = ceil_div(band.most, LANES), whole = pages.key_width / CHUNK;
  const int64_t chunks = ceil_div(pages.key_width, CHUNK);
  for (int64_t i = 0; whole < chunks && i < groups; i++) copy_last_keys(pages, tile.keys[i], band.keys[i]);
  const auto side = [&](int64_t chunk, int64_t group) {
    if (chunk == whole) return Side<T>{band.keys[group], 2 * LANES};
    return Side<T>{tile.keys[group] + chunk * CHUNK * LANES, 2 * LANES};
  };
  Products<T>::multiply({band.rows, chunks, groups}, (*band.q)[0][0], side, band.scores[0], TILE, true, ahead);
}

template <class T>
inline void add_weighted(Band<T>& band, float* sums, int64_t stride, Ahead<T>& ahead) {
  const auto side = [&](int64_t chunk, int64_t group) { return band.values.side(chunk, group); };
  const Extents extents = {band.rows, band.values.count, band.values.width / LANES};
  Products<T>::multiply(extents, band.weights[0][0], side, sums, stride, false, ahead);
}

// Weights of what a query does not see are 0, but 0 times what is not finite is NaN: then queries that do not see it are
// apart from those that do.
template <class T>
inline void add_values(const Pages& pages, const Tile<T>& tile, Band<T>& band, const Softmax& softmax, Ahead<T>& ahead) {
  const int64_t width = pages.value_width;
  if (band.least == band.most || band.values.are_finite(band.least, band.most))
    return add_weighted(band, softmax.sums, width, ahead);
  for (int64_t end, i = 0; i < band.rows; i = end) {  // those that see as much as one another
    end = std::upper_bound(band.seen + i, band.seen + band.rows, band.seen[i]) - band.seen;
    float *own = softmax.sums + i * width, *spare = band.sums[0];
    std::memcpy(spare, softmax.sums, ceil_to(band.rows, 16) * width * sizeof(float));
    band.values.take(pages, tile, band.seen[i]);
    add_weighted(band, spare, width, ahead);
    std::memcpy(own, spare + i * width, (end - i) * width * sizeof(float));
  }
}

// The band's queries take the tile whose first key is `first`. The one that comes next is in the second cache where these
// are not the first queries that read it; else it is asked for.
template <class T>
inline void take_tile(const Pages& pages, const Tile<T>& tile, const Tile<T>& next, bool is_near, int64_t first,
                      const int64_t* lengths, Band<T>& band, const Softmax& softmax) {
  const auto seen = [&](int64_t i) { return std::clamp<int64_t>(lengths[i] - first, 0, TILE); };
  band.least = seen(0), band.most = seen(band.rows - 1);
  for (int64_t i = 0; band.least < TILE && i < band.rows; i++) band.seen[i] = seen(i);
  band.values.take(pages, tile, band.most);
  const Tile<T> far = is_near ? Tile<T>{} : next;
  Ahead<T> ahead = {pages, far};
  ahead.take(OF_SCORES);
  score(pages, tile, band, ahead);
  ahead.take(OF_SOFTMAX);
  if (band.least == TILE) reweigh<true>(band, softmax, ahead);
  else reweigh<false>(band, softmax, ahead);
  ahead.take(OF_VALUES);
  add_values(pages, tile, band, softmax, ahead);
}
