// Paged attention for one instruction set: see kernels/paged_attention/api.py for what it computes.
//
// The step is cut into blocks: a block is either some queries of one sequence (a piece of a prefill chunk) or one query
// each of several sequences, neighbours that share leading pages. A block and one KV head make a task. A task goes over
// spans of 64 keys in their order and carries the online softmax (Milakov and Gimelshein 2018) of all
// its queries; over shared pages all of them together, then those of them that share more, beyond that each
// sequence by itself.
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
}  // namespace TIDEMILL_ISA
}  // namespace tidemill

#include "attention_float.h"
#include "attention_int8.h"

namespace tidemill {
namespace TIDEMILL_ISA {

constexpr int64_t kMaxQueries = 48;      // query heads of one block
constexpr int64_t kMaxChunkTokens = 16;  // tokens of one sequence in a block
constexpr int64_t kMaxMembers = 16;      // sequences that share a block
constexpr int64_t kComputeBound = 8;     // from so many queries on, a span costs more to compute than to fetch
static_assert(kSpan % kLanes == 0, "a span is whole vectors");

// Queries of one block and one KV head, and their softmax so far. A query is a (token, head of the group) pair.
struct Tile {
  int64_t count = 0;
  float* q = nullptr;        // [count, H]: scaled, or in whole numbers where pages are int8
  float* out = nullptr;      // [count, H], not yet divided
  float* logits = nullptr;   // [count, kSpan], then weights
  float* maximum = nullptr;  // [count]; this and what follows with room for a vector more
  float* total = nullptr;    // [count]
  vf* parts = nullptr;       // [kLanes], what is not yet added up of some queries
  int64_t* first = nullptr;  // [count], lowest visible key
  int64_t* last = nullptr;   // [count], one past the highest
  // Where pages are int8:
  vf* more_parts = nullptr;        // [kLanes]
  float* q_scales = nullptr;       // [count], the call's scale included
  float* weight_scales = nullptr;  // [count], of the span that is worked on
  // And where the CPU multiplies bytes:
  int32_t* q_quads = nullptr;   // [count, quads of H]
  int32_t* q_starts = nullptr;  // [count], what a logit's sum begins with because keys have 128 added
  int32_t* weights = nullptr;   // [count, kSpan / 4], bytes
};

// What a thread works in, kept from task to task.
struct TaskMemory {
  std::vector<float> tile_floats, span_floats, span_scales;
  std::vector<int64_t> bounds;
  std::vector<int32_t> tile_quads, span_quads;
  std::vector<int8_t> span_bytes;
  vf parts[2 * kLanes];
};

// What one call needs beside its arguments: which page a slot's column is, how a type is read, blocks.
class AttentionCall {
 public:
  explicit AttentionCall(const Attention& args)
      : a_(args),
        ratio_(args.num_heads / args.num_kv_heads),
        is_int8_(args.page_type == Attention::Type::kInt8),
        in_place_(args.page_size >= kSpan && (args.page_type == Attention::Type::kFloat32 ||
                                              (is_int8_ && args.head_dim % kLanes == 0))) {
    plan_blocks();
  }

  int64_t num_tasks() const { return static_cast<int64_t>(blocks_.size()) * a_.num_kv_heads; }

  // Whether any token has to be written, or cleared, before the tasks begin.
  bool has_early_tokens() const { return has_early_tokens_; }

  // Write a token's keys and values if other queries of the step read them; clear the output of a padding token. A
  // token that is its sequence's only one is written by the tasks that read it, while its span is in the cache.
  void prepare_token(int64_t token) const {
    const int64_t slot = slot_of_token_[token];
    if (slot < 0) {
      clear_token(token);
    } else if (a_.query_start[slot + 1] - a_.query_start[slot] > 1) {
      for (int64_t head = 0; head < a_.num_kv_heads; ++head) write_head(slot, token, head);
    }
  }

