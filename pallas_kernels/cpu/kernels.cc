// The ops as XLA calls them: arguments are checked, and a body is chosen by what the processor has.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <string>

#include "ops.h"
#include "xla/ffi/api/ffi.h"

namespace jaxengine {
namespace {

namespace ffi = xla::ffi;
using Any = ffi::AnyBuffer;
using Ints = ffi::Buffer<ffi::S32>;
using Floats = ffi::Buffer<ffi::F32>;
using AnyOut = ffi::Result<ffi::AnyBuffer>;
using FloatsOut = ffi::Result<Floats>;

// -- bodies -----------------------------------------------------------------------------------------------------------

enum BodyName : int64_t { BEST, AVX2, AVX512, AMX, BODIES };

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
  return body == AVX2 ? avx2 : body == AVX512 ? avx512 : avx512 && amx_is_allowed();
}

const Body* body_of(int64_t wanted) {  // null where this processor lacks it
  static const std::array<bool, BODIES> there = {false, has(AVX2), has(AVX512), has(AMX)};
  if (wanted == BEST) wanted = there[AMX] ? AMX : there[AVX512] ? AVX512 : AVX2;
  if (wanted < 0 || wanted >= BODIES || !there[wanted]) return nullptr;
  return wanted == AMX ? &amx_body : wanted == AVX512 ? &avx512_body : &avx2_body;
}

class OfXla final : public Threads {
 public:
  explicit OfXla(ffi::ThreadPool& pool) : pool_(pool) {}
  int64_t count() const override { return pool_.num_threads(); }
  void start(std::function<void()> work) override { pool_.Schedule(std::move(work)); }

