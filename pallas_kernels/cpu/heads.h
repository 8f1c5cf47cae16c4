// From a projection to the heads that attention takes: normalised, rotated; keys and values go to their pages.
// Included by a body, inside its namespace.
//
// Keys and values lie in a page as attend_pages.h has them. Columns of the projection lie by leaf: a leaf's queries, its
// keys, its values.

struct Turns { alignas(64) float cosines[WIDEST / 2], sines[WIDEST / 2]; };

inline void find_turns(const Heads& h, int64_t position, Turns& turns) {
  float angles[WIDEST / 2] = {};
  for (int64_t i = 0; i < h.width / 2; i++) angles[i] = float(position) * h.frequencies[i];
  for (int64_t i = 0; i < h.width / 2; i += 8) cos_sin(angles + i, turns.cosines + i, turns.sines + i);
  for (int64_t i = 0; i < h.width / 2; i++) turns.cosines[i] *= h.rope_factor, turns.sines[i] *= h.rope_factor;
}

inline void rotate(float* x, int64_t width, const Turns& turns) {
  for (int64_t i = 0; i < width / 2; i++) {
    const float a = x[i], b = x[width / 2 + i], c = turns.cosines[i], s = turns.sines[i];
    x[i] = a * c - b * s, x[width / 2 + i] = b * c + a * s;
  }
}

template <class T>
inline void write_key(const Pages& pages, int64_t page, int64_t head, int64_t cell, const float* x) {
  T* out = keys_at<T>(pages, page, head, cell / LANES * LANES) + cell % LANES * 2;
  for (int64_t i = 0; i < pages.key_width; i += 16) {
    T narrowed[16];
    narrow(narrowed, widen_some(x + i, pages.key_width - i));
    for (int64_t j = i; j < std::min(i + 16, pages.key_width); j += 2)
      std::memcpy(out + j * LANES, narrowed + j - i, 2 * sizeof(T));
  }
}

template <class T>
inline void write_value(const Pages& pages, int64_t page, int64_t head, int64_t cell, const float* x) {
  T* out = values_at<T>(pages, page, head, cell / 2 * 2);
  for (int64_t i = 0; i < pages.value_width; i += 16)  // the other token's may be written meanwhile
    narrow_to_pairs(out + 2 * i, cell % 2, widen_some(x + i, std::max<int64_t>(pages.key_width - i, 0)));
}

template <class T>
inline void heads_of_row(const Heads& h, int64_t m, int64_t position, int64_t page) {
  Turns turns;
  find_turns(h, position, turns);
  const int64_t queries = h.queries / h.leaves, keys = h.pages.heads / h.leaves, cell = position % h.pages.size;
  const float* row = h.packed + m * h.leaves * (queries + 2 * keys) * h.width;
  const size_t bytes = h.width * sizeof(float);
  alignas(64) float x[WIDEST];
  for (int64_t leaf = 0; leaf < h.leaves; leaf++) {
    const int64_t begin = leaf * (queries + 2 * keys);
    for (int64_t i = 0; i < queries; i++) {
      std::memcpy(x, row + (begin + i) * h.width, bytes);
      if (h.q_norm) normalise(x, h.width, h.q_norm, h.eps);
      rotate(x, h.width, turns);
      float* q = h.q + (m * h.queries + leaf * queries + i) * h.width;
      for (int64_t j = 0; j < h.width; j++) q[j] = x[j] * h.scale;
    }
    for (int64_t i = 0; i < keys; i++) {
      std::memcpy(x, row + (begin + queries + i) * h.width, bytes);
      if (h.k_norm) normalise(x, h.width, h.k_norm, h.eps);
      rotate(x, h.width, turns);
      write_key<T>(h.pages, page, leaf * keys + i, cell, x);
      write_value<T>(h.pages, page, leaf * keys + i, cell, row + (begin + queries + keys + i) * h.width);
    }
  }
}

inline void heads(Threads& threads, const Heads& h) {
  const Blocks& blocks = h.blocks;
  parallel(threads, blocks.live, [&](int64_t b) {
    for (int64_t m = blocks.first_row(b), t = 0; m < blocks.end_row(b); m++, t++) {
      const int64_t position = blocks.starts[b] + t;
      if (t >= blocks.counts[b]) {
        std::memset(h.q + m * h.queries * h.width, 0, h.queries * h.width * sizeof(float));
        continue;
      }
      const int64_t page = blocks.table(b)[position / h.pages.size];
      switch (h.pages.type) {
        case Type::F32: heads_of_row<float>(h, m, position, page); break;
        case Type::F16: heads_of_row<F16>(h, m, position, page); break;
        case Type::BF16: heads_of_row<BF16>(h, m, position, page); break;
      }
    }
  });
}
