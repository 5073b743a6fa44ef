#include "block_weight_grad.h"

#include <cstdlib>

#if defined(__GNUC__) && !defined(__clang__)
// How a vector would be passed to a function that is not inlined does not matter here.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fu::FU_ISA {
namespace {

using namespace fu::block_grad;

// A micro-tile of kRows x kCols sums stays in registers while T runs.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8, kVectors = 2;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4, kVectors = 2;
#else
constexpr int kLanes = 4, kRows = 4, kVectors = 2;
#endif
constexpr int kCols = kLanes * kVectors;
using Vector = float __attribute__((vector_size(kLanes * 4)));

// T below which a second part of it is not worth a workspace, and parts of the work below which it is.
constexpr int64_t kLongest = 2048, kParts = 16;
// Multiplications up to which one thread is done before the others are awake.
constexpr int64_t kSerial = 1 << 18;

inline int64_t up(int64_t n, int64_t step) {
  return ceil_div(n, step) * step;
}

// ---- packing: dY as panels [n, kRows], X as panels [n, kCols], zeros beyond the edge ----------------------

// `n` tokens from `t0`, `width` columns from `c0` of a row-major [.., size] matrix.
template <int WIDE, class T>
void pack_matrix(const T* from, int64_t size, int64_t t0, int64_t n, int64_t c0, int64_t width, float* to) {
  for (int64_t p = 0; p < width; p += WIDE, to += n * WIDE) {
    const int64_t own = width - p < WIDE ? width - p : WIDE;
    const T* row = from + t0 * size + c0 + p;
    float* out = to;
    if (own == WIDE) {
      for (int64_t t = 0; t < n; ++t, row += size, out += WIDE)
        for (int j = 0; j < WIDE; ++j) out[j] = to_float(row[j]);
    } else {
      for (int64_t t = 0; t < n; ++t, row += size, out += WIDE)
        for (int j = 0; j < WIDE; ++j) out[j] = j < own ? to_float(row[j]) : 0.f;
    }
  }
}

// The same of dY of a convolution, which is [images, rows, places].
template <class T>
void pack_places(const T* from, const Layer& l, int64_t t0, int64_t n, int64_t r0, int64_t width, float* to) {
  const int64_t places = l.out_height * l.out_width;
  for (int64_t p = 0; p < width; p += kRows, to += n * kRows) {
    for (int64_t done = 0; done < n;) {
      const int64_t image = (t0 + done) / places, at = (t0 + done) % places;
      const int64_t run = places - at < n - done ? places - at : n - done;
      for (int j = 0; j < kRows; ++j) {
        float* const out = to + done * kRows + j;
        if (p + j < width) {
          const T* const row = from + (image * l.rows + r0 + p + j) * places + at;
          for (int64_t t = 0; t < run; ++t) out[t * kRows] = to_float(row[t]);
        } else {
          for (int64_t t = 0; t < run; ++t) out[t * kRows] = 0;
        }
      }
      done += run;
    }
  }
}

// X of a convolution: a column is a channel and a place in the kernel.
template <class T>
void pack_patches(const T* from, const Layer& l, int64_t t0, int64_t n, int64_t c0, int64_t width,
                  float* to) {
  const int64_t places = l.out_height * l.out_width, taps = l.kernel_height * l.kernel_width;
  for (int64_t p = 0; p < width; p += kCols, to += n * kCols) {
    for (int j = 0; j < kCols; ++j) {
      float* out = to + j;
      if (p + j >= width) {
        for (int64_t t = 0; t < n; ++t) out[t * kCols] = 0;
        continue;
      }
      const int64_t c = c0 + p + j, channel = c / taps, tap = c % taps;
      const int64_t dy = tap / l.kernel_width * l.dilation_y - l.padding_y;
      const int64_t dx = tap % l.kernel_width * l.dilation_x - l.padding_x;
      int64_t image = t0 / places, y = t0 % places / l.out_width, x = t0 % l.out_width;
      for (int64_t done = 0; done < n;) {
        const int64_t run = l.out_width - x < n - done ? l.out_width - x : n - done;
        const int64_t iy = y * l.stride_y + dy;
        if (iy < 0 || iy >= l.height) {
          for (int64_t t = 0; t < run; ++t) out[t * kCols] = 0;
        } else {
          const T* const line = from + ((image * l.channels + channel) * l.height + iy) * l.width;
          for (int64_t t = 0; t < run; ++t) {
            const int64_t ix = (x + t) * l.stride_x + dx;
            out[t * kCols] = ix >= 0 && ix < l.width ? to_float(line[ix]) : 0.f;
          }
        }
        out += run * kCols;
        done += run;
        x = 0;
        if (++y == l.out_height) y = 0, ++image;
      }
    }
  }
}

// ---- the product ------------------------------------------------------------------------------------------

// sums [kRows, kCols] of a matrix with `stride` += a^T b over n tokens.
inline void multiply(const float* a, const float* b, int64_t n, float* sums, int64_t stride) {
  Vector acc[kRows][kVectors] = {};
  for (int64_t t = 0; t < n; ++t, a += kRows, b += kCols) {
    Vector v[kVectors];
    memcpy(v, b, sizeof v);
    for (int i = 0; i < kRows; ++i)
      for (int k = 0; k < kVectors; ++k) acc[i][k] += a[i] * v[k];
  }
  for (int i = 0; i < kRows; ++i)
    for (int k = 0; k < kVectors; ++k) {
      Vector v;
      float* const to = sums + i * stride + k * kLanes;
      memcpy(&v, to, sizeof v);
      v += acc[i][k];
      memcpy(to, &v, sizeof v);
    }
}

// Sums of a tile, [side, side] with `side` a multiple of both micro-sides.
template <class T>
void store(const float* sums, int64_t side, const Layer& l, const Tile& tile, int64_t block, T* out,
           bool packed) {
  const int64_t rows = l.rows - tile.row * block < block ? l.rows - tile.row * block : block;
  const int64_t cols = l.cols - tile.col * block < block ? l.cols - tile.col * block : block;
  const int64_t size = packed ? block : l.cols;
  out += packed ? tile.number * block * block : tile.row * block * l.cols + tile.col * block;
  for (int64_t r = 0; r < (packed ? block : rows); ++r) {
    T* const to = out + r * size;
    if (r < rows)
      for (int64_t c = 0; c < cols; ++c) to[c] = from_float<T>(sums[r * side + c]);
    for (int64_t c = r < rows ? cols : 0; packed && c < block; ++c) to[c] = from_float<T>(0.f);
  }
}

// A run of tiles of one column.
struct Run {
  int64_t first, count;
};

template <class T>
bool tiles_of(const T* grad, const T* x, const Layer& l, const Tile* tiles, int64_t count, int64_t block,
              T* out, bool packed) {
  const int64_t side = up(up(block, kRows), kCols), area = side * side;
  Run* const runs = static_cast<Run*>(std::malloc(size_t(count) * sizeof(Run)));
  if (!runs) return false;
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i && tiles[i].col == tiles[i - 1].col && runs[total - 1].count < kGroup)
      ++runs[total - 1].count;
    else
      runs[total++] = Run{i, 1};
  }
  int64_t parts = total < kParts ? ceil_div(kParts, total) : 1;
  if (parts > ceil_div(l.tokens, kLongest)) parts = ceil_div(l.tokens, kLongest);
  if (parts < 1) parts = 1;
  const int64_t length = up(ceil_div(l.tokens, parts), kChunk);
  float* partial = nullptr;
  bool failed = false;
  if (parts > 1) {
    partial = static_cast<float*>(std::malloc(size_t(parts * count * area) * sizeof(float)));
    if (!partial) {
      std::free(runs);
      return false;
    }
  }
