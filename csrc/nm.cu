#include <utility>

#include "nm.h"
#include "simt.h"

namespace fu::cuda {
namespace {

constexpr int kThreads = 256;

// Eight scores from `p`, of which `count` exist; the others are `filler`. Whole aligned runs take 16-byte
// loads.
__device__ inline void load8(const float* p, int count, float* x) {
  if (count == 8 && (reinterpret_cast<uintptr_t>(p) & 15) == 0) {
    const float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i < count ? p[i] : 0.f;
  }
}

template <class T>
__device__ inline void load8(const T* p, int count, float* x) {
  if (count == 8 && (reinterpret_cast<uintptr_t>(p) & 15) == 0) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = to_float(T{uint16_t(words[i] & 0xffffu)});
      x[2 * i + 1] = to_float(T{uint16_t(words[i] >> 16)});
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i < count ? to_float(p[i]) : 0.f;
  }
}

// The tensors of a launch: a table on the device, or one tensor among the arguments.
struct Job {
  const NmItem* items;
  int64_t count;
  NmItem one;
  int n, m;
  int* nan_seen;
};

// The tensor of this block's tile; `first` becomes the tile's first mask byte, counted over all rows.
__device__ inline NmItem item_of(const Job& job, int64_t& first) {
  const int64_t tile = blockIdx.x;
  NmItem t = job.one;
  if (job.items != nullptr) {
    int64_t low = 0, high = job.count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (job.items[middle].first <= tile ? low : high) = middle;
    }
    t = job.items[low];
  }
  first = (tile - t.first) * kNmTile;
  if (t.cols % 8 == 0) {  // rows of whole bytes are one long row
    t.cols *= t.rows;
    t.rows = 1;
  }
  return t;
}

// M = 2, 4, 8: one thread a byte of the mask. Floats are compared as they are; only a byte with a NaN pays
// for integer keys. All loads of a thread are on their way before the first is used.
template <int M, class T>
__global__ void __launch_bounds__(kThreads) nm_bytes_kernel(Job job) {
  constexpr int kPer = int(kNmTile) / kThreads;
  int64_t first;
  const NmItem t = item_of(job, first);
  const T* scores = static_cast<const T*>(t.scores);
  const int64_t width = (t.cols + 7) / 8, total = t.rows * width;
  float x[kPer][8];
  int count[kPer];
#pragma unroll
  for (int k = 0; k < kPer; ++k) {
    const int64_t i = first + k * kThreads + threadIdx.x;
    const int64_t row = t.rows == 1 ? 0 : i / width, col = (i - row * width) * 8;
    count[k] = i >= total ? 0 : col + 8 <= t.cols ? 8 : int(t.cols - col);
    load8(scores + row * t.cols + col, count[k], x[k]);
  }
#pragma unroll
  for (int k = 0; k < kPer; ++k) {
    if (count[k] == 0) continue;
    bool nan = false;
#pragma unroll
    for (int j = 0; j < 8; ++j) nan |= nm::is_nan(x[k][j]);
    uint32_t byte;
    if (nan) {
      int32_t key[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) key[j] = nm::key_of(x[k][j]);
      byte = nm::byte_of<M>(key, job.n);
      *job.nan_seen = 1;  // every writer writes the same
    } else {
      byte = nm::byte_of<M>(x[k], job.n);
    }
    t.bits[first + k * kThreads + threadIdx.x] = uint8_t(byte & ((1u << count[k]) - 1u));
  }
}

__device__ inline float lower(float a, float b) {
  return fminf(a, b);
}
__device__ inline float upper(float a, float b) {
  return fmaxf(a, b);
}
__device__ inline int32_t lower(int32_t a, int32_t b) {
  return a < b ? a : b;
}
__device__ inline int32_t upper(int32_t a, int32_t b) {
  return a < b ? b : a;
}

template <int A, int B, class K>
__device__ inline void order(K* key) {
  const K a = key[A], b = key[B];
  key[A] = lower(a, b);
  key[B] = upper(a, b);
}
template <int M, class K, int... I>
__device__ inline void sort(K* key, std::integer_sequence<int, I...>) {
  (order<nm::kNetwork<M>.low[I], nm::kNetwork<M>.high[I]>(key), ...);
}

// The mask of a group: what is above the n-th largest, and of its equals the lowest columns.
template <int M, class K>
__device__ inline uint32_t group_of(const K* key, int n) {
  K sorted[M];
#pragma unroll
  for (int c = 0; c < M; ++c) sorted[c] = key[c];
  sort<M>(sorted, std::make_integer_sequence<int, nm::Network<M>::count()>());
  K last = sorted[M - 1];
#pragma unroll
  for (int c = M - 2; c >= 0; --c)
    if (c >= M - n) last = sorted[c];
  uint32_t above = 0, equal = 0;
#pragma unroll
  for (int c = 0; c < M; ++c) {
    above |= uint32_t(key[c] > last) << c;
    equal |= uint32_t(key[c] == last) << c;
  }
  for (int spare = __popc(equal) - (n - __popc(above)); spare > 0; --spare) {
    uint32_t highest = 31u - uint32_t(__clz(int(equal)));
    equal &= ~(1u << highest);
  }
  return above | equal;
}

