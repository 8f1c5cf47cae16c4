// The ops as XLA calls them: arguments are checked, and the body's op is called on XLA's threads.
#include <utility>

#include "arguments.h"

namespace jaxengine {
namespace {

using AnyOut = ffi::Result<Any>;
using FloatsOut = ffi::Result<Floats>;
using BoolsOut = ffi::Result<Bools>;

class OfXla final : public Threads {
 public:
  explicit OfXla(ffi::ThreadPool& pool) : pool_(pool) {}
  int64_t count() const override { return pool_.num_threads(); }
  void start(std::function<void()> work) override { pool_.Schedule(std::move(work)); }

 private:
  ffi::ThreadPool& pool_;
};

Array array(const Any& x) {  // null where it is empty
  const auto type = x.element_type();
  return {x.element_count() ? x.untyped_data() : nullptr,
          type == ffi::F32 ? Type::F32 : type == ffi::F16 ? Type::F16 : Type::BF16};
}

// `op` of the chosen body, where the arguments fit and this processor has the body.
template <class Op>
ffi::Error guarded(const Arguments& given, ffi::ThreadPool& pool, int64_t body, void (*Body::*op)(Threads&, const Op&),
                   const Op& what) {
  const Body* chosen = body_of(body);
  if (!chosen) return refused("this processor lacks the body that was asked for, or gives other bits with it");
  if (!given.fit()) return given.refusal();
  try {  // nothing may be thrown through XLA
    OfXla threads(pool);
    (chosen->*op)(threads, what);
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxengine's CPU kernels: out of memory");
  }
}

ffi::Error product(ffi::ThreadPool pool, Any x, Any norm, Any w, Any bias, Floats residual, Bools fresh, Ints count,
                   AnyOut y, int64_t form, bool rounds, float eps, int64_t tile, int64_t body) {
  Arguments given("product");
  const int64_t rows = given.sizes<2>("x", x)[0];
  const auto [leaves, outputs, inputs] = given.sizes<3>("w", w);
  const bool is_gated = Form(form) == Form::GATED, is_added = Form(form) == Form::ADDED;
  const int64_t width = is_added ? leaves * inputs : inputs;
  const int64_t columns = is_added ? outputs : is_gated ? leaves * (outputs / 2) : leaves * outputs;
  given.that(form >= 0 && form <= int64_t(Form::ADDED), "form", "is no form of products");
  given.floats("w", w);
  given.that(leaves >= 1 && leaves <= MOST_LEAVES && !(leaves & (leaves - 1)), "w", "leaves must be a power of two up to 128");
  given.that(inputs >= 1, "w", "has no inputs");
  given.that(!is_gated || outputs % 2 == 0, "w", "must have as many gates as ups");
  given.floats("x", x);
  given.count("x", x, rows * width);
  given.optional("norm", norm, width);
  given.optional("bias", bias, is_gated ? 0 : columns);
  given.count("residual", residual, is_added ? rows * columns : 0);
  const bool some_are_fresh = fresh.element_count() > 0;
  given.that(!some_are_fresh || Form(form) == Form::PLAIN, "fresh", "is of a plain product");
  if (some_are_fresh) given.count("fresh", fresh, rows);
  given.count("y", *y, rows * columns);
  given.type("y", *y, is_gated ? w.element_type() : ffi::F32);
  const Extent extent(given, count, rows, tile);
  const Product p{Form(form), rows, extent.live, extent.zeros_to, leaves, outputs, inputs, array(x), array(norm), eps,
                  rounds, array(w), array(bias), residual.typed_data(), some_are_fresh ? fresh.typed_data() : nullptr,
                  y->untyped_data()};
  return guarded(given, pool, body, &Body::product, p);
}

ffi::Error embed(ffi::ThreadPool pool, Any table, Ints ids, Ints count, FloatsOut y, int64_t tile, int64_t body) {
  Arguments given("embed");
  const auto [ids_end, width] = given.sizes<2>("table", table);
  const int64_t rows = ids.element_count();
  given.floats("table", table);
  given.that(ids_end >= 1, "table", "is empty");
  given.count("y", *y, rows * width);
  const Extent extent(given, count, rows, tile);
  const Embedding e{extent.live, extent.zeros_to, width, ids_end, array(table), ids.typed_data(), y->typed_data()};
  return guarded(given, pool, body, &Body::embed, e);
}

ffi::Error heads(ffi::ThreadPool pool, Floats packed, Any q_norm, Any k_norm, Floats frequencies, Ints tables,
                 Ints slots, Ints starts, Ints counts, Ints first_rows, Ints num_blocks, Any keys_in, Any values_in,
                 FloatsOut q, AnyOut keys, AnyOut values, int64_t leaves, float eps, float rope_factor, float scale,
                 int64_t type, int64_t body) {
  Arguments given("heads");
  const auto [rows, queries, width] = given.sizes<3>("q", *q);
  const Pages pages = pages_of(given, *keys, *values, type);
  const char* copied = "were not handed over to be written in place";
  given.that(keys_in.untyped_data() == keys->untyped_data(), "keys", copied);
  given.that(values_in.untyped_data() == values->untyped_data(), "values", copied);
  given.that(width == pages.key_width && width % 2 == 0, "q", "heads must be as wide as the keys, in pairs");
  given.that(leaves >= 1 && queries % leaves == 0 && pages.heads % leaves == 0, "leaves", "do not divide the heads");
  given.count("packed", packed, rows * (queries + 2 * pages.heads) * width);
  given.optional("q_norm", q_norm, width);
  given.optional("k_norm", k_norm, width);
  given.count("frequencies", frequencies, width / 2);
  const Blocks blocks = blocks_of(given, tables, slots, starts, counts, first_rows, num_blocks, rows);
  check_tables(given, blocks, pages, tables, *keys);
  const Heads h{leaves, queries, width, packed.typed_data(), frequencies.typed_data(), array(q_norm),
                array(k_norm), eps, rope_factor, scale, blocks, pages, q->typed_data()};
  return guarded(given, pool, body, &Body::heads, h);
}

ffi::Error attend(ffi::ThreadPool pool, Floats q, Ints tables, Ints slots, Ints starts, Ints counts, Ints first_rows,
                  Ints num_blocks, Any keys, Any values, AnyOut y, int64_t type, int64_t body) {
  Arguments given("attend");
  const auto [rows, queries, width] = given.sizes<3>("q", q);
  const Pages pages = pages_of(given, keys, values, type);
  given.that(width == pages.key_width, "q", "heads must be as wide as the keys");
  given.that(pages.heads >= 1 && queries % pages.heads == 0, "q", "must have a multiple of the keys' heads");
  given.count("y", *y, rows * queries * width);
  given.type("y", *y, data_type(pages.type));
  const Blocks blocks = blocks_of(given, tables, slots, starts, counts, first_rows, num_blocks, rows);
  check_tables(given, blocks, pages, tables, keys);
  const Attention a{queries, q.typed_data(), blocks, pages, y->untyped_data()};
  return guarded(given, pool, body, &Body::attend, a);
}

ffi::Error draw(ffi::ThreadPool pool, Floats logits, Floats uniforms, Ints given_tokens, ffi::Result<Ints> tokens,
                FloatsOut logprobs, FloatsOut highs, FloatsOut log_masses, int64_t body) {
  Arguments given("draw");
  const auto [rows, vocabulary] = given.sizes<2>("logits", logits);
  given.that(vocabulary >= 128 && vocabulary % 128 == 0, "logits", "must be whole blocks of 128 ids");
  given.count("uniforms", uniforms, 2 * rows);
  given.count("given", given_tokens, rows);
  given.count("tokens", *tokens, rows);
  given.count("logprobs", *logprobs, rows);
  given.count("highs", *highs, rows);
  given.count("log_masses", *log_masses, rows);
  const Drawing d{rows, vocabulary, logits.typed_data(), uniforms.typed_data(), given_tokens.typed_data(),
                  tokens->typed_data(), logprobs->typed_data(), highs->typed_data(), log_masses->typed_data()};
  return guarded(given, pool, body, &Body::draw, d);
}

ffi::Error kept(ffi::ThreadPool pool, Floats logits, Ints top_k, Floats top_p, Floats min_p, BoolsOut mask,
               int64_t body) {
  Arguments given("kept");
  const auto [rows, vocabulary] = given.sizes<2>("logits", logits);
  given.count("top_k", top_k, rows);
  given.count("top_p", top_p, rows);
  given.count("min_p", min_p, rows);
  given.count("mask", *mask, rows * vocabulary);
  const Truncation t{rows, vocabulary, logits.typed_data(), top_k.typed_data(), top_p.typed_data(), min_p.typed_data(),
                     (uint8_t*)mask->untyped_data()};
  return guarded(given, pool, body, &Body::kept, t);
}

ffi::Error sample(ffi::ThreadPool pool, Floats x, Any norm, Any head, Bools fresh, Bools live, Floats temperatures,
                  Ints top_k, Floats top_p, Floats min_p, Ints given_tokens, Floats uniforms, ffi::Result<Ints> tokens,
                  FloatsOut logprobs, BoolsOut finite, float eps, int64_t vocabulary, int64_t body) {
  Arguments given("sample");
  const auto [rows, width] = given.sizes<2>("x", x);
  const auto [leaves, outputs, inputs] = given.sizes<3>("head", head);
  given.floats("head", head);
  given.that(width == inputs, "head", "has not as many inputs as x");
  given.that(vocabulary >= 1 && vocabulary <= leaves * outputs, "vocabulary", "is not within the head's outputs");
  given.that(leaves * outputs % 128 == 0, "head", "must have whole blocks of 128 ids");
  given.that(norm.element_count() == width, "norm", "is not as wide as x");
  given.floats("norm", norm);
  const auto of_rows = [&](const char* name, const auto& array, int64_t each = 1) {
    given.count(name, array, each * rows);
  };
  const bool some_are_fresh = fresh.element_count() > 0;
  if (some_are_fresh) of_rows("fresh", fresh);
  of_rows("live", live), of_rows("temperatures", temperatures), of_rows("top_k", top_k);
  of_rows("top_p", top_p), of_rows("min_p", min_p), of_rows("given", given_tokens), of_rows("uniforms", uniforms, 2);
  of_rows("tokens", *tokens), of_rows("logprobs", *logprobs), of_rows("finite", *finite);
  const Array hidden = {x.typed_data(), Type::F32}, none = {nullptr, Type::F32};
  const Product product{Form::PLAIN, rows, rows, rows, leaves, outputs, inputs, hidden, array(norm), eps, false,
                        array(head), none, nullptr, some_are_fresh ? fresh.typed_data() : nullptr, nullptr};
  const Sampling s{product, vocabulary, live.typed_data(), temperatures.typed_data(), top_p.typed_data(),
                   min_p.typed_data(), uniforms.typed_data(), top_k.typed_data(), given_tokens.typed_data(),
                   tokens->typed_data(), logprobs->typed_data(), finite->typed_data()};
  return guarded(given, pool, body, &Body::sample, s);
}

// Memory that XLA has just got from the system, in huge pages if the system has some: reads of one page of keys after the
// other wait for what translates addresses otherwise.
ffi::Error zeros(ffi::ThreadPool, AnyOut y) {
  wish_for_huge_pages(y->untyped_data(), y->size_bytes());
  std::memset(y->untyped_data(), 0, y->size_bytes());
  return ffi::Error::Success();
}

auto on_threads() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

}  // namespace
}  // namespace jaxengine

