// Paged attention for one instruction set: see kernels/paged_attention/api.py for what it computes.
//
// The step is cut into blocks: a block is either some queries of one sequence (a piece of a prefill chunk) or one query
// each of several sequences, neighbours that share leading pages. A block and one KV head make a task. A task goes over
// spans of 64 keys in their order and carries the online softmax (Milakov and Gimelshein 2018) of all
// its queries; over shared pages all of them together, beyond those each sequence by itself.
//
// Each logit is one chain of multiply-adds over the head dimension, each output one over the keys, and each sum of
// weights is taken over the span's lanes in one order. So a query's bits do not depend on its block.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

namespace tidemill {
namespace TIDEMILL_ISA {

constexpr int64_t kSpan = 64;
constexpr int64_t kMaxQueries = 48;      // query heads of one block
constexpr int64_t kMaxChunkTokens = 16;  // tokens of one sequence in a block
constexpr int64_t kMaxMembers = 16;      // sequences that share a block
constexpr int64_t kComputeBound = 8;     // from so many queries on, a span costs more to compute than to fetch
static_assert(kSpan % kLanes == 0, "a span is whole vectors");

// Queries of one block and one KV head, and their softmax so far. A query is a (token, head of the group) pair.
struct Tile {
  int64_t count = 0;
  float* q = nullptr;        // [count, H], scaled
  float* out = nullptr;      // [count, H], not yet divided
  float* logits = nullptr;   // [count, kSpan], then weights
  float* maximum = nullptr;  // [count]
  float* total = nullptr;    // [count]
  int64_t* first = nullptr;  // [count], lowest visible key
  int64_t* last = nullptr;   // [count], one past the highest
};

// One span's keys as [H, kSpan] with a row stride, and its values as [kSpan, H]; in the page or in the scratch.
struct Span {
  const float* keys;
  int64_t key_stride;
  const float* values;
};

// Vectors of a row that a block of rows keeps in registers: 24 in all with 32 registers, 12 with 16.
constexpr int vectors_at_once(int rows) { return rows <= 3 || kLanes == 16 ? 4 : 2; }

// logits[r][t] = sum over h of q[r][h] * keys[h][t], for `Rows` queries and at least the keys [begin, end) of a span.
template <int Rows>
TIDEMILL_INLINE void span_logits(const float* q, int64_t begin, int64_t end, int64_t head_dim, const Span& span,
                                 float* logits) {
  constexpr int kVectors = vectors_at_once(Rows);
  constexpr int kWidth = kVectors * kLanes;
  static_assert(kSpan % kWidth == 0 || kWidth > kSpan, "whole blocks of keys");
  constexpr int kUsed = kWidth > kSpan ? static_cast<int>(kSpan) / kLanes : kVectors;
  constexpr int64_t kStep = kUsed * kLanes;
  for (int64_t token = begin / kStep * kStep; token < end; token += kStep) {
    vf acc[Rows][kUsed];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kUsed; ++c) acc[r][c] = vf{};
    const float* key = span.keys + token;
    for (int64_t h = 0; h < head_dim; ++h, key += span.key_stride) {
      vf column[kUsed];
#pragma GCC unroll 4
      for (int c = 0; c < kUsed; ++c) column[c] = load(key + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const vf factor = splat(q[r * head_dim + h]);
#pragma GCC unroll 4
        for (int c = 0; c < kUsed; ++c) acc[r][c] = fma(factor, column[c], acc[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kUsed; ++c) store(logits + r * kSpan + token + c * kLanes, acc[r][c]);
  }
}

// out[r][h] += sum over t in [begin, end) of weights[r][t] * values[t][h].
template <int Rows>
TIDEMILL_INLINE void span_outputs(const float* weights, int64_t begin, int64_t end, int64_t head_dim,
                                  const float* values, float* out) {
  constexpr int kVectors = vectors_at_once(Rows);
  int64_t h = 0;
  for (; h + kVectors * kLanes <= head_dim; h += kVectors * kLanes) {
    vf acc[Rows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) acc[r][c] = load(out + r * head_dim + h + c * kLanes);
    const float* value = values + begin * head_dim + h;
    for (int64_t t = begin; t < end; ++t, value += head_dim) {
      vf row[kVectors];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) row[c] = load(value + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const vf weight = splat(weights[r * kSpan + t]);
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) acc[r][c] = fma(weight, row[c], acc[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) store(out + r * head_dim + h + c * kLanes, acc[r][c]);
  }
  for (; h + kLanes <= head_dim; h += kLanes) {
    for (int r = 0; r < Rows; ++r) {
      vf acc = load(out + r * head_dim + h);
      for (int64_t t = begin; t < end; ++t)
        acc = fma(splat(weights[r * kSpan + t]), load(values + t * head_dim + h), acc);
      store(out + r * head_dim + h, acc);
    }
  }
  for (; h < head_dim; ++h) {
    for (int r = 0; r < Rows; ++r) {
      float acc = out[r * head_dim + h];
      for (int64_t t = begin; t < end; ++t) acc = std::fma(weights[r * kSpan + t], values[t * head_dim + h], acc);
      out[r * head_dim + h] = acc;
    }
  }
}

// What one call needs beside its arguments: which page a slot's column is, how a type is read, blocks.
class AttentionCall {
 public:
  explicit AttentionCall(const Attention& args)
      : a_(args),
        ratio_(args.num_heads / args.num_kv_heads),
        in_place_(args.page_type == Attention::Type::kFloat32 && args.page_size >= kSpan) {
    plan_blocks();
  }

  int64_t num_tasks() const { return static_cast<int64_t>(blocks_.size()) * a_.num_kv_heads; }

  // Write the new keys and values of one token.
  void write_token(int64_t token) const {
    const int64_t slot = slot_of_token_[token];
    if (slot < 0) {
      clear_token(token);
      return;
    }
    const int64_t position = a_.kv_len[slot] - (a_.query_start[slot + 1] - token);
    const int64_t page = page_of(slot, position / a_.page_size);
    if (page < 0) return;
    const int64_t offset = position % a_.page_size, dim = a_.head_dim, size = a_.page_size;
    for (int64_t head = 0; head < a_.num_kv_heads; ++head) {
      const int64_t source = (token * a_.num_kv_heads + head) * dim;
      const int64_t plane = page * a_.num_kv_heads + head;
      const int64_t key = plane * dim * size + offset, value = (plane * size + offset) * dim;
      switch (a_.page_type) {
        case Attention::Type::kFloat32: {
          float* keys = static_cast<float*>(a_.keys) + key;
          float* values = static_cast<float*>(a_.values) + value;
          for (int64_t h = 0; h < dim; ++h) keys[h * size] = read(a_.k, source + h);
          for (int64_t h = 0; h < dim; ++h) values[h] = read(a_.v, source + h);
          break;
        }
        case Attention::Type::kBfloat16: {
          uint16_t* keys = static_cast<uint16_t*>(a_.keys) + key;
          uint16_t* values = static_cast<uint16_t*>(a_.values) + value;
          for (int64_t h = 0; h < dim; ++h) keys[h * size] = to_bf16(read(a_.k, source + h));
          for (int64_t h = 0; h < dim; ++h) values[h] = to_bf16(read(a_.v, source + h));
          break;
        }
        case Attention::Type::kInt8: {
          int8_t* keys = static_cast<int8_t*>(a_.keys) + key;
          int8_t* values = static_cast<int8_t*>(a_.values) + value;
          a_.key_scales[plane * size + offset] = quantise(a_.k, source, keys, size);
          a_.value_scales[plane * size + offset] = quantise(a_.v, source, values, 1);
          break;
        }
      }
    }
  }

  void run_task(int64_t task) const {
    const Block& block = blocks_[task / a_.num_kv_heads];
    const int64_t head = task % a_.num_kv_heads, dim = a_.head_dim;
    const int64_t count = block.num_tokens * ratio_;
    thread_local std::vector<float> memory;
    thread_local std::vector<int64_t> bounds;
    memory.resize(count * (2 * dim + kSpan + 2) + 2 * kSpan * dim);
    bounds.resize(2 * count);
    Tile tile;
    tile.count = count;
    tile.q = memory.data();
    tile.out = tile.q + count * dim;
    tile.logits = tile.out + count * dim;
    tile.maximum = tile.logits + count * kSpan;
    tile.total = tile.maximum + count;
    tile.first = bounds.data();
    tile.last = tile.first + count;
    float* scratch = tile.total + count;
    start(block, head, tile);
    int64_t begin = 0, end = std::numeric_limits<int64_t>::max();
    if (block.num_slots > 1) {  // one query each
      end = block.shared_len;
      attend(tile, 0, count, block.first_slot, head, begin, end, scratch);
      for (int64_t member = 0; member < block.num_slots; ++member) {
        if (in_place_ && member + 1 < block.num_slots && tile.last[(member + 1) * ratio_] > end)
          prefetch_span(block.first_slot + member + 1, head, end);
        attend(tile, member * ratio_, ratio_, block.first_slot + member, head, end,
               std::numeric_limits<int64_t>::max(), scratch);
      }
    } else {
      attend(tile, 0, count, block.first_slot, head, begin, end, scratch);
    }
    finish(block, head, tile);
  }

 private:
  struct Block {
    int64_t first_token, num_tokens;
    int64_t first_slot, num_slots;  // several slots: one query each
    int64_t shared_len;             // keys that all slots share, whole spans
  };

  void plan_blocks() {
    std::vector<int64_t> shared(a_.num_slots, 0), group(a_.num_slots, -1);
    for (int64_t g = 0; g < a_.num_groups; ++g) {
      const int64_t stop = std::min<int64_t>(a_.group_slot_stop[g], a_.num_slots);
      for (int64_t slot = std::max(a_.group_slot_start[g], 0); slot < stop; ++slot) {
        const int64_t len = static_cast<int64_t>(a_.group_page_stop[g]) * a_.page_size / kSpan * kSpan;
        if (len > shared[slot]) {
          shared[slot] = len;
          group[slot] = g;
        }
      }
    }
    slot_of_token_.assign(a_.num_tokens, -1);
    const int64_t max_members = std::max<int64_t>(1, std::min(kMaxMembers, kMaxQueries / ratio_));
    const int64_t max_tokens = std::max<int64_t>(1, std::min(kMaxChunkTokens, kMaxQueries / ratio_));
    for (int64_t slot = 0; slot < a_.num_slots; ++slot) {
      const int64_t begin = std::max(a_.query_start[slot], 0);
      const int64_t end = std::min<int64_t>(a_.query_start[slot + 1], a_.num_tokens);
      for (int64_t token = begin; token < end; ++token) slot_of_token_[token] = slot;
      if (end - begin == 1 && group[slot] >= 0 && !blocks_.empty()) {
        Block& previous = blocks_.back();
        const int64_t other = previous.first_slot;
        if (previous.num_slots == previous.num_tokens && group[other] == group[slot] &&
            previous.num_slots < max_members && previous.first_token + previous.num_tokens == begin &&
            previous.first_slot + previous.num_slots == slot) {
          ++previous.num_slots;
          ++previous.num_tokens;
          continue;
        }
      }
      for (int64_t token = begin; token < end; token += max_tokens)
        blocks_.push_back({token, std::min(max_tokens, end - token), slot, 1, shared[slot]});
    }
  }

  int64_t page_of(int64_t slot, int64_t column) const {
    if (column < 0 || column >= a_.table_width) return -1;
    const int64_t page = a_.page_table[slot * a_.table_width + column];
    return page >= 0 && page < a_.num_pages ? page : -1;
  }

  float read(const void* data, int64_t index) const {
    return a_.activation_type == Attention::Type::kFloat32
               ? static_cast<const float*>(data)[index]
               : from_bf16(static_cast<const uint16_t*>(data)[index]);
  }

  // Symmetric over one head of one token; returns the scale.
  float quantise(const void* data, int64_t source, int8_t* target, int64_t stride) const {
    float largest = 0;
    for (int64_t h = 0; h < a_.head_dim; ++h) largest = std::max(largest, std::fabs(read(data, source + h)));
    const float scale = largest / 127.0f;
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (int64_t h = 0; h < a_.head_dim; ++h)
      target[h * stride] = static_cast<int8_t>(std::nearbyint(read(data, source + h) * inverse));
    return scale;
  }

  void clear_token(int64_t token) const {
    const int64_t size = a_.activation_type == Attention::Type::kFloat32 ? 4 : 2;
    const int64_t bytes = a_.num_heads * a_.head_dim * size;
    std::memset(static_cast<char*>(a_.out) + token * bytes, 0, bytes);
  }

  void start(const Block& block, int64_t head, Tile& tile) const {
    const int64_t dim = a_.head_dim;
    std::fill(tile.out, tile.out + tile.count * dim, 0.0f);
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t token = block.first_token + i / ratio_;
      const int64_t query_head = head * ratio_ + i % ratio_;
      const int64_t slot = block.num_slots > 1 ? block.first_slot + i / ratio_ : block.first_slot;
      const int64_t source = (token * a_.num_heads + query_head) * dim;
      float* query = tile.q + i * dim;
      if (a_.activation_type == Attention::Type::kFloat32) {
        const float* from = static_cast<const float*>(a_.q) + source;
        for (int64_t h = 0; h < dim; ++h) query[h] = from[h] * a_.scale;
      } else {
        for (int64_t h = 0; h < dim; ++h) query[h] = read(a_.q, source + h) * a_.scale;
      }
      const int64_t position = a_.kv_len[slot] - (a_.query_start[slot + 1] - token);
      int64_t first = 0;
      if (a_.window > 0) first = std::max(first, position - (a_.window - 1));
      if (a_.chunk > 0) first = std::max(first, position / a_.chunk * a_.chunk);
      tile.first[i] = first;
      tile.last[i] = position + 1;
      const bool has_sink = a_.sinks != nullptr;
      tile.maximum[i] = has_sink ? a_.sinks[query_head] : -std::numeric_limits<float>::infinity();
      tile.total[i] = has_sink ? 1.0f : 0.0f;
    }
  }

  void finish(const Block& block, int64_t head, const Tile& tile) const {
    const int64_t dim = a_.head_dim;
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t token = block.first_token + i / ratio_;
      const int64_t target = (token * a_.num_heads + head * ratio_ + i % ratio_) * dim;
      const float total = tile.total[i] > 0 ? tile.total[i] : 1.0f;
      const float* result = tile.out + i * dim;
      if (a_.activation_type == Attention::Type::kFloat32) {
        float* out = static_cast<float*>(a_.out) + target;
        for (int64_t h = 0; h < dim; ++h) out[h] = result[h] / total;
      } else {
        uint16_t* out = static_cast<uint16_t*>(a_.out) + target;
        for (int64_t h = 0; h < dim; ++h) out[h] = to_bf16(result[h] / total);
      }
    }
  }

  // Queries [from, from + count) of the tile over the keys [begin, end) of a slot, in whole spans.
  void attend(Tile& tile, int64_t from, int64_t count, int64_t slot, int64_t head, int64_t begin, int64_t end,
              float* scratch) const {
    int64_t first = std::numeric_limits<int64_t>::max(), last = 0;
    for (int64_t i = from; i < from + count; ++i) {
      first = std::min(first, tile.first[i]);
      last = std::max(last, tile.last[i]);
    }
    begin = std::max(begin, first / kSpan * kSpan);
    end = std::min(end, last);
    for (int64_t start = begin; start < end; start += kSpan) {
      const int64_t held = std::min(kSpan, last - start);
      if (in_place_ && count < kComputeBound && start + kSpan < end) prefetch_span(slot, head, start + kSpan);
      const Span span = read_span(slot, head, start, held, scratch);
      add_span(tile, from, count, start, held, span);
    }
  }

  // Common head sizes as instances of their own: addresses are then constants.
  void add_span(Tile& tile, int64_t from, int64_t count, int64_t start, int64_t held, const Span& span) const {
    switch (a_.head_dim) {
      case 64: return add_span_of(std::integral_constant<int64_t, 64>(), tile, from, count, start, held, span);
      case 128: return add_span_of(std::integral_constant<int64_t, 128>(), tile, from, count, start, held, span);
      default: return add_span_of(a_.head_dim, tile, from, count, start, held, span);
    }
  }

  // `dim` is a number or a constant.
  template <typename Dim>
  void add_span_of(Dim dim, Tile& tile, int64_t from, int64_t count, int64_t start, int64_t held,
                   const Span& span) const {
    int64_t begin = kSpan, end = 0;  // what any of the queries sees
    for (int64_t i = from; i < from + count; ++i) {
      const int64_t seen_begin = std::max<int64_t>(tile.first[i] - start, 0);
      const int64_t seen_end = std::min(tile.last[i] - start, held);
      if (seen_begin >= seen_end) continue;
      begin = std::min(begin, seen_begin);
      end = std::max(end, seen_end);
    }
    if (begin >= end) return;
    by_rows(from, count, [&](auto rows, int64_t at) {
      span_logits<rows.value>(tile.q + at * dim, begin, end, dim, span, tile.logits + at * kSpan);
    });
    for (int64_t i = from; i < from + count; ++i)
      weigh(tile, i, std::max<int64_t>(tile.first[i] - start, 0), std::min(tile.last[i] - start, held), dim);
    by_rows(from, count, [&](auto rows, int64_t at) {
      span_outputs<rows.value>(tile.logits + at * kSpan, begin, end, dim, span.values, tile.out + at * dim);
    });
  }

  // Calls `body` with the number of rows as a constant, six at a time and then the rest.
  template <typename Body>
  TIDEMILL_INLINE void by_rows(int64_t from, int64_t count, const Body& body) const {
    int64_t at = from;
    for (; at + 6 <= from + count; at += 6) body(std::integral_constant<int, 6>(), at);
    switch (from + count - at) {
      case 5: body(std::integral_constant<int, 5>(), at); break;
      case 4: body(std::integral_constant<int, 4>(), at); break;
      case 3: body(std::integral_constant<int, 3>(), at); break;
      case 2: body(std::integral_constant<int, 2>(), at); break;
      case 1: body(std::integral_constant<int, 1>(), at); break;
    }
  }

  // Turn a query's logits over one span, of which it sees [begin, end), into weights, and rescale what it has.
  TIDEMILL_INLINE void weigh(Tile& tile, int64_t query, int64_t begin, int64_t end, int64_t dim) const {
    float* logits = tile.logits + query * kSpan;
    if (begin >= end) {
      std::fill(logits, logits + kSpan, 0.0f);
      return;
    }
    constexpr int kCount = kSpan / kLanes;
    const float lowest = -std::numeric_limits<float>::infinity();
    vf values[kCount];
    vf best = splat(lowest);
    for (int i = 0; i < kCount; ++i) values[i] = load(logits + i * kLanes);
    if (a_.soft_cap > 0)
      for (vf& value : values) value = splat(a_.soft_cap) * hyperbolic_tangent(value / splat(a_.soft_cap));
    if (begin > 0 || end < kSpan) {
      const vi low = splat_int(static_cast<int32_t>(begin)), high = splat_int(static_cast<int32_t>(end));
      for (int i = 0; i < kCount; ++i) {
        const vi number = lane_numbers() + splat_int(i * kLanes);
        values[i] = (number >= low) & (number < high) ? values[i] : splat(lowest);
      }
    }
    for (const vf& value : values) best = maximum(value, best);
    const float before = tile.maximum[query];
    const float highest_logit = std::max(before, highest(best));
    const vf shift = splat(highest_logit);
    vf added = vf{};
    for (int i = 0; i < kCount; ++i) {
      const vf weight = exponential(values[i] - shift);
      store(logits + i * kLanes, weight);
      added = added + weight;
    }
    if (before == highest_logit) {
      tile.total[query] += sum(added);
      return;
    }
    const vf decay = exponential(splat(before - highest_logit));
    tile.maximum[query] = highest_logit;
    tile.total[query] = tile.total[query] * decay[0] + sum(added);
    float* out = tile.out + query * dim;
    int64_t h = 0;
    for (; h + kLanes <= dim; h += kLanes) store(out + h, load(out + h) * decay);
    for (; h < dim; ++h) out[h] *= decay[0];
  }

  // Few queries are done with a span before the hardware's own prefetcher has found the next page.
  void prefetch_span(int64_t slot, int64_t head, int64_t start) const {
    const int64_t dim = a_.head_dim, size = a_.page_size;
    const int64_t plane = std::max<int64_t>(page_of(slot, start / size), 0) * a_.num_kv_heads + head;
    const float* keys = static_cast<const float*>(a_.keys) + plane * dim * size + start % size;
    const float* values = static_cast<const float*>(a_.values) + (plane * size + start % size) * dim;
    constexpr int64_t kLine = 16;
    for (int64_t h = 0; h < dim; ++h)
      for (int64_t t = 0; t < kSpan; t += kLine) __builtin_prefetch(keys + h * size + t, 0, 2);
    for (int64_t i = 0; i < kSpan * dim; i += kLine) __builtin_prefetch(values + i, 0, 2);
  }

  // The span's keys and values: where they lie, or converted and put together in `scratch` [2, kSpan * H].
  Span read_span(int64_t slot, int64_t head, int64_t start, int64_t held, float* scratch) const {
    const int64_t dim = a_.head_dim, size = a_.page_size;
    if (in_place_) {
      const int64_t page = std::max<int64_t>(page_of(slot, start / size), 0);
      const int64_t plane = page * a_.num_kv_heads + head, offset = start % size;
      return {static_cast<const float*>(a_.keys) + plane * dim * size + offset, size,
              static_cast<const float*>(a_.values) + (plane * size + offset) * dim};
    }
    float* keys = scratch;
    float* values = scratch + kSpan * dim;
    for (int64_t t = 0; t < held;) {
      const int64_t position = start + t, offset = position % size;
      const int64_t run = std::min(size - offset, held - t);
      const int64_t plane = std::max<int64_t>(page_of(slot, position / size), 0) * a_.num_kv_heads + head;
      const int64_t key = plane * dim * size + offset, value = (plane * size + offset) * dim;
      switch (a_.page_type) {
        case Attention::Type::kFloat32: {
          const float* from = static_cast<const float*>(a_.keys) + key;
          for (int64_t h = 0; h < dim; ++h) std::memcpy(keys + h * kSpan + t, from + h * size, run * sizeof(float));
          std::memcpy(values + t * dim, static_cast<const float*>(a_.values) + value, run * dim * sizeof(float));
          break;
        }
        case Attention::Type::kBfloat16: {
          const uint16_t* from = static_cast<const uint16_t*>(a_.keys) + key;
          for (int64_t h = 0; h < dim; ++h)
            for (int64_t i = 0; i < run; ++i) keys[h * kSpan + t + i] = from_bf16(from[h * size + i]);
          from = static_cast<const uint16_t*>(a_.values) + value;
          for (int64_t i = 0; i < run * dim; ++i) values[t * dim + i] = from_bf16(from[i]);
          break;
        }
        case Attention::Type::kInt8: {
          const int8_t* from = static_cast<const int8_t*>(a_.keys) + key;
          const float* scales = a_.key_scales + plane * size + offset;
          for (int64_t h = 0; h < dim; ++h)
            for (int64_t i = 0; i < run; ++i) keys[h * kSpan + t + i] = from[h * size + i] * scales[i];
          from = static_cast<const int8_t*>(a_.values) + value;
          scales = a_.value_scales + plane * size + offset;
          for (int64_t i = 0; i < run; ++i)
            for (int64_t h = 0; h < dim; ++h) values[(t + i) * dim + h] = from[i * dim + h] * scales[i];
          break;
        }
      }
      t += run;
    }
    // Past the end the scratch holds an earlier span's numbers, which the mask and the bounds keep out.
    return {keys, kSpan, values};
  }

  const Attention& a_;
  const int64_t ratio_;
  const bool in_place_;
  std::vector<Block> blocks_;
  std::vector<int64_t> slot_of_token_;
};

// Writes come first, for all tokens: a chunk's later queries see its earlier keys.
void attention(const Attention& args, Pool& pool) {
  const AttentionCall call(args);
  constexpr int64_t kTokensAtOnce = 16;
  const int64_t num_runs = (args.num_tokens + kTokensAtOnce - 1) / kTokensAtOnce;
  parallel_for(pool, num_runs, [&](int64_t run) {
    const int64_t end = std::min(args.num_tokens, (run + 1) * kTokensAtOnce);
    for (int64_t token = run * kTokensAtOnce; token < end; ++token) call.write_token(token);
  });
  parallel_for(pool, call.num_tasks(), [&](int64_t task) { call.run_task(task); });
}

}  // namespace TIDEMILL_ISA
}  // namespace tidemill
