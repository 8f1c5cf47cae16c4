// Elementary functions from additions and multiplications, because a C library's differ from machine to machine.
// Included by a body, inside its namespace.

inline Lanes exp_of_small(Lanes r) {  // e^r for |r| <= ln 2 / 2: the polynomial of expf in Moshier's Cephes library
  Lanes p = set(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, set(c));
  return fma(p, r * r, r) + set(1.0f);
}

// 2^x for x <= 0, and exactly 1 for 0; 0 below -126; NaN stays NaN. The polynomial has the least relative error of those
// of its degree between 0 and 1 that are 1 at 0. Several at once, because each is a chain of steps that wait for another.
template <int N>
inline void exp2(Lanes (&x)[N]) {
  Lanes n[N], f[N], y[N];
  for (int i = 0; i < N; i++) x[i] = max(set(-200.0f), x[i]);
  for (int i = 0; i < N; i++) n[i] = floor(x[i]);
  for (int i = 0; i < N; i++) f[i] = x[i] - n[i], y[i] = set(2.161291631637141e-4f);
  for (float c : {1.2467845808714628e-3f, 9.675451554358006e-3f, 5.5485282093286514e-2f, 0.2402293086051941f,
                  0.6931470632553101f, 1.0f})
    for (int i = 0; i < N; i++) y[i] = fma(y[i], f[i], set(c));
#ifdef WITH_AVX512
  for (int i = 0; i < N; i++) x[i].v = _mm512_scalef_ps(y[i].v, x[i].v);  // times 2 to floor(x)
#else
  for (int i = 0; i < N; i++)
    x[i] = where_less(n[i], set(-126.0f), set(0.0f), y[i] * two_to(max(set(-126.0f), n[i])));
#endif
}

inline Lanes exp2(Lanes x) {
  Lanes one[1] = {x};
  exp2(one);
  return one[0];
}

inline Lanes exp(Lanes x) {  // e^x; 0 below -87, e^88 above 88; NaN stays NaN
  const Lanes clipped = max(min(x, set(88.0f)), set(-87.0f));
  const Lanes n = floor(fma(clipped, set(1.442695040888963f), set(0.5f)));
  const Lanes r = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), clipped));
  const Lanes y = exp_of_small(r) * two_to(n);
  return where_nan(x, x, where_less(x, set(-87.0f), set(0.0f), y));
}

// log x of a positive normal number, as XLA's vector code has it: logf of Moshier's Cephes library.
inline float xla_log(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  float exponent = float(int32_t(bits >> 23) - 126);
  bits = (bits & 0x7fffff) | 0x3f000000;
  float m;
  std::memcpy(&m, &bits, 4);
  if (m < 0.707106781186547524f) exponent -= 1, m += m - 1;
  else m -= 1;
  auto polynomial = [m](float a, float b, float c) { return __builtin_fmaf(__builtin_fmaf(m, a, b), m, c); };
  const float square = m * m, cube = square * m;
  float y = __builtin_fmaf(polynomial(7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f), cube,
                     polynomial(-1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f));
  y = __builtin_fmaf(y, cube, polynomial(2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f));
  y = __builtin_fmaf(y, cube, exponent * -2.12194440e-4f);
  return __builtin_fmaf(exponent, 0.693359375f, (m - square * 0.5f) + y);
}

inline Lanes silu(Lanes x) { return x / (set(1.0f) + exp(set(0.0f) - x)); }

inline double log(double x) {  // of a positive finite number; NaN of all others
  if (!(x > 0 && x <= std::numeric_limits<double>::max())) return std::numeric_limits<double>::quiet_NaN();
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  int64_t exponent = int64_t(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffff) | (uint64_t(1023) << 52);
  double f;
  std::memcpy(&f, &bits, 8);
  if (f > 1.4142135623730951) f *= 0.5, exponent++;
  const double s = (f - 1) / (f + 1), square = s * s;  // log f = 2 (s + s^3 / 3 + s^5 / 5 + ...)
  double series = 0;
  for (int k = 23; k >= 1; k -= 2) series = series * square + 1.0 / k;
  return 2 * s * series + double(exponent) * 0.6931471805599453;
}

// Cosines and sines of eight angles below a million or so, in float64: quarter turns are taken off by pi/2 in two parts,
// of which the first times a whole number of 20 bits is exact.
inline void cos_sin(const float* angles, float* cosines, float* sines) {
  using Doubles = double __attribute__((vector_size(64)));
  using Whole = int64_t __attribute__((vector_size(64)));
  Doubles x;
  for (int i = 0; i < 8; i++) x[i] = angles[i];
  const Doubles turns = x * 0.6366197723675814;
  const Whole n = __builtin_convertvector(turns < 0 ? turns - 0.5 : turns + 0.5, Whole);
  const Doubles quarters = __builtin_convertvector(n, Doubles);
  const Doubles r = (x - quarters * 1.57079632673412561417e+00) - quarters * 6.07710050650619224932e-11;
  const Doubles square = r * r;
  Doubles c = Doubles{} + 1, s = c;
  for (int k = 16; k >= 2; k -= 2) {
    c = 1 - c * square * (1.0 / (k * (k - 1)));
    s = 1 - s * square * (1.0 / (k * (k + 1)));
  }
  s *= r;
  const Whole is_odd = (n & 1) != 0, is_back = (n & 2) != 0;
  const Doubles cosine = is_odd ? (is_back ? s : -s) : (is_back ? -c : c);
  const Doubles sine = is_odd ? (is_back ? -c : c) : (is_back ? -s : s);
  for (int i = 0; i < 8; i++) cosines[i] = float(cosine[i]), sines[i] = float(sine[i]);
}