// M = 16, 32: one thread a group, whose keys it sorts in registers.
template <int M, class T>
__global__ void __launch_bounds__(kThreads) nm_groups_kernel(Job job) {
  int64_t first;
  const NmItem t = item_of(job, first);
  const int64_t total = t.rows * t.cols / M;
  for (int64_t g = first * 8 / M + threadIdx.x; g < (first + kNmTile) * 8 / M && g < total; g += kThreads) {
    float x[M];
    const T* p = static_cast<const T*>(t.scores) + g * M;
#pragma unroll
    for (int j = 0; j < M; j += 8) load8(p + j, 8, x + j);
    bool nan = false;
#pragma unroll
    for (int j = 0; j < M; ++j) nan |= nm::is_nan(x[j]);
    uint32_t bits;
    if (nan) {
      int32_t key[M];
#pragma unroll
      for (int j = 0; j < M; ++j) key[j] = nm::key_of(x[j]);
      bits = group_of<M>(key, job.n);
      *job.nan_seen = 1;
    } else {
      bits = group_of<M>(x, job.n);
    }
    if constexpr (M == 16)
      reinterpret_cast<uint16_t*>(t.bits)[g] = uint16_t(bits);
    else
      reinterpret_cast<uint32_t*>(t.bits)[g] = bits;
  }
}

// Any m: one thread a byte, every column counts the columns of its group that come before it.
template <class T>
__global__ void __launch_bounds__(kThreads) nm_any_kernel(Job job) {
  int64_t first;
  const NmItem t = item_of(job, first);
  const int64_t width = (t.cols + 7) / 8, total = t.rows * width;
  for (int64_t i = first + threadIdx.x; i < first + kNmTile && i < total; i += kThreads) {
    const int64_t row = i / width, col = (i - row * width) * 8;
    const int count = col + 8 <= t.cols ? 8 : int(t.cols - col);
    uint32_t byte = 0;
    for (int b = 0; b < count; ++b) {
      const int64_t group = (col + b) / job.m * job.m;
      const int mine = int(col + b - group);
      const T* p = static_cast<const T*>(t.scores) + row * t.cols + group;
      const int32_t key = nm::key_of(to_float(p[mine]));
      if (key == nm::kNanKey) *job.nan_seen = 1;
      int rank = 0;
      for (int j = 0; j < job.m; ++j) rank += nm::key_of(to_float(p[j])) > key - (j < mine ? 1 : 0);
      byte |= uint32_t(rank < job.n) << b;
    }
    t.bits[i] = uint8_t(byte);
  }
}

template <class T>
void launch(const Job& job, int64_t tiles, uintptr_t stream) {
  const unsigned grid = unsigned(tiles);
  auto bytes2 = nm_bytes_kernel<2, T>;
  auto bytes4 = nm_bytes_kernel<4, T>;
  auto bytes8 = nm_bytes_kernel<8, T>;
  auto groups16 = nm_groups_kernel<16, T>;
  auto groups32 = nm_groups_kernel<32, T>;
  auto any = nm_any_kernel<T>;
  switch (job.m) {
    case 2:
      FU_LAUNCH(bytes2, grid, kThreads, 0, stream, job);
      break;
    case 4:
      FU_LAUNCH(bytes4, grid, kThreads, 0, stream, job);
      break;
    case 8:
      FU_LAUNCH(bytes8, grid, kThreads, 0, stream, job);
      break;
    case 16:
      FU_LAUNCH(groups16, grid, kThreads, 0, stream, job);
      break;
    case 32:
      FU_LAUNCH(groups32, grid, kThreads, 0, stream, job);
      break;
    default:
      FU_LAUNCH(any, grid, kThreads, 0, stream, job);
  }
}

}  // namespace

void nm_mask(const NmItem* items, const NmItem* one, int64_t count, int64_t tiles, int dtype, int n, int m,
             int* nan_seen, int device, uintptr_t stream) {
  if (tiles == 0) return;
  const DeviceGuard guard(device);
  const Job job{items, count, one != nullptr ? *one : NmItem{}, n, m, nan_seen};
  if (dtype == kF32)
    launch<float>(job, tiles, stream);
  else if (dtype == kF16)
    launch<f16>(job, tiles, stream);
  else
    launch<bf16>(job, tiles, stream);
}

}  // namespace fu::cuda
