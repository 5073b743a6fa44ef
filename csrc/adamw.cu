// Masked AdamW, SGD and the masked gradient norm: a list of tensors is one launch for each pair of element
// types.
//
// A block of threads takes a unit of a tensor, a warp a run of kBlock entries of it at a time. The lanes read
// the run's bits (a word each), list the places of the set ones in shared memory, and then go over the list
// side by side: moments lie together, of parameter and gradient only the sectors that hold a set bit are
// touched, and no arithmetic is spent on entries that do not move.
#include "adamw.h"
#include "simt.h"
#include "stochastic.h"

namespace fu::cuda {
namespace {

using namespace fu::masked;

constexpr int kWarps = 8;
constexpr int kAhead = 4;  // entries of a lane whose loads are in flight together
constexpr uint32_t kAll = 0xffffffffu;

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr int value = kF32;
};
template <>
struct TypeOf<f16> {
  static constexpr int value = kF16;
};
template <>
struct TypeOf<bf16> {
  static constexpr int value = kBF16;
};

__device__ inline void put(float* p, float x, uint32_t, bool) {
  *p = x;
}
__device__ inline void put(f16* p, float x, uint32_t, bool) {
  *p = to_f16(x);
}
__device__ inline void put(bf16* p, float x, uint32_t random, bool stochastic) {
  *p = stochastic ? to_bf16_stochastic(x, random) : to_bf16(x);
}

struct Adam {
  float w1, beta2, w2, eps, lr_decay, step_size, root_correction;

  __device__ explicit Adam(const float* h)
      : w1(h[0]), beta2(h[1]), w2(h[2]), eps(h[3]), lr_decay(h[4]), step_size(h[5]), root_correction(h[6]) {}

  __device__ float operator()(float p, float g, float& m, float& v, float s) const {
    p -= lr_decay * s * p;
    m += w1 * (g - m);
    v = v * beta2 + w2 * g * g;
    return p - step_size * s * (m / (sqrtf(v) / root_correction + eps));
  }
};

struct Sgd {
  float momentum, gain, decay, lr;
  bool nesterov, first;

  __device__ explicit Sgd(const float* h)
      : momentum(h[0]), gain(h[1]), decay(h[2]), lr(h[3]), nesterov(h[4] != 0), first(h[5] != 0) {}

  __device__ float operator()(float p, float g, float& m, float&, float s) const {
    g += decay * p;
    const float b = first ? g : m * momentum + gain * g;
    m = b;
    return p - lr * s * (nesterov ? g + momentum * b : b);
  }
};

// The 32 bits of a lane in the run that starts at `start`; what lies behind the last entry is 0.
__device__ inline uint32_t read_word(const uint8_t* bits, int64_t start, int lane, int64_t numel) {
  const int64_t byte = start / 8 + lane * 4, bytes = (numel + 7) / 8;
  const uint8_t* p = bits + byte;
  if (byte + 4 <= bytes && (reinterpret_cast<uintptr_t>(p) & 3) == 0)
    return *reinterpret_cast<const uint32_t*>(p);
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i)
    if (byte + i < bytes) word |= uint32_t(p[i]) << (8 * i);
  return word;
}

// Lists the set bits of the warp's 32 words in ascending order; returns their number.
__device__ inline int list_bits(uint32_t word, int lane, uint16_t* list) {
  int sum = __popc(word);
  const int mine = sum;
  for (int d = 1; d < 32; d *= 2) {
    const int before = __shfl_up_sync(kAll, sum, d);
    if (lane >= d) sum += before;
  }
  int at = sum - mine;
  while (word) {
    list[at++] = uint16_t(lane * 32 + __ffs(int(word)) - 1);
    word &= word - 1;
  }
  __syncwarp();
  return __shfl_sync(kAll, sum, 31);
}

