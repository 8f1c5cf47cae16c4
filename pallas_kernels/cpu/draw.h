// A token of each row, and its logprob: the definition of draw_reference.py. Included by a body, inside its namespace.
// The vocabulary is whole blocks of BLOCK ids; the exponentials' sums within one are float32, over blocks float64.

constexpr int64_t BLOCK = 128;

// The first index of positive weight whose running sum exceeds u times the total; where rounding lets none, the last one
// of positive weight.
inline int64_t inverse_cdf(const float* weights, int64_t n, float u) {
  double total = 0, running = 0;
  for (int64_t i = 0; i < n; i++) total += weights[i];
  int64_t last = 0;
  for (int64_t i = 0; i < n; i++) {
    if (!(weights[i] > 0)) continue;
    last = i, running += weights[i];
    if (running > double(u) * total) return i;
  }
  return last;
}

inline void exponentials(const float* x, float high, float* out) {
  for (int64_t i = 0; i < BLOCK; i += 16) store(out + i, exp(load(x + i) - set(high)));
}

inline void draw_row(const Drawing& d, int64_t row, float* masses) {
  const int64_t blocks = d.vocabulary / BLOCK;
  const float* x = d.logits + row * d.vocabulary;
  Lanes top = load(x);
  for (int64_t i = 16; i < d.vocabulary; i += 16) top = max(top, load(x + i));
  const float high = maximum(top);
  alignas(64) float weights[BLOCK];
  double mass = 0;
  for (int64_t b = 0; b < blocks; b++) {
    exponentials(x + b * BLOCK, high, weights);
    Lanes sums = load(weights);
    for (int64_t i = 16; i < BLOCK; i += 16) sums = sums + load(weights + i);
    mass += masses[b] = sum(sums);
  }
  int64_t token = d.given[row];
  if (token < 0) {
    const int64_t b = inverse_cdf(masses, blocks, d.uniforms[2 * row]);
    exponentials(x + b * BLOCK, high, weights);
    token = b * BLOCK + inverse_cdf(weights, BLOCK, d.uniforms[2 * row + 1]);
  }
  token = std::min(token, d.vocabulary - 1);
  const float log_mass = float(log(mass));
  d.tokens[row] = int32_t(token), d.highs[row] = high, d.log_masses[row] = log_mass;
  d.logprobs[row] = (x[token] - high) - log_mass;
}

inline void draw(Threads& threads, const Drawing& d) {
  parallel(threads, d.rows, [&](int64_t row) {
    static thread_local Scratch of_blocks;
    draw_row(d, row, of_blocks.floats(d.vocabulary / BLOCK));
  });
}
