// What XLA hands to an op, compared with what the op reads and writes, before any of it is touched.
#pragma once
#include <array>
#include <string>

#include "ops.h"
#include "xla/ffi/api/ffi.h"

namespace jaxengine {

namespace ffi = xla::ffi;
using Any = ffi::AnyBuffer;
using Ints = ffi::Buffer<ffi::S32>;
using Floats = ffi::Buffer<ffi::F32>;
using Bools = ffi::Buffer<ffi::PRED>;

inline ffi::Error refused(const std::string& what) {
  return ffi::Error::InvalidArgument("jaxengine's CPU kernels: " + what);
}

inline ffi::DataType data_type(Type type) {
  return type == Type::F32 ? ffi::F32 : type == Type::F16 ? ffi::F16 : ffi::BF16;
}

// The arguments of one op. Of those that do not fit the first is kept, by its name.
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) {}

  bool fit() const { return wrong_.empty(); }
  ffi::Error refusal() const { return refused(wrong_); }

  void that(bool holds, const char* name, const char* otherwise) {
    if (!holds) refuse(name, otherwise);
  }

  // The sizes of an array of N dimensions; zeros where it has another number of them, which is refused.
  template <size_t N, class Buffer>
  std::array<int64_t, N> sizes(const char* name, const Buffer& x) {
    std::array<int64_t, N> sizes = {};
    const auto dimensions = x.dimensions();
    if (dimensions.size() == N) std::copy(dimensions.begin(), dimensions.end(), sizes.begin());
    else refuse(name, "must have " + std::to_string(N) + " dimensions");
    return sizes;
  }

  template <class Buffer>
  void count(const char* name, const Buffer& x, int64_t wanted) {
    const int64_t found = x.element_count();
    if (found != wanted)
      refuse(name, "has " + std::to_string(found) + " numbers, must have " + std::to_string(wanted));
  }

  void type(const char* name, const Any& x, ffi::DataType wanted) {
    that(x.element_type() == wanted, name, "is of the wrong type");
  }

  void floats(const char* name, const Any& x) {
    const auto found = x.element_type();
    that(found == ffi::F32 || found == ffi::F16 || found == ffi::BF16, name, "is of no type of floats");
  }

  // One that may be left out, which is empty then.
  void optional(const char* name, const Any& x, int64_t wanted) {
    floats(name, x);
    if (x.element_count()) count(name, x, wanted);
  }

  int64_t number(const char* name, const Ints& x) {
    count(name, x, 1);
    return x.element_count() == 1 ? x.typed_data()[0] : 0;
  }

 private:
  void refuse(const char* name, const std::string& why) {
    if (fit()) wrong_ = std::string(op_) + ": " + name + ": " + why;
  }

  const char* op_;
  std::string wrong_;
};

// The first `live` rows of `rows`, and where the last tile with one ends.
struct Extent {
  int64_t live, zeros_to;
  Extent(Arguments& given, const Ints& count, int64_t rows, int64_t tile) {
    given.that(tile >= 1, "tile", "must be at least 1");
    live = std::clamp<int64_t>(given.number("count", count), 0, rows);
    zeros_to = std::min(rows, ceil_to(live, std::max<int64_t>(tile, 1)));
  }
};

inline Blocks blocks_of(Arguments& given, const Ints& tables, const Ints& slots, const Ints& starts, const Ints& counts,
                        const Ints& first_rows, const Ints& num_blocks, int64_t rows) {
  const int64_t table_width = given.sizes<2>("tables", tables)[1];
  const int64_t all = slots.element_count();
  const bool is_packed = first_rows.element_count() > 0;
  given.that(is_packed || (all ? rows % all == 0 : rows == 0), "slots", "do not divide the rows");
  given.count("starts", starts, all);
  given.count("counts", counts, all);
  if (is_packed) given.count("first_rows", first_rows, all);
  const int64_t live = std::clamp<int64_t>(given.number("num_blocks", num_blocks), 0, all);
  Blocks blocks = {live, all ? rows / all : 1, table_width, tables.typed_data(), slots.typed_data(),
                   starts.typed_data(), counts.typed_data(), is_packed ? first_rows.typed_data() : nullptr};
  if (is_packed && given.fit()) {
    blocks.tokens = 1;
    int64_t end = 0;  // of the block before
    for (int64_t i = 0; i < live; i++) {
      given.that(first_rows.typed_data()[i] >= end, "first_rows", "blocks lie over each other");
      end = first_rows.typed_data()[i] + blocks.count(i);
      blocks.tokens = std::max(blocks.tokens, blocks.count(i));
    }
    given.that(end <= rows, "first_rows", "a block ends after the last row");
  }
  return blocks;
}

// Pools hold 16-bit floats as such or as whole numbers of that size.
inline Pages pages_of(Arguments& given, const Any& keys, const Any& values, int64_t type) {
  const auto k = given.sizes<4>("keys", keys), v = given.sizes<4>("values", values);
  const int64_t pages = k[0], heads = k[1], width = k[3] / 16, size = 16 * k[2];
  given.that(type >= 0 && type <= int64_t(Type::BF16), "type", "is no type of floats");
  const size_t bytes = Type(type) == Type::F32 ? 4 : 2;
  given.that(heads >= 1, "keys", "have no heads");
  given.that(width >= 1 && width <= 256, "keys", "must have heads of at most 256");
  given.that(k[2] >= 1 && k[3] % 32 == 0, "keys", "must have pages of whole groups of 16 tokens, in pairs");
  given.that(v == std::array{pages, heads, size / 2, 2 * ceil_to(width, 16)}, "values",
             "must have the keys' sizes, in rows of pairs of whole groups of 16");
  given.that(ffi::ByteWidth(keys.element_type()) == bytes, "keys", "are of another size than their type");
  given.that(ffi::ByteWidth(values.element_type()) == bytes, "values", "are of another size than their type");
  return {heads, size, width, v[3] / 2, Type(type), keys.untyped_data(), values.untyped_data()};
}

// Every page that is read or written is looked at: a wrong one would be memory of somebody else's.
inline void check_tables(Arguments& given, const Blocks& b, const Pages& pages, const Ints& tables, const Any& keys) {
  if (!given.fit()) return;
  const int64_t num_slots = tables.dimensions()[0], num_pages = keys.dimensions()[0];
  for (int64_t i = 0; i < b.live && given.fit(); i++) {
    if (b.counts[i] <= 0) continue;
    const bool has_table = b.slots[i] >= 0 && b.slots[i] < num_slots;
    given.that(has_table, "slots", "a slot has no table");
    given.that(b.counts[i] <= b.tokens, "counts", "a block holds more than it can");
    given.that(b.starts[i] >= 0, "starts", "a block begins before 0");
    const int64_t last = (int64_t(b.starts[i]) + b.counts[i] - 1) / pages.size;
    given.that(last < b.table_width, "tables", "a position is after the end of its table");
    for (int64_t j = 0; j <= last && given.fit(); j++)
      given.that(b.table(i)[j] >= 0 && b.table(i)[j] < num_pages, "tables", "a table names a page that there is not");
  }
}

}  // namespace jaxengine
