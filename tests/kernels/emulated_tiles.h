// AMX's tiles in C++, for processors without: included before a source, it takes the place of the instructions that
// tiles.h uses, and has bodies.cc find a processor that has them.
//
// As Intel's manual defines them (Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS).
// What a processor would refuse ends the process.
#pragma once
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[8], reserved_bytes[8];  // of a row
  uint8_t rows[8], reserved_rows[8];
};
static_assert(sizeof(Config) == 64);

struct Tiles {
  Config config = {};  // palette 0: none are configured
  uint8_t data[8][16][64] = {};
};

inline thread_local Tiles tiles;

inline void want(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

template <class T, size_t N>
bool all_zero(const T (&numbers)[N]) {
  for (T each : numbers)
    if (each) return false;
  return true;
}

inline void load_config(const void* from) {
  Tiles next;
  Config& config = next.config;
  std::memcpy(&config, from, sizeof(config));
  want(config.palette == 1 && config.start_row == 0, "a palette of 1, from row 0 on");
  want(all_zero(config.reserved) && all_zero(config.reserved_bytes) && all_zero(config.reserved_rows), "reserved is 0");
  for (int t = 0; t < 8; t++) {
    want(config.bytes[t] <= 64 && config.rows[t] <= 16, "at most 16 rows of 64 bytes");
    want((config.bytes[t] == 0) == (config.rows[t] == 0), "rows and bytes, or neither");
  }
  tiles = next;  // tiles are zero from then on
}

inline void release() { tiles = Tiles(); }

inline int checked(int tile) {
  want(tile >= 0 && tile < 8 && tiles.config.rows[tile] > 0, "a tile that is configured");
  return tile;
}

inline void zero(int tile) { std::memset(tiles.data[checked(tile)], 0, sizeof(tiles.data[tile])); }

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int row = 0; row < tiles.config.rows[tile]; row++)
    std::memcpy(tiles.data[tile][row], (const char*)from + row * stride, tiles.config.bytes[tile]);
}

inline void store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < tiles.config.rows[checked(tile)]; row++)
    std::memcpy((char*)to + row * stride, tiles.data[tile][row], tiles.config.bytes[tile]);
}

// Of a row's words of 32 bits the lower bfloat16 (parity 0), or the upper one.
inline float widened(const uint8_t* row, int word, int parity) {
  uint16_t narrow;
  std::memcpy(&narrow, row + 4 * word + 2 * parity, sizeof(narrow));
  const uint32_t bits = uint32_t(narrow) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// Not inlined, so that no arithmetic is moved out from between the settings around its call.
__attribute__((noinline, target("fma"))) inline void dot_rows(int sums, int left, int right) {
  const Config& config = tiles.config;
  for (int m = 0; m < config.rows[sums]; m++) {
    float chains[16][2] = {}, total[16];
    for (int k = 0; k < config.bytes[left] / 4; k++)
      for (int n = 0; n < config.bytes[sums] / 4; n++)
        for (int parity = 0; parity < 2; parity++) {
          const float a = widened(tiles.data[left][m], k, parity), b = widened(tiles.data[right][k], n, parity);
          chains[n][parity] = std::fma(a, b, chains[n][parity]);
        }
    std::memcpy(total, tiles.data[sums][m], sizeof(total));
    for (int n = 0; n < config.bytes[sums] / 4; n++) total[n] += chains[n][0] + chains[n][1];
    std::memcpy(tiles.data[sums][m], total, config.bytes[sums]);
  }
}

// The thread's settings neither matter nor change: to nearest, subnormals read and written as zero.
inline void dot(int sums, int left, int right) {
  want(sums != left && left != right && sums != right, "three tiles");
  const Config& config = tiles.config;
  want(config.rows[checked(sums)] == config.rows[checked(left)], "as many rows of sums as of the left tile");
  want(config.bytes[sums] == config.bytes[checked(right)], "as many columns of sums as of the right tile");
  want(config.bytes[left] == 4 * config.rows[right], "as many pairs of the left tile as rows of the right one");
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8000 | 0x0040);
  dot_rows(sums, left, right);
  _mm_setcsr(before);
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) ::emulated::load_config(from)
#define _tile_release() ::emulated::release()
#define _tile_zero(tile) ::emulated::zero(tile)
#define _tile_loadd(tile, from, stride) ::emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) ::emulated::store(tile, to, stride)
#define _tile_dpbf16ps(sums, left, right) ::emulated::dot(sums, left, right)
// bodies.cc's two questions: the processor's features, and Linux's leave to use tiles.
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(a) = *(b) = *(c) = 0, *(d) = 1u << 22 | 1u << 24, 1)
#define syscall(...) 0L
