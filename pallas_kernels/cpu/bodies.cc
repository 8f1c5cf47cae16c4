// Which bodies there are on this processor: those whose instructions it has, and with which it gives AVX2's bits.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <vector>

#include "ops.h"

namespace jaxengine {
namespace {

const std::array<const Body*, BODIES> ALL = {nullptr, &avx2_body, &avx512_body, &avx512_bf16_body, &amx_body};

bool amx_is_allowed() {  // the processor has tiles and their bfloat16 product, and Linux grants them to who asks
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

bool has(int64_t body) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (body) {
    case AVX2: return avx2;
    case AVX512: return avx512;
    case AVX512_BF16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case AMX: return avx512 && amx_is_allowed();
    default: return false;
  }
}

class Alone final : public Threads {
 public:
  int64_t count() const override { return 1; }
  void start(std::function<void()> work) override { work(); }
};

// Products of one depth, so that no sum is hidden by a larger one, and of two, whose sums are added, the second one
// whole or in part: rows times `leaves`
// sets of outputs, of numbers from ranges of exponents in which sums round, cancel, leave the normal numbers, all of
// these, and in which rows or weights are subnormal, which is to be zero.
std::vector<float> depths_by(const Body& body) {
  constexpr int64_t ROWS = 19, LEAVES = 64, OUTPUTS = 16, RANGES = 6;
  constexpr struct Range { unsigned lowest, exponents; } ALL_NORMAL = {1, 200}, SMALLEST = {0, 2}, LARGE = {200, 12};
  constexpr Range OF_ROWS[RANGES] = {{120, 16}, {126, 2}, {60, 12}, ALL_NORMAL, SMALLEST, LARGE};
  constexpr Range OF_WEIGHTS[RANGES] = {{120, 16}, {126, 2}, {60, 12}, ALL_NORMAL, LARGE, SMALLEST};
  uint64_t state = 0x9e3779b97f4a7c15;
  const auto fill = [&](std::vector<BF16>& numbers, const Range& range) {
    for (BF16& each : numbers) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;  // Marsaglia's xorshift64
      const unsigned exponent = range.lowest + (state >> 20) % range.exponents;
      each = {uint16_t((state & 0x807f) | exponent << 7)};
    }
  };
  std::vector<float> found;
  for (const int64_t inputs : {32, 40, 64})
    for (int64_t range = 0; range < RANGES; range++) {
      std::vector<BF16> x(ROWS * inputs), w(LEAVES * OUTPUTS * inputs);
      std::vector<float> y(ROWS * LEAVES * OUTPUTS);
      fill(x, OF_ROWS[range]), fill(w, OF_WEIGHTS[range]);
      const Array none = {nullptr, Type::F32};
      Alone alone;
      body.product(alone, {Form::PLAIN, ROWS, ROWS, ROWS, LEAVES, OUTPUTS, inputs, {x.data(), Type::BF16}, none, 0.0f,
                           true, {w.data(), Type::BF16}, none, nullptr, nullptr, y.data()});
      found.insert(found.end(), y.begin(), y.end());
    }
  return found;
}

// An instruction may sum in another order than its maker's other processors, or than an emulator that stands in for one.
bool is_proven(const Body& body) {
  const auto expected = depths_by(avx2_body), found = depths_by(body);
  return std::memcmp(expected.data(), found.data(), expected.size() * sizeof(float)) == 0;
}

struct Found {
  std::array<bool, BODIES> there = {}, proven = {};
  Found() {
    for (int64_t body = AVX2; body < BODIES; body++) {
      there[body] = has(body);
      proven[body] = there[body] && is_proven(*ALL[body]);
    }
  }
};

const Found& found() {
  static const Found once;
  return once;
}

}  // namespace

const Body* body_of(int64_t name) {
  if (name == BEST)
    for (name = BODIES - 1; name > AVX2 && !found().proven[name];) name--;
  return name > BEST && name < BODIES && found().proven[name] ? ALL[name] : nullptr;
}

}  // namespace jaxengine

// Of bodies 1 << BodyName: those that may be used, and, 16 bits higher, those whose bits differ on this processor.
extern "C" __attribute__((visibility("default"))) int jaxengine_bodies() {
  using namespace jaxengine;
  int bits = 0;
  for (int64_t body = AVX2; body < BODIES; body++)
    bits |= int(found().proven[body]) << body | int(found().there[body] && !found().proven[body]) << (16 + body);
  return bits;
}
