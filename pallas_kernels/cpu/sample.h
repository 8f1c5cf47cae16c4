// From hidden rows to their tokens: the head, temperature, truncation and draw. Included by a body, inside its namespace.
// Logits never leave the caches of the thread that draws from them but once, as the head's product has written them.

inline bool are_finite(const float* x, int64_t n) {
  Lanes differences = set(0.0f);  // 0, and NaN of what is not finite
  for (int64_t i = 0; i < n; i += 16) {
    const Lanes v = widen_some(x + i, n - i);
    differences = differences + (v - v);
  }
  return sum(differences) == 0;
}

// The first of the largest.
inline int32_t likeliest(const float* x, int64_t n) {
  const float high = largest_logit(x, n);
  int64_t id = 0;
  while (id < n - 1 && x[id] != high) id++;
  return int32_t(id);
}

// Sampling's place for a row of processed logits and for what is kept of it.
struct RowMemory {
  float *logits, *truncation;
  uint8_t* mask;
  static int64_t floats(int64_t columns) { return columns + ceil_div(columns, 4) + KeptOfRow::floats(columns); }
  RowMemory(float* memory, int64_t columns)
      : logits(memory), truncation(memory + columns), mask((uint8_t*)(truncation + KeptOfRow::floats(columns))) {}
};

inline void sample_row(const Sampling& s, int64_t row, const float* x, int64_t columns, float* memory) {
  const RowMemory own(memory, columns);
  const Lanes reciprocal = set(1.0f / s.temperatures[row]);  // as pinned_math.row_quotient divides
  for (int64_t i = 0; i < columns; i += 16) store(own.logits + i, load(x + i) * reciprocal);
  std::fill(own.logits + s.vocabulary, own.logits + columns, -std::numeric_limits<float>::infinity());
  if (s.top_k[row] > 0 || s.top_p[row] < 1 || s.min_p[row] > 0) {
    find_kept({1, columns, own.logits, s.top_k + row, s.top_p + row, s.min_p + row, own.mask}, 0, own.truncation);
    for (int64_t id = 0; id < columns; id++)
      if (!own.mask[id]) own.logits[id] = -std::numeric_limits<float>::infinity();
  }
  const int32_t given = s.given[row] == LIKELIEST ? likeliest(x, s.vocabulary) : s.given[row];
  float high, log_mass;
  draw_row({1, columns, own.logits, s.uniforms + 2 * row, &given, s.tokens + row, s.logprobs + row, &high, &log_mass}, 0,
           own.truncation);
  s.finite[row] = are_finite(x, s.vocabulary) && s.logprobs[row] == s.logprobs[row];
}

// The logits' memory is lent: as many as there are calls at a time, and not one for each of XLA's threads.
inline void sample(Threads& threads, const Sampling& s) {
  const int64_t columns = s.head.leaves * s.head.outputs;
  const Lent logits(s.head.rows * columns);
  Product head = s.head;
  head.y = logits.floats;
  product(threads, head);
  parallel(threads, s.head.rows, [&](int64_t row) {
    static thread_local Scratch of_row;
    s.tokens[row] = 0, s.logprobs[row] = 0, s.finite[row] = true;
    if (s.live[row])
      sample_row(s, row, logits.floats + row * columns, columns, of_row.floats(RowMemory::floats(columns)));
  });
}