#pragma omp parallel if (l.tokens * count * block * block > kSerial)
  {
    // Of a thread: a chunk of X, a chunk of dY, the sums of a run.
    const size_t own = size_t(2 * kChunk * side + (parts > 1 ? 0 : kGroup * area)) * sizeof(float);
    float* const room = static_cast<float*>(std::aligned_alloc(64, (own + 63) / 64 * 64));
    if (!room) {
#pragma omp atomic write
      failed = true;
    }
    float* const b = room;
    float* const a = room + kChunk * side;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < total * parts; ++i) {
      if (!room) continue;
      const Run run = runs[i / parts];
      const int64_t part = i % parts, col = tiles[run.first].col * block;
      const int64_t width = l.cols - col < block ? l.cols - col : block;
      float* const sums = partial ? partial + (part * count + run.first) * area : a + kChunk * side;
      for (int64_t k = 0; k < run.count * area; ++k) sums[k] = 0;
      const int64_t end = (part + 1) * length < l.tokens ? (part + 1) * length : l.tokens;
      for (int64_t t0 = part * length; t0 < end; t0 += kChunk) {
        const int64_t n = end - t0 < kChunk ? end - t0 : kChunk;
        if (l.channels)
          pack_patches(x, l, t0, n, col, width, b);
        else
          pack_matrix<kCols>(x, l.cols, t0, n, col, width, b);
        for (int64_t k = 0; k < run.count; ++k) {
          const int64_t row = tiles[run.first + k].row * block;
          const int64_t height = l.rows - row < block ? l.rows - row : block;
          if (l.channels)
            pack_places(grad, l, t0, n, row, height, a);
          else
            pack_matrix<kRows>(grad, l.rows, t0, n, row, height, a);
          for (int64_t c = 0; c < width; c += kCols)
            for (int64_t r = 0; r < height; r += kRows)
              multiply(a + r * n, b + c * n, n, sums + k * area + r * side + c, side);
        }
      }
      if (!partial)
        for (int64_t k = 0; k < run.count; ++k)
          store(sums + k * area, side, l, tiles[run.first + k], block, out, packed);
    }
    std::free(room);
    if (partial) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i) {
        float* const sums = partial + i * area;
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t k = 0; k < area; ++k) sums[k] += sums[part * count * area + k];
        store(sums, side, l, tiles[i], block, out, packed);
      }
    }
  }
  std::free(partial);
  std::free(runs);
  return !failed;
}

}  // namespace

bool block_weight_grad(const void* grad, const void* x, int dtype, const Layer& layer, const Tile* tiles,
                       int64_t count, int64_t block, void* out, bool packed) {
  const auto run = [&]<class T>(T* to) {
    return tiles_of(static_cast<const T*>(grad), static_cast<const T*>(x), layer, tiles, count, block, to,
                    packed);
  };
  if (dtype == kF16) return run(static_cast<f16*>(out));
  if (dtype == kBF16) return run(static_cast<bf16*>(out));
  return run(static_cast<float*>(out));
}

}  // namespace fu::FU_ISA
