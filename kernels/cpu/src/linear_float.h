// Products of float32 or bfloat16 rows with float32 or bfloat16 panels, for one instruction set; included by linear.h.
//
// Each result is one chain of multiply-adds over the inputs in their order, so a row's bits do not depend on the
// number of rows, its tile, its block or its thread. What is multiplied lies in steps of 32 bits an output: one input in
// float32, or two in bfloat16. Where the CPU multiplies and adds pairs of bfloat16, such rows meet such panels as they
// lie; else the panels are widened, a slice for all of the block's rows.

namespace tidemill {
namespace TIDEMILL_ISA {

constexpr int kPanel = 16;  // outputs of one panel
constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int kVectors = kPanel / kLanes;
// With 16 lanes there are 32 registers: two panels at once then give each loaded value of x two uses.
constexpr int kPanelsAtOnce = kLanes == 16 ? 2 : 1;
constexpr int kAcross = kPanelsAtOnce * kVectors;
constexpr int kTileRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 2;
constexpr int64_t kMaxBlockRows = 132;  // a multiple of every kTileRows
// Inputs of one slice. With 32 registers a tile asks for 128 bytes of the panels in 12 cycles, which the second-level
// cache gives, so results need not be put aside; else 16 KiB of the panels stay in the first-level cache.
constexpr int64_t kFloatSlice = kLanes == 16 ? 2048 : 256 / kPanelsAtOnce;
constexpr int64_t kNarrowSlice = 256 / kPanelsAtOnce;  // of bfloat16 panels, which are widened
static_assert(kMaxBlockRows % kTileRows == 0, "whole tiles");
constexpr int64_t kPairedInputs = 32;  // bfloat16 panels are filled up to a multiple of it

TIDEMILL_INLINE int64_t paired_dim(int64_t in_dim) { return (in_dim + kPairedInputs - 1) / kPairedInputs * kPairedInputs; }

// A slice of bfloat16 panels, widened.
struct FloatMemory {
  alignas(64) float panels[kPanelsAtOnce][kNarrowSlice * kPanel];
};

// One slice of the panels that are worked on together.
struct FloatSlice {
  const float* panels[kPanelsAtOnce];  // [count, 16] each; of pairs their bits
  const void* ahead[kPanelsAtOnce];    // what is worked on next, to be fetched meanwhile
  int64_t count;                       // steps
  bool is_first;
};

// results[r][16 of each panel] (+)= sum over k of x[r][k] * panel[k][16]; with `IsPairs` a k is a pair of inputs.
//
// `Ahead` lines of what is worked on next are fetched with every four steps, from each panel's `ahead` on.
//
// Three rows share a pointer, and the steps go by fours: a pointer a row would be more than there are registers. Where
// slices are short, the same slice of the rows that come `Rows` further down is fetched from the second-level cache
// meanwhile: too short a stretch for the hardware to foresee.
template <int Rows, int Ahead, bool IsPairs>
void float_tile(const float* x, int64_t row_stride, const FloatSlice& slice, float* const* results) {
  constexpr int kSharing = 3, kPointers = (Rows + kSharing - 1) / kSharing;
  const float* rows[kPointers];
#pragma GCC unroll 4
  for (int i = 0; i < kPointers; ++i) rows[i] = x + i * kSharing * row_stride;
  const float* panels[kPanelsAtOnce];
  const char* ahead[kPanelsAtOnce];
  for (int p = 0; p < kPanelsAtOnce; ++p) {
    panels[p] = slice.panels[p];
    ahead[p] = static_cast<const char*>(slice.ahead[p]);
  }
  vf acc[Rows][kAcross];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kAcross; ++c)
      acc[r][c] = slice.is_first ? vf{} : load(results[c / kVectors] + r * kPanel + c % kVectors * kLanes);
  const auto multiply = [&](int at) __attribute__((always_inline)) {
    vf column[kAcross];
#pragma GCC unroll 4
    for (int c = 0; c < kAcross; ++c) column[c] = load(panels[c / kVectors] + at * kPanel + c % kVectors * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const float* factor = rows[r / kSharing] + at + r % kSharing * row_stride;
      if constexpr (IsPairs) {
        int32_t pair;
        std::memcpy(&pair, factor, sizeof pair);
        const vi pairs = splat_int(pair);
#pragma GCC unroll 4
        for (int c = 0; c < kAcross; ++c) acc[r][c] = pair_dot(acc[r][c], pairs, as_int(column[c]));
      } else {
        const vf factors = splat(*factor);
#pragma GCC unroll 4
        for (int c = 0; c < kAcross; ++c) acc[r][c] = fma(factors, column[c], acc[r][c]);
      }
    }
  };
  const auto advance = [&](int by) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) rows[i] += by;
#pragma GCC unroll 2
    for (int p = 0; p < kPanelsAtOnce; ++p) panels[p] += by * kPanel;
  };
  int64_t left = slice.count;
  for (; left >= 4; left -= 4) {
    if (kLanes < 16 && left % kPanel == 0)
#pragma GCC unroll 12
      for (int r = Rows; r < 2 * Rows; ++r) __builtin_prefetch(x + r * row_stride + slice.count - left, 0, 3);
#pragma GCC unroll 4
    for (int at = 0; at < 4; ++at) {
      if (at < Ahead)
#pragma GCC unroll 2
        for (int p = 0; p < kPanelsAtOnce; ++p) __builtin_prefetch(ahead[p] + at * kLine, 0, 2);
      multiply(at);
    }
    advance(4);
#pragma GCC unroll 2
    for (int p = 0; p < kPanelsAtOnce; ++p) ahead[p] += Ahead * kLine;
  }
  for (; left > 0; --left) {
    multiply(0);
    advance(1);
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kAcross; ++c) store(results[c / kVectors] + r * kPanel + c % kVectors * kLanes, acc[r][c]);
}

