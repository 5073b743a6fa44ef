#include "mask.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fu::FU_ISA {
namespace {

constexpr int64_t kGrain = 1 << 16;
// Entries up to which one thread is done before the others are awake.
constexpr int64_t kSerial = 1 << 20;

// Eight bytes of any value -> eight bits. The comparison makes every byte 0 or 1; the multiplication gathers
// the eight low bits in the top byte.
inline uint8_t pack8(const uint8_t* p) {
  uint64_t v;
  memcpy(&v, p, 8);
  v |= v >> 4;
  v |= v >> 2;
  v |= v >> 1;
  v &= 0x0101010101010101ull;
  return uint8_t((v * 0x0102040810204080ull) >> 56);
}

inline void unpack8(uint8_t bits, uint8_t* p) {
  const uint64_t spread = (uint64_t(bits) * 0x0101010101010101ull) & 0x8040201008040201ull;
  const uint64_t ones = ((spread + 0x7f7f7f7f7f7f7f7full) | spread) >> 7 & 0x0101010101010101ull;
  memcpy(p, &ones, 8);
}

void pack_run(const uint8_t* in, int64_t n, uint8_t* out) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  for (; i + 64 <= n; i += 64) {
    const __m512i v = _mm512_loadu_si512(in + i);
    const uint64_t m = _mm512_test_epi8_mask(v, v);
    memcpy(out + i / 8, &m, 8);
  }
#elif defined(__AVX2__)
  for (; i + 32 <= n; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
    const uint32_t m = ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
    memcpy(out + i / 8, &m, 4);
  }
#endif
  for (; i + 8 <= n; i += 8) out[i / 8] = pack8(in + i);
  if (i < n) {
    uint8_t tail[8] = {};
    memcpy(tail, in + i, size_t(n - i));
    out[i / 8] = pack8(tail);
  }
}

void unpack_run(const uint8_t* bits, int64_t n, uint8_t* out) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  for (; i + 64 <= n; i += 64) {
    uint64_t m;
    memcpy(&m, bits + i / 8, 8);
    _mm512_storeu_si512(out + i, _mm512_maskz_set1_epi8(m, 1));
  }
#endif
  for (; i + 8 <= n; i += 8) unpack8(bits[i / 8], out + i);
  if (i < n) {
    uint8_t tail[8];
    unpack8(bits[i / 8], tail);
    memcpy(out + i, tail, size_t(n - i));
  }
}

int64_t count_run(const uint8_t* bits, int64_t bytes) {
  int64_t total = 0, i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t v;
    memcpy(&v, bits + i, 8);
    total += __builtin_popcountll(v);
  }
  for (; i < bytes; ++i) total += __builtin_popcount(bits[i]);
  return total;
}

// Calls f(first column, columns, row) on pieces that start on a byte of the mask. Rows of whole bytes form
// one long row, which keeps small rows cheap.
template <class F>
void for_pieces(int64_t rows, int64_t cols, F f) {
  if (rows == 0 || cols == 0) return;
  if (cols % 8 == 0) {
    cols *= rows;
    rows = 1;
  }
  const int64_t per_row = (cols + kGrain - 1) / kGrain;
  const int64_t n = rows * per_row;
#pragma omp parallel for schedule(static) if (rows * cols > kSerial)
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = i / per_row, at = i % per_row * kGrain;
    f(at, cols - at < kGrain ? cols - at : kGrain, row, cols);
  }
}

}  // namespace

void mask_pack(const uint8_t* bools, int64_t rows, int64_t cols, uint8_t* bits) {
  for_pieces(rows, cols, [&](int64_t at, int64_t n, int64_t row, int64_t width) {
    pack_run(bools + row * width + at, n, bits + row * ((width + 7) / 8) + at / 8);
  });
}

void mask_unpack(const uint8_t* bits, int64_t rows, int64_t cols, uint8_t* bools) {
  for_pieces(rows, cols, [&](int64_t at, int64_t n, int64_t row, int64_t width) {
    unpack_run(bits + row * ((width + 7) / 8) + at / 8, n, bools + row * width + at);
  });
}

int64_t mask_count(const uint8_t* bits, int64_t bytes) {
  int64_t total = 0;
  const int64_t n = (bytes + kGrain - 1) / kGrain;
#pragma omp parallel for schedule(static) reduction(+ : total) if (n > 1)
  for (int64_t i = 0; i < n; ++i)
    total += count_run(bits + i * kGrain, bytes - i * kGrain < kGrain ? bytes - i * kGrain : kGrain);
  return total;
}

void mask_counts(const int64_t* masks, int64_t n, int64_t* out) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < n; ++i) bytes += masks[2 * i + 1];
#pragma omp parallel for schedule(dynamic, 1) if (n > 1 && bytes > 4 * kGrain)
  for (int64_t i = 0; i < n; ++i) {
    const auto* bits = reinterpret_cast<const uint8_t*>(masks[2 * i]);
    out[i] = n > 1 ? count_run(bits, masks[2 * i + 1]) : mask_count(bits, masks[2 * i + 1]);
  }
}

void mask_prefix(const uint8_t* bits, int64_t bytes, int64_t chunk, int64_t* out) {
  const int64_t n = (bytes + chunk - 1) / chunk;
#pragma omp parallel for schedule(static) if (bytes > kGrain)
  for (int64_t i = 0; i < n; ++i)
    out[i + 1] = count_run(bits + i * chunk, bytes - i * chunk < chunk ? bytes - i * chunk : chunk);
  out[0] = 0;
  for (int64_t i = 0; i < n; ++i) out[i + 1] += out[i];
}

}  // namespace fu::FU_ISA
