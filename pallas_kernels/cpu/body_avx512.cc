// The ops for AVX-512 as servers have it since 2017: F, BW, DQ and VL.
#include <cmath>

#include "ops.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define WITH_AVX512
namespace jaxengine {
namespace avx512 {
#include "body.h"
}
const Body avx512_body = {avx512::product, avx512::embed, avx512::heads, avx512::attend, avx512::draw, avx512::kept, avx512::sample};
}  // namespace jaxengine
#pragma GCC pop_options
