// topk_mask on a GPU. Global scope: a sample brackets the k-th value; one pass over the scores writes the
// bits that the bracket decides and puts the few entries inside it in a pool; digits of their keys find the
// k-th; the pool completes the bits. Where the bracket failed, and in the scope of tensors, digits are
// counted over the scores themselves. What to do is decided on the device: every kernel is launched, and
// returns at once where its problem needs nothing. Rows: a warp or a block for each row.
#include "simt.h"
#include "topk.h"
#include "topk_device.cuh"
#include "topk_rows.cuh"
#include "topk_stream.cuh"

namespace fu::cuda {
namespace {

// ---- the problems ---------------------------------------------------------------------------------------

enum Start { kSelect = 0, kHistogram = 1, kWrite = 2 };

// params [counts * scopes, 4]: k, lo or key, shift, take.
__global__ void topk_begin(Job job, int what) {
  const int64_t all = int64_t(job.counts) * job.scopes;
  const int64_t step = int64_t(gridDim.x) * blockDim.x, me = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t q = me; q < all; q += step) {
    const int64_t* from = job.params + 4 * q;
    const int tensor = int(q % job.scopes);
    Problem p{};
    p.k = u64(from[0]);
    p.total = u64(job.scopes == 1 ? job.total : job.tensors[tensor].rows * job.tensors[tensor].cols);
    count_scores(p);
    if (what == kSelect && p.k == 0 && job.scopes == 1) settle(p, 0xffffffffu, 0, 0);
    if (what == kHistogram) {
      p.lo = uint32_t(from[1]);
      p.shift = uint32_t(from[2]);
    }
    if (what == kWrite) settle(p, uint32_t(from[1]), u64(from[3]), ~u64(0));
    job.problems[q] = p;
  }
  for (int64_t i = me; i < all * kTopkBins; i += step) job.histograms[i] = 0;
  if (job.first)
    for (int64_t i = me; i < kTopkBins; i += step) job.first[i] = 0;
  if (me == 0 && job.nan) *job.nan = 0;
}

// ---- digits ---------------------------------------------------------------------------------------------

template <class T, bool Abs>
__global__ void __launch_bounds__(kThreads) topk_digit(Job job) {
  __shared__ uint32_t counts[kTopkBins];
  for (int d = 0; d < job.counts; ++d) {
    int64_t owner = -1;
    const auto clear = [&] {
      for (int i = threadIdx.x; i < kTopkBins; i += kThreads) counts[i] = 0;
      __syncthreads();
    };
    const auto flush = [&] {
      __syncthreads();
      for (int i = threadIdx.x; i < kTopkBins; i += kThreads)
        if (counts[i]) atomicAdd(&job.histograms[owner * kTopkBins + i], u64(counts[i]));
      __syncthreads();
    };
    if (job.scopes == 1 && job.problems[d].mode == kPool) {
      const Problem& p = job.problems[d];
      if (p.done) continue;
      owner = d;
      clear();
      const Pool<T, Abs> pool(job, p, d, 0);
      const uint32_t lo = p.lo, shift = p.shift, bins = p.bins;
      for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < int64_t(p.pool);
           i += int64_t(gridDim.x) * kThreads) {
        const uint32_t x = pool.key(i);
        if (x >= lo && (x - lo) >> shift < bins) atomicAdd(&counts[(x - lo) >> shift], 1u);
      }
      flush();
      continue;
    }
    Walk w = walk(job);
    for (; w.tile < w.last; ++w.tile) {
      const Tile tile = at(job, w);
      const int64_t q = int64_t(d) * job.scopes + (job.scopes == 1 ? 0 : tile.index);
      const Problem& p = job.problems[q];
      if (p.done) continue;
      if (q != owner) {
        if (owner >= 0) flush();
        owner = q;
        clear();
      }
      const uint32_t lo = p.lo, shift = p.shift, bins = p.bins;
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t byte = tile.byte + i * kThreads + threadIdx.x;
        if (byte >= tile.bytes) break;
        Eight<T> v;
        load8(*tile.tensor, byte, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t x = topk_key(float_bits(widen(v[j])), Abs);
          if (x != 0 && x >= lo && (x - lo) >> shift < bins) atomicAdd(&counts[(x - lo) >> shift], 1u);
        }
      }
    }
    if (owner >= 0) flush();
  }
}

