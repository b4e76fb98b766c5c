// Products of bfloat16 rows with bfloat16 panels, and of rows quantised to 8 bits with int8 or int4 panels, by tiles
// (tiles.h); included by linear.h. A tile of weights is 16 lines of a panel as they lie: 32 inputs of 16 outputs in
// bfloat16, a group's 64 in int8.
//
// A row's results are one chain of tile products over the inputs in their order, so its bits do not depend on the number
// of rows or its place. Those of quantised rows are the bits of linear_int8.h: the sums of a group are
// whole numbers, and what is done with them is the same.

namespace tidemill {
namespace TIDEMILL_ISA {

constexpr int64_t kTiledRows = 2 * kTileHeight;  // of a block, worked on together
// Inputs of a slice: that of a pair of panels, 40 KiB, stays in the first-level cache (48 KiB on all CPUs with AMX) while
// the block's rows go by.
constexpr int64_t kTiledSlice = 640;
constexpr int64_t kTileInputs = kTileBytes / 2;  // bfloat16 inputs of a tile
static_assert(kTileInputs == kPairedInputs && kTileBytes == kGroup, "panels are filled up to whole tiles");

// Rows of a block, at most 32, against a slice of a pair of panels; the same slice `ahead` values on is fetched, if not 0.
template <bool HasBottom>
TIDEMILL_INLINE void tile_of_pairs(Tiles& tiles, const float* x, int64_t row_stride, const uint16_t* const* panels,
                                   int64_t count, int64_t ahead, bool is_first, float* const* results) {
  constexpr int64_t kResultBytes = kPanel * sizeof(float), kBottom = kTileHeight * kPanel;
  if (is_first) {
    tiles.template zero<0>();
    tiles.template zero<1>();
    if (HasBottom) tiles.template zero<2>();
    if (HasBottom) tiles.template zero<3>();
  } else {
    tiles.template load<0>(results[0], kResultBytes);
    tiles.template load<1>(results[1], kResultBytes);
    if (HasBottom) tiles.template load<2>(results[0] + kBottom, kResultBytes);
    if (HasBottom) tiles.template load<3>(results[1] + kBottom, kResultBytes);
  }
  const int64_t stride = row_stride * 4;
  for (int64_t k = 0; k < count; k += kTileInputs) {
    tiles.template load<4>(x + k / 2, stride);
    tiles.template load<6>(panels[0] + k * kPanel, kTileBytes);
    tiles.template load<7>(panels[1] + k * kPanel, kTileBytes);
    tiles.template add_pairs<0, 4, 6>();
    tiles.template add_pairs<1, 4, 7>();
    if (HasBottom) {
      tiles.template load<5>(x + kTileHeight * row_stride + k / 2, stride);
      tiles.template add_pairs<2, 5, 6>();
      tiles.template add_pairs<3, 5, 7>();
    }
    if (ahead != 0)  // the same of the next pair of panels
      for (int p = 0; p < 2; ++p)
        for (int line = 0; line < kTileHeight; ++line)
          __builtin_prefetch(reinterpret_cast<const char*>(panels[p] + k * kPanel + ahead) + line * kLine, 0, 2);
  }
  tiles.template save<0>(results[0], kResultBytes);
  tiles.template save<1>(results[1], kResultBytes);
  if (HasBottom) tiles.template save<2>(results[0] + kBottom, kResultBytes);
  if (HasBottom) tiles.template save<3>(results[1] + kBottom, kResultBytes);
}

// All the rows of a block, pairs of bfloat16, against one pair of panels; `row_stride` in 32 bits.
TIDEMILL_INLINE void pair_by_tiles(const Linear& args, const float* x, int64_t row_stride, int64_t num_rows,
                                   int64_t pair, float (*results)[kMaxBlockRows * kPanel], Tiles& tiles) {
  const int64_t in_dim = paired_dim(args.in_dim), num_slices = (in_dim + kTiledSlice - 1) / kTiledSlice;
  const int64_t slice_len = paired_dim((in_dim + num_slices - 1) / num_slices);
  const int64_t panel_len = in_dim * kPanel;
  const uint16_t* weights = static_cast<const uint16_t*>(args.weights) + 2 * pair * panel_len;
  for (int64_t begin = 0; begin < in_dim; begin += slice_len) {
    const int64_t count = std::min(slice_len, in_dim - begin);
    const uint16_t* panels[] = {weights + begin * kPanel, weights + panel_len + begin * kPanel};
    for (int64_t row = 0; row < num_rows; row += kTiledRows) {
      const int rows = static_cast<int>(std::min(kTiledRows, num_rows - row));
      const float* first = x + row * row_stride + begin / 2;
      float* targets[] = {results[0] + row * kPanel, results[1] + row * kPanel};
      const int64_t ahead = row == 0 ? 2 * panel_len : 0;
      tiles.shape(std::min(rows, kTileHeight), std::max(rows - kTileHeight, 0));
      if (rows > kTileHeight)
        tile_of_pairs<true>(tiles, first, row_stride, panels, count, ahead, begin == 0, targets);
      else
        tile_of_pairs<false>(tiles, first, row_stride, panels, count, ahead, begin == 0, targets);
    }
  }
}

// Rows of x, quantised: [rows, groups, 64], and their scales, those of a tile's rows side by side: [tiles, groups, 16].
struct TiledIntRows {
  int8_t* bytes;
  float* scales;
  int64_t num_groups;

