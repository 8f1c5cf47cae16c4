// Keys and values as they lie in pages. Included by a body, inside its namespace.
//
// Both are the right side of a product: pairs of what is summed over are neighbours, and lanes are next to each other.
// Of keys those are pairs of the head and lanes of tokens, [tokens / 16, head width / 2, 16, 2]; of values pairs of tokens
// and lanes of the head, [tokens / 2, value width, 2].

constexpr int64_t TILE = 64, LANES = 16, CHUNK = DEPTH;  // keys of a step of the softmax; members of a sum from zero
constexpr int64_t SIXTEENS = TILE / LANES, CHUNKS = TILE / CHUNK, WIDEST = 256;

// Sixteen pairs of members, `stride` apart, for sixteen lanes each.
template <class T>
struct Side {
  const T* at;
  int64_t stride;
};

// Where a head of a page has the keys of sixteen tokens, or the values of two, from token `cell` on.
template <class T>
inline T* keys_at(const Pages& pages, int64_t page, int64_t head, int64_t cell) {
  return (T*)pages.keys + ((page * pages.heads + head) * pages.size + cell) * pages.key_width;
}
template <class T>
inline T* values_at(const Pages& pages, int64_t page, int64_t head, int64_t cell) {
  return (T*)pages.values + ((page * pages.heads + head) * pages.size + cell) * pages.value_width;
}

template <class T>
struct Tile {  // pointers to 16 keys and values each; those after the context are null
  const T *keys[SIXTEENS], *values[SIXTEENS];
};

template <class T>
inline Tile<T> locate(const Pages& pages, const int32_t* table, int64_t head, int64_t first, int64_t length) {
  Tile<T> tile = {};
  for (int64_t i = 0; i < SIXTEENS; i++) {
    const int64_t key = first + i * LANES;
    if (key >= length) break;
    const int64_t page = table[key / pages.size], cell = key % pages.size;
    tile.keys[i] = keys_at<T>(pages, page, head, cell), tile.values[i] = values_at<T>(pages, page, head, cell);
  }
  return tile;
}

// -- asking for a tile before it is read ------------------------------------------------------------------------------

// Pages lie anywhere, so a core does not guess them, and where it is asked for many lines at once it waits. So a tile is
// asked for in steps, while the one before it is multiplied, and in each step for some lines of all its blocks of sixteen
// tokens, because a core reads on by itself where it sees several requests that go upwards.
constexpr int64_t OF_SCORES = 24, OF_SOFTMAX = 8, OF_VALUES = 24, STEPS = OF_SCORES + OF_SOFTMAX + OF_VALUES;

// A tile that is asked for while there is other work.
template <class T>
struct Ahead {
  const Pages& pages;
  const Tile<T>& tile;
  int64_t step = 0, first = 0, end = 0;  // the steps of the work that goes on now begin and end there

  void take(int64_t steps) { first = end, end += steps; }

  // Called when `done` of `all` parts of that work are done.
  void until(int64_t done, int64_t all) {
    const int64_t from = step, to = first + (end - first) * done / all;
    if (from >= to) return;
    step = to;
    for (int64_t i = 0; i < SIXTEENS && tile.keys[i]; i++) {
      fetch_part(tile.keys[i], pages.key_width, from, to);
      fetch_part(tile.values[i], pages.value_width, from, to);
    }
  }

 private:
  static void fetch_part(const T* block, int64_t width, int64_t from, int64_t to) {
    const int64_t lines = LANES * width * sizeof(T) / 64;
    for (int64_t i = lines * from / STEPS; i < lines * to / STEPS; i++) fetch((const char*)block + i * 64);
  }
};

// -- parts of a tile that are copied ----------------------------------------------------------------------------------

// The last members of the head, where they are no whole chunk, with zeros up to one.
template <class T>
inline void copy_last_keys(const Pages& pages, const T* keys, T* out) {
  const int64_t first = pages.key_width / CHUNK * CHUNK, count = pages.key_width - first;
  std::memset(out, 0, CHUNK * LANES * sizeof(T));
  std::memcpy(out, keys + first * LANES, count * LANES * sizeof(T));
}

// The values of 32 keys from the tile's key `first` on, and zeros in the place of those from key `seen` on.
template <class T>
inline void copy_values(const Pages& pages, const Tile<T>& tile, int64_t first, int64_t seen, T* out) {
  const int64_t row = 2 * pages.value_width;
  for (int64_t key = first; key < first + CHUNK; key += 2, out += row) {
    if (key >= seen) {
      std::memset(out, 0, row * sizeof(T));
      continue;
    }
    std::memcpy(out, tile.values[key / LANES] + key % LANES * pages.value_width, row * sizeof(T));
    for (int64_t i = 1; key + 1 >= seen && i < row; i += 2) out[i] = {};
  }
}

template <class T>
inline bool all_finite(const T* values, int64_t count) {
  Lanes zero = set(0.0f);
  for (int64_t i = 0; i < count; i += LANES) zero = fma(widen(values + i), set(0.0f), zero);  // of others it is NaN
  return sum(zero) == 0.0f;
}

// The values of a tile, a pointer to 32 keys each, of which those from key `seen` on are zero. What does not lie so in the
// pages is copied.
template <class T>
struct Values {
  T copies[CHUNKS][CHUNK * WIDEST];
  const T* chunks[CHUNKS];
  int64_t count, width;

  void take(const Pages& pages, const Tile<T>& tile, int64_t seen) {
    count = ceil_div(seen, CHUNK), width = pages.value_width;
    for (int64_t i = 0; i < count; i++) {
      const T *first = tile.values[2 * i], *second = tile.values[2 * i + 1];
      chunks[i] = first;
      if (seen >= (i + 1) * CHUNK && second == first + LANES * width) continue;
      copy_values(pages, tile, i * CHUNK, seen, copies[i]);
      chunks[i] = copies[i];
    }
  }
  bool are_finite(int64_t from, int64_t to) const {  // and maybe those next to them
    for (int64_t pair = from / 2; pair < ceil_div(to, 2); pair++)
      if (!all_finite(chunks[pair * 2 / CHUNK] + pair % (CHUNK / 2) * 2 * width, 2 * width)) return false;
    return true;
  }
  Side<T> side(int64_t chunk, int64_t group) const { return {chunks[chunk] + group * 2 * LANES, 2 * width}; }
};