// A block a problem: narrows the range to the digit that holds the entry looked for.
__global__ void __launch_bounds__(kThreads) topk_pick(Job job, int level) {
  Problem& p = job.problems[blockIdx.x];
  if (p.done) return;
  u64* counts = job.histograms + int64_t(blockIdx.x) * kTopkBins;
  if (p.mode == kScores && level == 0) {
    u64 mine = 0, valid;
    for (int i = threadIdx.x; i < kTopkBins; i += kThreads) mine += counts[i];
    block_scan(mine, &valid);
    if (threadIdx.x == 0) {
      p.rank = p.k < valid ? p.k : valid;
      if (p.rank == 0) settle(p, 0xffffffffu, 0, 0);
      if (job.scopes > 1 && int(blockIdx.x) < job.scopes && valid < p.total)
        atomicAdd(job.nan, p.total - valid);
    }
    __syncthreads();
    if (p.done) return;
  }
  u64 higher;
  const int bin = pick_bin(counts, p.rank, &higher);
  if (threadIdx.x == 0) {
    p.rank -= higher;
    p.lo += uint32_t(bin) << p.shift;
    if (p.shift == 0) {
      settle(p, p.lo, p.rank, counts[bin]);
    } else {
      const uint32_t next = p.shift > 11 ? p.shift - 11 : 0;
      p.bins = 1u << (p.shift - next);
      p.shift = next;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTopkBins; i += kThreads) counts[i] = 0;
}

// ---- ties and the last bits -----------------------------------------------------------------------------

__device__ inline bool shares_ties(const Problem& p) {
  return p.take > 0 && p.take < p.ties;
}

template <class T, bool Abs>
__global__ void __launch_bounds__(kThreads) topk_ties(Job job) {
  __shared__ uint32_t found;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = 0; d < job.counts; ++d) {
    if (job.scopes == 1 && job.problems[d].mode == kPool) {
      const Problem& p = job.problems[d];
      if (!shares_ties(p)) continue;
      const int64_t warps = int64_t(gridDim.x) * (kThreads / 32);
      for (int64_t tile = int64_t(blockIdx.x) * (kThreads / 32) + warp; tile < job.tiles; tile += warps) {
        const int64_t record = d * job.tiles + tile;
        const Pool<T, Abs> pool(job, p, d, job.start[record]);
        u64 ties = 0;
        for (uint32_t i = lane; i < job.count[record]; i += 32) ties += pool.key(i) == p.key;
        ties = warp_sum(ties);
        if (lane == 0) job.before[record] = ties;
      }
      continue;
    }
    Walk w = walk(job);
    for (; w.tile < w.last; ++w.tile) {
      const Tile tile = at(job, w);
      const Problem& p = job.problems[int64_t(d) * job.scopes + (job.scopes == 1 ? 0 : tile.index)];
      if (!shares_ties(p)) continue;
      if (threadIdx.x == 0) found = 0;
      __syncthreads();
      uint32_t ties = 0;
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t byte = tile.byte + i * kThreads + threadIdx.x;
        if (byte >= tile.bytes) break;
        Eight<T> v;
        load8(*tile.tensor, byte, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) ties += topk_key(float_bits(widen(v[j])), Abs) == p.key;
      }
      if (ties) atomicAdd(&found, ties);
      __syncthreads();
      if (threadIdx.x == 0) job.before[d * job.tiles + w.tile] = found;
      __syncthreads();
    }
  }
}

// A block a problem: from the ties of its tiles to those before each.
__global__ void __launch_bounds__(kWide) topk_before(Job job) {
  const Problem& p = job.problems[blockIdx.x];
  if (!shares_ties(p)) return;
  const int64_t d = blockIdx.x / job.scopes, scope = blockIdx.x % job.scopes;
  int64_t first = 0, last = job.tiles;
  if (job.scopes > 1) {
    first = job.tensors[scope].first_tile;
    if (scope + 1 < job.n) last = job.tensors[scope + 1].first_tile;
  }
  u64 carry = 0, sum;
  u64* before = job.before + d * job.tiles;
  constexpr int kEach = 16;
  for (int64_t from = first; from < last; from += kWide * kEach) {
    const int64_t mine = from + int64_t(threadIdx.x) * kEach;
    u64 ties[kEach], own = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      ties[i] = mine + i < last ? before[mine + i] : 0;
      own += ties[i];
    }
    u64 upto = carry + block_scan(own, &sum) - own;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (mine + i < last) before[mine + i] = upto;
      upto += ties[i];
    }
    carry += sum;
  }
}