 private:
  ffi::ThreadPool& pool_;
};

// -- arguments --------------------------------------------------------------------------------------------------------

ffi::Error refused(const char* what) { return ffi::Error::InvalidArgument(std::string("jaxengine's CPU kernels: ") + what); }

bool is_float(const Any& x) {
  const auto type = x.element_type();
  return type == ffi::F32 || type == ffi::F16 || type == ffi::BF16;
}

Array array(const Any& x) {  // null where it is empty
  const auto type = x.element_type();
  return {x.element_count() ? x.untyped_data() : nullptr,
          type == ffi::F32 ? Type::F32 : type == ffi::F16 ? Type::F16 : Type::BF16};
}

// The first `live` rows of `rows`, and where the last tile with one ends.
struct Extent {
  int64_t live, zeros_to;
  Extent(const Ints& count, int64_t rows, int64_t tile) {
    live = std::clamp<int64_t>(count.typed_data()[0], 0, rows);
    zeros_to = std::min(rows, ceil_to(live, tile));
  }
};

Blocks blocks_of(const Ints& tables, const Ints& slots, const Ints& starts, const Ints& counts, const Ints& num_blocks,
                 int64_t rows) {
  const int64_t all = slots.element_count();
  return {std::clamp<int64_t>(num_blocks.typed_data()[0], 0, all), all ? rows / all : 1, tables.dimensions()[1],
          tables.typed_data(), slots.typed_data(), starts.typed_data(), counts.typed_data()};
}

Pages pages_of(const Any& keys, const Any& values, int64_t type) {
  const auto k = keys.dimensions(), v = values.dimensions();
  return {k[1], k[3], k[2], v[3], Type(type), keys.untyped_data(), values.untyped_data()};
}

// Why a table leads outside the pools, or null. Every page that is read or written is looked at: a wrong one would be
// memory of somebody else's.
const char* trouble(const Blocks& b, const Pages& pages, int64_t num_pages, int64_t num_slots) {
  if (pages.key_width > 256) return "heads are at most 256 wide";
  if (pages.size % 16) return "pages hold whole groups of 16 tokens";
  if (pages.value_width != ceil_to(pages.key_width, 16)) return "values lie in rows of whole groups of 16";
  for (int64_t i = 0; i < b.live; i++) {
    if (b.counts[i] <= 0) continue;
    if (b.slots[i] < 0 || b.slots[i] >= num_slots) return "a slot has no table";
    if (b.counts[i] > b.tokens || b.starts[i] < 0) return "a block holds more than it can, or begins before 0";
    const int64_t last = (int64_t(b.starts[i]) + b.counts[i] - 1) / pages.size;
    if (last >= b.table_width) return "a position is after the end of its table";
    for (int64_t j = 0; j <= last; j++)
      if (b.table(i)[j] < 0 || b.table(i)[j] >= num_pages) return "a table names a page that there is not";
  }
  return nullptr;
}

template <class Arguments>
ffi::Error guarded(ffi::ThreadPool& pool, void (*op)(Threads&, const Arguments&), const Arguments& arguments) {
  try {  // nothing may be thrown through XLA
    OfXla threads(pool);
    op(threads, arguments);
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxengine's CPU kernels: out of memory");
  }
}

// -- ops --------------------------------------------------------------------------------------------------------------

ffi::Error product(ffi::ThreadPool pool, Any x, Any norm, Any w, Any bias, Floats residual, Ints count, AnyOut y,
                   int64_t form, int64_t parts, bool rounds, float eps, int64_t tile, int64_t body) {
  const Body* chosen = body_of(body);
  if (!chosen) return refused("this processor lacks the body that was asked for");
  const auto shape = w.dimensions();
  const int64_t rows = x.dimensions()[0], leaves = shape[0];
  const int64_t inputs = Form(form) == Form::ADDED ? leaves * shape[2] : shape[2];
  if (!is_float(x) || !is_float(w) || x.dimensions()[1] != inputs) return refused("rows and weights do not fit");
  if (leaves > 128) return refused("at most 128 leaves");
  const Extent extent(count, rows, tile);
  const Product p{Form(form), rows, extent.live, extent.zeros_to, leaves, shape[1], shape[2], array(x), array(norm), eps,
                  int(parts), rounds, array(w), array(bias), residual.typed_data(), y->untyped_data()};
  return guarded(pool, chosen->product, p);
}

ffi::Error embed(ffi::ThreadPool pool, Any table, Ints ids, Ints count, FloatsOut y, int64_t tile, int64_t body) {
  const Body* chosen = body_of(body);
  if (!chosen) return refused("this processor lacks the body that was asked for");
  const auto shape = table.dimensions();
  const Extent extent(count, ids.element_count(), tile);
  const Embedding e{extent.live, extent.zeros_to, shape[1], shape[0], array(table), ids.typed_data(), y->typed_data()};
  return guarded(pool, chosen->embed, e);
}

ffi::Error heads(ffi::ThreadPool pool, Floats packed, Any q_norm, Any k_norm, Floats frequencies, Ints tables,
                 Ints slots, Ints starts, Ints counts, Ints num_blocks, Any keys_in, Any values_in, FloatsOut q,
                 AnyOut keys, AnyOut values, int64_t leaves, float eps, float rope_factor, float scale, int64_t type,
                 int64_t body) {
  const Body* chosen = body_of(body);
  if (!chosen) return refused("this processor lacks the body that was asked for");
  const bool copied = keys_in.untyped_data() != keys->untyped_data() || values_in.untyped_data() != values->untyped_data();
  if (copied) return refused("pools are written in place, and were not handed over for it");
  const int64_t queries = q->dimensions()[1], width = q->dimensions()[2];
  const Blocks blocks = blocks_of(tables, slots, starts, counts, num_blocks, packed.dimensions()[0]);
  const Pages pages = pages_of(*keys, *values, type);
  if (const char* what = trouble(blocks, pages, keys->dimensions()[0], tables.dimensions()[0])) return refused(what);
  if (packed.dimensions()[1] != (queries + 2 * pages.heads) * width) return refused("a projection and its heads do not fit");
  const Heads h{leaves, queries, width, packed.typed_data(), frequencies.typed_data(), array(q_norm),
                array(k_norm), eps, rope_factor, scale, blocks, pages, q->typed_data()};
  return guarded(pool, chosen->heads, h);
}

ffi::Error attend(ffi::ThreadPool pool, Floats q, Ints tables, Ints slots, Ints starts, Ints counts, Ints num_blocks,
                  Any keys, Any values, AnyOut y, int64_t type, int64_t body) {
  const Body* chosen = body_of(body);
  if (!chosen) return refused("this processor lacks the body that was asked for");
  const Blocks blocks = blocks_of(tables, slots, starts, counts, num_blocks, q.dimensions()[0]);
  const Pages pages = pages_of(keys, values, type);
  if (const char* what = trouble(blocks, pages, keys.dimensions()[0], tables.dimensions()[0])) return refused(what);
  const Attention a{q.dimensions()[1], q.typed_data(), blocks, pages, y->untyped_data()};
  return guarded(pool, chosen->attend, a);
}

ffi::Error draw(ffi::ThreadPool pool, Floats logits, Floats uniforms, Ints given, ffi::Result<Ints> tokens,
                FloatsOut logprobs, FloatsOut highs, FloatsOut log_masses, int64_t body) {
  const Body* chosen = body_of(body);
  if (!chosen) return refused("this processor lacks the body that was asked for");
  const Drawing d{logits.dimensions()[0], logits.dimensions()[1], logits.typed_data(), uniforms.typed_data(),
                  given.typed_data(), tokens->typed_data(), logprobs->typed_data(), highs->typed_data(),
                  log_masses->typed_data()};
  return guarded(pool, chosen->draw, d);
}

ffi::Error cut(ffi::ThreadPool pool, Floats logits, Ints top_k, Floats top_p, Floats min_p,
                    ffi::Result<ffi::Buffer<ffi::PRED>> kept, int64_t body) {
  const Body* chosen = body_of(body);
  if (!chosen) return refused("this processor lacks the body that was asked for");
  const Truncation t{logits.dimensions()[0], logits.dimensions()[1], logits.typed_data(), top_k.typed_data(),
                     top_p.typed_data(), min_p.typed_data(), (uint8_t*)kept->untyped_data()};
  return guarded(pool, chosen->cut, t);
}

auto on_threads() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

}  // namespace
}  // namespace jaxengine

