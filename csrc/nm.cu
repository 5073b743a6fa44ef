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

// M = 2, 4, 8: one thread a byte of the mask. Floats are compared as they are; only a byte with a NaN pays
// for integer keys.
template <int M, class T>
__global__ void __launch_bounds__(kThreads)
    nm_bytes_kernel(const T* scores, int64_t rows, int64_t cols, int n, uint8_t* bits, int* nan_seen) {
  const int64_t width = (cols + 7) / 8, total = rows * width;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t row = rows == 1 ? 0 : i / width, col = (i - row * width) * 8;
    const int count = col + 8 <= cols ? 8 : int(cols - col);
    float x[8];
    load8(scores + row * cols + col, count, x);
    bool nan = false;
#pragma unroll
    for (int j = 0; j < 8; ++j) nan |= nm::is_nan(x[j]);
    uint32_t byte;
    if (nan) {
      int32_t key[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) key[j] = nm::key_of(x[j]);
      byte = nm::byte_of<M>(key, n);
      *nan_seen = 1;  // every writer writes the same
    } else {
      byte = nm::byte_of<M>(x, n);
    }
    bits[i] = uint8_t(byte & ((1u << count) - 1u));
  }
}

// M = 16, 32: one lane a column, keys go round by warp exchanges, a ballot gives four bytes of the mask. Rows
// are whole bytes here, so all of them are one long row.
template <int M, class T>
__global__ void __launch_bounds__(kThreads)
    nm_warps_kernel(const T* scores, int64_t total, int n, uint8_t* bits, int* nan_seen) {
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x - lane;
  for (int64_t at = first; at < total; at += step) {
    const bool here = at + lane < total;
    const float x = here ? to_float(scores[at + lane]) : 0.f;
    if (nm::is_nan(x)) *nan_seen = 1;
    const int32_t key = nm::key_of(x);
    int rank = 0;
#pragma unroll
    for (int r = 1; r < M; ++r) {
      const int32_t partner = __shfl_xor_sync(0xffffffffu, key, r);
      rank += partner > key - ((lane ^ r) < lane ? 1 : 0);
    }
    const uint32_t kept = __ballot_sync(0xffffffffu, here && rank < n);
    if (lane < 4 && at + 8 * lane < total) bits[at / 8 + lane] = uint8_t(kept >> (8 * lane));
  }
}

// Any m: one thread a byte, every column counts the columns of its group that come before it.
template <class T>
__global__ void __launch_bounds__(kThreads)
    nm_any_kernel(const T* scores, int64_t rows, int64_t cols, int n, int m, uint8_t* bits, int* nan_seen) {
  const int64_t width = (cols + 7) / 8, total = rows * width;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t row = i / width, col = (i - row * width) * 8;
    const int count = col + 8 <= cols ? 8 : int(cols - col);
    uint32_t byte = 0;
    for (int b = 0; b < count; ++b) {
      const int64_t group = (col + b) / m * m;
      const int mine = int(col + b - group);
      const T* p = scores + row * cols + group;
      const int32_t key = nm::key_of(to_float(p[mine]));
      if (key == nm::kNanKey) *nan_seen = 1;
      int rank = 0;
      for (int j = 0; j < m; ++j) rank += nm::key_of(to_float(p[j])) > key - (j < mine ? 1 : 0);
      byte |= uint32_t(rank < n) << b;
    }
    bits[i] = uint8_t(byte);
  }
}

unsigned grid_for(int64_t threads, int device) {
  const int64_t most = int64_t(multiprocessors(device)) * 32;
  const int64_t want = ceil_div(threads, kThreads);
  return unsigned(want < 1 ? 1 : want < most ? want : most);
}

template <class T>
void launch(const T* scores, int64_t rows, int64_t cols, int n, int m, uint8_t* bits, int* nan_seen,
            int device, uintptr_t stream) {
  if (cols % 8 == 0) {
    cols *= rows;
    rows = 1;
  }
  const unsigned by_byte = grid_for(rows * ceil_div(cols, 8), device), by_column = grid_for(cols, device);
  auto bytes2 = nm_bytes_kernel<2, T>;
  auto bytes4 = nm_bytes_kernel<4, T>;
  auto bytes8 = nm_bytes_kernel<8, T>;
  auto warps16 = nm_warps_kernel<16, T>;
  auto warps32 = nm_warps_kernel<32, T>;
  auto any = nm_any_kernel<T>;
  switch (m) {
    case 2:
      FU_LAUNCH(bytes2, by_byte, kThreads, 0, stream, scores, rows, cols, n, bits, nan_seen);
      break;
    case 4:
      FU_LAUNCH(bytes4, by_byte, kThreads, 0, stream, scores, rows, cols, n, bits, nan_seen);
      break;
    case 8:
      FU_LAUNCH(bytes8, by_byte, kThreads, 0, stream, scores, rows, cols, n, bits, nan_seen);
      break;
    case 16:
      FU_LAUNCH(warps16, by_column, kThreads, 0, stream, scores, cols, n, bits, nan_seen);
      break;
    case 32:
      FU_LAUNCH(warps32, by_column, kThreads, 0, stream, scores, cols, n, bits, nan_seen);
      break;
    default:
      FU_LAUNCH(any, by_byte, kThreads, 0, stream, scores, rows, cols, n, m, bits, nan_seen);
  }
}

}  // namespace

void nm_mask(const void* scores, int dtype, int64_t rows, int64_t cols, int n, int m, uint8_t* bits,
             int* nan_seen, int device, uintptr_t stream) {
  if (rows == 0 || cols == 0) return;
  const DeviceGuard guard(device);
  if (dtype == kF32)
    launch(static_cast<const float*>(scores), rows, cols, n, m, bits, nan_seen, device, stream);
  else if (dtype == kF16)
    launch(static_cast<const f16*>(scores), rows, cols, n, m, bits, nan_seen, device, stream);
  else
    launch(static_cast<const bf16*>(scores), rows, cols, n, m, bits, nan_seen, device, stream);
}

}  // namespace fu::cuda
