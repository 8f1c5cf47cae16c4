// Products with bfloat16 weights by AVX-512's own instruction. Included by a body, inside its namespace.
//
// VDPBF16PS adds to a lane the product of two upper halves, then that of two lower ones, each by a fused multiply-add that
// takes subnormals for zero and rounds to nearest. With inputs k and k + 2 in a lane's halves that is two steps along
// product.h's order, in the time of one.

// Inputs 0, 1, 2, 3 of four neighbours become 2, 0, 3, 1: a lane of even ones, a lane of odd ones, the earlier one above.
__attribute__((always_inline)) inline __m512i quads(__m512i x) {
  return _mm512_shuffle_epi8(x, _mm512_set4_epi32(0x0b0a0f0e, 0x09080d0c, 0x03020706, 0x01000504));
}

inline void put_bfloat16(const Rows& rows, int64_t leaf, int64_t depth, int64_t row, Lanes first, Lanes second) {
  BF16* out = rows.at<BF16>(leaf, depth, row);
  narrow(out, first), narrow(out + 16, second);
  _mm512_storeu_si512(out, quads(_mm512_loadu_si512(out)));
}

// The four quarters of four outputs' inputs, each of them together.
__attribute__((always_inline)) inline void quarters(const BF16* w, int64_t stride, __m512i (&out)[4]) {
  __m512i r[4];
  for (int n = 0; n < 4; n++) r[n] = quads(_mm512_loadu_si512(w + 4 * n * stride));
  const __m512i a = _mm512_shuffle_i64x2(r[0], r[1], 0x44), b = _mm512_shuffle_i64x2(r[0], r[1], 0xee);
  const __m512i c = _mm512_shuffle_i64x2(r[2], r[3], 0x44), d = _mm512_shuffle_i64x2(r[2], r[3], 0xee);
  out[0] = _mm512_shuffle_i64x2(a, c, 0x88), out[1] = _mm512_shuffle_i64x2(a, c, 0xdd);
  out[2] = _mm512_shuffle_i64x2(b, d, 0x88), out[3] = _mm512_shuffle_i64x2(b, d, 0xdd);
}

// As Pairs in blocks.h, eight quads of inputs.
struct Quads {
  using Number = BF16;
  static constexpr int STEPS = 8;
  using Turned = Lanes[STEPS][2];

  static void turn(const Block<BF16>& block, Turned& out) {
    for (int half = 0; half < 2; half++) {
      __m512i evens[4], odds[4];
      quarters(block.w + 2 * half * block.stride, block.stride, evens);
      quarters(block.w + (2 * half + 1) * block.stride, block.stride, odds);
      for (int i = 0; i < 4; i++) {
        out[2 * i][half].v = _mm512_castsi512_ps(_mm512_unpacklo_epi64(evens[i], odds[i]));
        out[2 * i + 1][half].v = _mm512_castsi512_ps(_mm512_unpackhi_epi64(evens[i], odds[i]));
      }
    }
  }
  static Lanes step(Lanes sums, const BF16* quad, Lanes w) {
    int64_t both;
    std::memcpy(&both, quad, sizeof(both));
    return {_mm512_dpbf16_ps(sums.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi64(both))};
  }
};

inline void sum_bfloat16(const Product& p, const Rows& rows, int64_t leaf, int64_t first, int64_t count, const BF16* w,
                         const Group& group, Sums& sums) {
  sum_by<Quads>(p, rows, leaf, first, count, w, group, sums);
}
