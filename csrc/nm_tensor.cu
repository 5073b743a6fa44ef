#include "nm_tensor.h"
#include "simt.h"

namespace fu::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPer = 4;  // mask bytes of a thread, whose loads are all on their way before the first is used

// Rows of whole bytes come as one long row.
struct Job {
  const void* from;
  void* to;
  const uint8_t* bits;
  int64_t rows, cols, kept;  // kept: values of a row
  int64_t bytes, true_cols;
  int n, m, per_byte;  // per_byte: values of eight columns, where m divides eight
  long long* wrong_row;
};

// Eight entries in registers. at(j) with a j that is known at run time only, and without local memory.
template <class T>
struct Eight {
  T x[8];
  __device__ T at(uint32_t j) const {
    const T a = j & 1 ? x[1] : x[0], b = j & 1 ? x[3] : x[2], c = j & 1 ? x[5] : x[4],
            d = j & 1 ? x[7] : x[6];
    const T low = j & 2 ? b : a, high = j & 2 ? d : c;
    return j & 4 ? high : low;
  }
  __device__ void set(int j, T value) { x[j] = value; }
  __device__ T get(int j) const { return x[j]; }
  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = 0;
  }
};

template <>
struct Eight<uint16_t> {
  uint32_t word[4];
  __device__ uint16_t at(uint32_t j) const {
    const uint32_t low = j & 4 ? word[2] : word[0], high = j & 4 ? word[3] : word[1];
    return uint16_t(__byte_perm(low, high, 0x10u + (j & 3u) * 0x22u));
  }
  // Of a register that was cleared before.
  __device__ void set(int j, uint16_t value) { word[j / 2] |= uint32_t(value) << (16 * (j % 2)); }
  __device__ uint16_t get(int j) const { return uint16_t(word[j / 2] >> (16 * (j % 2))); }
  __device__ void clear() { word[0] = word[1] = word[2] = word[3] = 0; }
};

__device__ inline bool aligned(const void* p, int bytes) {
  return (reinterpret_cast<uintptr_t>(p) & uintptr_t(bytes - 1)) == 0;
}

// `count` of the N entries from p (N = 4 or 8), the others 0. Whole aligned runs are one or two vector loads.
template <int N>
__device__ inline Eight<uint16_t> load(const uint16_t* p, int count) {
  Eight<uint16_t> e;
  e.clear();
  if (count == N && aligned(p, 2 * N)) {
    if constexpr (N == 8) {
      const uint4 v = *reinterpret_cast<const uint4*>(p);
      e.word[0] = v.x, e.word[1] = v.y, e.word[2] = v.z, e.word[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      e.word[0] = v.x, e.word[1] = v.y;
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < count) e.set(j, p[j]);
  }
  return e;
}

template <int N>
__device__ inline Eight<uint32_t> load(const uint32_t* p, int count) {
  Eight<uint32_t> e;
  e.clear();
  if (count == N && aligned(p, 16)) {
#pragma unroll
    for (int q = 0; q < N / 4; ++q) {
      const uint4 v = reinterpret_cast<const uint4*>(p)[q];
      e.x[4 * q] = v.x, e.x[4 * q + 1] = v.y, e.x[4 * q + 2] = v.z, e.x[4 * q + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < count) e.x[j] = p[j];
  }
  return e;
}

template <int N>
__device__ inline Eight<uint64_t> load(const uint64_t* p, int count) {
  Eight<uint64_t> e;
  e.clear();
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (j < count) e.x[j] = p[j];
  return e;
}

template <int N>
__device__ inline void store(uint16_t* p, const Eight<uint16_t>& e, int count) {
  if (count == N && aligned(p, 2 * N)) {
    if constexpr (N == 8)
      *reinterpret_cast<uint4*>(p) = uint4{e.word[0], e.word[1], e.word[2], e.word[3]};
    else
      *reinterpret_cast<uint2*>(p) = uint2{e.word[0], e.word[1]};
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < count) p[j] = e.get(j);
  }
}

template <int N>
__device__ inline void store(uint32_t* p, const Eight<uint32_t>& e, int count) {
  if (count == N && aligned(p, 16)) {
#pragma unroll
    for (int q = 0; q < N / 4; ++q)
      reinterpret_cast<uint4*>(p)[q] = uint4{e.x[4 * q], e.x[4 * q + 1], e.x[4 * q + 2], e.x[4 * q + 3]};
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < count) p[j] = e.x[j];
  }
}

