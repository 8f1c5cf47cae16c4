// Attention's products of bfloat16 by AVX-512's own instruction. Included by a body, inside its namespace.
//
// As dots.h has it, two steps along the order at once: with members k and k + 2 in a lane's halves.

struct Dots {
  using Number = BF16;

  static void put(BF16* out, Lanes first, Lanes second) {
    _mm512_storeu_si512(out, quads(rounded_words(first, second)));
  }

  template <int Q, int N>
  static void add(const BF16* rows, const Side<BF16> (&sides)[N], Lanes (&even)[Q][N], Lanes (&odd)[Q][N]) {
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
  }
};

template <class T>
using Products = InRegisters<T, std::conditional_t<std::is_same_v<T, BF16>, Dots, Floats<T>>>;
