// The ops for AVX-512, with products of bfloat16 by AMX: Intel's servers since 2023.
#include <cmath>

#include "ops.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512,amx-tile,amx-bf16")
#define WITH_AVX512
#define WITH_AMX
namespace jaxengine {
namespace amx {
#include "body.h"
}
const Body amx_body = {amx::product, amx::embed, amx::heads, amx::attend, amx::draw, amx::kept, amx::sample};
}  // namespace jaxengine
#pragma GCC pop_options