template <int N>
__device__ inline void store(uint64_t* p, const Eight<uint64_t>& e, int count) {
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (j < count) p[j] = e.x[j];
}

// Where a mask byte's columns are: row, first column, how many of them exist (0: no such byte).
struct Spot {
  int64_t row, col;
  int count;
};
__device__ inline Spot spot_of(const Job& job, int64_t i) {
  if (i >= job.bytes) return {0, 0, 0};
  const int64_t width = (job.cols + 7) / 8, row = job.rows == 1 ? 0 : i / width, col = (i - row * width) * 8;
  return {row, col, col + 8 <= job.cols ? 8 : int(job.cols - col)};
}

__device__ inline void report(const Job& job, const Spot& at, int64_t col) {
  const long long row = job.rows == 1 ? col / job.true_cols : at.row;
  atomicMin(job.wrong_row, row);
}

// m divides eight: one thread a byte of the mask, whose values have a place that does not depend on the bits.
// K: values of a byte, 0 where that is known at run time only.
template <class T, int K, bool CHECK>
__global__ void __launch_bounds__(kThreads) nm_gather_bytes(Job job) {
  constexpr int kMost = K ? K : 8;
  const int per = K ? K : job.per_byte;
  const int64_t first = int64_t(blockIdx.x) * kThreads * kPer + threadIdx.x;
  Eight<T> x[kPer];
  uint32_t byte[kPer];
  Spot at[kPer];
#pragma unroll
  for (int p = 0; p < kPer; ++p) {
    at[p] = spot_of(job, first + p * kThreads);
    byte[p] = at[p].count ? job.bits[first + p * kThreads] : 0;
    x[p] = load<8>(static_cast<const T*>(job.from) + at[p].row * job.cols + at[p].col, at[p].count);
  }
#pragma unroll
  for (int p = 0; p < kPer; ++p) {
    if (at[p].count == 0) continue;
    if constexpr (CHECK) {
      bool wrong = false;
      for (int q = 0; q < at[p].count; q += job.m)
        wrong |= __popc(byte[p] >> q & ((1u << job.m) - 1u)) != job.n;
      if (wrong) report(job, at[p], at[p].col);
    }
    Eight<T> out;
    out.clear();
    uint32_t rest = byte[p];
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      if (rest != 0) out.set(k, x[p].at(uint32_t(__ffs(int(rest))) - 1u));
      rest &= rest - 1u;
    }
    T* to = static_cast<T*>(job.to) + at[p].row * job.kept + at[p].col / 8 * per;
    store<kMost>(to, out, at[p].count == 8 ? per : at[p].count * per / 8);
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads) nm_expand_bytes(Job job) {
  constexpr int kMost = K ? K : 8;
  const int per = K ? K : job.per_byte;
  const int64_t first = int64_t(blockIdx.x) * kThreads * kPer + threadIdx.x;
  Eight<T> x[kPer];
  uint32_t byte[kPer];
  Spot at[kPer];
#pragma unroll
  for (int p = 0; p < kPer; ++p) {
    at[p] = spot_of(job, first + p * kThreads);
    byte[p] = at[p].count ? job.bits[first + p * kThreads] : 0;
    const T* from = static_cast<const T*>(job.from) + at[p].row * job.kept + at[p].col / 8 * per;
    x[p] = load<kMost>(from, at[p].count == 8 ? per : at[p].count * per / 8);
  }
#pragma unroll
  for (int p = 0; p < kPer; ++p) {
    if (at[p].count == 0) continue;
    Eight<T> out;
    out.clear();
    uint32_t k = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const bool set = byte[p] >> j & 1u;
      if (set) out.set(j, x[p].at(k));
      k += set;
    }
    store<8>(static_cast<T*>(job.to) + at[p].row * job.cols + at[p].col, out, at[p].count);
  }
}

// Any m: the values before a byte are those of the groups before it, and the set bits of its own group.
template <class T, bool CHECK>
__global__ void __launch_bounds__(kThreads) nm_gather_any(Job job) {
  const Spot at = spot_of(job, int64_t(blockIdx.x) * kThreads + threadIdx.x);
  if (at.count == 0) return;
  const uint8_t* row = job.bits + at.row * ((job.cols + 7) / 8);
  if constexpr (CHECK) {
    for (int64_t group = ceil_div(at.col, job.m) * job.m; group < at.col + at.count; group += job.m)
      if (nm::count_bits(row, group, group + job.m) != job.n) report(job, at, group);
  }
  const Eight<T> x = load<8>(static_cast<const T*>(job.from) + at.row * job.cols + at.col, at.count);
  const uint32_t byte = row[at.col / 8];
  int64_t k = nm::place_of(row, at.col, job.n, job.m);
  T* to = static_cast<T*>(job.to) + at.row * job.kept;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (j < at.count && (byte >> j & 1u) && k < job.kept) to[k++] = x.get(j);
}

