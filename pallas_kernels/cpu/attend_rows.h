// Rows of queries, or of weights, times a tile's keys, or values. Included by a body, inside its namespace.
//
// The order of a sum is product.h's: of 32 members the even and the odd ones are summed apart, each from zero by fused
// multiply-adds, the two sums are added, and that is added to the running sum. Rows lie as [chunks, ROWS, 32].

constexpr int64_t ROWS = 32;  // that are multiplied with a tile before the next one is read

struct Extents {  // groups: of sixteen lanes
  int64_t rows, chunks, groups;
};

// Numbers that are no NaN, rounded to bfloat16.
#ifdef WITH_AVX512
inline Lanes upper_half(__m512i x) { return {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000)))}; }
inline Lanes rounded(Lanes a) { return upper_half(rounded_bits(a)); }
// The same as words of 16 bits, one after the other.
inline __m512i rounded_words(Lanes first, Lanes second) {
  const __m512i upper_halves = _mm512_setr_epi32(
      0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015, 0x001b0019, 0x001f001d, 0x00230021,
      0x00270025, 0x002b0029, 0x002f002d, 0x00330031, 0x00370035, 0x003b0039, 0x003f003d);
  return _mm512_permutex2var_epi16(rounded_bits(first), upper_halves, rounded_bits(second));
}
#else
inline __m256 upper_half(__m256i x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff0000))); }
inline Lanes rounded(Lanes a) { return {upper_half(rounded_bits(a.lo)), upper_half(rounded_bits(a.hi))}; }
#endif

// The even and the odd members of sixteen pairs.
struct Members { Lanes even, odd; };
#ifdef WITH_AVX512
inline Members members(const BF16* pairs) {
  const __m512i x = _mm512_loadu_si512(pairs);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))}, upper_half(x)};
}
inline Members members(const F16* pairs) {
  const __m512i x = _mm512_loadu_si512(pairs);
  return {{_mm512_cvtph_ps(_mm512_cvtepi32_epi16(x))}, {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)))}};
}
inline Members members(const float* pairs) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 a = _mm512_loadu_ps(pairs), b = _mm512_loadu_ps(pairs + 16);
  return {{_mm512_permutex2var_ps(a, even, b)}, {_mm512_permutex2var_ps(a, odd, b)}};
}
#else
inline __m256 even8(const BF16* pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)pairs), 16));
}
inline __m256 odd8(const BF16* pairs) { return upper_half(_mm256_loadu_si256((const __m256i*)pairs)); }
inline __m256 lower_half8(__m256i x) {
  x = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
  return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x88)));
}
inline __m256 even8(const F16* pairs) { return lower_half8(_mm256_loadu_si256((const __m256i*)pairs)); }
inline __m256 odd8(const F16* pairs) {
  return lower_half8(_mm256_srli_epi32(_mm256_loadu_si256((const __m256i*)pairs), 16));
}
inline __m256 in_order8(__m256 x) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
}
inline __m256 even8(const float* pairs) {
  return in_order8(_mm256_shuffle_ps(_mm256_loadu_ps(pairs), _mm256_loadu_ps(pairs + 8), 0x88));
}
inline __m256 odd8(const float* pairs) {
  return in_order8(_mm256_shuffle_ps(_mm256_loadu_ps(pairs), _mm256_loadu_ps(pairs + 8), 0xdd));
}
template <class T>
inline Members members(const T* pairs) {
  return {{even8(pairs), even8(pairs + 16)}, {odd8(pairs), odd8(pairs + 16)}};
}
#endif

// A way to multiply: what numbers rows are, and how Q of them go through one chunk of N groups of lanes, whose even and
// odd members' sums are added to.
template <class T>
struct Floats {
  using Number = float;

  static void put(float* out, Lanes first, Lanes second) {
    if constexpr (std::is_same_v<T, BF16>) first = rounded(first), second = rounded(second);
    store(out, first), store(out + LANES, second);
  }

