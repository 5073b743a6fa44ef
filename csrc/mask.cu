#include "mask.h"
#include "simt.h"

namespace fu::cuda {
namespace {

constexpr int kThreads = 256;

// One thread a byte of the mask. Adjacent threads read adjacent 8-byte runs: whole sectors when rows are
// aligned.
__global__ void mask_pack_kernel(const uint8_t* bools, int64_t rows, int64_t cols, uint8_t* bits) {
  const int64_t width = (cols + 7) / 8, total = rows * width;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t row = i / width, col = (i - row * width) * 8;
    const uint8_t* p = bools + row * cols + col;
    uint32_t byte = 0;
    if (col + 8 <= cols && (reinterpret_cast<uintptr_t>(p) & 7) == 0) {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      for (int b = 0; b < 4; ++b) {
        byte |= uint32_t((v.x >> (8 * b) & 255u) != 0) << b;
        byte |= uint32_t((v.y >> (8 * b) & 255u) != 0) << (b + 4);
      }
    } else {
      for (int b = 0; b < 8; ++b)
        if (col + b < cols) byte |= uint32_t(p[b] != 0) << b;
    }
    bits[i] = uint8_t(byte);
  }
}

__global__ void mask_unpack_kernel(const uint8_t* bits, int64_t rows, int64_t cols, uint8_t* bools) {
  const int64_t width = (cols + 7) / 8, total = rows * width;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t row = i / width, col = (i - row * width) * 8;
    uint8_t* p = bools + row * cols + col;
    const uint32_t byte = bits[i];
    if (col + 8 <= cols && (reinterpret_cast<uintptr_t>(p) & 7) == 0) {
      uint2 v = {0, 0};
      for (int b = 0; b < 4; ++b) {
        v.x |= (byte >> b & 1u) << (8 * b);
        v.y |= (byte >> (b + 4) & 1u) << (8 * b);
      }
      *reinterpret_cast<uint2*>(p) = v;
    } else {
      for (int b = 0; b < 8; ++b)
        if (col + b < cols) p[b] = uint8_t(byte >> b & 1u);
    }
  }
}

__device__ inline int64_t warp_sum(int64_t v) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

__device__ inline int64_t popcount_bytes(const uint8_t* p, int64_t n) {
  int64_t sum = 0, i = 0;
  for (; i < n && (reinterpret_cast<uintptr_t>(p + i) & 3); ++i) sum += __popc(p[i]);
  for (; i + 4 <= n; i += 4) sum += __popc(*reinterpret_cast<const uint32_t*>(p + i));
  for (; i < n; ++i) sum += __popc(p[i]);
  return sum;
}

__global__ void mask_count_kernel(const uint8_t* bits, int64_t bytes, unsigned long long* out) {
  constexpr int64_t kRun = 64;
  int64_t sum = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x * kRun;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kRun; i < bytes; i += step)
    sum += popcount_bytes(bits + i, min(kRun, bytes - i));
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0 && sum) atomicAdd(out, static_cast<unsigned long long>(sum));
}

constexpr int kScan = 1024;  // chunks a block scans

// Inclusive scan over the threads of a block of kScan.
__device__ inline int64_t block_scan(int64_t v) {
  __shared__ int64_t sums[32];
  const int lane = threadIdx.x % 32, w = threadIdx.x / 32;
  for (int d = 1; d < 32; d *= 2) {
    const int64_t u = __shfl_up_sync(0xffffffffu, v, d);
    if (lane >= d) v += u;
  }
  __syncthreads();
  if (lane == 31) sums[w] = v;
  __syncthreads();
  if (w == 0) {
    int64_t s = lane < int(blockDim.x / 32) ? sums[lane] : 0;
    for (int d = 1; d < 32; d *= 2) {
      const int64_t u = __shfl_up_sync(0xffffffffu, s, d);
      if (lane >= d) s += u;
    }
    sums[lane] = s;
  }
  __syncthreads();
  return v + (w > 0 ? sums[w - 1] : 0);
}

