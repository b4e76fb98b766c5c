// What each instruction set offers; `dispatch.cpp` chooses one at run time.
#pragma once

// Compilers that know the instructions for bfloat16 and can ask a CPU whether it has them.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define TIDEMILL_KNOWS_BF16 1
#endif

// Tiles are asked of the system, and their instructions written as such: compilers whose assembler has them.
#if defined(TIDEMILL_KNOWS_BF16) && defined(__linux__)
#define TIDEMILL_KNOWS_AMX 1
#endif

#include <cstdint>

#include "pool.h"

namespace tidemill {

// One call of paged attention. Axes: T tokens, S slots, N query heads, K KV heads, H head dim, G groups, W page-table
// columns. Pointers are row-major arrays of the shapes told in `kernels/paged_attention/layout.py`.
struct Attention {
  enum class Type { kFloat32, kBfloat16, kInt8 };

  int64_t num_tokens, num_slots, num_heads, num_kv_heads, head_dim, page_size, table_width, num_groups, num_pages;
  Type activation_type;  // of q, k, v and out: float32 or bfloat16
  Type page_type;
  const void* q;  // [T, N, H]
  const void* k;  // [T, K, H]
  const void* v;  // [T, K, H]
  void* keys;     // [P, K, H, page]
  void* values;   // [P, K, page, H]
  float* key_scales;    // [P, K, page] for int8 pages, else null
  float* value_scales;  // [P, K, page]
  const int32_t* query_start;  // [S + 1]
  const int32_t* kv_len;       // [S]
  const int32_t* page_table;   // [S, W]
  const int32_t* group_slot_start;  // [G]
  const int32_t* group_slot_stop;
  const int32_t* group_page_stop;
  const float* sinks;  // [N] or null
  void* out;           // [T, N, H]
  float scale;
  float soft_cap;      // 0: none
  int64_t window;      // 0: none
  int64_t chunk;       // 0: none
};

// One matrix product, y = x @ w.T, with what goes before and after it. Axes: T rows, K inputs, N outputs. The weights
// are one layer's panels, packed as `kernels/linear/layout.py` tells.
struct Linear {
  enum class Type { kFloat32, kBfloat16 };
  enum class Format { kFloat32, kBfloat16, kInt8, kInt4 };
  enum class Activation { kNone, kSilu, kGeluTanh };  // not kNone: gated, and panels alternate gate and up

  int64_t max_rows, num_rows;  // T, and how many of them are computed; the others become zero
  int64_t in_dim, out_dim;     // K, N
  int64_t num_panels;          // even; of 16 rows of w each
  Type type;                   // of x and residual; bfloat16 and bfloat16 weights: x is rounded to it once normalised
  Type out_type;
  Format format;
  Activation activation;
  const void* x;             // [T, K]
  const void* weights;       // [num_panels, K, 16]; K filled up to whole groups for int8 and int4, and to 32 for bfloat16
  const float* scales;       // [num_panels, K / 64, 16], int8 and int4: of 64 inputs of a row of w
  const float* bias;         // [N], gated [2 N], or null
  const void* residual;      // [T, N] or null
  const float* norm_weight;  // [K] or null
  float norm_eps;
  void* out;      // [T, N]
  void* scratch;  // 4 bytes [T, K filled up to 32] where x is normalised or bfloat16; for int8 and int4 132 bytes a group
                  // and row, of T + 11 rows
};

// Tokens drawn from logits. Axes: L rows of logits, V vocabulary.
struct Sampling {
  int64_t num_rows, vocab_size;
  const float* logits;       // [L, V]
  const float* temperature;  // [L], 0: greedy
  const int32_t* top_k;      // [L], V: off
  const float* top_p;        // [L], 1: off
  const float* min_p;        // [L], 0: off
  const uint32_t* keys;      // [L, 2], a threefry key
  const int32_t* positions;  // [L], folded into the key
  int32_t* token_ids;        // [L]
};

struct Kernels {
  const char* name;
  void (*attention)(const Attention&, Pool&);
  void (*linear)(const Linear&, Pool&);
  void (*sampling)(const Sampling&, Pool&);
};

// The best this CPU has; TIDEMILL_CPU_ISA names another that it has too, for tests and comparisons.
const Kernels& kernels();

}  // namespace tidemill
