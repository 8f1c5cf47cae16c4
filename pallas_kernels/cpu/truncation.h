// What top-k, then top-p, then min-p keep of a row: the definition of truncation_reference.py. Included by a body, inside
// its namespace.
//
// Thresholds are found bit by bit, and nothing is sorted. Counts are exact in any order. Masses are summed in the order
// that XLA's dot with ones has on AVX2: of 128 numbers the even and the odd ones apart, one after the other, then both
// added; the sums of blocks of 128 ids likewise, until one is left. A block's sum is one long chain, so sixteen blocks are
// summed side by side, a lane a block: what is summed lies as [blocks / 16, 128 ids, 16 blocks].

constexpr int64_t SUMMED = 128, GROUP = SUMMED * 16;
constexpr int32_t DROPPED = std::numeric_limits<int32_t>::min();  // the order of what is kept no more
constexpr float NOTHING = -std::numeric_limits<float>::infinity(), TINY = std::numeric_limits<float>::min();

// The largest threshold that is enough: the lowest one always is, and none above one that is not.
template <class F>
inline int32_t largest(const F& enough) {
  constexpr uint32_t SIGN = uint32_t(1) << 31;
  uint32_t found = 0;
  for (uint32_t bit = SIGN; bit; bit >>= 1)
    if (enough(int32_t((found | bit) ^ SIGN))) found |= bit;
  return int32_t(found ^ SIGN);
}

inline float sum_of_few(const float* x, int64_t n) {
  float even = 0, odd = 0;
  for (int64_t i = 0; i + 1 < n; i += 2) even += x[i], odd += x[i + 1];
  return n % 2 ? (even + odd) + x[n - 1] : even + odd;
}

// Of n sums of blocks, which it overwrites; there is room for zeros up to a whole block of them.
inline float sum_of_blocks(float* sums, int64_t n) {
  for (; n > SUMMED; n = ceil_div(n, SUMMED)) {
    std::fill(sums + n, sums + ceil_to(n, SUMMED), 0.0f);
    for (int64_t i = 0; i < n; i += SUMMED) sums[i / SUMMED] = sum_of_few(sums + i, SUMMED);
  }
  return sum_of_few(sums, n);
}

// The largest of a row; NaN where there is no softmax of it.
inline float largest_logit(const float* x, int64_t n) {
  Lanes top = set(NOTHING), not_numbers = set(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const Lanes v = widen_some(x + i, n - i, NOTHING);
    top = max(top, v), not_numbers = where_nan(v, v, not_numbers);
  }
  const float high = maximum(top);
  return __builtin_isfinite(high) && sum(not_numbers) == 0 ? high : std::numeric_limits<float>::quiet_NaN();
}

// What is kept of a row so far.
struct KeptOfRow {
  int64_t vocabulary, padded;  // to whole groups
  float* logits;               // -inf of what is kept no more
  int32_t* order;              // of the same
  float* weights;              // as they are summed, with their order
  int32_t* orders;
  float* sums;

  static int64_t floats(int64_t vocabulary) { return ceil_to(vocabulary, GROUP) / GROUP * (4 * GROUP + 16) + SUMMED; }

  KeptOfRow(const float* x, int64_t vocabulary, float* memory)
      : vocabulary(vocabulary), padded(ceil_to(vocabulary, GROUP)) {
    logits = memory, weights = logits + padded, sums = weights + 3 * padded;
    order = (int32_t*)(weights + padded), orders = order + padded;
    for (int64_t i = 0; i < padded; i += 16) {
      const Lanes v = widen_some(x + i, std::max<int64_t>(vocabulary - i, 0), NOTHING);
      store(logits + i, v), store_order(order + i, v);
      for (int64_t id = std::max(i, vocabulary); id < i + 16; id++) order[id] = DROPPED;
    }
  }

  int64_t count(int32_t least) const {
    int64_t found = 0;
    for (int64_t i = 0; i < padded; i += 16) found += __builtin_popcount(at_least(order + i, least));
    return found;
  }

  // Everything above the edge, and the `wanted` lowest ids of those on it.
  void keep(int32_t edge, int64_t wanted) {
    for (int64_t i = 0; i < padded; i += 16) {
      const uint32_t above = at_least(order + i, edge + 1), there = at_least(order + i, edge);
      for (uint32_t bits = 0xffff ^ above; bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        if ((there >> lane & 1) && wanted-- > 0) continue;
        logits[i + lane] = NOTHING, order[i + lane] = DROPPED;
      }
    }
  }