__global__ void __launch_bounds__(kScan) mask_prefix_local(const uint8_t* bits, int64_t bytes, int64_t chunk,
                                                           int64_t n, int64_t* out, int64_t* partial) {
  const int64_t i = int64_t(blockIdx.x) * kScan + threadIdx.x;
  const int64_t mine = i < n ? popcount_bytes(bits + i * chunk, min(chunk, bytes - i * chunk)) : 0;
  const int64_t sum = block_scan(mine);
  if (i < n) out[i + 1] = sum;
  if (threadIdx.x == kScan - 1) partial[blockIdx.x] = sum;
}

// One block turns the sums of the blocks into what came before each of them.
__global__ void __launch_bounds__(kScan) mask_prefix_partial(int64_t* partial, int64_t blocks) {
  __shared__ int64_t carry;
  if (threadIdx.x == 0) carry = 0;
  __syncthreads();
  for (int64_t at = 0; at < blocks; at += kScan) {
    const int64_t i = at + threadIdx.x;
    const int64_t mine = i < blocks ? partial[i] : 0;
    const int64_t before = carry;
    const int64_t sum = block_scan(mine) + before;
    if (i < blocks) partial[i] = sum - mine;
    __syncthreads();
    if (threadIdx.x == kScan - 1) carry = sum;
    __syncthreads();
  }
}

__global__ void mask_prefix_add(int64_t* out, int64_t n, const int64_t* partial) {
  const int64_t i = int64_t(blockIdx.x) * kScan + threadIdx.x;
  if (i == 0) out[0] = 0;
  if (i < n) out[i + 1] += partial[blockIdx.x];
}

unsigned grid_for(int64_t items, int device) {
  const int64_t most = int64_t(multiprocessors(device)) * 8;
  const int64_t want = ceil_div(items, kThreads);
  return unsigned(want < 1 ? 1 : want < most ? want : most);
}

}  // namespace

void mask_pack(const uint8_t* bools, int64_t rows, int64_t cols, uint8_t* bits, int device,
               uintptr_t stream) {
  if (rows == 0 || cols == 0) return;
  const DeviceGuard guard(device);
  FU_LAUNCH(mask_pack_kernel, grid_for(rows * ceil_div(cols, 8), device), kThreads, 0, stream, bools, rows,
            cols, bits);
}

void mask_unpack(const uint8_t* bits, int64_t rows, int64_t cols, uint8_t* bools, int device,
                 uintptr_t stream) {
  if (rows == 0 || cols == 0) return;
  const DeviceGuard guard(device);
  FU_LAUNCH(mask_unpack_kernel, grid_for(rows * ceil_div(cols, 8), device), kThreads, 0, stream, bits, rows,
            cols, bools);
}

void mask_count(const uint8_t* bits, int64_t bytes, int64_t* out, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  memset_async(out, 0, sizeof(int64_t), stream);
  if (bytes == 0) return;
  FU_LAUNCH(mask_count_kernel, grid_for(ceil_div(bytes, 64), device), kThreads, 0, stream, bits, bytes,
            reinterpret_cast<unsigned long long*>(out));
}

void mask_prefix(const uint8_t* bits, int64_t bytes, int64_t chunk, int64_t* out, int64_t* partial,
                 int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  const int64_t n = ceil_div(bytes, chunk);
  if (n == 0) {
    memset_async(out, 0, sizeof(int64_t), stream);
    return;
  }
  const unsigned blocks = unsigned(ceil_div(n, kScan));
  FU_LAUNCH(mask_prefix_local, blocks, kScan, 0, stream, bits, bytes, chunk, n, out, partial);
  FU_LAUNCH(mask_prefix_partial, 1, kScan, 0, stream, partial, int64_t(blocks));
  FU_LAUNCH(mask_prefix_add, blocks, kScan, 0, stream, out, n, partial);
}

}  // namespace fu::cuda
