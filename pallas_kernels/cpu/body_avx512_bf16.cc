// The ops for AVX-512 with its products of bfloat16: AMD since Zen 4, Intel's servers since Cooper Lake.
#include <cmath>

#include "ops.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#define WITH_AVX512
#define WITH_DOTS
namespace jaxengine {
namespace avx512_bf16 {
#include "body.h"
}
const Body avx512_bf16_body = {
    avx512_bf16::product, avx512_bf16::embed, avx512_bf16::heads, avx512_bf16::attend,
    avx512_bf16::draw,    avx512_bf16::kept,  avx512_bf16::sample};
}  // namespace jaxengine
#pragma GCC pop_options