  // `next` is the task that the thread goes on with, or none (-1).
  void run_task(int64_t task, int64_t next) const {
    const Block& block = blocks_[task / a_.num_kv_heads];
    const int64_t head = task % a_.num_kv_heads;
    const int64_t count = block.num_tokens * ratio_;
    thread_local TaskMemory memory;
    Tile tile = make_tile(count, memory);
    start(block, head, tile);
    const int64_t each = count / block.num_slots;
    for (int64_t i = block.first_share; i < block.last_share; ++i) {
      const Share& share = shares_[i];
      const Place after = i + 1 < block.last_share ? Place{} : first_own(block, 0, head);
      attend(tile, share.first_member * each, (share.last_member - share.first_member) * each,
             {block.first_slot + share.first_member, head, share.begin}, share.end, -1, after, memory);
    }
    for (int64_t member = 0; member < block.num_slots; ++member) {
      const Place after = member + 1 < block.num_slots ? first_own(block, member + 1, head) : first_of_task(next);
      attend(tile, member * each, each, {block.first_slot + member, head, own_begin_[block.first_slot + member]},
             std::numeric_limits<int64_t>::max(), block.is_decode ? block.first_token + member : -1, after, memory);
    }
    finish(block, head, tile);
  }

 private:
  // A span of a slot's keys and values, of one head.
  struct Place {
    int64_t slot = -1, head = 0, start = 0;
  };

  struct Block {
    int64_t first_token, num_tokens;
    int64_t first_slot, num_slots;       // several slots: one query each
    bool is_decode;                      // each slot has no other query in the step
    int64_t first_share, last_share;     // of shares_
  };

  // The keys [begin, end), whole spans, are the same ones for members [first_member, last_member) of a block.
  struct Share {
    int64_t first_member, last_member;
    int64_t begin, end;
  };

  void plan_blocks() {
    // Decodes are put together by the group around all others, which comes first.
    std::vector<int64_t> group(a_.num_slots, -1);
    for (int64_t g = 0; g < a_.num_groups; ++g) {
      if (shared_len(g) == 0) continue;
      const int64_t stop = std::min<int64_t>(a_.group_slot_stop[g], a_.num_slots);
      for (int64_t slot = std::max(a_.group_slot_start[g], 0); slot < stop; ++slot)
        if (group[slot] < 0) group[slot] = g;
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
        if (previous.is_decode && group[other] == group[slot] &&
            previous.num_slots < max_members && previous.first_token + previous.num_tokens == begin &&
            previous.first_slot + previous.num_slots == slot) {
          ++previous.num_slots;
          ++previous.num_tokens;
          continue;
        }
      }
      for (int64_t token = begin; token < end; token += max_tokens)
        blocks_.push_back({token, std::min(max_tokens, end - token), slot, 1, end - begin == 1, 0, 0});
      has_early_tokens_ = has_early_tokens_ || end - begin > 1;
    }
    for (int64_t slot : slot_of_token_) has_early_tokens_ = has_early_tokens_ || slot < 0;
    own_begin_.assign(a_.num_slots, 0);
    for (Block& block : blocks_)
      if (block.num_slots > 1) plan_shares(block);
  }

  // What a block's members read together, group by group: neighbours that have read equally much so far.
  void plan_shares(Block& block) {
    block.first_share = shares_.size();
    const int64_t block_stop = block.first_slot + block.num_slots;
    for (int64_t g = 0; g < a_.num_groups; ++g) {
      const int64_t len = shared_len(g);
      const int64_t stop = std::min<int64_t>(a_.group_slot_stop[g], block_stop);
      for (int64_t slot = std::max<int64_t>(a_.group_slot_start[g], block.first_slot); slot < stop;) {
        const int64_t begin = own_begin_[slot];
        int64_t next = slot + 1;
        while (next < stop && own_begin_[next] == begin) ++next;
        if (next - slot > 1 && begin < len) {
          shares_.push_back({slot - block.first_slot, next - block.first_slot, begin, len});
          std::fill(own_begin_.begin() + slot, own_begin_.begin() + next, len);
        }
        slot = next;
      }
    }
    block.last_share = shares_.size();
  }

  int64_t shared_len(int64_t group) const {
    return std::max<int64_t>(a_.group_page_stop[group], 0) * a_.page_size / kSpan * kSpan;
  }