template <class Rule, class P, class G>
__global__ void __launch_bounds__(kWarps * 32) masked_update_kernel(Work work) {
  __shared__ uint16_t lists[kWarps][kBlock];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t unit = blockIdx.x, t = work.unit_tensor[unit];
  const int64_t* row = work.table + t * kFields;
  // Both types at once: of loads that wait for one another a block has enough.
  if ((row[kParamType] ^ TypeOf<P>::value) | (row[kGradType] ^ TypeOf<G>::value)) return;
  P* const params = reinterpret_cast<P*>(row[kParam]);
  const G* const grads = reinterpret_cast<const G*>(row[kGrad]);
  const uint8_t* const bits = reinterpret_cast<const uint8_t*>(row[kBits]);
  const int64_t* const prefix = reinterpret_cast<const int64_t*>(row[kPrefix]);
  float* const first = reinterpret_cast<float*>(row[kFirst]);
  float* const second = reinterpret_cast<float*>(row[kSecond]);
  float* const master = reinterpret_cast<float*>(row[kMaster]);
  const float* const scale = reinterpret_cast<const float*>(row[kScale]);
  const int64_t numel = row[kNumel];
  const bool stochastic = row[kStochastic] != 0;
  const float* const h = work.hyper + t * kHyper;
  const Rule rule(h);
  const float factor = h[7] * (work.grad_scale ? *work.grad_scale : 1.0f);
  const RoundKey tensor_key{work.keys[2 * t], work.keys[2 * t + 1]};
  const int64_t begin = (unit - work.first_unit[t]) * kUnit;
  const int64_t end = min(begin + kUnit, numel);

  // Bits and place of the next run are on their way while this one is worked on: where few entries move, a
  // run's time is that of the loads that wait for one another.
  int64_t start = begin + warp * kBlock, next_at = 0;
  uint32_t next = 0;
  if (bits && start < end) {
    next = read_word(bits, start, lane, numel);
    next_at = prefix[start / kBlock];
  }
  for (; start < end; start += kWarps * kBlock) {
    const int n = int(min(kBlock, end - start));
    int count = n;
    int64_t at = start;
    const uint16_t* list = nullptr;
    if (bits) {
      const uint32_t word = next;
      at = next_at;
      const int64_t following = start + kWarps * kBlock;
      if (following < end) {
        next = read_word(bits, following, lane, numel);
        next_at = prefix[following / kBlock];
      }
      count = list_bits(word, lane, lists[warp]);
      if (count < n) list = lists[warp];
    }
    const RoundKey key = with_high_word(tensor_key, uint32_t(uint64_t(start) >> 32));
    for (int from = lane; from < count; from += 32 * kAhead) {
      int place[kAhead];
      float p[kAhead], g[kAhead], m[kAhead], v[kAhead], s[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = from + 32 * j;
        m[j] = v[j] = 0.0f;
        s[j] = 1.0f;
        if (i >= count) continue;
        place[j] = list ? list[i] : i;
        g[j] = to_float(grads[start + place[j]]);
        p[j] = master ? master[at + i] : to_float(params[start + place[j]]);
        if (first) m[j] = first[at + i];
        if (second) v[j] = second[at + i];
        if (scale) s[j] = scale[at + i];
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = from + 32 * j;
        if (i >= count) continue;
        const float x = rule(p[j], g[j] * factor, m[j], v[j], s[j]);
        if (first) first[at + i] = m[j];
        if (second) second[at + i] = v[j];
        if (master) master[at + i] = x;
        const uint32_t random = stochastic ? counter_random(uint32_t(start) + uint32_t(place[j]), key) : 0;
        put(params + start + place[j], x, random, stochastic);
      }
    }
    __syncwarp();
  }
}

