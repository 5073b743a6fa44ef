#include "nm_tensor.h"

#if defined(__AVX2__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operand inside its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#endif

namespace fu::FU_ISA {
namespace {

constexpr int64_t kSerial = 1 << 18;  // entries that are done before the other threads are awake
// Dense bytes beyond which they leave the cache before anyone reads them: written past it.
constexpr int64_t kPastCache = 16 << 20;

// The bits of a byte whose columns exist.
inline uint32_t bits_of(uint8_t byte, int64_t columns) {
  return columns < 8 ? byte & ((1u << columns) - 1u) : byte;
}

// One run: `columns` columns that start on a byte of the mask and on a group, with `count` values. No value
// outside of these is read or written, whatever the bits.
template <class T>
struct Run {
  const uint8_t* bits;
  int64_t columns, count;
};

template <class T>
void gather_scalar(const T* dense, const Run<T>& run, int64_t i, int64_t k, T* values) {
  for (; i < run.columns; i += 8)
    for (uint32_t rest = bits_of(run.bits[i / 8], run.columns - i); rest != 0 && k < run.count;
         rest &= rest - 1)
      values[k++] = dense[i + __builtin_ctz(rest)];
}

template <class T>
void expand_scalar(const T* values, const Run<T>& run, int64_t i, int64_t k, T* dense) {
  for (; i < run.columns; i += 8) {
    uint32_t rest = bits_of(run.bits[i / 8], run.columns - i);
    const int64_t width = run.columns - i < 8 ? run.columns - i : 8;
    memset(dense + i, 0, size_t(width) * sizeof(T));
    for (; rest != 0 && k < run.count; rest &= rest - 1) dense[i + __builtin_ctz(rest)] = values[k++];
  }
}

#if defined(__AVX512BW__)

inline __m512i widen(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i widen(const uint32_t* p) {
  return _mm512_loadu_si512(p);
}
inline void narrow(uint16_t* p, __m512i x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
inline void narrow(uint32_t* p, __m512i x) {
  _mm512_storeu_si512(p, x);
}
inline uint32_t sixteen(const uint8_t* bits) {
  uint16_t m;
  memcpy(&m, bits, 2);
  return m;
}

// Sixteen entries a step. A store may write past the values it has, never past the run's: the next one
// overwrites them.
template <class T>
void gather_run(const T* dense, const Run<T>& run, T* values) {
  int64_t i = 0, k = 0;
  for (; i + 16 <= run.columns && k + 16 <= run.count; i += 16) {
    const uint32_t m = sixteen(run.bits + i / 8);
    narrow(values + k, _mm512_maskz_compress_epi32(__mmask16(m), widen(dense + i)));
    k += __builtin_popcount(m);
  }
  gather_scalar(dense, run, i, k, values);
}

template <class T>
inline __m512i expand16(const T* values, uint32_t m, int64_t& k) {
  const __m512i x = _mm512_maskz_expand_epi32(__mmask16(m), widen(values + k));
  k += __builtin_popcount(m);
  return x;
}
inline void stream64(uint32_t* dense, const uint32_t* values, const uint8_t* bits, int64_t& k) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dense), expand16(values, sixteen(bits), k));
}
inline void stream64(uint16_t* dense, const uint16_t* values, const uint8_t* bits, int64_t& k) {
  const __m256i low = _mm512_cvtepi32_epi16(expand16(values, sixteen(bits), k));
  const __m256i high = _mm512_cvtepi32_epi16(expand16(values, sixteen(bits + 2), k));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dense),
                      _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

template <class T>
void expand_run(const T* values, const Run<T>& run, bool past_cache, T* dense) {
  int64_t i = 0, k = 0;
  if (past_cache && (reinterpret_cast<uintptr_t>(dense) & 63) == 0) {
    constexpr int64_t kStep = 64 / sizeof(T);
    for (; i + kStep <= run.columns && k + kStep <= run.count; i += kStep)
      stream64(dense + i, values, run.bits + i / 8, k);
    _mm_sfence();
  }
  for (; i + 16 <= run.columns && k + 16 <= run.count; i += 16)
    narrow(dense + i, expand16(values, sixteen(run.bits + i / 8), k));
  expand_scalar(values, run, i, k, dense);
}

#elif defined(__AVX2__)

// Of a byte of the mask: the columns of its set bits, and for every column its value's place (128 where the
// bit is not set); as lanes of 32 bits, and as the bytes of lanes of 16 bits.
struct Tables {
  alignas(64) uint8_t set[256][8], place[256][8], set16[256][16], place16[256][16];
  constexpr Tables() : set{}, place{}, set16{}, place16{} {
    for (int b = 0; b < 256; ++b) {
      int k = 0;
      for (int j = 0; j < 8; ++j) {
        const bool on = b >> j & 1;
        place[b][j] = on ? uint8_t(k) : 128;
        place16[b][2 * j] = on ? uint8_t(2 * k) : 128;
        place16[b][2 * j + 1] = on ? uint8_t(2 * k + 1) : 128;
        if (!on) continue;
        set[b][k] = uint8_t(j);
        set16[b][2 * k] = uint8_t(2 * j);
        set16[b][2 * k + 1] = uint8_t(2 * j + 1);
        ++k;
      }
    }
  }
};
constexpr Tables kTables{};

inline __m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
inline __m256i lanes(const uint8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

inline void compact(const uint16_t* dense, uint8_t byte, uint16_t* values) {
  const __m128i x = _mm_shuffle_epi8(load128(dense), load128(kTables.set16[byte]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(values), x);
}
inline void compact(const uint32_t* dense, uint8_t byte, uint32_t* values) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(dense));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(values),
                      _mm256_permutevar8x32_epi32(x, lanes(kTables.set[byte])));
}
inline void spread(const uint16_t* values, uint8_t byte, uint16_t* dense) {
  const __m128i x = _mm_shuffle_epi8(load128(values), load128(kTables.place16[byte]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dense), x);
}
inline void spread(const uint32_t* values, uint8_t byte, uint32_t* dense) {
  const __m256i place = lanes(kTables.place[byte]);
  const __m256i x =
      _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), place);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dense),
                      _mm256_andnot_si256(_mm256_srai_epi32(place, 31), x));
}