  Tile make_tile(int64_t count, TaskMemory& memory) const {
    const int64_t dim = a_.head_dim;
    const int64_t padded = count + kLanes;
    memory.tile_floats.resize(count * (2 * dim + kSpan) + 4 * padded);
    memory.bounds.resize(2 * count);
    Tile tile;
    tile.count = count;
    tile.q = memory.tile_floats.data();
    tile.out = tile.q + count * dim;
    tile.logits = tile.out + count * dim;
    tile.maximum = tile.logits + count * kSpan;
    tile.total = tile.maximum + padded;
    tile.q_scales = tile.total + padded;
    tile.weight_scales = tile.q_scales + padded;
    tile.parts = memory.parts;
    tile.more_parts = memory.parts + kLanes;
    tile.first = memory.bounds.data();
    tile.last = tile.first + count;
    if (is_int8_ && kHasByteDot) {
      memory.tile_quads.resize(count * (quads_of(dim) + 1 + kSpan / 4));
      tile.q_quads = memory.tile_quads.data();
      tile.q_starts = tile.q_quads + count * quads_of(dim);
      tile.weights = tile.q_starts + count;
    }
    return tile;
  }

  // Write one head of a token's new key and value.
  void write_head(int64_t slot, int64_t token, int64_t head) const {
    const int64_t position = position_of(slot, token);
    const int64_t page = page_of(slot, position / a_.page_size);
    if (page < 0) return;
    const int64_t offset = position % a_.page_size, dim = a_.head_dim, size = a_.page_size;
    const int64_t source = (token * a_.num_kv_heads + head) * dim;
    const int64_t plane = page * a_.num_kv_heads + head;
    const int64_t key = plane * dim * size + offset, value = (plane * size + offset) * dim;
    thread_local std::vector<float> memory;
    memory.resize(2 * dim);
    const float* new_key = as_floats(a_.k, source, memory.data());
    const float* new_value = as_floats(a_.v, source, memory.data() + dim);
    switch (a_.page_type) {
      case Attention::Type::kFloat32: {
        float* keys = static_cast<float*>(a_.keys) + key;
        for (int64_t h = 0; h < dim; ++h) keys[h * size] = new_key[h];
        std::memcpy(static_cast<float*>(a_.values) + value, new_value, dim * sizeof(float));
        break;
      }
      case Attention::Type::kBfloat16: {
        uint16_t* keys = static_cast<uint16_t*>(a_.keys) + key;
        uint16_t* values = static_cast<uint16_t*>(a_.values) + value;
        for (int64_t h = 0; h < dim; ++h) keys[h * size] = to_bf16(new_key[h]);
        for (int64_t h = 0; h < dim; ++h) values[h] = to_bf16(new_value[h]);
        break;
      }
      case Attention::Type::kInt8: {
        thread_local std::vector<int8_t> bytes;
        bytes.resize(dim);
        a_.key_scales[plane * size + offset] = quantise_symmetric(new_key, dim, bytes.data());
        int8_t* keys = static_cast<int8_t*>(a_.keys) + key;
        for (int64_t h = 0; h < dim; ++h) keys[h * size] = bytes[h];
        a_.value_scales[plane * size + offset] =
            quantise_symmetric(new_value, dim, static_cast<int8_t*>(a_.values) + value);
        break;
      }
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

  // [H] of an activation in float32: where it lies, or at `target`.
  const float* as_floats(const void* data, int64_t index, float* target) const {
    if (a_.activation_type == Attention::Type::kFloat32) return static_cast<const float*>(data) + index;
    for (int64_t h = 0; h < a_.head_dim; ++h) target[h] = read(data, index + h);
    return target;
  }

  void clear_token(int64_t token) const {
    const int64_t size = a_.activation_type == Attention::Type::kFloat32 ? 4 : 2;
    const int64_t bytes = a_.num_heads * a_.head_dim * size;
    std::memset(static_cast<char*>(a_.out) + token * bytes, 0, bytes);
  }

  int64_t position_of(int64_t slot, int64_t token) const {
    return a_.kv_len[slot] - (a_.query_start[slot + 1] - token);
  }

  // The lowest key that a query at `position` sees.
  int64_t first_key(int64_t position) const {
    int64_t first = 0;
    if (a_.window > 0) first = std::max(first, position - (a_.window - 1));
    if (a_.chunk > 0) first = std::max(first, position / a_.chunk * a_.chunk);
    return first;
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
      const float* from = as_floats(a_.q, source, query);
      if (is_int8_)
        quantise_query(tile, i, from);
      else
        for (int64_t h = 0; h < dim; ++h) query[h] = from[h] * a_.scale;
      const int64_t position = position_of(slot, token);
      tile.first[i] = first_key(position);
      tile.last[i] = position + 1;
      const bool has_sink = a_.sinks != nullptr;
      tile.maximum[i] = has_sink ? a_.sinks[query_head] : -std::numeric_limits<float>::infinity();
      tile.total[i] = has_sink ? 1.0f : 0.0f;
    }
  }

  void quantise_query(Tile& tile, int64_t query, const float* x) const {
    const int64_t dim = a_.head_dim, num_quads = quads_of(dim);
    thread_local std::vector<int8_t> bytes;
    bytes.assign(4 * num_quads, 0);
    tile.q_scales[query] = quantise_symmetric(x, dim, bytes.data()) * a_.scale;
    if (kHasByteDot) {
      std::memcpy(tile.q_quads + query * num_quads, bytes.data(), 4 * num_quads);
      int32_t total = 0;
      for (int8_t byte : bytes) total += byte;
      tile.q_starts[query] = -128 * total;
    } else {
      for (int64_t h = 0; h < dim; ++h) tile.q[query * dim + h] = bytes[h];
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

  // The first span that a block's member reads by itself.
  Place first_own(const Block& block, int64_t member, int64_t head) const {
    const int64_t slot = block.first_slot + member;
    return {slot, head, std::max(own_begin_[slot], first_key(position_of(slot, block.first_token + member)) / kSpan * kSpan)};
  }

  // The first span that a task reads, where fetching it early is worth it.
  Place first_of_task(int64_t task) const {
    if (task < 0) return {};
    const Block& block = blocks_[task / a_.num_kv_heads];
    const int64_t head = task % a_.num_kv_heads;
    if (!block.is_decode) return {};
    if (block.first_share == block.last_share) return first_own(block, 0, head);
    const Share& share = shares_[block.first_share];
    return {block.first_slot + share.first_member, head, share.begin};
  }

  // Queries [from, from + count) of the tile over the keys [first.start, end) of a slot, in whole spans. `token`, if
  // any, is the slot's newest: written when the span that it lies in has come into the cache. `after` is what is read
  // after these spans.
  void attend(Tile& tile, int64_t from, int64_t count, Place first, int64_t end, int64_t token, Place after,
              TaskMemory& memory) const {
    int64_t lowest = std::numeric_limits<int64_t>::max(), highest = 0;
    for (int64_t i = from; i < from + count; ++i) {
      lowest = std::min(lowest, tile.first[i]);
      highest = std::max(highest, tile.last[i]);
    }
    first.start = std::max(first.start, lowest / kSpan * kSpan);
    end = std::min(end, highest);
    for (Place place = first; place.start < end; place.start += kSpan) {
      const int64_t held = std::min(kSpan, highest - place.start);
      const bool is_last = place.start + kSpan >= end;
      Place next = is_last ? after : Place{place.slot, place.head, place.start + kSpan};
      if (!is_last && count >= kComputeBound) next = {};
      if (is_last && token >= 0) write_head(place.slot, token, place.head);
      // Common head sizes as instances of their own: addresses are then constants.
      switch (a_.head_dim) {
        case 64: add_span(std::integral_constant<int64_t, 64>(), tile, from, count, place, held, next, memory); break;
        case 128: add_span(std::integral_constant<int64_t, 128>(), tile, from, count, place, held, next, memory); break;
        default: add_span(a_.head_dim, tile, from, count, place, held, next, memory);
      }
    }
  }

  // The first `held` keys of a span; `dim` is a number or a constant, `next` the span to fetch meanwhile.
  template <typename Dim>
  void add_span(Dim dim, Tile& tile, int64_t from, int64_t count, Place place, int64_t held, Place next,
                TaskMemory& memory) const {
    const auto [slot, head, start] = place;
    int64_t begin = kSpan, end = 0;  // what any of the queries sees
    for (int64_t i = from; i < from + count; ++i) {
      const int64_t seen_begin = std::max<int64_t>(tile.first[i] - start, 0);
      const int64_t seen_end = std::min(tile.last[i] - start, held);
      if (seen_begin >= seen_end) continue;
      begin = std::min(begin, seen_begin);
      end = std::max(end, seen_end);
    }
    if (begin >= end) return;
    const Ahead keys_ahead = ahead_of_keys(next, dim), values_ahead = ahead_of_values(next, dim);
    const auto in_first = [from](const Ahead& ahead, int64_t at) { return at == from ? ahead : Ahead{}; };
    if (!is_int8_) {
      const Span span = read_span(slot, head, start, held, memory);
      by_rows(from, count, [&](auto rows, int64_t at) {
        span_logits<rows.value>(tile.q + at * dim, begin, end, dim, span, tile.logits + at * kSpan,
                                in_first(keys_ahead, at));
      });
      weigh<false>(dim, tile, from, count, start, held, nullptr);
      by_rows(from, count, [&](auto rows, int64_t at) {
        span_outputs<rows.value>(tile.logits + at * kSpan, nullptr, begin, end, dim, span.values, tile.out + at * dim,
                                 in_first(values_ahead, at));
      });
      return;
    }
    const ByteSpan bytes = read_bytes(slot, head, start, held, memory);
#if defined(TIDEMILL_VNNI)
    const int64_t num_quads = quads_of(dim);
    memory.span_quads.resize(num_quads * kSpan + kSpan / 4 * whole_vectors(dim));
    int32_t* keys = memory.span_quads.data();
    int32_t* values = keys + num_quads * kSpan;
    key_quads(bytes, dim, keys, keys_ahead);
    by_rows(from, count, [&](auto rows, int64_t at) {
      byte_logits<rows.value>(tile.q_quads + at * num_quads, tile.q_starts + at, num_quads, keys,
                              tile.logits + at * kSpan);
    });
    weigh<true>(dim, tile, from, count, start, held, &bytes);
    value_quads(bytes, dim, values, values_ahead);
    by_rows(from, count, [&](auto rows, int64_t at) {
      byte_outputs<rows.value>(tile.weights + at * (kSpan / 4), tile.weight_scales + at, dim, values,
                               tile.out + at * dim);
    });
#else
    const Span span = widened(bytes, held, memory);
    by_rows(from, count, [&](auto rows, int64_t at) {
      span_logits<rows.value>(tile.q + at * dim, begin, end, dim, span, tile.logits + at * kSpan,
                              in_first(keys_ahead, at));
    });
    weigh<true>(dim, tile, from, count, start, held, &bytes);
    by_rows(from, count, [&](auto rows, int64_t at) {
      span_outputs<rows.value>(tile.logits + at * kSpan, tile.weight_scales + at, begin, end, dim, span.values,
                               tile.out + at * dim, in_first(values_ahead, at));
    });
#endif
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

  // Turn the logits of queries [from, from + count) over one span into weights, and rescale what they have. As many
  // queries as a vector has lanes go together, so that what is one number a query costs a vector's instruction for all.
  template <bool kIsInt8, typename Dim>
  TIDEMILL_INLINE void weigh(Dim dim, Tile& tile, int64_t from, int64_t count, int64_t start, int64_t held,
                             const ByteSpan* bytes) const {
    for (int64_t at = from; at < from + count; at += kLanes)
      weigh_some<kIsInt8>(dim, tile, at, static_cast<int>(std::min<int64_t>(kLanes, from + count - at)), start, held,
                          bytes);
  }

  template <bool kIsInt8, typename Dim>
  TIDEMILL_INLINE void weigh_some(Dim dim, Tile& tile, int64_t from, int count, int64_t start, int64_t held,
                                  const ByteSpan* bytes) const {
    constexpr int kCount = kSpan / kLanes;
    const float lowest = -std::numeric_limits<float>::infinity();
    const vi is_one_of = lane_numbers() < splat_int(count);
    vf* parts = tile.parts;
    for (int i = 0; i < count; ++i) {
      const int64_t query = from + i;
      float* logits = tile.logits + query * kSpan;
      const int64_t begin = std::max<int64_t>(tile.first[query] - start, 0);
      const int64_t end = std::min(tile.last[query] - start, held);
      vf values[kCount];
      for (int c = 0; c < kCount; ++c) {
        values[c] = load(logits + c * kLanes);
        if (kIsInt8) values[c] = values[c] * load(bytes->key_scales + c * kLanes) * splat(tile.q_scales[query]);
        if (a_.soft_cap > 0)
          values[c] = splat(a_.soft_cap) * hyperbolic_tangent(values[c] / splat(a_.soft_cap));
      }
      if (begin > 0 || end < kSpan) {
        const vi low = splat_int(static_cast<int32_t>(std::min(begin, kSpan)));
        const vi high = splat_int(static_cast<int32_t>(std::max<int64_t>(end, 0)));
        for (int c = 0; c < kCount; ++c) {
          const vi number = lane_numbers() + splat_int(c * kLanes);
          values[c] = (number >= low) & (number < high) ? values[c] : splat(lowest);
        }
      }
      vf best = values[0];
      for (int c = 1; c < kCount; ++c) best = maximum(values[c], best);
      parts[i] = best;
      if (kIsInt8 || a_.soft_cap > 0 || begin > 0 || end < kSpan)
        for (int c = 0; c < kCount; ++c) store(logits + c * kLanes, values[c]);
    }
    const auto larger = [](vf a, vf b) { return maximum(a, b); };
    const auto added = [](vf a, vf b) { return a + b; };
    const vf before = load(tile.maximum + from);
    const vf now = maximum(before, reduce_rows(parts, larger));
    const vf shift = now > splat(lowest) ? now : vf{};  // a query may have seen nothing so far
    const vf decay = bounded_exponential(before - shift);
    store(tile.maximum + from, is_one_of ? now : before);
    float shifts[kLanes], decays[kLanes];
    store(shifts, shift);
    store(decays, decay);
    for (int i = 0; i < count; ++i) {
      const int64_t query = from + i;
      float* weights = tile.logits + query * kSpan;
      vf total = vf{}, most = vf{};
      for (int c = 0; c < kCount; ++c) {
        vf weight = bounded_exponential(load(weights + c * kLanes) - splat(shifts[i]));
        total = total + weight;
        if (kIsInt8) {  // a scale that nothing was stored with may be anything
          weight = weight > vf{} ? weight * load(bytes->value_scales + c * kLanes) : vf{};
          most = maximum(weight, most);
        }
        store(weights + c * kLanes, weight);
      }
      parts[i] = total;
      if (kIsInt8) tile.more_parts[i] = most;
      if (decays[i] == 1.0f) continue;
      float* out = tile.out + query * dim;
      int64_t h = 0;
      for (; h + kLanes <= dim; h += kLanes) store(out + h, load(out + h) * splat(decays[i]));
      for (; h < dim; ++h) out[h] *= decays[i];
    }
    const vf old_total = load(tile.total + from);
    store(tile.total + from, is_one_of ? fma(old_total, decay, reduce_rows(parts, added)) : old_total);
    if (kIsInt8) narrow_weights(tile, from, count, reduce_rows(tile.more_parts, larger));
  }

  // The weights of `count` queries over one span as bytes; `largest` has each query's largest.
  TIDEMILL_INLINE void narrow_weights(Tile& tile, int64_t from, int count, vf largest) const {
    float inverses[kLanes];
    store(inverses, largest > vf{} ? splat(255.0f) / largest : vf{});
    const vf old_scales = load(tile.weight_scales + from);
    store(tile.weight_scales + from, lane_numbers() < splat_int(count) ? largest / splat(255.0f) : old_scales);
    for (int i = 0; i < count; ++i) {
      float* weights = tile.logits + (from + i) * kSpan;
      for (int64_t t = 0; t < kSpan; t += kLanes) {
        const vi whole = nearest(load(weights + t), splat(inverses[i]));
        if (kHasByteDot) {
          const auto narrow = __builtin_convertvector(whole, vb);
          std::memcpy(tile.weights + ((from + i) * kSpan + t) / 4, &narrow, kLanes);
        } else {
          store(weights + t, __builtin_convertvector(whole, vf));
        }
      }
    }
  }

  // What to fetch of a span that is read later: nothing unless it is read where it lies. (Few queries are done with a
  // span before the hardware's own prefetcher has found the next page.)
  Ahead ahead_of_keys(Place place, int64_t dim) const {
    if (place.slot < 0 || !in_place_) return {};
    const int64_t size = a_.page_size, bytes = page_item_bytes();
    const char* keys = static_cast<const char*>(a_.keys) + (plane_of(place) * dim * size + place.start % size) * bytes;
    return {keys, size * bytes, kSpan * bytes};
  }

  Ahead ahead_of_values(Place place, int64_t dim) const {
    if (place.slot < 0 || !in_place_) return {};
    const int64_t size = a_.page_size, row_bytes = dim * page_item_bytes();
    const char* values = static_cast<const char*>(a_.values) + (plane_of(place) * size + place.start % size) * row_bytes;
    return {values, row_bytes, row_bytes};
  }

  int64_t page_item_bytes() const { return is_int8_ ? 1 : sizeof(float); }

  // One head of the page that a span begins in; pages that are not there are read as page 0.
  int64_t plane_of(Place place) const {
    return std::max<int64_t>(page_of(place.slot, place.start / a_.page_size), 0) * a_.num_kv_heads + place.head;
  }

  // Calls `body(t, run, plane, offset)` for each page that the keys [start, start + held) of a slot lie in: the span's
  // keys [t, t + run) are the page's from `offset` on; a plane is one head of a page.
  template <typename Body>
  TIDEMILL_INLINE void by_pages(int64_t slot, int64_t head, int64_t start, int64_t held, const Body& body) const {
    const int64_t size = a_.page_size;
    for (int64_t t = 0, run; t < held; t += run) {
      const int64_t position = start + t, offset = position % size;
      run = std::min(size - offset, held - t);
      body(t, run, std::max<int64_t>(page_of(slot, position / size), 0) * a_.num_kv_heads + head, offset);
    }
  }

  // The span's keys and values: where they lie, or converted and put together in memory [2, kSpan * H].
  Span read_span(int64_t slot, int64_t head, int64_t start, int64_t held, TaskMemory& memory) const {
    const int64_t dim = a_.head_dim, size = a_.page_size;
    if (in_place_) {
      const int64_t plane = plane_of({slot, head, start}), offset = start % size;
      return {static_cast<const float*>(a_.keys) + plane * dim * size + offset, size,
              static_cast<const float*>(a_.values) + (plane * size + offset) * dim};
    }
    memory.span_floats.resize(2 * kSpan * dim);
    float* keys = memory.span_floats.data();
    float* values = keys + kSpan * dim;
    by_pages(slot, head, start, held, [&](int64_t t, int64_t run, int64_t plane, int64_t offset) {
      const int64_t key = plane * dim * size + offset, value = (plane * size + offset) * dim;
      if (a_.page_type == Attention::Type::kFloat32) {
        const float* from = static_cast<const float*>(a_.keys) + key;
        for (int64_t h = 0; h < dim; ++h) std::memcpy(keys + h * kSpan + t, from + h * size, run * sizeof(float));
        std::memcpy(values + t * dim, static_cast<const float*>(a_.values) + value, run * dim * sizeof(float));
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(a_.keys) + key;
        for (int64_t h = 0; h < dim; ++h)
          for (int64_t i = 0; i < run; ++i) keys[h * kSpan + t + i] = from_bf16(from[h * size + i]);
        from = static_cast<const uint16_t*>(a_.values) + value;
        for (int64_t i = 0; i < run * dim; ++i) values[t * dim + i] = from_bf16(from[i]);
      }
    });
    // Past the end the memory holds an earlier span's numbers, which the mask and the bounds keep out.
    return {keys, kSpan, values};
  }

  // The span's bytes and scales: where they lie, or put together in memory.
  ByteSpan read_bytes(int64_t slot, int64_t head, int64_t start, int64_t held, TaskMemory& memory) const {
    const int64_t dim = a_.head_dim, size = a_.page_size;
    const int8_t* all_keys = static_cast<const int8_t*>(a_.keys);
    const int8_t* all_values = static_cast<const int8_t*>(a_.values);
    if (in_place_) {
      const int64_t plane = plane_of({slot, head, start}), offset = start % size, at = plane * size + offset;
      return {all_keys + plane * dim * size + offset, size, all_values + at * dim, dim, a_.key_scales + at,
              a_.value_scales + at};
    }
    const int64_t width = whole_vectors(dim);
    memory.span_bytes.resize(kSpan * (dim + width));
    memory.span_scales.resize(2 * kSpan);
    int8_t* keys = memory.span_bytes.data();
    int8_t* values = keys + kSpan * dim;
    float* key_scales = memory.span_scales.data();
    float* value_scales = key_scales + kSpan;
    by_pages(slot, head, start, held, [&](int64_t t, int64_t run, int64_t plane, int64_t offset) {
      const int64_t at = plane * size + offset;
      for (int64_t h = 0; h < dim; ++h)
        std::memcpy(keys + h * kSpan + t, all_keys + (plane * dim + h) * size + offset, run);
      for (int64_t i = 0; i < run; ++i) std::memcpy(values + (t + i) * width, all_values + (at + i) * dim, dim);
      std::memcpy(key_scales + t, a_.key_scales + at, run * sizeof(float));
      std::memcpy(value_scales + t, a_.value_scales + at, run * sizeof(float));
    });
    return {keys, kSpan, values, width, key_scales, value_scales};
  }

  // A span's bytes as numbers of 32 bits, for CPUs that do not multiply bytes.
  Span widened(const ByteSpan& bytes, int64_t held, TaskMemory& memory) const {
    const int64_t dim = a_.head_dim;
    memory.span_floats.resize(2 * kSpan * dim);
    float* keys = memory.span_floats.data();
    float* values = keys + kSpan * dim;
    for (int64_t h = 0; h < dim; ++h)
      for (int64_t t = 0; t < kSpan; ++t) keys[h * kSpan + t] = bytes.keys[h * bytes.key_stride + t];
    for (int64_t t = 0; t < held; ++t)
      for (int64_t h = 0; h < dim; ++h) values[t * dim + h] = bytes.values[t * bytes.value_stride + h];
    return {keys, kSpan, values};
  }

  const Attention& a_;
  const int64_t ratio_;
  const bool is_int8_;
  const bool in_place_;  // spans are read where they lie
  bool has_early_tokens_ = false;
  std::vector<Block> blocks_;
  std::vector<Share> shares_;
  std::vector<int64_t> own_begin_;  // by slot: its keys from here on it reads by itself
  std::vector<int64_t> slot_of_token_;
};

// Writes come first where a chunk's later queries see its earlier keys.
void attention(const Attention& args, Pool& pool) {
  const AttentionCall call(args);
  constexpr int64_t kTokensAtOnce = 16, kTasksAtOnce = 8, kRunsAThread = 16;
  const int64_t num_runs = call.has_early_tokens() ? (args.num_tokens + kTokensAtOnce - 1) / kTokensAtOnce : 0;
  parallel_for(pool, num_runs, [&](int64_t run) {
    const int64_t end = std::min(args.num_tokens, (run + 1) * kTokensAtOnce);
    for (int64_t token = run * kTokensAtOnce; token < end; ++token) call.prepare_token(token);
  });
  // A thread takes neighbours, so that it knows what it will read next; so few that none is left with much at the end.
  const int64_t num_tasks = call.num_tasks();
  const int64_t at_once = std::clamp<int64_t>(num_tasks / (kRunsAThread * pool.num_threads()), 1, kTasksAtOnce);
  parallel_for(pool, (num_tasks + at_once - 1) / at_once, [&](int64_t run) {
    const int64_t end = std::min(num_tasks, (run + 1) * at_once);
    for (int64_t task = run * at_once; task < end; ++task) call.run_task(task, task + 1 < end ? task + 1 : -1);
  });
}

}  // namespace TIDEMILL_ISA
}  // namespace tidemill