  template <int Q, int N>
  static void add(const float* rows, const Side<T> (&sides)[N], Lanes (&even)[Q][N], Lanes (&odd)[Q][N]) {
    for (int pair = 0; pair < CHUNK / 2; pair++) {
      Members both[N];
      for (int n = 0; n < N; n++) both[n] = members(sides[n].at + pair * sides[n].stride);
      for (int q = 0; q < Q; q++) {
        const Lanes a = set(rows[q * CHUNK + 2 * pair]), b = set(rows[q * CHUNK + 2 * pair + 1]);
        for (int n = 0; n < N; n++) even[q][n] = fma(a, both[n].even, even[q][n]);
        for (int n = 0; n < N; n++) odd[q][n] = fma(b, both[n].odd, odd[q][n]);
      }
    }
  }
};

// Products whose sums are in registers.
#ifdef WITH_AVX512
constexpr int MOST_ROWS = 6, FEW_ROWS = 2, GROUPS = 2, GROUPS_OF_FEW = 4;
#else
constexpr int MOST_ROWS = 3, FEW_ROWS = 1, GROUPS = 1, GROUPS_OF_FEW = 2;
#endif

template <class T, class Way>
struct InRegisters : Way {
  using Number = typename Way::Number;
  struct Ready {  // nothing has to be
    explicit Ready(int64_t) {}
  };

  // side(chunk, group) is the right side. Sums lie `stride` apart, and are new or go on. `ahead` is told how far it has come.
  template <class S>
  static void multiply(const Extents& extents, const Number* rows, const S& side, float* sums, int64_t stride, bool are_new,
                       Ahead<T>& ahead) {
    if (extents.rows <= FEW_ROWS) groups_from<GROUPS_OF_FEW>(0, extents, rows, side, sums, stride, are_new, ahead);
    else groups_from<GROUPS>(0, extents, rows, side, sums, stride, are_new, ahead);
  }

 private:
  template <int N, class S>
  static void groups_from(int64_t group, const Extents& extents, const Number* rows, const S& side, float* sums,
                          int64_t stride, bool are_new, Ahead<T>& ahead) {
    for (; group + N <= extents.groups; group += N)
      for (int64_t chunk = 0; chunk < extents.chunks; chunk++) {
        ahead.until(group * extents.chunks + (chunk + 1) * N, extents.groups * extents.chunks);
        Side<T> sides[N];
        for (int n = 0; n < N; n++) sides[n] = side(chunk, group + n);
        int64_t row = 0;  // parts of about the same number of rows, because few rows are few chains
        for (int64_t parts = ceil_div(extents.rows, MOST_ROWS); parts > 0; parts--) {
          const int64_t size = ceil_div(extents.rows - row, parts);
          part<MOST_ROWS>(size, rows + (chunk * ROWS + row) * CHUNK, sides, sums + row * stride + group * LANES, stride,
                          are_new && chunk == 0);
          row += size;
        }
      }
    if constexpr (N > 1)
      if (group < extents.groups) groups_from<N / 2>(group, extents, rows, side, sums, stride, are_new, ahead);
  }

  template <int Q, int N>
  static void part(int64_t size, const Number* rows, const Side<T> (&sides)[N], float* sums, int64_t stride, bool are_new) {
    if constexpr (Q > 1)
      if (size < Q) return part<Q - 1>(size, rows, sides, sums, stride, are_new);
    Lanes even[Q][N], odd[Q][N];
    for (int q = 0; q < Q; q++)
      for (int n = 0; n < N; n++) even[q][n] = odd[q][n] = set(0.0f);
    Way::template add<Q, N>(rows, sides, even, odd);
    for (int q = 0; q < Q; q++)
      for (int n = 0; n < N; n++) {
        float* own = sums + q * stride + n * LANES;
        store(own, (are_new ? set(0.0f) : load(own)) + (even[q][n] + odd[q][n]));
      }
  }
};

#if defined(WITH_AMX)
#include "attend_amx.h"
#elif defined(WITH_DOTS)
#include "attend_dots.h"
#else
template <class T>
using Products = InRegisters<T, Floats<T>>;
#endif