// The last tile of a block has fewer rows.
template <int Rows, int Ahead, bool IsPairs>
void float_rest(int64_t rows, const float* x, int64_t row_stride, const FloatSlice& slice, float* const* results) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      float_tile<Rows, Ahead, IsPairs>(x, row_stride, slice, results);
    else
      float_rest<Rows - 1, Ahead, IsPairs>(rows, x, row_stride, slice, results);
  }
}

// Of `num_pairs` pairs of inputs of a bfloat16 panel each input by itself, in float32.
TIDEMILL_INLINE void widen_pairs(const uint16_t* panel, int64_t num_pairs, float* target) {
  for (int64_t pair = 0; pair < num_pairs; ++pair)
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const vi both = load_int(panel + (pair * kPanel + lane) * 2);
      store(target + 2 * pair * kPanel + lane, as_float(both << 16));
      store(target + (2 * pair + 1) * kPanel + lane, as_float(both & splat_int(static_cast<int32_t>(0xffff0000u))));
    }
}

// All the rows of a block against one pair of panels; `row_stride` in 32 bits.
template <bool IsPairs>
TIDEMILL_INLINE void float_pair(const Linear& args, const float* x, int64_t row_stride, int64_t num_rows, int64_t pair,
                                float (*results)[kMaxBlockRows * kPanel], FloatMemory& memory) {
  const bool is_narrow = !IsPairs && args.format == Linear::Format::kBfloat16;
  // Of steps, and of the panel's lines of 32 bits an output.
  const int64_t in_dim = IsPairs ? paired_dim(args.in_dim) / 2 : args.in_dim;
  const int64_t panel_len = is_narrow ? paired_dim(args.in_dim) / 2 : in_dim;
  const int64_t slice_len = is_narrow ? kNarrowSlice : kFloatSlice;
  for (int first = 0; first < 2; first += kPanelsAtOnce) {
    for (int64_t begin = 0; begin < in_dim; begin += slice_len) {
      FloatSlice slice;
      slice.count = std::min(slice_len, in_dim - begin);
      slice.is_first = begin == 0;
      const bool is_last = begin + slice.count == in_dim;
      float* target[kPanelsAtOnce];
      for (int p = 0; p < kPanelsAtOnce; ++p) {
        const int64_t panel = (pair * 2 + first + p) * panel_len;
        const int64_t num_lines = is_narrow ? (slice.count + 1) / 2 : slice.count;
        const float* lines = static_cast<const float*>(args.weights) + (panel + (is_narrow ? begin / 2 : begin)) * kPanel;
        target[p] = results[first + p];
        slice.panels[p] = lines;
        slice.ahead[p] = lines + (num_lines + (is_last ? (kPanelsAtOnce - 1) * panel_len : 0)) * kPanel;
        if (is_narrow) {
          widen_pairs(reinterpret_cast<const uint16_t*>(lines), num_lines, memory.panels[p]);
          slice.panels[p] = memory.panels[p];
        }
      }
      // What comes next is fetched by the first four tiles, a quarter each: all of it by one would ask for more than the
      // memory gives meanwhile.
      const int64_t num_tiles = num_rows / kTileRows;
      const int64_t num_fetching = num_tiles >= 4 ? 4 : num_tiles >= 2 ? 2 : 1;
      const int64_t part = slice.count / num_fetching * (is_narrow ? kLine / 2 : kLine);
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const float* rows = x + tile * kTileRows * row_stride + begin;
        if (tile >= num_fetching)
          float_tile<kTileRows, 0, IsPairs>(rows, row_stride, slice, target);
        else if (num_fetching == 4)
          float_tile<kTileRows, 1, IsPairs>(rows, row_stride, slice, target);
        else if (num_fetching == 2)
          float_tile<kTileRows, 2, IsPairs>(rows, row_stride, slice, target);
        else
          float_tile<kTileRows, 4, IsPairs>(rows, row_stride, slice, target);
        for (int p = 0; p < kPanelsAtOnce; ++p) {
          target[p] += kTileRows * kPanel;
          slice.ahead[p] = static_cast<const char*>(slice.ahead[p]) + part;
        }
      }
      const int64_t row = num_tiles * kTileRows;
      if (num_tiles == 0)
        float_rest<kTileRows - 1, 4, IsPairs>(num_rows, x + begin, row_stride, slice, target);
      else
        float_rest<kTileRows - 1, 0, IsPairs>(num_rows - row, x + row * row_stride + begin, row_stride, slice, target);
    }
  }
}

}  // namespace TIDEMILL_ISA
}  // namespace tidemill
