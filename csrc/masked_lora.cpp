#include "masked_lora.h"

#include "widen.h"

namespace fu::FU_ISA {
namespace {

using namespace fu::masked_lora;

// Entries up to which one thread is done before the others are awake.
constexpr int64_t kSerial = 1 << 16;
// Rows of one pass over the factors: their sums stay in registers.
#if defined(__AVX512F__)
constexpr int kRows = 8, kRowsBack = 4;
#else
constexpr int kRows = 4, kRowsBack = 2;
#endif
constexpr int kRanks = 4;
constexpr int64_t kColumns = 512, kRun = 64, kChunk = 16;

struct Factors {
  const float *A, *B;
  int64_t cols, rank;
};

inline float total(const Float16& x) {
  using Half = float __attribute__((vector_size(kLanes * 2)));
  using Quarter = float __attribute__((vector_size(kLanes)));
  Half halves[2];
  memcpy(halves, &x, sizeof x);
  const Half sum = halves[0] + halves[1];
  Quarter quarters[2];
  memcpy(quarters, &sum, sizeof sum);
  const Quarter last = quarters[0] + quarters[1];
  return (last[0] + last[1]) + (last[2] + last[3]);
}

// R rows, columns [from, to); `from` a multiple of 16. All pointers are those of the first row.
template <int R, class W, class O>
void effective(const W* w, const Factors& f, const float* B, const uint8_t* bits, int64_t width, int64_t from,
               int64_t to, float scale, O* out) {
  int64_t j = from;
  for (; j + kLanes <= to; j += kLanes) {
    Float16 sum[R] = {};
    for (int64_t k = 0; k < f.rank; ++k) {
      const Float16 a = load_lanes(f.A + k * f.cols + j);
      for (int r = 0; r < R; ++r) sum[r] += B[r * f.rank + k] * a;
    }
    for (int r = 0; r < R; ++r) {
      const Float16 x = load_lanes(w + r * f.cols + j);
      store_lanes(choose_lanes(bits + r * width + j / 8, x + scale * sum[r], x), out + r * f.cols + j);
    }
  }
  for (; j < to; ++j)
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int64_t k = 0; k < f.rank; ++k) sum += B[r * f.rank + k] * f.A[k * f.cols + j];
      const float x = to_float(w[r * f.cols + j]);
      out[r * f.cols + j] = from_float<O>(bits[r * width + j / 8] >> (j & 7) & 1 ? x + scale * sum : x);
    }
}

template <class W, class O>
void effective_rows(const void* weight, const Factors& f, const uint8_t* bits, int64_t rows, float scale,
                    void* out) {
  const int64_t width = ceil_div(f.cols, 8);
#pragma omp parallel for schedule(static) if (rows * f.cols > kSerial)
  for (int64_t run = 0; run < ceil_div(rows, kRun); ++run) {
    const int64_t end = rows < (run + 1) * kRun ? rows : (run + 1) * kRun;
    for (int64_t from = 0; from < f.cols; from += kColumns) {
      const int64_t to = f.cols < from + kColumns ? f.cols : from + kColumns;
      int64_t r = run * kRun;
      auto some = [&]<int R>() {
        for (; r + R <= end; r += R)
          effective<R>(static_cast<const W*>(weight) + r * f.cols, f, f.B + r * f.rank, bits + r * width,
                       width, from, to, scale, static_cast<O*>(out) + r * f.cols);
      };
      some.template operator()<kRows>();
      some.template operator()<1>();
    }
  }
}

// R rows, K ranks, n columns. Pointers are those of the first entry; dB is written, dA added to.
template <int R, int K, class T>
void contract(const T* g, const float* A, const float* B, const uint8_t* bits, int64_t width, int64_t cols,
              int64_t rank, int64_t n, float* dA, float* dB) {
  Float16 dots[R][K] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Float16 x[R];
    for (int r = 0; r < R; ++r) x[r] = keep_lanes(bits + r * width + j / 8, load_lanes(g + r * cols + j));
    for (int k = 0; k < K; ++k) {
      const Float16 a = load_lanes(A + k * cols + j);
      Float16 sum = load_lanes(dA + k * cols + j);
      for (int r = 0; r < R; ++r) {
        dots[r][k] += x[r] * a;
        sum += B[r * rank + k] * x[r];
      }
      store_lanes(sum, dA + k * cols + j);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k) {
      float sum = total(dots[r][k]);
      for (int64_t i = j; i < n; ++i) {
        const float x = bits[r * width + i / 8] >> (i & 7) & 1 ? to_float(g[r * cols + i]) : 0.f;
        sum += x * A[k * cols + i];
        dA[k * cols + i] += B[r * rank + k] * x;
      }
      dB[r * rank + k] = sum;
    }
}

