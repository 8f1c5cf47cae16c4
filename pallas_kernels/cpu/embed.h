// Rows of the embedding in float32. Included by a body, inside its namespace.

inline void embed(Threads& threads, const Embedding& e) {
  const int64_t few = ceil_div(std::max<int64_t>(e.live, 1), 4 * threads.count());
  parallel(threads, ceil_div(e.live, few), [&](int64_t task) {
    for (int64_t m = task * few; m < std::min(e.live, (task + 1) * few); m++) {
      const int64_t id = std::min<int64_t>(std::max(e.ids[m], 0), e.ids_end - 1);
      for (int64_t k = 0; k < e.width; k += 16)
        narrow_some(e.y + m * e.width + k, widen_some(e.table, id * e.width + k, e.width - k), e.width - k);
    }
  });
  std::memset(e.y + e.live * e.width, 0, (e.zeros_to - e.live) * e.width * sizeof(float));
}