__device__ inline void set_bit(uint8_t* bits, int64_t byte, uint32_t bit) {
  // The atomic works on the aligned word around the byte: another tile may share it.
  const uintptr_t address = reinterpret_cast<uintptr_t>(bits + byte);
  atomicOr(reinterpret_cast<uint32_t*>(address & ~uintptr_t(3)), 1u << (8 * (address & 3) + bit));
}

template <class T, bool Abs>
__global__ void __launch_bounds__(kThreads) topk_patch(Job job) {
  __shared__ uint32_t tie[kTileBytes / 4];
  const int lane = threadIdx.x % 32;
  for (int d = 0; d < job.counts; ++d) {
    if (job.scopes == 1 && job.problems[d].mode == kPool) {
      // A warp a tile.
      const Problem& p = job.problems[d];
      if (p.key == 0xffffffffu) continue;
      const int64_t warps = int64_t(gridDim.x) * (kThreads / 32);
      for (int64_t i = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < job.tiles; i += warps) {
        const int64_t record = d * job.tiles + i;
        const uint32_t n = job.count[record];
        if (n == 0) continue;
        const Pool<T, Abs> pool(job, p, d, job.start[record]);
        // Ties at places below `limit` are taken.
        uint32_t limit = p.take > 0 ? 8u * kTileBytes : 0;
        if (shares_ties(p)) {
          const u64 before = job.before[record], left = before < p.take ? p.take - before : 0;
          uint32_t low = 0;
          while (low < limit) {
            const uint32_t mid = (low + limit) / 2;
            u64 below = 0;
            for (uint32_t c = lane; c < n; c += 32) below += pool.place(c) < mid + 1 && pool.key(c) == p.key;
            if (warp_sum(below) > left)
              limit = mid;
            else
              low = mid + 1;
          }
        }
        Walk w{i, i + 1, tensor_of(job, i)};
        const Tile tile = at(job, w);
        uint8_t* bits = bits_of(job, d, tile.index);
        for (uint32_t c = lane; c < n; c += 32) {
          const uint32_t x = pool.key(c), place = pool.place(c);
          if (x > p.key || (x == p.key && place < limit)) set_bit(bits, tile.byte + place / 8, place % 8);
        }
      }
      continue;
    }
    Walk w = walk(job);
    for (; w.tile < w.last; ++w.tile) {
      const Tile tile = at(job, w);
      const Problem& p = job.problems[int64_t(d) * job.scopes + (job.scopes == 1 ? 0 : tile.index)];
      uint8_t* ties = reinterpret_cast<uint8_t*>(tie);
      uint8_t above[kPerThread];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t byte = tile.byte + i * kThreads + threadIdx.x;
        uint32_t over = 0, equal = 0;
        if (byte < tile.bytes) {
          Eight<T> v;
          load8(*tile.tensor, byte, v);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const uint32_t x = topk_key(float_bits(widen(v[j])), Abs);
            over |= uint32_t(x > p.key) << j;
            equal |= uint32_t(x == p.key && x != 0) << j;
          }
        }
        above[i] = uint8_t(over);
        ties[i * kThreads + threadIdx.x] = uint8_t(p.take > 0 ? equal : 0);
      }
      __syncthreads();
      if (shares_ties(p)) {
        const u64 before = job.before[d * job.tiles + w.tile], left = before < p.take ? p.take - before : 0;
        const uint32_t word = tie[threadIdx.x];
        u64 sum;
        const u64 earlier = block_scan(__popc(word), &sum) - __popc(word);
        tie[threadIdx.x] = lowest_bits(word, earlier < left ? left - earlier : 0);
        __syncthreads();
      }
      uint8_t* bits = bits_of(job, d, tile.index);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t byte = tile.byte + i * kThreads + threadIdx.x;
        if (byte < tile.bytes) bits[byte] = uint8_t(above[i] | ties[i * kThreads + threadIdx.x]);
      }
      __syncthreads();
    }
  }
}