using namespace jaxengine;

// Moves memory into huge pages, what it holds and its addresses as they are, and with it what else lies in its first and
// last one, which are often its neighbours' too: of arrays of a few megabytes a quarter would be left out otherwise. Takes
// about two seconds for a gigabyte; where the memory is somebody else's by now, or nobody's, no harm is done. Linux has
// this since 6.1, and may refuse it for any of the pages.
extern "C" __attribute__((visibility("default"))) void jaxengine_into_huge_pages(void* data, size_t size) {
  constexpr int COLLAPSE = 25;
  const int64_t first = int64_t(data) / HUGE_PAGE * HUGE_PAGE, end = int64_t(data) + int64_t(size);
  for (int64_t at = first; at < end; at += HUGE_PAGE) madvise(reinterpret_cast<void*>(at), HUGE_PAGE, COLLAPSE);
}

#define OP(NAME, FUNCTION, ...)                                                        \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* NAME(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, FUNCTION, __VA_ARGS__)

OP(jaxengine_product, product, on_threads().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Floats>().Arg<Bools>()
    .Arg<Ints>().Ret<Any>().Attr<int64_t>("form").Attr<bool>("rounds").Attr<float>("eps")
    .Attr<int64_t>("tile").Attr<int64_t>("body"));

OP(jaxengine_embed, embed, on_threads().Arg<Any>().Arg<Ints>().Arg<Ints>().Ret<Floats>().Attr<int64_t>("tile")
    .Attr<int64_t>("body"));

