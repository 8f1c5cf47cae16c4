// One tile of keys for some queries: scores, the online softmax, weighted values. Included by a body, inside its namespace.
// attend.h has the order of the sums, and gives each thread its tiles.

constexpr int64_t TILE = 64, LANE_KEYS = 16;
constexpr float MASKED = -1e30f;
#ifdef WITH_AVX512  // registers of sums: a few more than what is under way at once, 2 · 4
constexpr int KEYS_AT_ONCE = 16, VALUES_AT_ONCE = 16;
#else
constexpr int KEYS_AT_ONCE = 4, VALUES_AT_ONCE = 4;
#endif

// The softmax of one query over some keys so far: the weights' exponent, their sum, and the weighted sum of values.
struct Softmax {
  float high, total;
  float* sums;  // [value width]
};

template <class T>
struct Tile {  // pointers to 16 keys and values each; those after the context are null
  const T* keys[TILE / LANE_KEYS];
  const T* values[TILE / LANE_KEYS];
};

template <class T>
inline Tile<T> locate(const Pages& pages, const int32_t* table, int64_t head, int64_t first, int64_t length) {
  Tile<T> tile = {};
  for (int64_t i = 0; i < TILE / LANE_KEYS; i++) {
    const int64_t key = first + i * LANE_KEYS;
    if (key >= length) break;
    const int64_t at = int64_t(table[key / pages.size]) * pages.heads + head, cell = key % pages.size;
    tile.keys[i] = (const T*)pages.keys + at * pages.key_width * pages.size + cell;
    tile.values[i] = (const T*)pages.values + (at * pages.size + cell) * pages.value_width;
  }
  return tile;
}

constexpr int64_t STEPS = 16;  // in which a tile is asked for
constexpr auto fetch_nothing = [](int64_t) {};

// Asks for part `step` of a tile's keys, or of its values: pages lie anywhere, so a core does not guess them,
// and where it is asked for many lines at once it waits.
template <class T>
inline void fetch_keys(const Pages& pages, const Tile<T>& tile, int64_t step) {
  const int64_t from = pages.key_width * step / STEPS, to = pages.key_width * (step + 1) / STEPS;
  for (int64_t i = 0; i < TILE / LANE_KEYS && tile.keys[i]; i++)
    if (i == 0 || tile.keys[i] != tile.keys[i - 1] + LANE_KEYS)  // else in the lines of the sixteen before
      for (int64_t d = from; d < to; d++) _mm_prefetch((const char*)(tile.keys[i] + d * pages.size), _MM_HINT_T1);
}
template <class T>
inline void fetch_values(const Pages& pages, const Tile<T>& tile, int64_t step) {
  const int64_t lines = LANE_KEYS * pages.value_width * int64_t(sizeof(T)) / 64;
  const int64_t from = lines * step / STEPS, to = lines * (step + 1) / STEPS;
  for (int64_t i = 0; i < TILE / LANE_KEYS && tile.values[i]; i++)
    for (int64_t line = from; line < to; line++) _mm_prefetch((const char*)tile.values[i] + line * 64, _MM_HINT_T1);
}

// Scores of Q queries with N times 16 keys. fetch(step) is called on the way.
template <int Q, int N, class T, class F>
inline void score(const float* const* q, const T* const* keys, int64_t width, int64_t stride, float (*scores)[TILE],
                  const F& fetch) {
  Lanes sums[Q][N];
  for (int i = 0; i < Q; i++)
    for (int n = 0; n < N; n++) sums[i][n] = set(0.0f);
  for (int64_t step = 0, d = 0; step < STEPS; step++) {
    fetch(step);
    for (; d < width * (step + 1) / STEPS; d++)
      for (int n = 0; n < N; n++) {
        const Lanes k = widen(keys[n] + d * stride);
        for (int i = 0; i < Q; i++) sums[i][n] = fma(set(q[i][d]), k, sums[i][n]);
      }
  }
  for (int i = 0; i < Q; i++)
    for (int n = 0; n < N; n++) store(scores[i] + n * LANE_KEYS, sums[i][n]);
}