using namespace jaxengine;

// Which bodies this processor has: bit 1 << BodyName.
extern "C" __attribute__((visibility("default"))) int jaxengine_bodies() {
  int found = 0;
  for (int64_t body = AVX2; body < BODIES; body++) found |= int(has(body)) << body;
  return found;
}

#define OP(NAME, FUNCTION, ...)                                                        \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* NAME(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, FUNCTION, __VA_ARGS__)

OP(jaxengine_product, product, on_threads().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Floats>().Arg<Ints>()
    .Ret<Any>().Attr<int64_t>("form").Attr<int64_t>("parts").Attr<bool>("rounds").Attr<float>("eps")
    .Attr<int64_t>("tile").Attr<int64_t>("body"));

OP(jaxengine_embed, embed, on_threads().Arg<Any>().Arg<Ints>().Arg<Ints>().Ret<Floats>().Attr<int64_t>("tile")
    .Attr<int64_t>("body"));

OP(jaxengine_heads, heads, on_threads().Arg<Floats>().Arg<Any>().Arg<Any>().Arg<Floats>().Arg<Ints>()
    .Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Any>().Arg<Any>().Ret<Floats>().Ret<Any>().Ret<Any>()
    .Attr<int64_t>("leaves").Attr<float>("eps").Attr<float>("rope_factor").Attr<float>("scale").Attr<int64_t>("type")
    .Attr<int64_t>("body"));

OP(jaxengine_attend, attend, on_threads().Arg<Floats>().Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Ints>()
    .Arg<Any>().Arg<Any>().Ret<Any>().Attr<int64_t>("type").Attr<int64_t>("body"));

OP(jaxengine_draw, draw, on_threads().Arg<Floats>().Arg<Floats>().Arg<Ints>().Ret<Ints>().Ret<Floats>().Ret<Floats>()
    .Ret<Floats>().Attr<int64_t>("body"));

OP(jaxengine_cut, cut, on_threads().Arg<Floats>().Arg<Ints>().Arg<Floats>().Arg<Floats>()
    .Ret<ffi::Buffer<ffi::PRED>>().Attr<int64_t>("body"));
