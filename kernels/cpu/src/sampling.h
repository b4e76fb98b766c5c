// Draws a token a row of logits: see kernels/sampling/api.py for what it computes. A row is worked on by one thread
// while it lies in that thread's cache, and nothing of it depends on another row.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace tidemill {
namespace TIDEMILL_ISA {

typedef uint32_t vu __attribute__((vector_size(4 * TIDEMILL_LANES), aligned(4)));

TIDEMILL_INLINE vu splat_bits(uint32_t x) { return x - vu{}; }

// The natural logarithm of a positive, normal x, to about one unit in the last place (Cephes, Moshier 1989).
TIDEMILL_INLINE vf logarithm(vf x) {
  const vi bits = as_int(x);
  vf e = __builtin_convertvector((bits >> 23) - splat_int(126), vf);
  vf m = as_float((bits & splat_int(0x007fffff)) | splat_int(0x3f000000));  // in [0.5, 1)
  const vi is_small = m < splat(0.707106781186547524f);
  e = is_small ? e - splat(1.0f) : e;
  m = is_small ? m + m - splat(1.0f) : m - splat(1.0f);
  const vf z = m * m;
  vf p = splat(7.0376836292e-2f);
  p = fma(p, m, splat(-1.1514610310e-1f));
  p = fma(p, m, splat(1.1676998740e-1f));
  p = fma(p, m, splat(-1.2420140846e-1f));
  p = fma(p, m, splat(1.4249322787e-1f));
  p = fma(p, m, splat(-1.6668057665e-1f));
  p = fma(p, m, splat(2.0000714765e-1f));
  p = fma(p, m, splat(-2.4999993993e-1f));
  p = fma(p, m, splat(3.3333331174e-1f));
  vf y = p * m * z;
  y = fma(e, splat(-2.12194440e-4f), y);
  y = fma(z, splat(-0.5f), y);
  return fma(e, splat(0.693359375f), m + y);
}

TIDEMILL_INLINE vu rotated(vu x, int by) {
  return (x << by) | (x >> (32 - by));
}

// Threefry-2x32 with 20 rounds (Salmon et al. 2011): the generator of jax.random's default keys.
TIDEMILL_INLINE void threefry(uint32_t key0, uint32_t key1, vu& x0, vu& x1) {
  const uint32_t keys[3] = {key0, key1, key0 ^ key1 ^ 0x1BD11BDAu};
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  x0 = x0 + keys[0];
  x1 = x1 + keys[1];
#pragma GCC unroll 5
  for (int block = 0; block < 5; ++block) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x0 = x0 + x1;
      x1 = rotated(x1, kRotations[block % 2][i]) ^ x0;
    }
    x0 = x0 + keys[(block + 1) % 3];
    x1 = x1 + (keys[(block + 2) % 3] + static_cast<uint32_t>(block + 1));
  }
}

// Standard Gumbel noise of the tokens `index`, as jax.random.gumbel(key, (V,)) has it.
TIDEMILL_INLINE vf gumbel(uint32_t key0, uint32_t key1, vu index) {
  vu high = vu{};
  threefry(key0, key1, high, index);
  const vu mantissa = ((high ^ index) >> 9) | splat_bits(0x3f800000u);
  const vf tiny = splat(std::numeric_limits<float>::min());
  const vf uniform = maximum(reinterpret_cast<vf>(mantissa) - splat(1.0f), tiny);
  return -logarithm(maximum(-logarithm(uniform), tiny));
}

constexpr float kMostNoise = 16.64f;  // above the noise of the largest uniform number below 1

constexpr int64_t kBlock = 4 * kLanes;  // logits whose highest is kept

// One row: V logits, padded here to whole blocks with what can never be drawn.
class Row {
 public:
  Row(const float* logits, int64_t vocab_size) : logits_(logits), size_(vocab_size) {}

