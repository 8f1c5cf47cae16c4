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

struct Range { unsigned lowest, exponents; };

class Random {
 public:
  void fill(std::vector<BF16>& numbers, const Range& range) {
    for (BF16& each : numbers) {
      const unsigned exponent = range.lowest + (next() >> 20) % range.exponents;
      each = {uint16_t((state_ & 0x807f) | exponent << 7)};
    }
  }
  void fill(std::vector<float>& numbers) {  // from -4 to 4
    for (float& each : numbers) each = float(int32_t(next() >> 32)) * 0x1p-29f;
  }

 private:
  uint64_t next() {  // Marsaglia's xorshift64
    return state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
  }
  uint64_t state_ = 0x9e3779b97f4a7c15;
};

template <class T>
void append(std::vector<char>& bytes, const std::vector<T>& numbers) {
  const auto* first = (const char*)numbers.data();
  bytes.insert(bytes.end(), first, first + numbers.size() * sizeof(T));
}

// Products of one depth, so that no sum is hidden by a larger one, and of two, whose sums are added; the second one and the
// outputs whole or in part. Rows times `LEAVES` sets of outputs, of numbers from ranges of exponents in which sums round,
// cancel, leave the normal numbers, all of these, and in which rows or weights are subnormal, which is to be zero.
void products_by(const Body& body, std::vector<char>& found) {
  constexpr int64_t ROWS = 19, LEAVES = 64, RANGES = 6;
  constexpr Range ALL_NORMAL = {1, 200}, SMALLEST = {0, 2}, LARGE = {200, 12};
  constexpr Range OF_ROWS[RANGES] = {{120, 16}, {126, 2}, {60, 12}, ALL_NORMAL, SMALLEST, LARGE};
  constexpr Range OF_WEIGHTS[RANGES] = {{120, 16}, {126, 2}, {60, 12}, ALL_NORMAL, LARGE, SMALLEST};
  constexpr struct { int64_t inputs, outputs; } SHAPES[] = {{32, 16}, {40, 13}, {64, 16}};
  Random random;
  for (const auto& [inputs, outputs] : SHAPES)
    for (int64_t range = 0; range < RANGES; range++) {
      std::vector<BF16> x(ROWS * inputs), w(LEAVES * outputs * inputs);
      std::vector<float> y(ROWS * LEAVES * outputs);
      random.fill(x, OF_ROWS[range]), random.fill(w, OF_WEIGHTS[range]);
      const Array none = {nullptr, Type::F32};
      Alone alone;
      body.product(alone, {Form::PLAIN, ROWS, ROWS, ROWS, LEAVES, outputs, inputs, {x.data(), Type::BF16}, none, 0.0f,
                           true, {w.data(), Type::BF16}, none, nullptr, nullptr, y.data()});
      append(found, y);
    }
}

// A sequence's queries, keys and values and what they attend to: more than a tile of keys, whole and part-filled groups of
// rows, of keys and of a head's numbers.
void attended_by(const Body& body, std::vector<char>& found) {
  constexpr int64_t BLOCKS = 6, TOKENS = 16, ROWS = BLOCKS * TOKENS, HEADS = 2, QUERIES = 6, WIDTH = 40, PADDED = 48;
  std::vector<float> packed(ROWS * (QUERIES + 2 * HEADS) * WIDTH), frequencies(WIDTH / 2), q(ROWS * QUERIES * WIDTH);
  std::vector<BF16> keys(ROWS * HEADS * WIDTH), values(ROWS * HEADS * PADDED), y(ROWS * QUERIES * WIDTH);
  Random random;
  random.fill(packed), random.fill(frequencies);
  std::vector<int32_t> table, slots(BLOCKS, 0), starts, counts(BLOCKS, TOKENS);
  for (int32_t i = 0; i < BLOCKS; i++) table.push_back(BLOCKS - 1 - i), starts.push_back(i * TOKENS);
  counts.back() = 3;
  const Array none = {nullptr, Type::F32};
  const Blocks blocks = {BLOCKS, TOKENS, BLOCKS, table.data(), slots.data(), starts.data(), counts.data(), nullptr};
  const Pages pages = {HEADS, TOKENS, WIDTH, PADDED, Type::BF16, keys.data(), values.data()};
  Alone alone;
  body.heads(alone, {1, QUERIES, WIDTH, packed.data(), frequencies.data(), none, none, 0.0f, 1.0f, 0.25f, blocks, pages,
                     q.data()});
  body.attend(alone, {QUERIES, q.data(), blocks, pages, y.data()});
  append(found, q), append(found, keys), append(found, values), append(found, y);
}

std::vector<char> found_by(const Body& body) {
  std::vector<char> found;
  products_by(body, found), attended_by(body, found);
  return found;
}

struct Found {
  std::array<bool, BODIES> there = {}, proven = {};
  // An instruction may sum in another order than its maker's other processors, or than an emulator that stands in for one.
  Found() {
    if (!has(AVX2)) return;  // which all of them need, and which is what they are compared with
    there[AVX2] = proven[AVX2] = true;
    const std::vector<char> expected = found_by(avx2_body);
    for (int64_t body = AVX2 + 1; body < BODIES; body++) {
      there[body] = has(body);
      proven[body] = there[body] && found_by(*ALL[body]) == expected;
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