// Q queries' sums, 16 · N numbers of the head from `at` on, with keys [from, to) of the tile added.
template <int Q, int N, class T, class F>
inline void add_values(const Tile<T>& tile, int64_t at, int64_t width, int64_t from, int64_t to,
                       const float (*weights)[TILE], Softmax* softmax, const F& fetch) {
  Lanes sums[Q][N];
  for (int i = 0; i < Q; i++)
    for (int n = 0; n < N; n++) sums[i][n] = load(softmax[i].sums + at + n * 16);
  for (int64_t step = 0, key = from; step < STEPS; step++) {
    fetch(step);
    for (; key < std::min(to, (step + 1) * (TILE / STEPS)); key++) {
      const T* value = tile.values[key / LANE_KEYS] + key % LANE_KEYS * width + at;
      for (int n = 0; n < N; n++) {
        const Lanes v = widen(value + n * 16);
        for (int i = 0; i < Q; i++) sums[i][n] = fma(set(weights[i][key]), v, sums[i][n]);
      }
    }
  }
  for (int i = 0; i < Q; i++)
    for (int n = 0; n < N; n++) store(softmax[i].sums + at + n * 16, sums[i][n]);
}

// The head's numbers from `at` on, as many registers at once as there are.
template <int Q, int N, class T, class F>
inline void add_all_values(const Tile<T>& tile, int64_t at, int64_t width, int64_t from, int64_t to,
                           const float (*weights)[TILE], Softmax* softmax, const F& fetch) {
  for (; at + 16 * N <= width; at += 16 * N)
    if (at == 0) add_values<Q, N>(tile, at, width, from, to, weights, softmax, fetch);
    else add_values<Q, N>(tile, at, width, from, to, weights, softmax, fetch_nothing);
  if constexpr (N > 1)
    if (at < width) add_all_values<Q, N / 2>(tile, at, width, from, to, weights, softmax, fetch);
}

// Scores of Q queries with the tile's keys from the n-th sixteen to the one before `there`.
template <int Q, int N, class T, class F>
inline void score_all(const Pages& pages, const Tile<T>& tile, const float* const* q, int64_t n, int64_t there,
                      float (*scores)[TILE], const F& fetch) {
  for (; n + N <= there; n += N) {
    auto* own = (float(*)[TILE])(scores[0] + n * LANE_KEYS);
    if (n == 0) score<Q, N>(q, tile.keys, pages.key_width, pages.size, own, fetch);
    else score<Q, N>(q, tile.keys + n, pages.key_width, pages.size, own, fetch_nothing);
  }
  if constexpr (N > 1)
    if (n < there) score_all<Q, N / 2>(pages, tile, q, n, there, scores, fetch);
}

// The online softmax: scores of a tile become weights, and what was summed is rescaled.
inline void reweigh(float* scores, int64_t keys, int64_t width, Softmax& softmax) {
  for (int64_t i = keys; i < TILE; i++) scores[i] = MASKED;
  Lanes top = load(scores);
  for (int64_t i = 16; i < TILE; i += 16) top = max(top, load(scores + i));
  const float high = std::max(softmax.high, std::ceil(maximum(top)));
  Lanes total = set(0.0f);
  for (int64_t i = 0; i < TILE; i += 16) {
    const Lanes weights = exp2(load(scores + i) - set(high));
    store(scores + i, weights);
    total = total + weights;
  }
  if (high != softmax.high) {
    const Lanes shrink = exp2(set(softmax.high - high));
    for (int64_t i = 0; i < width; i += 16) store(softmax.sums + i, load(softmax.sums + i) * shrink);
    alignas(64) float factor[16];
    store(factor, shrink);
    softmax.total *= factor[0];
  }
  softmax.total += sum(total), softmax.high = high;
}

// Q queries take one tile; query i sees the keys before lengths[i].
template <int Q, class T>
inline void take_tile(const Pages& pages, const Tile<T>& tile, const Tile<T>& next, const float* const* q,
                      const int64_t* lengths, int64_t first, Softmax* softmax) {
  alignas(64) float scores[Q][TILE];
  int64_t seen[Q], least = TILE;
  for (int i = 0; i < Q; i++) seen[i] = std::min(lengths[i] - first, TILE), least = std::min(least, seen[i]);
  const int64_t there = std::count_if(tile.keys, tile.keys + TILE / LANE_KEYS, [](const T* keys) { return keys; });
  score_all<Q, std::min<int>(KEYS_AT_ONCE / Q, TILE / LANE_KEYS)>(
      pages, tile, q, 0, there, scores, [&](int64_t step) { fetch_keys(pages, next, step); });
  for (int i = 0; i < Q; i++) reweigh(scores[i], seen[i], pages.value_width, softmax[i]);
  add_all_values<Q, std::min(VALUES_AT_ONCE / Q, 8)>(tile, 0, pages.value_width, 0, least, scores, softmax,
                                                     [&](int64_t step) { fetch_values(pages, next, step); });
  for (int i = 0; i < Q; i++)
    if (seen[i] > least)
      add_all_values<1, std::min(VALUES_AT_ONCE, 8)>(tile, 0, pages.value_width, least, seen[i], scores + i, softmax + i,
                                                     fetch_nothing);
}