  // The first of the highest logits.
  int32_t argmax() const {
    vf best = splat(-std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + 4 * kLanes <= size_; i += 4 * kLanes) {
      const vf low = maximum(load(logits_ + i), load(logits_ + i + kLanes));
      const vf high = maximum(load(logits_ + i + 2 * kLanes), load(logits_ + i + 3 * kLanes));
      best = maximum(maximum(low, high), best);
    }
    float top = highest(best);
    for (; i < size_; ++i) top = std::max(top, logits_[i]);
    for (i = 0; i + kLanes <= size_; i += kLanes) {
      const vi is_top = load(logits_ + i) >= splat(top);
      if (any(is_top)) break;
    }
    while (i < size_ && !(logits_[i] >= top)) ++i;
    return static_cast<int32_t>(i < size_ ? i : 0);
  }

  int32_t draw(float temperature, int64_t top_k, float top_p, float min_p, uint32_t key0, uint32_t key1,
               int32_t position, int32_t likeliest) {
    scale(temperature, likeliest);
    float floor = min_p > 0 ? std::log(min_p) : -std::numeric_limits<float>::infinity();
    if (top_k < size_) floor = kth_largest(top_k, floor);
    if (top_p < 1) floor = nucleus(top_p, floor);
    vu high = vu{}, low = splat_bits(static_cast<uint32_t>(position));
    threefry(key0, key1, high, low);
    return noisiest(floor, high[0], low[0], likeliest);
  }

 private:
  // Logits relative to the highest, over the temperature: so none is above 0. And the highest of each block of them,
  // by which blocks without a candidate are passed over.
  void scale(float temperature, int32_t likeliest) {
    const int64_t padded = (size_ + kBlock - 1) / kBlock * kBlock;
    scaled_.resize(padded);
    tops_.resize(padded / kBlock);
    const float top = logits_[likeliest];
    int64_t i = 0;
    for (; i + kLanes <= size_; i += kLanes)
      store(scaled_.data() + i, (load(logits_ + i) - splat(top)) / splat(temperature));
    for (; i < size_; ++i) scaled_[i] = (logits_[i] - top) / temperature;
    for (; i < padded; ++i) scaled_[i] = -std::numeric_limits<float>::infinity();
    for (size_t block = 0; block < tops_.size(); ++block) {
      const float* at = scaled_.data() + block * kBlock;
      const float highest_here = highest(maximum(maximum(load(at), load(at + kLanes)),
                                                 maximum(load(at + 2 * kLanes), load(at + 3 * kLanes))));
      // A NaN, which no model should give, is no candidate, and would put a sort out of its bounds.
      tops_[block] = highest_here == highest_here ? highest_here : -std::numeric_limits<float>::infinity();
    }
  }

  // Calls `visit` with the place of each vector of the blocks that hold a value of at least `cut`.
  template <typename Visit>
  void each_vector(float cut, const Visit& visit) const {
    for (size_t block = 0; block < tops_.size(); ++block) {
      if (!(tops_[block] >= cut)) continue;
      for (int64_t at = 0; at < kBlock; at += kLanes) visit(block * kBlock + at);
    }
  }

  // The candidates of at least `cut`, unordered.
  void gather(float cut) {
    if (chosen_.size() < scaled_.size()) chosen_.resize(scaled_.size());
    size_t count = 0;
    each_vector(cut, [&](size_t i) {
      if (!any(load(scaled_.data() + i) >= splat(cut))) return;
      for (int lane = 0; lane < kLanes; ++lane) {  // written always, kept if it counts: no branch to mispredict
        chosen_[count] = scaled_[i + lane];
        count += scaled_[i + lane] >= cut;
      }
    });
    num_chosen_ = count;
  }