// The rows [begin, end) of one strip of n columns from `from`. partial: of the strip, [rows, rank].
template <class T>
void contract_strip(const T* G, const Factors& f, const uint8_t* bits, int64_t begin, int64_t end,
                    int64_t from, int64_t n, float* partial, float* dA) {
  const int64_t width = ceil_div(f.cols, 8);
  int64_t r = begin;
  auto some = [&]<int R>() {
    for (; r + R <= end; r += R) {
      auto ranks = [&]<int K>(int64_t k) {
        contract<R, K>(G + r * f.cols + from, f.A + k * f.cols + from, f.B + r * f.rank + k,
                       bits + r * width + from / 8, width, f.cols, f.rank, n, dA + k * f.cols + from,
                       partial + r * f.rank + k);
      };
      int64_t k = 0;
      for (; k + kRanks <= f.rank; k += kRanks) ranks.template operator()<kRanks>(k);
      for (; k < f.rank; ++k) ranks.template operator()<1>(k);
    }
  };
  some.template operator()<kRowsBack>();
  some.template operator()<1>();
}

template <class T>
void contract_strips(const void* G, const Factors& f, const uint8_t* bits, int64_t rows, float* partial,
                     float* dA, float* dB) {
  const int64_t wide = strip(f.cols), strips = ceil_div(f.cols, wide);
#pragma omp parallel if (rows * f.cols > kSerial)
  {
    // Some rows of all of its strips before the next rows: memory is read in order.
    for (int64_t begin = 0; begin < rows; begin += kChunk) {
      const int64_t end = rows < begin + kChunk ? rows : begin + kChunk;
#pragma omp for schedule(static) nowait
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t from = s * wide, n = f.cols - from < wide ? f.cols - from : wide;
        contract_strip(static_cast<const T*>(G), f, bits, begin, end, from, n, partial + s * rows * f.rank,
                       dA);
      }
    }
  }
  for (int64_t i = 0; i < rows * f.rank; ++i) {
    float sum = partial[i];
    for (int64_t s = 1; s < strips; ++s) sum += partial[s * rows * f.rank + i];
    dB[i] = sum;
  }
}

// Of the bits of an entry, whatever its type: what is masked out becomes +0, also NaN and infinity.
template <class U>
void keep_run(U* x, const uint8_t* bits, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  constexpr int kWide = 64 / sizeof(U);
  for (; i + kWide <= n; i += kWide) {
    uint32_t m = 0;
    memcpy(&m, bits + i / 8, kWide / 8);
    if constexpr (sizeof(U) == 4)
      _mm512_storeu_si512(x + i, _mm512_maskz_loadu_epi32(static_cast<__mmask16>(m), x + i));
    else
      _mm512_storeu_si512(x + i, _mm512_maskz_loadu_epi16(m, x + i));
  }
#endif
  for (; i + 8 <= n; i += 8) {
    const uint32_t byte = bits[i / 8];
    for (int j = 0; j < 8; ++j) x[i + j] &= U(0u - (byte >> j & 1u));
  }
  for (; i < n; ++i) x[i] &= U(0u - (bits[i / 8] >> (i & 7) & 1u));
}

template <class U>
void keep_rows(void* x, const uint8_t* bits, int64_t rows, int64_t cols) {
  const int64_t width = ceil_div(cols, 8);
#pragma omp parallel for schedule(static) if (rows * cols > kSerial)
  for (int64_t r = 0; r < rows; ++r) keep_run(static_cast<U*>(x) + r * cols, bits + r * width, cols);
}

}  // namespace

void masked_lora_effective(const void* weight, int weight_dtype, const float* A, const float* B,
                           const uint8_t* bits, int64_t rows, int64_t cols, int64_t rank, float scale,
                           void* out, int out_dtype) {
  const Factors f{A, B, cols, rank};
  if (weight_dtype == kF16)
    effective_rows<f16, f16>(weight, f, bits, rows, scale, out);
  else if (weight_dtype == kBF16)
    effective_rows<bf16, bf16>(weight, f, bits, rows, scale, out);
  else if (out_dtype == kF16)
    effective_rows<float, f16>(weight, f, bits, rows, scale, out);
  else if (out_dtype == kBF16)
    effective_rows<float, bf16>(weight, f, bits, rows, scale, out);
  else
    effective_rows<float, float>(weight, f, bits, rows, scale, out);
}

void masked_lora_contract(const void* G, int dtype, const float* A, const float* B, const uint8_t* bits,
                          int64_t rows, int64_t cols, int64_t rank, float* partial, float* dA, float* dB) {
  const Factors f{A, B, cols, rank};
  if (dtype == kF16)
    contract_strips<f16>(G, f, bits, rows, partial, dA, dB);
  else if (dtype == kBF16)
    contract_strips<bf16>(G, f, bits, rows, partial, dA, dB);
  else
    contract_strips<float>(G, f, bits, rows, partial, dA, dB);
}

void masked_lora_keep(void* x, int dtype, const uint8_t* bits, int64_t rows, int64_t cols) {
  if (dtype == kF32)
    keep_rows<uint32_t>(x, bits, rows, cols);
  else
    keep_rows<uint16_t>(x, bits, rows, cols);
}

}  // namespace fu::FU_ISA