// ---- the host's side ------------------------------------------------------------------------------------

// A multiple of kWide. With 16 bits the pool has room for fewer entries of their own kind (two bytes of three
// are places): the bracket has to be narrower.
int64_t samples_for(int64_t total, int64_t item) {
  if (total <= kSmall) return 0;
  const int64_t want = item == 2 ? total / 32 : total / 64, most = item == 2 ? 262144 : 131072;
  return want < 8192 ? 8192 : want < most ? want / kWide * kWide : most;
}

// Entries of the pool: together with the sample and the tables 2 % of the scores' bytes.
int64_t room_for(int64_t total, int64_t item) {
  const int64_t room = int64_t(double(total) * double(item) * 0.016 / double(item + 2));
  return room < kSmall ? kSmall : room / 8 * 8;
}

struct Layout {
  int64_t bytes = 0;
  int64_t take(int64_t want) {
    const int64_t at = bytes;
    bytes += (want + 255) / 256 * 256;
    return at;
  }
};

// Lays the workspace out; with base 0 only its size.
int64_t lay_out(Job& job, uintptr_t base, int item, bool pooled) {
  Layout l;
  const int64_t problems = int64_t(job.counts) * job.scopes;
  job.problems = reinterpret_cast<Problem*>(base + l.take(problems * int64_t(sizeof(Problem))));
  job.histograms = reinterpret_cast<u64*>(base + l.take(problems * kTopkBins * 8));
  job.before = reinterpret_cast<u64*>(base + l.take(job.counts * job.tiles * 8));
  if (pooled) {
    job.samples = samples_for(job.total, item);
    job.room = room_for(job.total, item);
    job.start = reinterpret_cast<uint32_t*>(base + l.take(job.counts * job.tiles * 4));
    job.count = reinterpret_cast<uint32_t*>(base + l.take(job.counts * job.tiles * 4));
    job.pool = reinterpret_cast<char*>(base + l.take(job.counts * job.room * (item + 2)));
    job.first = reinterpret_cast<uint32_t*>(base + l.take(kTopkBins * 4));
    job.sample = reinterpret_cast<void*>(base + l.take(job.samples * item));
  }
  return l.bytes;
}

int item_size(int dtype) {
  return dtype == kF32 ? 4 : 2;
}

// Calls f(T(), Flag) for the element type and the key.
template <bool B>
struct Flag {
  static constexpr bool value = B;
};
template <class F>
void dispatch(int dtype, bool absolute, F f) {
  const auto by_key = [&](auto type) {
    if (absolute)
      f(type, Flag<true>());
    else
      f(type, Flag<false>());
  };
  if (dtype == kF32) by_key(float());
  if (dtype == kF16) by_key(f16());
  if (dtype == kBF16) by_key(bf16());
}

Job make_job(const TopkCudaCall& call) {
  Job job{};
  job.tensors = call.tensors;
  job.bits = reinterpret_cast<const u64*>(call.bits);
  job.params = call.params;
  job.n = int(call.n);
  job.counts = int(call.counts);
  job.scopes = int(call.scopes);
  job.total = call.total;
  job.tiles = call.tiles;
  job.nan = reinterpret_cast<u64*>(call.nan);
  return job;
}

unsigned grid_for(int64_t items, int device, int each) {
  const int64_t most = int64_t(multiprocessors(device)) * each;
  return unsigned(items < 1 ? 1 : items < most ? items : most);
}

template <class T, bool Abs>
void find_keys(const Job& job, unsigned grid, [[maybe_unused]] uintptr_t stream) {
  const unsigned problems = unsigned(job.counts * job.scopes);
  const auto digit = topk_digit<T, Abs>;
  for (int level = 0; level < 3; ++level) {
    FU_LAUNCH(digit, grid, kThreads, 0, stream, job);
    FU_LAUNCH(topk_pick, problems, kThreads, 0, stream, job, level);
  }
}

template <class T, bool Abs>
void write_bits(const Job& job, unsigned grid, [[maybe_unused]] uintptr_t stream) {
  const auto ties = topk_ties<T, Abs>;
  const auto patch = topk_patch<T, Abs>;
  FU_LAUNCH(ties, grid, kThreads, 0, stream, job);
  FU_LAUNCH(topk_before, unsigned(job.counts * job.scopes), kWide, 0, stream, job);
  FU_LAUNCH(patch, grid, kThreads, 0, stream, job);
}

}  // namespace