  // The k-th largest value of at least `floor`; `floor` itself where there are fewer. It is at least the k-th largest of
  // the blocks' highest values; for a large k a net is cast ever lower until it holds enough.
  float kth_largest(int64_t k, float floor) {
    float first = -3.0f;
    if (2 * k <= static_cast<int64_t>(tops_.size())) {
      ranked_ = tops_;
      std::nth_element(ranked_.begin(), ranked_.begin() + (k - 1), ranked_.end(), std::greater<float>());
      first = ranked_[k - 1];
    }
    for (float cut = first;; cut *= 2.0f) {
      const bool is_last = cut <= floor || cut < -1e30f;
      gather(is_last ? floor : cut);
      if (static_cast<int64_t>(num_chosen_) >= k) {
        const auto end = chosen_.begin() + num_chosen_;
        std::nth_element(chosen_.begin(), chosen_.begin() + (k - 1), end, std::greater<float>());
        return chosen_[k - 1];
      }
      if (is_last) return floor;
    }
  }

  // The largest value such that the tokens of at least it have `top_p` of the mass of those of at least `floor`.
  float nucleus(float top_p, float floor) {
    vf mass = vf{};
    each_vector(floor, [&](size_t i) {
      const vf value = load(scaled_.data() + i);
      mass = mass + (value >= splat(floor) ? exponential(value) : vf{});
    });
    const float wanted = top_p * sum(mass);
    for (float cut = -3.0f;; cut *= 2.0f) {
      const bool is_last = cut <= floor || cut < -1e30f;
      gather(is_last ? floor : cut);
      std::sort(chosen_.begin(), chosen_.begin() + num_chosen_, std::greater<float>());
      float held = 0;
      for (size_t i = 0; i < num_chosen_; ++i) {
        held += exponential(splat(chosen_[i]))[0];
        if (held >= wanted) return chosen_[i];
      }
      if (is_last) return num_chosen_ == 0 ? floor : chosen_[num_chosen_ - 1];
    }
  }

  // The first token whose scaled logit plus noise is highest, of those of at least `floor`. Noise is made only where it
  // could still win.
  int32_t noisiest(float floor, uint32_t key0, uint32_t key1, int32_t likeliest) const {
    const vu start = reinterpret_cast<vu>(lane_numbers());
    const vf at_top = gumbel(key0, key1, start + splat_bits(static_cast<uint32_t>(likeliest)));
    float best = at_top[0];  // the likeliest token's own scaled logit is 0
    int32_t winner = likeliest;
    each_vector(std::max(floor, best - kMostNoise), [&](size_t i) {
      const vf value = load(scaled_.data() + i);
      if (!any(value >= splat(std::max(floor, best - kMostNoise)))) return;
      const vf noisy = value + gumbel(key0, key1, start + splat_bits(static_cast<uint32_t>(i)));
      if (!any(noisy >= splat(best))) return;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int32_t token = static_cast<int32_t>(i) + lane;
        if (!(value[lane] >= floor) || !(noisy[lane] >= best)) continue;
        if (noisy[lane] > best || token < winner) {
          best = noisy[lane];
          winner = token;
        }
      }
    });
    return winner;
  }

  const float* logits_;
  int64_t size_;
  size_t num_chosen_ = 0;  // at the front of `chosen_`, which stays as large as a row
  static thread_local std::vector<float> scaled_;
  static thread_local std::vector<float> tops_;
  static thread_local std::vector<float> ranked_;
  static thread_local std::vector<float> chosen_;
};

thread_local std::vector<float> Row::scaled_;
thread_local std::vector<float> Row::tops_;
thread_local std::vector<float> Row::ranked_;
thread_local std::vector<float> Row::chosen_;

void sampling(const Sampling& args, Pool& pool) {
  parallel_for(pool, args.num_rows, [&](int64_t index) {
    Row row(args.logits + index * args.vocab_size, args.vocab_size);
    int32_t token = row.argmax();
    if (args.temperature[index] > 0)
      token = row.draw(args.temperature[index], args.top_k[index], args.top_p[index], args.min_p[index],
                       args.keys[2 * index], args.keys[2 * index + 1], args.positions[index], token);
    args.token_ids[index] = token;
  });
}

}  // namespace TIDEMILL_ISA
}  // namespace tidemill