template <class T>
void gather_run(const T* dense, const Run<T>& run, T* values) {
  int64_t i = 0, k = 0;
  for (; i + 8 <= run.columns && k + 8 <= run.count; i += 8) {
    compact(dense + i, run.bits[i / 8], values + k);
    k += __builtin_popcount(run.bits[i / 8]);
  }
  gather_scalar(dense, run, i, k, values);
}

template <class T>
void expand_run(const T* values, const Run<T>& run, bool, T* dense) {
  int64_t i = 0, k = 0;
  for (; i + 8 <= run.columns && k + 8 <= run.count; i += 8) {
    spread(values + k, run.bits[i / 8], dense + i);
    k += __builtin_popcount(run.bits[i / 8]);
  }
  expand_scalar(values, run, i, k, dense);
}

#else

template <class T>
void gather_run(const T* dense, const Run<T>& run, T* values) {
  gather_scalar(dense, run, 0, 0, values);
}
template <class T>
void expand_run(const T* values, const Run<T>& run, bool, T* dense) {
  expand_scalar(values, run, 0, 0, dense);
}

#endif

#if defined(__AVX2__)
// Entries of eight bytes are what a test in double precision takes.
void gather_run(const uint64_t* dense, const Run<uint64_t>& run, uint64_t* values) {
  gather_scalar(dense, run, 0, 0, values);
}
void expand_run(const uint64_t* values, const Run<uint64_t>& run, bool, uint64_t* dense) {
  expand_scalar(values, run, 0, 0, dense);
}
#endif

// Calls f(first entry, its first value, the run) on runs of whole groups and whole bytes, of 64 bytes or a
// multiple where they follow one another. Rows of whole bytes form one long row.
template <class T, class F>
void for_runs(const uint8_t* bits, int64_t rows, int64_t cols, int n, int m, F f) {
  if (rows == 0 || cols == 0) return;
  if (cols % 8 == 0) {
    cols *= rows;
    rows = 1;
  }
  const int64_t piece = int64_t(32) * m * (2048 / m), width = (cols + 7) / 8, kept = cols / m * n;
  const int64_t per_row = (cols + piece - 1) / piece, pieces = rows * per_row;
#pragma omp parallel for schedule(static) if (rows * cols > kSerial)
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t row = i / per_row, at = i % per_row * piece;
    const int64_t columns = cols - at < piece ? cols - at : piece;
    f(row * cols + at, row * kept + at / m * n,
      Run<T>{bits + row * width + at / 8, columns, columns / m * n});
  }
}

