// Random calls of the native kernels, without XLA, for builds with sanitizers and for emulated CPUs.
//
//     fuzz SEED CASES        prints "ISA: N cases" and exits 0, or says which case was wrong and exits 1
//
// Every array is exactly as large as told, so that a read or write outside is one outside the allocation. What must not be
// read is NaN. Results are compared with plain loops in double precision.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

#include "fuzz.h"

namespace {

class ThreadPool final : public Pool {
 public:
  ~ThreadPool() override { join(); }
  int64_t num_threads() const override { return 3; }
  void schedule(std::function<void()> work) override { threads_.emplace_back(std::move(work)); }
  void join() {
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  std::vector<std::thread> threads_;
};

// Sequences with random histories, some of which begin with the same pages; attention and then every output checked.
void fuzz_attention(int64_t number, Pool& pool) {
  const int64_t dims[] = {16, 20, 64, 80, 128};
  Attention args{};
  args.num_kv_heads = pick(1, 3);
  const int64_t ratio = pick(1, 5);
  args.num_heads = args.num_kv_heads * ratio;
  args.head_dim = dims[pick(0, 4)];
  args.page_size = int64_t{8} << pick(0, 4);
  args.num_slots = pick(1, 12);
  args.page_type = static_cast<Attention::Type>(pick(0, 2));
  args.activation_type = Attention::Type::kFloat32;
  args.scale = 0.3f;
  args.window = pick(0, 3) == 0 ? pick(1, 90) : 0;
  args.chunk = pick(0, 3) == 0 ? pick(1, 90) : 0;
  args.soft_cap = pick(0, 3) == 0 ? 3.0f : 0.0f;
  const int64_t num_shared = pick(0, 3);  // pages that the slots [0, num_members) begin with
  const int64_t num_members = pick(0, args.num_slots);
  const int64_t num_inner = pick(0, 2);  // pages behind those that the slots [inner_start, inner_stop) share too
  const int64_t inner_start = pick(0, num_members), inner_stop = pick(inner_start, num_members);
  auto is_inner = [&](int64_t slot) { return inner_start <= slot && slot < inner_stop; };
  std::vector<int32_t> query_start(args.num_slots + 1, 0), kv_len(args.num_slots, 0);
  for (int64_t slot = 0; slot < args.num_slots; ++slot) {
    const int64_t num_leading = (slot < num_members ? num_shared : 0) + (is_inner(slot) ? num_inner : 0);
    const int64_t shared = num_leading * args.page_size;
    const int64_t new_tokens = pick(0, 4) == 0 ? pick(0, 40) : 1;
    query_start[slot + 1] = query_start[slot] + static_cast<int32_t>(new_tokens);
    kv_len[slot] = new_tokens == 0 ? 0 : static_cast<int32_t>(shared + pick(0, 100) + new_tokens);
  }
  const int64_t num_queries = query_start[args.num_slots];
  args.num_tokens = num_queries + pick(0, 5);
  if (args.num_tokens == 0) return;
  int64_t longest = 0;
  for (int32_t len : kv_len) longest = std::max<int64_t>(longest, len);
  args.table_width = std::max<int64_t>(1, (longest + args.page_size - 1) / args.page_size);
  std::vector<int32_t> table(args.num_slots * args.table_width, 0);
  int32_t next_page = 1 + static_cast<int32_t>(num_shared + num_inner);
  for (int64_t slot = 0; slot < args.num_slots; ++slot)
    for (int64_t column = 0; column * args.page_size < kv_len[slot]; ++column) {
      const bool is_shared = (slot < num_members && column < num_shared) ||
                             (is_inner(slot) && column < num_shared + num_inner);
      table[slot * args.table_width + column] = is_shared ? static_cast<int32_t>(column) + 1 : next_page++;
    }
  args.num_pages = next_page;

  // What each place holds, in double; NaN where nothing is.
  const int64_t plane = args.page_size * args.head_dim, num_planes = args.num_pages * args.num_kv_heads;
  const double nothing = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> true_keys(num_planes * plane, nothing), true_values(num_planes * plane, nothing);
  std::vector<float> key_scales(num_planes * args.page_size, std::nanf("")), value_scales = key_scales;
  std::vector<float> keys32, values32;
  std::vector<uint16_t> keys16, values16;
  std::vector<int8_t> keys8, values8;
  auto bf16 = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>(bits >> 16);
  };
  auto widen = [](uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  };
  keys32.assign(args.page_type == Attention::Type::kFloat32 ? num_planes * plane : 0, std::nanf(""));
  values32 = keys32;
  keys16.assign(args.page_type == Attention::Type::kBfloat16 ? num_planes * plane : 0, 0x7fc0);
  values16 = keys16;
  keys8.assign(args.page_type == Attention::Type::kInt8 ? num_planes * plane : 0, 0);
  values8 = keys8;
  for (int64_t slot = 0; slot < args.num_slots; ++slot) {
    const int64_t held = kv_len[slot] - (query_start[slot + 1] - query_start[slot]);
    for (int64_t token = 0; token < held; ++token) {
      const int64_t page = table[slot * args.table_width + token / args.page_size], offset = token % args.page_size;
      for (int64_t head = 0; head < args.num_kv_heads; ++head) {
        const int64_t at = page * args.num_kv_heads + head;
        key_scales[at * args.page_size + offset] = 0.02f;
        value_scales[at * args.page_size + offset] = 0.03f;
        for (int64_t h = 0; h < args.head_dim; ++h) {
          const int64_t key = at * plane + h * args.page_size + offset, value = at * plane + offset * args.head_dim + h;
          const float a = normal(), b = normal();
          switch (args.page_type) {
            case Attention::Type::kFloat32:
              true_keys[key] = keys32[key] = a;
              true_values[value] = values32[value] = b;
              break;
            case Attention::Type::kBfloat16:
              true_keys[key] = widen(keys16[key] = bf16(a));
              true_values[value] = widen(values16[value] = bf16(b));
              break;
            case Attention::Type::kInt8:
              keys8[key] = static_cast<int8_t>(pick(-127, 127));
              values8[value] = static_cast<int8_t>(pick(-127, 127));
              true_keys[key] = keys8[key] * 0.02f;
              true_values[value] = values8[value] * 0.03f;
              break;
          }
        }
      }
    }
  }
  const std::vector<float> q = normals(args.num_tokens * args.num_heads * args.head_dim);
  const std::vector<float> k = normals(args.num_tokens * args.num_kv_heads * args.head_dim);
  const std::vector<float> v = normals(args.num_tokens * args.num_kv_heads * args.head_dim);
  const std::vector<float> sinks = normals(args.num_heads);
  const std::vector<int32_t> group_start = {0, static_cast<int32_t>(inner_start)};
  const std::vector<int32_t> group_stop = {static_cast<int32_t>(num_members), static_cast<int32_t>(inner_stop)};
  std::vector<int32_t> group_pages = {static_cast<int32_t>(num_shared), static_cast<int32_t>(num_shared + num_inner)};
  for (int64_t slot = 0; slot < num_members; ++slot)  // an empty slot holds no pages
    for (int64_t group = 0; group < 2; ++group)
      if (kv_len[slot] == 0 && group_start[group] <= slot && slot < group_stop[group]) group_pages[group] = 0;
  std::vector<float> out(q.size(), std::nanf(""));
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  const bool is_wide = args.page_type == Attention::Type::kFloat32;
  const bool is_int8 = args.page_type == Attention::Type::kInt8;
  args.keys = is_wide ? static_cast<void*>(keys32.data()) : is_int8 ? static_cast<void*>(keys8.data()) : keys16.data();
  args.values =
      is_wide ? static_cast<void*>(values32.data()) : is_int8 ? static_cast<void*>(values8.data()) : values16.data();
  args.key_scales = is_int8 ? key_scales.data() : nullptr;
  args.value_scales = is_int8 ? value_scales.data() : nullptr;
  args.query_start = query_start.data();
  args.kv_len = kv_len.data();
  args.page_table = table.data();
  args.num_groups = pick(0, 2);
  args.group_slot_start = group_start.data();
  args.group_slot_stop = group_stop.data();
  args.group_page_stop = group_pages.data();
  args.sinks = pick(0, 2) == 0 ? sinks.data() : nullptr;
  args.out = out.data();
  kernels().attention(args, pool);

