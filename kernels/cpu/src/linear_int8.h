// Products of rows quantised to 8 bits with int8 or int4 panels, for one instruction set; included by linear.h.
//
// Rows of x and of w are cut into groups of 64 inputs with a scale each: y = sum over groups of scale_x * scale_w *
// (sum over the group of x_q * w_q). The inner sums are whole numbers, below 2^24 and so exact in float32 too;
// the outer sum is one chain over the groups in their order. A row's bits depend on nothing else, and neither
// on the instruction that takes the inner sums.
//
// Four inputs make a quad, and in int8 panels a quad of 16 outputs lies as [16][4]. What is multiplied lies in steps of
// 32 bits an output. With VNNI a step is a quad: x is stored as unsigned bytes, 128 added, because the
// instruction multiplies unsigned by signed bytes, and sums start by taking it off. Elsewhere a step is two 16-bit
// numbers, a quad's inputs 0 and 2, then 1 and 3, and a slice is widened for all of the block's rows. (AVX2's product of
// bytes adds in 16 bits, for which weights would have to have 7 bits: somewhat faster, and perplexity rises by
// more than 1 %.)
// int4 panels hold two quads in the bytes of one, the first in the low halves; they are unpacked likewise.

namespace tidemill {
namespace TIDEMILL_ISA {

constexpr int64_t kGroup = 64;      // inputs that share a scale
constexpr int64_t kIntSlice = 512;  // inputs of one slice whose panels are unpacked
#if defined(TIDEMILL_VNNI)
constexpr bool kUsesQuads = true;
TIDEMILL_INLINE vi dot(vi sum, vi x, vi w) { return byte_dot(sum, x, w); }
#elif TIDEMILL_LANES == 16
constexpr bool kUsesQuads = false;
TIDEMILL_INLINE vi dot(vi sum, vi x, vi w) {
  return sum + reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(w)));
}
#elif TIDEMILL_LANES == 8
constexpr bool kUsesQuads = false;
TIDEMILL_INLINE vi dot(vi sum, vi x, vi w) {
  return sum + reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(w)));
}
#else
constexpr bool kUsesQuads = true;
TIDEMILL_INLINE vi dot(vi sum, vi x, vi w) {
#pragma GCC unroll 4
  for (int byte = 0; byte < 4; ++byte) sum += ((x >> (8 * byte)) & splat_int(0xff)) * ((w << (24 - 8 * byte)) >> 24);
  return sum;
}
#endif

constexpr int64_t kQuadSteps = kUsesQuads ? 1 : 2;
constexpr int64_t kGroupSteps = kGroup / 4 * kQuadSteps;
// Inputs of one slice whose panels are read as they lie: see kFloatSlice.
constexpr int64_t kPackedSlice = kLanes == 16 ? 2048 : kIntSlice;
constexpr int64_t kIntRowBytes = kUsesQuads ? 1 : 2;  // of a quantised row, for each input
constexpr int64_t kSliceSteps = kIntSlice / 4 * kQuadSteps;

typedef int16_t vs __attribute__((vector_size(4 * TIDEMILL_LANES), aligned(4)));

TIDEMILL_INLINE vs as_short(vi x) { return reinterpret_cast<vs>(x); }

// What is made of a slice of panels.
struct IntMemory {
  alignas(64) int32_t panels[kPanelsAtOnce][kSliceSteps * kPanel];  // as steps
  alignas(64) int32_t start[kPanelsAtOnce][kPackedSlice / kGroup * kPanel];  // what a group's sums begin with
};

struct IntSlice {
  const int32_t* panels[kPanelsAtOnce];  // [steps, 16] each
  const int32_t* start[kPanelsAtOnce];   // [groups, 16] each
  const float* scales[kPanelsAtOnce];    // [groups, 16] each
  const char* ahead[kPanelsAtOnce];      // what is worked on next, `ahead_stride` bytes a step
  int64_t ahead_stride;
  int64_t num_groups;
};

// A quad of some outputs, from its inputs 0 and 2, and 1 and 3, as 16-bit numbers.
TIDEMILL_INLINE void store_quad(int32_t* step, vs even, vs odd) {
  if (kUsesQuads) {
    store_int(step, (reinterpret_cast<vi>(even) & splat_int(0x00ff00ff)) | reinterpret_cast<vi>(odd << 8));
  } else {
    store_int(step, reinterpret_cast<vi>(even));
    store_int(step + kPanel, reinterpret_cast<vi>(odd));
  }
}

TIDEMILL_INLINE void unpack_int8(const int8_t* weights, int64_t num_quads, int32_t* target) {
  for (int64_t quad = 0; quad < num_quads; ++quad)
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const vs both = as_short(load_int(weights + (quad * kPanel + lane) * 4));
      store_quad(target + quad * kQuadSteps * kPanel + lane, (both << 8) >> 8, both >> 8);
    }
}