  // `of(i)` are sixteen numbers to sum, from place i on.
  template <class F>
  float total(const F& of) const {
    for (int64_t group = 0; group < padded; group += GROUP) {
      Lanes even = set(0.0f), odd = set(0.0f);
      for (int64_t i = group; i < group + GROUP; i += 32) even = even + of(i), odd = odd + of(i + 16);
      store(sums + group / SUMMED, even + odd);
    }
    return sum_of_blocks(sums, ceil_div(vocabulary, SUMMED));
  }

  float mass(int32_t least) const {
    return total([&](int64_t i) { return where_at_least(orders + i, least, load(weights + i)); });
  }

  // Probabilities, as they are summed. Returns the logarithm of what they were divided by.
  float normalise(float high) {
    for (int64_t block = 0; block < padded / SUMMED; block += 8)
      for (int64_t id = 0; id < SUMMED; id += 8) {
        __m256 r[8];
        for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(logits + (block + i) * SUMMED + id);
        transpose8(r);
        float* out = weights + block / 16 * GROUP + id * 16 + block % 16;
        for (int i = 0; i < 8; i++) _mm256_storeu_ps(out + i * 16, r[i]);
      }
    const float log_mass = xla_log(total([&](int64_t i) { return exp(load(weights + i) - set(high)); }));
    for (int64_t i = 0; i < padded; i += 16) {
      const Lanes v = load(weights + i);
      store_order(orders + i, v), store(weights + i, probabilities(v, high, log_mass));
    }
    return log_mass;
  }

  static Lanes probabilities(Lanes logits, float high, float log_mass) {
    return exp((logits - set(high)) - set(log_mass));
  }

  void keep_nucleus(float p) {
    p = std::max(p, TINY);  // one that rounds to 0 still keeps the likeliest
    const int32_t edge = largest([&](int32_t least) { return mass(least) >= p; });
    Lanes on_edge = set(0.0f);
    for (int64_t i = 0; i < padded; i += 16) {
      const Lanes w = load(weights + i);
      on_edge = max(on_edge, where_at_least(orders + i, edge, w - where_at_least(orders + i, edge + 1, w)));
    }
    const float wanted = std::ceil((p - mass(edge + 1)) / std::max(maximum(on_edge), TINY));
    keep(edge, int64_t(std::min(std::max(wanted, 1.0f), float(vocabulary))));
  }

  void keep_likely(float min_p, float high, float log_mass) {
    Lanes top = set(0.0f);
    for (int64_t i = 0; i < padded; i += 16) top = max(top, load(weights + i));
    const float least = min_p * maximum(top);
    for (int64_t i = 0; i < padded; i += 16) {
      alignas(64) float p[16];
      store(p, probabilities(load(logits + i), high, log_mass));
      for (int lane = 0; lane < 16; lane++)
        if (p[lane] < least) order[i + lane] = DROPPED;
    }
  }
};

inline void find_kept(const Truncation& t, int64_t row, float* memory) {
  const float* x = t.logits + row * t.vocabulary;
  uint8_t* out = t.mask + row * t.vocabulary;
  const float top_p = t.top_p[row], min_p = t.min_p[row];
  const int64_t top_k = t.top_k[row];
  const bool by_k = top_k > 0 && top_k < t.vocabulary;
  if (!by_k && !(top_p < 1) && !(min_p > 0)) {  // the only pass over a row that asks for nothing
    const float high = largest_logit(x, t.vocabulary);
    std::memset(out, high == high, t.vocabulary);
    return;
  }
  KeptOfRow own(x, t.vocabulary, memory);
  if (by_k) {
    const int32_t edge = largest([&](int32_t least) { return own.count(least) >= top_k; });
    own.keep(edge, top_k - own.count(edge + 1));
  }
  const float high = largest_logit(own.logits, own.padded);
  if (high != high) {
    std::memset(out, 0, t.vocabulary);
    return;
  }
  if (top_p < 1 || min_p > 0) {
    const float log_mass = own.normalise(high);
    if (top_p < 1) own.keep_nucleus(top_p);
    if (min_p > 0) own.keep_likely(min_p, high, log_mass);
  }
  for (int64_t id = 0; id < t.vocabulary; id++) out[id] = own.order[id] != DROPPED;
}

inline void kept(Threads& threads, const Truncation& t) {
  parallel(threads, t.rows, [&](int64_t row) {
    static thread_local Scratch of_row;
    find_kept(t, row, of_row.floats(KeptOfRow::floats(t.vocabulary)));
  });
}