  TiledIntRows(const Linear& args) : num_groups((args.in_dim + kGroup - 1) / kGroup) {
    bytes = static_cast<int8_t*>(args.scratch);
    scales = reinterpret_cast<float*>(bytes + args.max_rows * num_groups * kGroup);
  }

  // Of a tile's rows, from `group` on.
  TIDEMILL_INLINE float* scales_at(int64_t row, int64_t group) const {
    return scales + (row / kTileHeight * num_groups + group) * kTileHeight;
  }

  // One group of a row, from `values` [64].
  TIDEMILL_INLINE void quantise(int64_t row, int64_t group, const float* values) const {
    vf inverse;
    scales_at(row, group)[row % kTileHeight] = group_scale(values, inverse);
    int8_t* target = bytes + (row * num_groups + group) * kGroup;
    for (int64_t k = 0; k < kGroup; k += kLanes) {
      const auto narrow = __builtin_convertvector(nearest(load(values + k), inverse), vb);
      std::memcpy(target + k, &narrow, kLanes);
    }
  }
};

// A group is one tile product; as many are on their way at once as there are tiles to add to.
constexpr int64_t kGroupsAtOnce = 4;

struct TiledIntMemory {
  alignas(64) int32_t panel[kIntSlice / 4 * kPanel];  // of an int4 panel, a slice, as quads
  alignas(64) int32_t sums[2][kGroupsAtOnce][kTileHeight * kPanel];
};

// The groups [first, first + 4), as far as there are so many, of 16 rows of x and a panel.
TIDEMILL_INLINE void sum_groups(Tiles& tiles, const int8_t* x, int64_t row_bytes, const int8_t* panel, int64_t first,
                                int64_t num_groups, int32_t (*sums)[kTileHeight * kPanel]) {
  const auto multiply = [&](auto index) __attribute__((always_inline)) {
    constexpr int kSum = decltype(index)::value, kRows = 4 + kSum % 2, kWeights = 6 + kSum % 2;
    const int64_t group = first + kSum;
    if (group >= num_groups) return;
    tiles.template zero<kSum>();
    tiles.template load<kRows>(x + group * kGroup, row_bytes);
    tiles.template load<kWeights>(panel + group * kGroup * kPanel, kTileBytes);
    tiles.template add_bytes<kSum, kRows, kWeights>();
  };
  multiply(std::integral_constant<int, 0>{});
  multiply(std::integral_constant<int, 1>{});
  multiply(std::integral_constant<int, 2>{});
  multiply(std::integral_constant<int, 3>{});
  tiles.template save<0>(sums[0], kTileBytes);
  tiles.template save<1>(sums[1], kTileBytes);
  tiles.template save<2>(sums[2], kTileBytes);
  tiles.template save<3>(sums[3], kTileBytes);
}

// 16 rows of x against a slice of one panel; what rows beyond the last come to is not looked at.
TIDEMILL_INLINE void tile_of_bytes(Tiles& tiles, const int8_t* x, int64_t row_bytes, const float* scales,
                                   const int8_t* panel, const float* panel_scales, int64_t num_groups, float* results,
                                   TiledIntMemory& memory) {
  vf acc[kTileHeight][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kTileHeight; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) acc[r][c] = load(results + r * kPanel + c * kLanes);
  sum_groups(tiles, x, row_bytes, panel, 0, num_groups, memory.sums[0]);
  for (int64_t first = 0, turn = 0; first < num_groups; first += kGroupsAtOnce, turn ^= 1) {
    // The next ones are multiplied while these are scaled.
    const int64_t next = first + kGroupsAtOnce;
    if (next < num_groups) sum_groups(tiles, x, row_bytes, panel, next, num_groups, memory.sums[turn ^ 1]);
    for (int64_t group = first; group < std::min(next, num_groups); ++group) {
      const int32_t* sums = memory.sums[turn][group - first];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        const vf panel_scale = load(panel_scales + group * kPanel + c * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kTileHeight; ++r) {
          const vf exact = __builtin_convertvector(load_int(sums + r * kPanel + c * kLanes), vf);
          acc[r][c] = fma(exact * panel_scale, splat(scales[group * kTileHeight + r]), acc[r][c]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileHeight; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) store(results + r * kPanel + c * kLanes, acc[r][c]);
}

// The rows [first_row, first_row + num_rows) against one pair of panels.
TIDEMILL_INLINE void int_pair(const Linear& args, const TiledIntRows& x, int64_t first_row, int64_t num_rows, int64_t pair,
                              float (*results)[kMaxBlockRows * kPanel], TiledIntMemory& memory, Tiles& tiles) {
  const bool is_int4 = args.format == Linear::Format::kInt4;
  const int64_t row_bytes = x.num_groups * kGroup, slice_len = is_int4 ? kIntSlice : row_bytes;
  const int64_t panel_bytes = row_bytes * kPanel / (is_int4 ? 2 : 1);
  for (int p = 0; p < 2; ++p) {
    const int64_t panel = pair * 2 + p;
    std::fill(results[p], results[p] + (num_rows + kTileHeight - 1) / kTileHeight * kTileHeight * kPanel, 0.0f);
    for (int64_t begin = 0; begin < row_bytes; begin += slice_len) {
      const int64_t count = std::min(slice_len, row_bytes - begin);
      const int8_t* weights = static_cast<const int8_t*>(args.weights) + panel * panel_bytes;
      if (is_int4) {
        unpack_int4(weights + begin * kPanel / 2, count / 4, memory.panel);
        weights = reinterpret_cast<const int8_t*>(memory.panel);
      }
      const float* panel_scales = args.scales + (panel * x.num_groups + begin / kGroup) * kPanel;
      for (int64_t row = 0; row < num_rows; row += kTileHeight) {
        const int rows = static_cast<int>(std::min<int64_t>(kTileHeight, num_rows - row));
        tiles.shape(rows, rows);
        tile_of_bytes(tiles, x.bytes + (first_row + row) * row_bytes + begin, row_bytes,
                      x.scales_at(first_row + row, begin / kGroup), weights, panel_scales, count / kGroup,
                      results[p] + row * kPanel, memory);
      }
    }
  }
}

}  // namespace TIDEMILL_ISA
}  // namespace tidemill
