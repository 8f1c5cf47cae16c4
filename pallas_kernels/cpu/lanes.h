// Sixteen float32 lanes: one register of AVX-512, two of AVX2. All that the ops do with vectors is here, and every one of
// these is exact or rounds once, so that both give the same bits. Included by a body, inside its namespace.

struct Lanes {
#ifdef WITH_AVX512
  __m512 v;
#else
  __m256 lo, hi;
#endif
};

#ifdef WITH_AVX512
inline Lanes set(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a · b + c
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes floor(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
inline Lanes where_less(Lanes a, Lanes b, Lanes yes, Lanes no) {  // `no` where a or b is NaN
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline Lanes where_nan(Lanes a, Lanes yes, Lanes no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), no.v, yes.v)};
}
inline Lanes two_to(Lanes n) {  // 2^n for whole n between -126 and 127, from its bits
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
inline uint32_t at_least(const int32_t* p, int32_t least) {  // a bit for each of sixteen whole numbers
  return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(least));
}
inline Lanes where_at_least(const int32_t* p, int32_t least, Lanes yes) {  // else 0
  return {_mm512_maskz_mov_ps(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(least)), yes.v)};
}
inline __m256 low(Lanes a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high(Lanes a) { return _mm512_extractf32x8_ps(a.v, 1); }
inline Lanes join(__m256 lo, __m256 hi) { return {_mm512_insertf32x8(_mm512_castps256_ps512(lo), hi, 1)}; }
#else
inline Lanes set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) {  // a · b + c
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Lanes floor(Lanes a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
inline Lanes where_less(Lanes a, Lanes b, Lanes yes, Lanes no) {  // `no` where a or b is NaN
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline Lanes where_nan(Lanes a, Lanes yes, Lanes no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q))};
}
inline __m256 two_to(__m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Lanes two_to(Lanes n) { return {two_to(n.lo), two_to(n.hi)}; }  // for whole n between -126 and 127
inline uint32_t below8(const int32_t* p, int32_t least) {
  const __m256i is_below = _mm256_cmpgt_epi32(_mm256_set1_epi32(least), _mm256_loadu_si256((const __m256i*)p));
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(is_below)));
}
inline uint32_t at_least(const int32_t* p, int32_t least) {  // a bit for each of sixteen whole numbers
  return 0xffff ^ (below8(p, least) | below8(p + 8, least) << 8);
}
inline __m256 where_at_least8(const int32_t* p, int32_t least, __m256 yes) {
  const __m256i is_below = _mm256_cmpgt_epi32(_mm256_set1_epi32(least), _mm256_loadu_si256((const __m256i*)p));
  return _mm256_andnot_ps(_mm256_castsi256_ps(is_below), yes);
}
inline Lanes where_at_least(const int32_t* p, int32_t least, Lanes yes) {  // else 0
  return {where_at_least8(p, least, yes.lo), where_at_least8(p + 8, least, yes.hi)};
}
inline __m256 low(Lanes a) { return a.lo; }
inline __m256 high(Lanes a) { return a.hi; }
inline Lanes join(__m256 lo, __m256 hi) { return {lo, hi}; }
#endif

// -- float32 as whole numbers in the same order -----------------------------------------------------------------------

// -0 and +0 are one number, and no NaN is above 2^31 - 2, so that there is a next one.
inline void store_order8(int32_t* p, __m256 a) {
  __m256i bits = _mm256_castps_si256(a);
  bits = _mm256_andnot_si256(_mm256_cmpeq_epi32(bits, _mm256_set1_epi32(int32_t(0x80000000))), bits);
  bits = _mm256_xor_si256(bits, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
  _mm256_storeu_si256((__m256i*)p, _mm256_min_epi32(bits, _mm256_set1_epi32(0x7ffffffe)));
}
inline void store_order(int32_t* p, Lanes a) { store_order8(p, low(a)), store_order8(p + 8, high(a)); }

// -- 16-bit numbers ---------------------------------------------------------------------------------------------------

inline __m256 widen8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 widen8(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline __m256 widen8(const BF16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Lanes widen(const float* p) { return load(p); }
#ifdef WITH_AVX512
inline Lanes widened(const BF16*, __m256i words) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
}
inline Lanes widened(const F16*, __m256i words) { return {_mm512_cvtph_ps(words)}; }
template <class T>
inline Lanes widen(const T* p) { return widened(p, _mm256_loadu_si256((const __m256i*)p)); }
#else
template <class T>
inline Lanes widen(const T* p) { return join(widen8(p), widen8(p + 8)); }
#endif

inline void narrow8(float* p, __m256 a) { _mm256_storeu_ps(p, a); }
inline void narrow8(F16* p, __m256 a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The bits of numbers that are no NaN, rounded to bfloat16 in their upper halves: to nearest, ties to even.
inline __m256i rounded_bits(__m256 a) {
  const __m256i x = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7fff)), odd);
}
inline void narrow8(BF16* p, __m256 a) {  // NaN stays NaN
  __m256i y = _mm256_srli_epi32(rounded_bits(a), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  y = _mm256_blendv_epi8(y, _mm256_set1_epi32(0x7fc0), is_nan);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(y, y), 0x88);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(words));
}
template <class T>
inline void narrow(T* p, Lanes a) { narrow8(p, low(a)), narrow8(p + 8, high(a)); }
inline void narrow(float* p, Lanes a) { store(p, a); }
#ifdef WITH_AVX512
inline __m512i rounded_bits(Lanes a) {
  const __m512i x = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd);
}
inline void narrow(BF16* p, Lanes a) {
  __m512i y = _mm512_srli_epi32(rounded_bits(a), 16);
  y = _mm512_mask_mov_epi32(y, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(y));
}
#endif

// Sixteen numbers become the first or the second members of sixteen pairs; the other members are not touched.
template <class T>
inline void narrow_to_pairs(T* pairs, int64_t member, Lanes a) {
  T narrowed[16];
  narrow(narrowed, a);
#ifdef WITH_AVX512
  if constexpr (sizeof(T) == 2) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)narrowed));
    if (member == 0) _mm512_mask_storeu_epi16(pairs, 0x55555555, words);
    else _mm512_mask_storeu_epi16(pairs, 0xaaaaaaaa, _mm512_slli_epi32(words, 16));
    return;
  }
#endif
  for (int64_t i = 0; i < 16; i++) pairs[2 * i + member] = narrowed[i];
}

// The first n of sixteen, and `others` in the place of the rest.
template <class T>
inline Lanes widen_some(const T* p, int64_t n, T others = {}) {
  if (n >= 16) return widen(p);
  T all[16];
  for (T& each : all) each = others;
  std::memcpy(all, p, n * sizeof(T));
  return widen(all);
}
template <class T>
inline void narrow_some(T* p, Lanes a, int64_t n) {
  if (n >= 16) return narrow(p, a);
  T all[16];
  narrow(all, a);
  std::memcpy(p, all, n * sizeof(T));
}

inline Lanes widen_some(const Array& a, int64_t at, int64_t n) {
  if (a.type == Type::F32) return widen_some((const float*)a.data + at, n);
  return a.type == Type::F16 ? widen_some((const F16*)a.data + at, n) : widen_some((const BF16*)a.data + at, n);
}

template <class T>
inline Lanes rounded_to(Lanes a) {
  T words[16];
  narrow(words, a);
  return widen(words);
}

// -- over lanes, halves first -----------------------------------------------------------------------------------------

inline float sum(Lanes a) {
  const __m256 eight = _mm256_add_ps(low(a), high(a));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float maximum(Lanes a) {
  const __m256 eight = _mm256_max_ps(low(a), high(a));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