  // What the step wrote: as near to the new keys and values as the pages' type allows.
  auto stored = [&](bool is_key, int64_t at, int64_t offset, int64_t h) -> double {
    const int64_t index = at * plane + (is_key ? h * args.page_size + offset : offset * args.head_dim + h);
    switch (args.page_type) {
      case Attention::Type::kFloat32: return (is_key ? keys32 : values32)[index];
      case Attention::Type::kBfloat16: return widen((is_key ? keys16 : values16)[index]);
      default: return (is_key ? keys8 : values8)[index] * (is_key ? key_scales : value_scales)[at * args.page_size + offset];
    }
  };
  const double rounding[] = {0, 1.0 / 256, 1.0 / 127};  // of the value; of the largest of its head for int8
  for (int64_t slot = 0; slot < args.num_slots; ++slot) {
    for (int64_t token = query_start[slot]; token < query_start[slot + 1]; ++token) {
      const int64_t position = kv_len[slot] - (query_start[slot + 1] - token);
      const int64_t page = table[slot * args.table_width + position / args.page_size], offset = position % args.page_size;
      for (int64_t head = 0; head < args.num_kv_heads; ++head) {
        const int64_t at = page * args.num_kv_heads + head;
        for (const bool is_key : {true, false}) {
          const float* source = &(is_key ? k : v)[(token * args.num_kv_heads + head) * args.head_dim];
          float largest = 0;
          for (int64_t h = 0; h < args.head_dim; ++h) largest = std::max(largest, std::fabs(source[h]));
          for (int64_t h = 0; h < args.head_dim; ++h) {
            const double got = stored(is_key, at, offset, h);
            const double scale = args.page_type == Attention::Type::kInt8 ? largest : std::fabs(source[h]);
            if (!(std::fabs(got - source[h]) <= rounding[static_cast<int>(args.page_type)] * scale))
              fail("attention, written", number, got, source[h]);
            const int64_t index = at * plane + (is_key ? h * args.page_size + offset : offset * args.head_dim + h);
            (is_key ? true_keys : true_values)[index] = got;
          }
        }
      }
    }
  }
  const double tolerance = 2e-5;
  for (int64_t slot = 0; slot < args.num_slots; ++slot) {
    const int64_t first_token = query_start[slot], count = query_start[slot + 1] - first_token;
    const int64_t held = kv_len[slot] - count;
    for (int64_t token = 0; token < count; ++token) {
      const int64_t position = held + token;
      for (int64_t head = 0; head < args.num_heads; ++head) {
        const int64_t kv_head = head / ratio;
        auto key_of = [&](int64_t j, int64_t h) -> double {
          const int64_t page = table[slot * args.table_width + j / args.page_size];
          return true_keys[(page * args.num_kv_heads + kv_head) * plane + h * args.page_size + j % args.page_size];
        };
        auto value_of = [&](int64_t j, int64_t h) -> double {
          const int64_t page = table[slot * args.table_width + j / args.page_size];
          return true_values[(page * args.num_kv_heads + kv_head) * plane + j % args.page_size * args.head_dim + h];
        };
        std::vector<double> logits;
        std::vector<int64_t> seen;
        std::vector<float> query(&q[((first_token + token) * args.num_heads + head) * args.head_dim],
                                 &q[((first_token + token) * args.num_heads + head + 1) * args.head_dim]);
        bool is_tie = false;  // a query halfway between two whole numbers, which may go to either
        if (is_int8) {        // over int8 pages queries are whole numbers too
          float largest = 0;
          for (float x : query) largest = std::max(largest, std::fabs(x));
          for (float& x : query) {
            const double exact = static_cast<double>(x) * (127.0f / largest);
            is_tie = is_tie || std::fabs(std::fabs(exact - std::trunc(exact)) - 0.5) < 1e-5;
            x = static_cast<float>(std::nearbyint(exact)) * (largest / 127.0f);
          }
        }
        if (is_tie) continue;
        for (int64_t j = 0; j <= position; ++j) {
          if (args.window > 0 && position - j >= args.window) continue;
          if (args.chunk > 0 && position / args.chunk != j / args.chunk) continue;
          double logit = 0;
          for (int64_t h = 0; h < args.head_dim; ++h) logit += query[h] * key_of(j, h);
          logit *= args.scale;
          if (args.soft_cap > 0) logit = args.soft_cap * std::tanh(logit / args.soft_cap);
          logits.push_back(logit);
          seen.push_back(j);
        }
        double top = args.sinks != nullptr ? sinks[head] : -1e300, total = 0;
        for (double logit : logits) top = std::max(top, logit);
        if (args.sinks != nullptr) total += std::exp(sinks[head] - top);
        for (double logit : logits) total += std::exp(logit - top);
        for (int64_t h = 0; h < args.head_dim; ++h) {
          double want = 0, allowed = 0;
          double most = 0, values = 0;  // of a span of 64 keys: its largest weight times scale, the sum of its values
          for (size_t i = 0; i < seen.size(); ++i) {
            const double weight = std::exp(logits[i] - top) / total, value = value_of(seen[i], h);
            want += weight * value;
            if (!is_int8) continue;
            const int64_t page = table[slot * args.table_width + seen[i] / args.page_size];
            const double scale =
                value_scales[(page * args.num_kv_heads + kv_head) * args.page_size + seen[i] % args.page_size];
            most = std::max(most, weight * scale);
            values += std::fabs(value / scale);
            if (i + 1 == seen.size() || seen[i + 1] / 64 != seen[i] / 64) {  // weights are bytes: half of one is lost
              allowed += most / 255 * 0.5 * values;
              most = values = 0;
            }
          }
          allowed += tolerance * (1 + std::fabs(want));
          const double got = out[((first_token + token) * args.num_heads + head) * args.head_dim + h];
          if (!(std::fabs(got - want) <= allowed)) fail("attention", number, got, want);
        }
      }
    }
  }
  for (size_t i = num_queries * args.num_heads * args.head_dim; i < out.size(); ++i)
    if (out[i] != 0) fail("attention, padding", number, out[i], 0);
}

// Greedy rows are the argmax; the others are one of the tokens that the filters leave.
void fuzz_sampling(int64_t number, Pool& pool) {
  Sampling args{};
  args.num_rows = pick(1, 5);
  args.vocab_size = pick(1, 300);
  const std::vector<float> logits = normals(args.num_rows * args.vocab_size);
  std::vector<float> temperature, top_p, min_p;
  std::vector<int32_t> top_k, positions, token_ids(args.num_rows, -1);
  std::vector<uint32_t> keys;
  for (int64_t row = 0; row < args.num_rows; ++row) {
    temperature.push_back(pick(0, 2) == 0 ? 0.0f : 0.1f * static_cast<float>(pick(1, 30)));
    top_k.push_back(static_cast<int32_t>(pick(0, 1) == 0 ? args.vocab_size : pick(1, args.vocab_size)));
    top_p.push_back(pick(0, 1) == 0 ? 1.0f : 0.01f * static_cast<float>(pick(1, 99)));
    min_p.push_back(pick(0, 1) == 0 ? 0.0f : 0.01f * static_cast<float>(pick(1, 99)));
    positions.push_back(static_cast<int32_t>(pick(0, 1000)));
    keys.push_back(random_bits());
    keys.push_back(random_bits());
  }
  args.logits = logits.data();
  args.temperature = temperature.data();
  args.top_k = top_k.data();
  args.top_p = top_p.data();
  args.min_p = min_p.data();
  args.keys = keys.data();
  args.positions = positions.data();
  args.token_ids = token_ids.data();
  kernels().sampling(args, pool);
  for (int64_t row = 0; row < args.num_rows; ++row) {
    const float* of_row = &logits[row * args.vocab_size];
    const int64_t token = token_ids[row];
    if (token < 0 || token >= args.vocab_size) fail("sampling, token", number, token, args.vocab_size);
    const float top = *std::max_element(of_row, of_row + args.vocab_size);
    if (temperature[row] == 0) {
      if (of_row[token] != top) fail("sampling, argmax", number, of_row[token], top);
      continue;
    }
    const int64_t num_above = std::count_if(of_row, of_row + args.vocab_size, [&](float x) { return x > of_row[token]; });
    if (num_above >= top_k[row]) fail("sampling, top_k", number, num_above, top_k[row]);
    const double relative = (of_row[token] - top) / temperature[row];
    if (min_p[row] > 0 && relative < std::log(min_p[row]) - 1e-4) fail("sampling, min_p", number, relative, min_p[row]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: fuzz SEED CASES\n");
    return 2;
  }
  const long long seed = std::atoll(argv[1]), num_cases = std::atoll(argv[2]);
  for (long long number = 0; number < num_cases; ++number) {
    random_bits.seed(static_cast<unsigned>(seed * 1000003 + number));
    ThreadPool pool;
    fuzz_attention(number, pool);
    pool.join();
    fuzz_sampling(number, pool);
    pool.join();
    fuzz_linear(number, pool);
    pool.join();
  }
  std::printf("%s: %lld cases\n", kernels().name, num_cases);
  return 0;
}
