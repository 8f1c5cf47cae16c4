// Blocks of weights, and rows times a block. Included by a body, inside its namespace.
//
// Lanes are outputs. Weights are read as they lie, 16 outputs by 32 inputs at a time, a block, and turned so that the
// outputs of one input are neighbours. What is turned stays in registers where AVX-512 has room for it and for the sums
// of all rows; for more rows, and always on AVX2, it lies in a panel, which stays in the first cache while all rows of a
// band are multiplied with it.

using Sums = float[BAND][WIDTH];

// Up to 16 neighbouring outputs. The thread that computes them will probably take those `ahead` outputs further on next,
// which are still to be read from memory; 0 where they are not.
struct Group {
  int64_t first, count, ahead;
};

// Each output's inputs are neighbours, outputs lie `stride` apart.
template <class T>
struct Block {
  const T* w;
  int64_t stride;
};

// Asks for what comes soon of sixteen outputs' inputs, k and on.
template <class T>
inline void fetch_soon(const T* w, int64_t stride, int64_t k) {
  for (int n = 0; n < WIDTH; n++) fetch<_MM_HINT_T0>((const char*)(w + n * stride + k) + 256);
}

// Asks for a block's inputs of some of the outputs that come next, which a core does not guess.
template <class T>
inline void fetch_next(const Group& group, const T* w, int64_t stride, int64_t k, int64_t first, int64_t outputs) {
  if (group.ahead == 0) return;
  const T* next = w + (group.ahead + first) * stride + k;
  for (int64_t n = 0; n < outputs; n++) fetch(next + n * stride);
}

// Of weights [.., stride] from w on: `outputs` <= 16 of them, inputs [k, k + 32) of which `inputs` exist. What is no whole
// block is copied to `padded`, with zeros.
template <class T>
inline Block<T> block_of(const T* w, int64_t stride, int64_t outputs, int64_t k, int64_t inputs,
                         T (&padded)[WIDTH * DEPTH]) {
  if (outputs == WIDTH && inputs - k >= DEPTH) return {w + k, stride};
  std::memset(padded, 0, sizeof(padded));
  for (int64_t n = 0; n < outputs; n++)
    std::memcpy(padded + n * DEPTH, w + n * stride + k, std::min<int64_t>(DEPTH, inputs - k) * sizeof(T));
  return {padded, DEPTH};
}

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

#ifdef WITH_AVX512
// 8 neighbouring words of 32 bits of each of 16 outputs, as 8 registers of 16 outputs.
template <class T>
__attribute__((always_inline)) inline void turned(const Block<T>& block, int64_t k, __m512i (&r)[8]) {
  __m512i a[8];
  for (int n = 0; n < 8; n++) {
    const T* w = block.w + n * block.stride + k;
    const __m256i first = _mm256_loadu_si256((const __m256i*)w);
    const __m256i eighth = _mm256_loadu_si256((const __m256i*)(w + 8 * block.stride));
    r[n] = _mm512_inserti64x4(_mm512_castsi256_si512(first), eighth, 1);
  }
  for (int n = 0; n < 8; n += 2)
    a[n] = _mm512_unpacklo_epi32(r[n], r[n + 1]), a[n + 1] = _mm512_unpackhi_epi32(r[n], r[n + 1]);
  for (int n = 0; n < 8; n += 4)
    for (int j = 0; j < 2; j++) {
      r[n + 2 * j] = _mm512_unpacklo_epi64(a[n + j], a[n + 2 + j]);
      r[n + 2 * j + 1] = _mm512_unpackhi_epi64(a[n + j], a[n + 2 + j]);
    }
  // Quarters are now outputs 0, 0, 8, 8 of words j, 4 + j, j, 4 + j in r[j], and outputs 4, 4, 12, 12 in r[4 + j].
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int j = 0; j < 4; j++) {
    a[j] = _mm512_permutex2var_epi64(r[j], low, r[4 + j]);
    a[4 + j] = _mm512_permutex2var_epi64(r[j], high, r[4 + j]);
  }
  for (int n = 0; n < 8; n++) r[n] = a[n];
}

// Both members of a pair of inputs, the even one's weight and the odd one's, for outputs 0, 1, 4, 5, 8, 9, 12 and 13, and
// for the others; from words of a pair each, or from one of each member.
inline void pairs_of(const BF16*, const __m512i* words, Lanes& first, Lanes& second) {
  const __m512i zero = _mm512_setzero_si512();
  first.v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, *words));
  second.v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, *words));
}
inline void pairs_of(const F16*, const __m512i* words, Lanes& first, Lanes& second) {
  const __m512i both = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), *words);
  first.v = _mm512_cvtph_ps(_mm512_castsi512_si256(both)), second.v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
}
inline void pairs_of(const float*, const __m512i* words, Lanes& first, Lanes& second) {
  first.v = _mm512_castsi512_ps(_mm512_unpacklo_epi32(words[0], words[1]));
  second.v = _mm512_castsi512_ps(_mm512_unpackhi_epi32(words[0], words[1]));
}