template <class G>
__global__ void __launch_bounds__(kWarps * 32) masked_sumsq_kernel(Work work, double* partial) {
  __shared__ uint16_t lists[kWarps][kBlock];
  __shared__ double sums[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t unit = blockIdx.x, t = work.unit_tensor[unit];
  const int64_t* row = work.table + t * kFields;
  if (row[kGradType] != TypeOf<G>::value) return;
  const G* const grads = reinterpret_cast<const G*>(row[kGrad]);
  const uint8_t* const bits = reinterpret_cast<const uint8_t*>(row[kBits]);
  const int64_t numel = row[kNumel];
  const int64_t begin = (unit - work.first_unit[t]) * kUnit;
  const int64_t end = min(begin + kUnit, numel);
  double total = 0;
  for (int64_t start = begin + warp * kBlock; start < end; start += kWarps * kBlock) {
    const int n = int(min(kBlock, end - start));
    int count = n;
    const uint16_t* list = nullptr;
    if (bits) {
      count = list_bits(read_word(bits, start, lane, numel), lane, lists[warp]);
      if (count < n) list = lists[warp];
    }
    // At most 32 squares a lane in fp32, the rest in fp64, which not every GPU is quick at.
    float sum = 0;
    for (int i = lane; i < count; i += 32) {
      const float g = to_float(grads[start + (list ? list[i] : i)]);
      sum += g * g;
    }
    double squares = double(sum);
    // What fp32 has lost of a sum in between, 32 squares below 2^-126 at most, is less than its rounding.
    if (sum < 0x1p-90f || sum > 0x1p127f) {
      squares = 0;
      for (int i = lane; i < count; i += 32) {
        const double g = double(to_float(grads[start + (list ? list[i] : i)]));
        squares += g * g;
      }
    }
    total += squares;
    __syncwarp();
  }
  for (int d = 16; d > 0; d /= 2) total += __shfl_xor_sync(kAll, total, d);
  if (lane == 0) sums[warp] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    double all = 0;
    for (int w = 0; w < kWarps; ++w) all += sums[w];
    partial[unit] = all;
  }
}

template <class Rule, class P, class G>
void launch_kind(const Work& work, uint32_t kinds, [[maybe_unused]] uintptr_t stream) {
  if (!(kinds >> (3 * TypeOf<P>::value + TypeOf<G>::value) & 1u)) return;
  auto kernel = masked_update_kernel<Rule, P, G>;
  FU_LAUNCH(kernel, unsigned(work.units), kWarps * 32, 0, stream, work);
}

template <class Rule, class P>
void launch_param(const Work& work, uint32_t kinds, uintptr_t stream) {
  launch_kind<Rule, P, float>(work, kinds, stream);
  launch_kind<Rule, P, f16>(work, kinds, stream);
  launch_kind<Rule, P, bf16>(work, kinds, stream);
}

template <class Rule>
void launch_all(const Work& work, uint32_t kinds, int device, uintptr_t stream) {
  if (work.units == 0) return;
  const DeviceGuard guard(device);
  launch_param<Rule, float>(work, kinds, stream);
  launch_param<Rule, f16>(work, kinds, stream);
  launch_param<Rule, bf16>(work, kinds, stream);
}

template <class G>
void launch_sumsq(const Work& work, double* partial, uint32_t kinds, [[maybe_unused]] uintptr_t stream) {
  if (!(kinds >> TypeOf<G>::value & 0x49u)) return;  // bits 0, 3 and 6: any type of parameter
  auto kernel = masked_sumsq_kernel<G>;
  FU_LAUNCH(kernel, unsigned(work.units), kWarps * 32, 0, stream, work, partial);
}

}  // namespace

void masked_adamw(const Work& work, uint32_t kinds, int device, uintptr_t stream) {
  launch_all<Adam>(work, kinds, device, stream);
}

void masked_sgd(const Work& work, uint32_t kinds, int device, uintptr_t stream) {
  launch_all<Sgd>(work, kinds, device, stream);
}

void masked_sumsq(const Work& work, double* partial, uint32_t kinds, int device, uintptr_t stream) {
  if (work.units == 0) return;
  const DeviceGuard guard(device);
  launch_sumsq<float>(work, partial, kinds, stream);
  launch_sumsq<f16>(work, partial, kinds, stream);
  launch_sumsq<bf16>(work, partial, kinds, stream);
}

}  // namespace fu::cuda
