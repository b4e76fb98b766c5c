// Eight tiles, two-dimensional registers of up to 16 rows of 64 bytes, and what multiplies them: Intel's AMX where this
// translation unit is compiled for it, else the same in memory, as Intel's manual tells it (Software Developer's Manual,
// volume 2, TDPBF16PS and TDPBSSD), so that what is built on tiles runs, and is tested, on any CPU. Included by linear.h.
//
// Tiles 0 to 3 are added to, 4 and 5 hold rows, 6 and 7 weights. Tiles 0, 1 and 4 have `top` rows, 2, 3 and 5 `bottom`
// rows, and what a row of a tile comes to depends on no other row.

namespace tidemill {
namespace TIDEMILL_ISA {

#if defined(TIDEMILL_TILES)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

constexpr int kTileHeight = 16;      // rows
constexpr int64_t kTileBytes = 64;   // of a row

#if defined(TIDEMILL_AMX)

// By their own instructions and not the compiler's names for them, some of which do not say what memory they read.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  // A thread that keeps no tiles is switched without them.
  ~Tiles() {
    if (top_ >= 0) asm volatile("tilerelease" ::: "memory");
  }

  // Contents are lost when the shape changes.
  TIDEMILL_INLINE void shape(int top, int bottom) {
    if (top == top_ && bottom == bottom_) return;
    top_ = top;
    bottom_ = bottom;
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(Config) == 64, "as the instruction reads it");
    const int rows[] = {top, top, bottom, bottom, top, bottom, kTileHeight, kTileHeight};
    for (int tile = 0; tile < 8; ++tile) {
      config.rows[tile] = static_cast<uint8_t>(rows[tile]);
      config.row_bytes[tile] = rows[tile] > 0 ? kTileBytes : 0;
    }
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }

  template <int T>
  TIDEMILL_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  // Rows `stride` bytes apart.
  template <int T>
  TIDEMILL_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  TIDEMILL_INLINE void save(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
  }
  // Sum += rows times weights: of pairs of bfloat16, added in float32.
  template <int Sum, int Rows, int Weights>
  TIDEMILL_INLINE void add_pairs() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Rows), "i"(Weights));
  }
  // The same of signed bytes by fours, in 32 bits.
  template <int Sum, int Rows, int Weights>
  TIDEMILL_INLINE void add_bytes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Rows), "i"(Weights));
  }

 private:
  int top_ = -1, bottom_ = -1;
};

#else

class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  void shape(int top, int bottom) {
    if (top == rows_[0] && bottom == rows_[2]) return;
    const int rows[] = {top, top, bottom, bottom, top, bottom, kTileHeight, kTileHeight};
    std::memcpy(rows_, rows, sizeof rows_);
    std::memset(tiles_, 0, sizeof tiles_);
  }

  template <int T>
  void zero() {
    std::memset(tiles_[T], 0, sizeof tiles_[T]);
  }
  template <int T>
  void load(const void* from, int64_t stride) {
    zero<T>();
    for (int row = 0; row < rows_[T]; ++row)
      std::memcpy(tiles_[T][row], static_cast<const char*>(from) + row * stride, kTileBytes);
  }
  template <int T>
  void save(void* to, int64_t stride) {
    for (int row = 0; row < rows_[T]; ++row)
      std::memcpy(static_cast<char*>(to) + row * stride, tiles_[T][row], kTileBytes);
  }
  // Of each result the even and the odd inputs are added up by themselves, then both, and that to what was there. (AMX
  // takes subnormal numbers for zero; here they are numbers.)
  template <int Sum, int Rows, int Weights>
  void add_pairs() {
    for (int row = 0; row < rows_[Sum]; ++row)
      for (int column = 0; column < kTileHeight; ++column) {
        float parts[2] = {0.0f, 0.0f}, sum;
        for (int k = 0; k < kTileHeight; ++k)
          for (int part = 0; part < 2; ++part)
            parts[part] += from_bf16(at<uint16_t>(Rows, row, 2 * k + part)) * from_bf16(at<uint16_t>(Weights, k, 2 * column + part));
        sum = at<float>(Sum, row, column) + (parts[0] + parts[1]);
        std::memcpy(tiles_[Sum][row] + column * sizeof sum, &sum, sizeof sum);
      }
  }
  template <int Sum, int Rows, int Weights>
  void add_bytes() {
    for (int row = 0; row < rows_[Sum]; ++row)
      for (int column = 0; column < kTileHeight; ++column) {
        int32_t sum = at<int32_t>(Sum, row, column);
        for (int k = 0; k < kTileHeight; ++k)
          for (int byte = 0; byte < 4; ++byte)
            sum += at<int8_t>(Rows, row, 4 * k + byte) * at<int8_t>(Weights, k, 4 * column + byte);
        std::memcpy(tiles_[Sum][row] + column * sizeof sum, &sum, sizeof sum);
      }
  }

 private:
  template <typename Value>
  Value at(int tile, int row, int index) const {
    Value value;
    std::memcpy(&value, tiles_[tile][row] + index * sizeof value, sizeof value);
    return value;
  }

  int rows_[8] = {};
  alignas(64) char tiles_[8][kTileHeight][kTileBytes];
};

#endif

}  // namespace TIDEMILL_ISA
}  // namespace tidemill
