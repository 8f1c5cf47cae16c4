// The ops for AVX2, FMA and F16C: Intel since 2013, AMD since 2015.
#include <cmath>

#include "ops.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace jaxengine {
namespace avx2 {
#include "body.h"
}
const Body avx2_body = {avx2::product, avx2::embed, avx2::heads, avx2::attend, avx2::draw, avx2::kept, avx2::sample};
}  // namespace jaxengine
#pragma GCC pop_options