template <class T>
__global__ void __launch_bounds__(kThreads) nm_expand_any(Job job) {
  const Spot at = spot_of(job, int64_t(blockIdx.x) * kThreads + threadIdx.x);
  if (at.count == 0) return;
  const uint8_t* row = job.bits + at.row * ((job.cols + 7) / 8);
  const uint32_t byte = row[at.col / 8];
  int64_t k = nm::place_of(row, at.col, job.n, job.m);
  const T* from = static_cast<const T*>(job.from) + at.row * job.kept;
  Eight<T> out;
  out.clear();
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if ((byte >> j & 1u) && k < job.kept) out.set(j, from[k++]);
  store<8>(static_cast<T*>(job.to) + at.row * job.cols + at.col, out, at.count);
}

Job job_of(const void* from, void* to, const uint8_t* bits, int64_t rows, int64_t cols, int n, int m,
           int64_t* wrong_row) {
  Job job{from, to, bits, rows, cols, 0, 0, cols, n, m, 8 * n / m, reinterpret_cast<long long*>(wrong_row)};
  if (cols % 8 == 0) {
    job.cols *= rows;
    job.rows = 1;
  }
  job.kept = job.cols / m * n;
  job.bytes = job.rows * ceil_div(job.cols, 8);
  return job;
}

template <class T, bool CHECK>
void gather(const Job& job, uintptr_t stream) {
  auto four = nm_gather_bytes<T, 4, CHECK>;
  auto bytes = nm_gather_bytes<T, 0, CHECK>;
  auto any = nm_gather_any<T, CHECK>;
  const unsigned wide = unsigned(ceil_div(job.bytes, kThreads * kPer));
  if (8 % job.m)
    FU_LAUNCH(any, unsigned(ceil_div(job.bytes, kThreads)), kThreads, 0, stream, job);
  else if (job.per_byte == 4)
    FU_LAUNCH(four, wide, kThreads, 0, stream, job);
  else
    FU_LAUNCH(bytes, wide, kThreads, 0, stream, job);
}

template <class T>
void gather(const Job& job, uintptr_t stream) {
  if (job.wrong_row != nullptr)
    gather<T, true>(job, stream);
  else
    gather<T, false>(job, stream);
}

template <class T>
void expand(const Job& job, uintptr_t stream) {
  auto four = nm_expand_bytes<T, 4>;
  auto bytes = nm_expand_bytes<T, 0>;
  auto any = nm_expand_any<T>;
  const unsigned wide = unsigned(ceil_div(job.bytes, kThreads * kPer));
  if (8 % job.m)
    FU_LAUNCH(any, unsigned(ceil_div(job.bytes, kThreads)), kThreads, 0, stream, job);
  else if (job.per_byte == 4)
    FU_LAUNCH(four, wide, kThreads, 0, stream, job);
  else
    FU_LAUNCH(bytes, wide, kThreads, 0, stream, job);
}

}  // namespace

void nm_gather(const void* dense, const uint8_t* bits, int64_t rows, int64_t cols, int n, int m, int size,
               void* values, int64_t* wrong_row, int device, uintptr_t stream) {
  if (rows == 0 || cols == 0) return;
  const DeviceGuard guard(device);
  const Job job = job_of(dense, values, bits, rows, cols, n, m, wrong_row);
  if (size == 2)
    gather<uint16_t>(job, stream);
  else if (size == 4)
    gather<uint32_t>(job, stream);
  else
    gather<uint64_t>(job, stream);
}

void nm_expand(const void* values, const uint8_t* bits, int64_t rows, int64_t cols, int n, int m, int size,
               void* dense, int device, uintptr_t stream) {
  if (rows == 0 || cols == 0) return;
  const DeviceGuard guard(device);
  const Job job = job_of(values, dense, bits, rows, cols, n, m, nullptr);
  if (size == 2)
    expand<uint16_t>(job, stream);
  else if (size == 4)
    expand<uint32_t>(job, stream);
  else
    expand<uint64_t>(job, stream);
}

}  // namespace fu::cuda