OP(jaxengine_heads, heads, on_threads().Arg<Floats>().Arg<Any>().Arg<Any>().Arg<Floats>().Arg<Ints>()
    .Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Any>().Arg<Any>().Ret<Floats>().Ret<Any>().Ret<Any>()
    .Attr<int64_t>("leaves").Attr<float>("eps").Attr<float>("rope_factor").Attr<float>("scale").Attr<int64_t>("type")
    .Attr<int64_t>("body"));

OP(jaxengine_attend, attend, on_threads().Arg<Floats>().Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Ints>()
    .Arg<Ints>().Arg<Any>().Arg<Any>().Ret<Any>().Attr<int64_t>("type").Attr<int64_t>("body"));

OP(jaxengine_draw, draw, on_threads().Arg<Floats>().Arg<Floats>().Arg<Ints>().Ret<Ints>().Ret<Floats>().Ret<Floats>()
    .Ret<Floats>().Attr<int64_t>("body"));

OP(jaxengine_kept, kept, on_threads().Arg<Floats>().Arg<Ints>().Arg<Floats>().Arg<Floats>()
    .Ret<Bools>().Attr<int64_t>("body"));

OP(jaxengine_sample, sample, on_threads().Arg<Floats>().Arg<Any>().Arg<Any>().Arg<Bools>().Arg<Bools>().Arg<Floats>()
    .Arg<Ints>().Arg<Floats>().Arg<Floats>().Arg<Ints>().Arg<Floats>().Ret<Ints>().Ret<Floats>().Ret<ffi::Buffer<ffi::PRED>>()
    .Attr<float>("eps").Attr<int64_t>("vocabulary").Attr<int64_t>("body"));

OP(jaxengine_zeros, zeros, on_threads().Ret<Any>());