TIDEMILL_INLINE void unpack_int4(const int8_t* weights, int64_t num_quads, int32_t* target) {
  for (int64_t quad = 0; quad < num_quads; quad += 2)
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const vs both = as_short(load_int(weights + (quad / 2 * kPanel + lane) * 4));
      int32_t* first = target + quad * kQuadSteps * kPanel + lane;
      store_quad(first, (both << 12) >> 12, (both << 4) >> 12);
      store_quad(first + kQuadSteps * kPanel, (both << 8) >> 12, both >> 12);
    }
}

// What a group's sums begin with, for 16 outputs: with quads, -128 * w summed.
TIDEMILL_INLINE void offsets(const int32_t* panel, int64_t num_groups, int32_t* start) {
  for (int64_t group = 0; group < num_groups; ++group)
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      vi total = vi{};
      for (int64_t step = 0; kUsesQuads && step < kGroupSteps; ++step)
        total = dot(total, splat_int(0x01010101), load_int(panel + (group * kGroupSteps + step) * kPanel + lane));
      store_int(start + group * kPanel + lane, total * splat_int(-128));
    }
}

// results[r][16 of each panel] += sum over groups of scales[r][group] * (x_q . w_q within the group).
template <int Rows, bool HasAhead>
void int_tile(const int32_t* x, const float* scales, const IntSlice& slice, float* const* results) {
  const int32_t* panels[kPanelsAtOnce];
  const char* ahead[kPanelsAtOnce];
  for (int p = 0; p < kPanelsAtOnce; ++p) {
    panels[p] = slice.panels[p];
    ahead[p] = slice.ahead[p];
  }
  for (int64_t group = 0; group < slice.num_groups; ++group) {
    vi acc[Rows][kAcross];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kAcross; ++c)
        acc[r][c] = kUsesQuads ? load_int(slice.start[c / kVectors] + group * kPanel + c % kVectors * kLanes) : vi{};
    for (int64_t step = 0; step < kGroupSteps; ++step) {
      vi column[kAcross];
#pragma GCC unroll 4
      for (int c = 0; c < kAcross; ++c) column[c] = load_int(panels[c / kVectors] + c % kVectors * kLanes);
#pragma GCC unroll 2
      for (int p = 0; p < kPanelsAtOnce; ++p) {
        panels[p] += kPanel;
        if (HasAhead) {
          __builtin_prefetch(ahead[p], 0, 2);
          ahead[p] += slice.ahead_stride;
        }
      }
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
        const vi factor = splat_int(x[r]);
#pragma GCC unroll 4
        for (int c = 0; c < kAcross; ++c) acc[r][c] = dot(acc[r][c], factor, column[c]);
      }
      x += kTileRows;
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const vf scale = splat(scales[group * kTileRows + r]);
#pragma GCC unroll 4
      for (int c = 0; c < kAcross; ++c) {
        float* result = results[c / kVectors] + r * kPanel + c % kVectors * kLanes;
        const vf exact = __builtin_convertvector(acc[r][c], vf);
        const vf weight_scale = load(slice.scales[c / kVectors] + group * kPanel + c % kVectors * kLanes);
        store(result, fma(exact * weight_scale, scale, load(result)));
      }
    }
  }
}

template <int Rows>
void int_rest(int64_t rows, const int32_t* x, const float* scales, const IntSlice& slice, float* const* results) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      int_tile<Rows, true>(x, scales, slice, results);
    else
      int_rest<Rows - 1>(rows, x, scales, slice, results);
  }
}

// The scale of a group of x, from `values` [64], and what brings these to whole numbers.
TIDEMILL_INLINE float group_scale(const float* values, vf& inverse) {
  vf largest = vf{};
  for (int64_t k = 0; k < kGroup; k += kLanes)
    largest = maximum(as_float(as_int(load(values + k)) & splat_int(0x7fffffff)), largest);
  const float limit = highest(largest);
  inverse = splat(limit > 0 ? 127.0f / limit : 0.0f);
  return limit / 127.0f;
}

// Rows of x, quantised, a tile's rows side by side: [tiles, steps, rows of a tile] and [tiles, groups, rows of a tile].
struct IntRows {
  int32_t* steps;
  float* scales;
  int64_t num_groups;

  IntRows(const Linear& args) : num_groups((args.in_dim + kGroup - 1) / kGroup) {
    steps = static_cast<int32_t*>(args.scratch);
    scales = reinterpret_cast<float*>(steps + place(args.max_rows + kTileRows - 1, 0) * kGroupSteps);
  }

  // Where a row's numbers of a group begin, in groups of the tile's rows; `row` in rows.
  int64_t place(int64_t row, int64_t group) const {
    return (row / kTileRows * num_groups + group) * kTileRows;
  }