inline Lanes both_of(const float* pair) {  // (even, odd) eight times
  double both;
  std::memcpy(&both, pair, sizeof(both));
  return {_mm512_castpd_ps(_mm512_set1_pd(both))};
}

// A way to multiply: what numbers rows are, what a turned block is, and in how many steps a row goes through it. A lane sums
// an output's even or odd members. Both are in one register because one read of a row's pair then serves both: reads that
// fill a register with one number are what limits a core.
struct Pairs {
  using Number = float;
  static constexpr int STEPS = 16;
  using Turned = Lanes[STEPS][2];

  template <class T>
  static void turn(const Block<T>& block, Turned& out) {
    constexpr int INPUTS = 32 / sizeof(T), WORDS = sizeof(T) / 2;  // of 8 words, and words to a pair
    for (int k = 0; k < DEPTH; k += INPUTS) {
      __m512i r[8];
      turned(block, k, r);
      for (int i = 0; i < INPUTS / 2; i++) pairs_of(block.w, r + i * WORDS, out[k / 2 + i][0], out[k / 2 + i][1]);
    }
  }
  static Lanes step(Lanes sums, const float* pair, Lanes w) { return fma(both_of(pair), w, sums); }
};

// The sums of two registers' even and odd members, in the order of outputs.
inline Lanes outputs_of(Lanes first, Lanes second) {
  return Lanes{_mm512_shuffle_ps(first.v, second.v, 0x88)} + Lanes{_mm512_shuffle_ps(first.v, second.v, 0xdd)};
}

// R rows times some depths of blocks, added to running sums. fetch(depth) is called at each.
template <class Way, int R, class F>
inline void multiply(int64_t depths, const typename Way::Number* x, const typename Way::Turned* w, float* sums,
                     const F& fetch) {
  for (int64_t depth = 0; depth < depths; depth++, x += ROWS_AT_ONCE * DEPTH) {
    fetch(depth);
    Lanes first[R], second[R];
    for (int r = 0; r < R; r++) first[r] = second[r] = set(0.0f);
    for (int i = 0; i < Way::STEPS; i++)
      for (int r = 0; r < R; r++) {
        const auto* own = x + r * DEPTH + i * (DEPTH / Way::STEPS);
        first[r] = Way::step(first[r], own, w[depth][i][0]), second[r] = Way::step(second[r], own, w[depth][i][1]);
      }
    for (int r = 0; r < R; r++) store(sums + r * WIDTH, load(sums + r * WIDTH) + outputs_of(first[r], second[r]));
  }
}
#else
using Panel = float[2][16][WIDTH];  // even and odd inputs, outputs

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
#endif

// f(a std::integral_constant of R): a number of rows as one of the program.
template <class F>
inline void with_rows(int64_t rows, const F& f) {
  switch (rows) {
#define CASE(R) case R: if constexpr (R <= ROWS_AT_ONCE) f(std::integral_constant<int, R>()); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
  }
}

#ifdef WITH_AVX512
// The blocks of some depths are turned, and all rows are multiplied with them. Meanwhile the weights of the outputs that
// come next are asked for, a few lines at a time: a core waits if it asks for many at once.
template <class Way, class T>
inline void sum_by(const Product& p, const Rows& rows, int64_t leaf, int64_t first, int64_t count, const T* w,
                   const Group& group, Sums& sums) {
  constexpr int64_t CHUNK = 16384 / sizeof(typename Way::Turned);  // a third of the first cache
  alignas(64) typename Way::Turned turned[CHUNK];
  T padded[WIDTH * DEPTH];
  std::memset(sums, 0, count * sizeof(sums[0]));
  // Of few rows few depths, so that arithmetic and reads of weights take turns quickly.
  const int64_t chunk = count <= ROWS_AT_ONCE / 2 ? 1 : count <= ROWS_AT_ONCE ? 4 : CHUNK;
  const int64_t turns = ceil_div(count, ROWS_AT_ONCE);
  const int64_t lines = ceil_div(WIDTH, turns);  // of each depth and turn
  for (int64_t from = 0; from < rows.depths; from += chunk) {
    const int64_t depths = std::min(chunk, rows.depths - from);
    for (int64_t depth = 0; depth < depths; depth++) {
      const int64_t k = (from + depth) * DEPTH;
      fetch_soon(w, p.inputs, k);
      Way::turn(block_of(w, p.inputs, group.count, k, p.inputs, padded), turned[depth]);
    }
    for (int64_t r = 0; r < count; r += ROWS_AT_ONCE)
      with_rows(std::min(count - r, ROWS_AT_ONCE), [&](auto size) {
        const auto* x = rows.at<typename Way::Number>(leaf, from, first + r);
        multiply<Way, size()>(depths, x, turned, sums[r], [&](int64_t depth) {
          fetch_next(group, w, p.inputs, (from + depth) * DEPTH, r / ROWS_AT_ONCE * lines, lines);
        });
      });
  }
}
#endif
