// The ops, and what each is given. A body (body_*.cc) is all of them, compiled for one set of instructions.
#pragma once
#include "common.h"

namespace jaxengine {

enum class Form { PLAIN, GATED, ADDED };
constexpr int LEVELS = 7;  // of pairs of leaves, pairs of those, and so on
constexpr int64_t MOST_LEAVES = int64_t(1) << LEVELS;

// Rows [rows, leaves of x · inputs] times weights [leaves, outputs, inputs], as jaxengine/ops/kernels.py has `project`,
// `gated`, `add` and `logits`. Rows from `live` on are not computed; up to `zeros_to` they become zeros. Of live rows that
// are not `fresh` the results are those of the last fresh one before, which row 0 always is; without `fresh` all are.
struct Product {
  Form form;
  int64_t rows, live, zeros_to, leaves, outputs, inputs;
  Array x, norm;  // with a norm x is float32, and normalised first
  float eps;
  bool rounds;  // whether rows are rounded to the weights' type; those of the head are not
  Array w, bias;
  const float* residual;
  const bool* fresh;  // of PLAIN only
  void* y;  // float32; of GATED the weights' type
  int64_t row_leaves() const { return form == Form::ADDED ? leaves : 1; }  // that a row is cut into
  int64_t parts() const { return rounds || w.type != Type::BF16 ? 1 : 3; }  // of a row (rows.h)
};

struct Embedding {
  int64_t live, zeros_to, width, ids_end;
  Array table;
  const int32_t* ids;
  float* y;
};

struct Pages {
  // Keys [pages, heads, size / 16, key_width / 2, 16, 2], values [pages, heads, size / 2, value_width, 2].
  int64_t heads, size, key_width, value_width;
  Type type;
  void *keys, *values;
};

struct Blocks {  // query blocks, as jaxengine/ops/query_blocks.py has them
  int64_t live, tokens, table_width;  // tokens: the most that a block has
  const int32_t *tables, *slots, *starts, *counts, *first_rows;
  const int32_t* table(int64_t block) const { return tables + int64_t(slots[block]) * table_width; }
  int64_t count(int64_t block) const { return std::max<int64_t>(counts[block], 0); }
  int64_t first_row(int64_t block) const { return first_rows ? first_rows[block] : block * tokens; }
  int64_t end_row(int64_t block) const {  // of its tokens and of what stands between it and the next block
    return first_rows && block + 1 == live ? first_rows[block] + count(block) : first_row(block + 1);
  }
};

struct Heads {  // packed [rows, leaves · (queries + 2 keys) · width] -> q [rows, heads, width] and pages
  int64_t leaves, queries, width;  // queries: of all leaves
  const float *packed, *frequencies;
  Array q_norm, k_norm;
  float eps, rope_factor, scale;
  Blocks blocks;
  Pages pages;
  float* q;
};

struct Attention {
  int64_t queries;
  const float* q;
  Blocks blocks;
  Pages pages;
  void* y;  // [rows, queries · width], the pages' type
};

struct Drawing {
  int64_t rows, vocabulary;
  const float *logits, *uniforms;
  const int32_t* given;
  int32_t* tokens;
  float *logprobs, *highs, *log_masses;
};

struct Truncation {
  int64_t rows, vocabulary;
  const float* logits;
  const int32_t* top_k;
  const float *top_p, *min_p;
  uint8_t* mask;  // 1 of what is kept, or 0
};

constexpr int32_t LIKELIEST = -2;  // as a given token

struct Sampling {  // a token of each row that is live; of the others 0
  Product head;    // PLAIN, without its y
  int64_t vocabulary;  // of the head's outputs; after it there is padding to whole blocks
  const bool* live;
  const float *temperatures, *top_p, *min_p, *uniforms;  // two uniforms a row
  const int32_t *top_k, *given;
  int32_t* tokens;
  float* logprobs;
  bool* finite;  // all logits, and the logprob
};

struct Body {
  void (*product)(Threads&, const Product&);
  void (*embed)(Threads&, const Embedding&);
  void (*heads)(Threads&, const Heads&);
  void (*attend)(Threads&, const Attention&);
  void (*draw)(Threads&, const Drawing&);
  void (*kept)(Threads&, const Truncation&);
  void (*sample)(Threads&, const Sampling&);
};

extern const Body avx2_body, avx512_body, avx512_bf16_body, amx_body;

enum BodyName : int64_t { BEST, AVX2, AVX512, AVX512_BF16, AMX, BODIES };

// Null where this processor lacks it, or has not the same bits with it (bodies.cc).
const Body* body_of(int64_t name);

}  // namespace jaxengine