template <class T>
void gather(const void* dense, const uint8_t* bits, int64_t rows, int64_t cols, int n, int m, void* values) {
  for_runs<T>(bits, rows, cols, n, m, [&](int64_t entry, int64_t value, const Run<T>& run) {
    gather_run(static_cast<const T*>(dense) + entry, run, static_cast<T*>(values) + value);
  });
}

template <class T>
void expand(const void* values, const uint8_t* bits, int64_t rows, int64_t cols, int n, int m, void* dense) {
  const bool past_cache = rows * cols * int64_t(sizeof(T)) > kPastCache;
  for_runs<T>(bits, rows, cols, n, m, [&](int64_t entry, int64_t value, const Run<T>& run) {
    expand_run(static_cast<const T*>(values) + value, run, past_cache, static_cast<T*>(dense) + entry);
  });
}

// Whether every group of a row has n bits; m a power of two: counts of ever longer fields of one word.
bool row_is_right(const uint8_t* bits, int64_t cols, int n, int m) {
  constexpr uint64_t kFields[] = {0x5555555555555555, 0x3333333333333333, 0x0f0f0f0f0f0f0f0f,
                                  0x00ff00ff00ff00ff, 0x0000ffff0000ffff, 0x00000000ffffffff};
  constexpr uint64_t kOnes[] = {~0ull,
                                0x5555555555555555,
                                0x1111111111111111,
                                0x0101010101010101,
                                0x0001000100010001,
                                0x0000000100000001,
                                1};
  const int steps = __builtin_ctz(unsigned(m));
  for (int64_t at = 0; at < cols; at += 64) {
    const int64_t here = cols - at < 64 ? cols - at : 64;
    uint64_t v = 0, want = kOnes[steps] * uint64_t(n);
    memcpy(&v, bits + at / 8, size_t((here + 7) / 8));
    for (int s = 0; s < steps; ++s) v = (v & kFields[s]) + (v >> (1 << s) & kFields[s]);
    if (here < 64) want &= (1ull << here) - 1;
    if (v != want) return false;
  }
  return true;
}

}  // namespace

void nm_gather(const void* dense, const uint8_t* bits, int64_t rows, int64_t cols, int n, int m, int size,
               void* values) {
  if (size == 2)
    gather<uint16_t>(dense, bits, rows, cols, n, m, values);
  else if (size == 4)
    gather<uint32_t>(dense, bits, rows, cols, n, m, values);
  else
    gather<uint64_t>(dense, bits, rows, cols, n, m, values);
}

void nm_expand(const void* values, const uint8_t* bits, int64_t rows, int64_t cols, int n, int m, int size,
               void* dense) {
  if (size == 2)
    expand<uint16_t>(values, bits, rows, cols, n, m, dense);
  else if (size == 4)
    expand<uint32_t>(values, bits, rows, cols, n, m, dense);
  else
    expand<uint64_t>(values, bits, rows, cols, n, m, dense);
}

int64_t nm_first_wrong_row(const uint8_t* bits, int64_t rows, int64_t cols, int n, int m) {
  const int64_t width = (cols + 7) / 8;
  const bool power = (m & (m - 1)) == 0;
  int64_t first = nm::kNoRow;
#pragma omp parallel for schedule(static) reduction(min : first) if (rows * cols > 8 * kSerial)
  for (int64_t row = 0; row < rows; ++row) {
    if (row > first) continue;
    const uint8_t* mine = bits + row * width;
    bool right = true;
    if (power)
      right = row_is_right(mine, cols, n, m);
    else
      for (int64_t at = 0; right && at < cols; at += m) right = nm::count_bits(mine, at, at + m) == n;
    if (!right) first = row;
  }
  return first;
}

}  // namespace fu::FU_ISA