int64_t topk_tile_bytes() {
  return kTileBytes;
}

int64_t topk_workspace(int64_t counts, int64_t scopes, int64_t total, int64_t tiles, int dtype, bool pooled) {
  Job job{};
  job.counts = int(counts);
  job.scopes = int(scopes);
  job.total = total;
  job.tiles = tiles;
  return lay_out(job, 0, item_size(dtype), pooled);
}

void topk_select(const TopkCudaCall& call) {
  const DeviceGuard guard(call.device);
  Job job = make_job(call);
  const bool pooled = job.scopes == 1;
  lay_out(job, call.workspace, item_size(call.dtype), pooled);
  const unsigned grid = grid_for(job.tiles, call.device, 8);
  FU_LAUNCH(topk_begin, grid_for(job.counts * job.scopes, call.device, 8), kThreads, 0, call.stream, job,
            kSelect);
  if (job.tiles == 0) return;
  dispatch(call.dtype, call.absolute, [&](auto type, auto flag) {
    using T = decltype(type);
    constexpr bool kAbs = decltype(flag)::value;
    if (pooled) {
      const auto sample = topk_sample<T, kAbs>;
      const auto bracket = topk_bracket<T, kAbs>;
      const auto stream = topk_stream<T, kAbs>;
      if (job.samples > 0) FU_LAUNCH(sample, unsigned(job.samples / kWide), kWide, 0, call.stream, job);
      FU_LAUNCH(bracket, unsigned(job.counts), kWide, 0, call.stream, job);
      // One wave: every block has its share of the tiles from the start.
      const int resident = resident_blocks(stream, kThreads);
      FU_LAUNCH(stream, grid_for(job.tiles, call.device, resident), kThreads, 0, call.stream, job);
      FU_LAUNCH(topk_judge, 1, kThreads, 0, call.stream, job);
    }
    find_keys<T, kAbs>(job, grid, call.stream);
    write_bits<T, kAbs>(job, grid, call.stream);
  });
}

void topk_rows(const TopkCudaCall& call) {
  const DeviceGuard guard(call.device);
  Job job = make_job(call);
  memset_async(job.nan, 0, sizeof(u64), call.stream);
  if (job.tiles == 0) return;
  dispatch(call.dtype, call.absolute, [&](auto type, auto flag) {
    const auto short_rows = topk_short_rows<decltype(type), decltype(flag)::value>;
    const auto long_rows = topk_long_rows<decltype(type), decltype(flag)::value>;
    FU_LAUNCH(short_rows, grid_for(ceil_div(job.tiles, kThreads / 32), call.device, 32), kThreads, 0,
              call.stream, job);
    FU_LAUNCH(long_rows, grid_for(job.tiles, call.device, 32), kThreads, 0, call.stream, job);
  });
}

void topk_histogram(const TopkCudaCall& call, int64_t* out) {
  const DeviceGuard guard(call.device);
  Job job = make_job(call);
  lay_out(job, call.workspace, item_size(call.dtype), false);
  job.histograms = reinterpret_cast<u64*>(out);
  FU_LAUNCH(topk_begin, grid_for(job.scopes, call.device, 8), kThreads, 0, call.stream, job, kHistogram);
  if (job.tiles == 0) return;
  dispatch(call.dtype, call.absolute, [&](auto type, auto flag) {
    const auto digit = topk_digit<decltype(type), decltype(flag)::value>;
    FU_LAUNCH(digit, grid_for(job.tiles, call.device, 8), kThreads, 0, call.stream, job);
  });
}

void topk_write(const TopkCudaCall& call) {
  const DeviceGuard guard(call.device);
  Job job = make_job(call);
  lay_out(job, call.workspace, item_size(call.dtype), false);
  FU_LAUNCH(topk_begin, grid_for(job.scopes, call.device, 8), kThreads, 0, call.stream, job, kWrite);
  if (job.tiles == 0) return;
  dispatch(call.dtype, call.absolute, [&](auto type, auto flag) {
    write_bits<decltype(type), decltype(flag)::value>(job, grid_for(job.tiles, call.device, 8), call.stream);
  });
}

}  // namespace fu::cuda