  // One group of a row, from `values` [64].
  TIDEMILL_INLINE void quantise(int64_t row, int64_t group, const float* values) const {
    vf inverse;
    scales[place(row, group) + row % kTileRows] = group_scale(values, inverse);
    int32_t* target = steps + place(row, group) * kGroupSteps + row % kTileRows;
    if (kUsesQuads) {
      alignas(64) uint8_t bytes[kGroup];
      for (int64_t k = 0; k < kGroup; k += kLanes) {
        const auto narrow = __builtin_convertvector(nearest(load(values + k), inverse) + splat_int(128), vb);
        std::memcpy(bytes + k, &narrow, kLanes);
      }
      for (int64_t quad = 0; quad < kGroup / 4; ++quad)
        std::memcpy(target + quad * kTileRows, bytes + 4 * quad, sizeof(int32_t));
    } else {
      alignas(64) int32_t whole[kGroup];
      for (int64_t k = 0; k < kGroup; k += kLanes)
        store_int(whole + k, nearest(load(values + k), inverse));
      for (int64_t quad = 0; quad < kGroup / 4; ++quad) {
        const int32_t* q = whole + 4 * quad;
        int32_t* step = target + quad * kQuadSteps * kTileRows;
        step[0] = static_cast<int32_t>((q[0] & 0xffff) | static_cast<uint32_t>(q[2]) << 16);
        step[kTileRows] = static_cast<int32_t>((q[1] & 0xffff) | static_cast<uint32_t>(q[3]) << 16);
      }
    }
  }
};

// The rows [first_row, first_row + num_rows) against one pair of panels.
TIDEMILL_INLINE void int_pair(const Linear& args, const IntRows& x, int64_t first_row, int64_t num_rows, int64_t pair,
                              float (*results)[kMaxBlockRows * kPanel], IntMemory& memory, Tiles&) {
  const bool is_int4 = args.format == Linear::Format::kInt4;
  const int64_t in_dim = x.num_groups * kGroup;
  const int64_t slice_len = kUsesQuads && !is_int4 ? kPackedSlice : kIntSlice;
  const int64_t panel_bytes = in_dim * kPanel / (is_int4 ? 2 : 1);
  const int8_t* weights = static_cast<const int8_t*>(args.weights);
  // From zero, and not by a branch for the first group: a product that is added behind a branch may be rounded twice.
  for (int p = 0; p < 2; ++p) std::fill(results[p], results[p] + num_rows * kPanel, 0.0f);
  for (int first = 0; first < 2; first += kPanelsAtOnce) {
    for (int64_t begin = 0; begin < in_dim; begin += slice_len) {
      const int64_t count = std::min(slice_len, in_dim - begin);
      IntSlice slice;
      slice.num_groups = count / kGroup;
      slice.ahead_stride = count * panel_bytes / in_dim / (slice.num_groups * kGroupSteps);
      const bool is_last = begin + count == in_dim;
      float* target[kPanelsAtOnce];
      for (int p = 0; p < kPanelsAtOnce; ++p) {
        const int64_t panel = pair * 2 + first + p;
        const int8_t* at = weights + panel * panel_bytes + begin * panel_bytes / in_dim;
        target[p] = results[first + p];
        slice.panels[p] = memory.panels[p];
        if (is_int4)
          unpack_int4(at, count / 4, memory.panels[p]);
        else if (kUsesQuads)
          slice.panels[p] = reinterpret_cast<const int32_t*>(at);
        else
          unpack_int8(at, count / 4, memory.panels[p]);
        offsets(slice.panels[p], slice.num_groups, memory.start[p]);
        slice.start[p] = memory.start[p];
        slice.scales[p] = args.scales + (panel * in_dim + begin) / kGroup * kPanel;
        slice.ahead[p] = reinterpret_cast<const char*>(at) + count * panel_bytes / in_dim +
                         (is_last ? (kPanelsAtOnce - 1) * panel_bytes : 0);
      }
      for (int64_t row = 0; row < num_rows; row += kTileRows) {
        const int64_t place = x.place(first_row + row, begin / kGroup);
        const int32_t* steps = x.steps + place * kGroupSteps;
        const float* scales = x.scales + place;
        if (num_rows - row < kTileRows)
          int_rest<kTileRows - 1>(num_rows - row, steps, scales, slice, target);
        else if (row == 0)
          int_tile<kTileRows, true>(steps, scales, slice, target);
        else
          int_tile<kTileRows, false>(steps, scales, slice, target);
        for (int p = 0; p < kPanelsAtOnce; ++p) target[p] += kTileRows * kPanel;
      }
    }
  }
}

}  // namespace TIDEMILL_ISA
}  // namespace tidemill
