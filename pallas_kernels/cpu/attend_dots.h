// Attention's products of bfloat16 by AVX-512's own instruction. Included by a body, inside its namespace.
//
// VDPBF16PS adds to a lane the product of two upper halves, then that of two lower ones, each by a fused multiply-add that
// takes subnormals for zero and rounds to nearest. With members k and k + 2 in a lane's halves that is two steps along the
// order, in the time of one.

struct Dots {
  using Number = BF16;

  // Members 0, 1, 2, 3 of four neighbours become 2, 0, 3, 1: a word of even ones, a word of odd ones.
  static void put(BF16* out, Lanes first, Lanes second) {
    const __m512i odd_halves = _mm512_setr_epi32(
        0x00010005, 0x00030007, 0x0009000d, 0x000b000f, 0x00110015, 0x00130017, 0x0019001d, 0x001b001f, 0x00210025,
        0x00230027, 0x0029002d, 0x002b002f, 0x00310035, 0x00330037, 0x0039003d, 0x003b003f);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(rounded_bits(first), odd_halves, rounded_bits(second)));
  }

  template <int Q, int N>
  static void multiply(const BF16* rows, const Side<BF16> (&sides)[N], Lanes (&sums)[Q][N]) {
    Lanes even[Q][N], odd[Q][N];
    for (int q = 0; q < Q; q++)
      for (int n = 0; n < N; n++) even[q][n] = odd[q][n] = set(0.0f);
    for (int i = 0; i < CHUNK / 4; i++) {
      __m512i evens[N], odds[N];
      for (int n = 0; n < N; n++) {
        const BF16* pair = sides[n].at + 2 * i * sides[n].stride;
        const __m512i first = _mm512_loadu_si512(pair), second = _mm512_loadu_si512(pair + sides[n].stride);
        evens[n] = _mm512_mask_blend_epi16(0x55555555, _mm512_slli_epi32(first, 16), second);
        odds[n] = _mm512_mask_blend_epi16(0x55555555, first, _mm512_srli_epi32(second, 16));
      }
      for (int q = 0; q < Q; q++) {
        int32_t words[2];
        std::memcpy(words, rows + q * CHUNK + 4 * i, sizeof(words));
        const auto a = (__m512bh)_mm512_set1_epi32(words[0]), b = (__m512bh)_mm512_set1_epi32(words[1]);
        for (int n = 0; n < N; n++) even[q][n].v = _mm512_dpbf16_ps(even[q][n].v, a, (__m512bh)evens[n]);
        for (int n = 0; n < N; n++) odd[q][n].v = _mm512_dpbf16_ps(odd[q][n].v, b, (__m512bh)odds[n]);
      }
    }
    for (int q = 0; q < Q; q++)
      for (int n = 0; n < N; n++) sums[q][n] = sums[q][n] + (even[q][n] + odd[q][n]);
  }
};

template <class T>
using Products = InRegisters<T, std::conditional_t<std::is_same_v<T, BF16>, Dots, Floats<T>>>;
