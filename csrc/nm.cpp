#include "nm.h"

#include <type_traits>
#include <utility>

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

using nm::kMaxGroup;
using nm::kNanKey;

constexpr int64_t kSerial = 1 << 19;  // entries that are done before the other threads are awake

// A rotation by r pairs lane i of a group with column (i + r) % M; the partner comes before i in a tie when
// its column is lower, i.e. when i + r >= M. Adding `lower` (-1 there) to the own key makes both cases one
// "greater than". One rotation answers for both of its pair, so r = 1 .. M / 2 are all that is compared.
template <class Int, int Lanes, int M>
struct Tables {
  alignas(64) Int index[M][Lanes];
  alignas(64) Int lower[M][Lanes];
  constexpr Tables() : index{}, lower{} {
    for (int r = 0; r < M; ++r)
      for (int i = 0; i < Lanes; ++i) {
        index[r][i] = Int(i / M * M + (i % M + r) % M);
        lower[r][i] = Int(i % M + r >= M ? -1 : 0);
      }
  }
};

#if defined(__AVX512BW__)

struct Wide32 {
  static constexpr int kLanes = 16;
  using Reg = __m512i;
  template <int M>
  static constexpr Tables<int32_t, kLanes, M> tables{};

  template <class T>
  static Reg keys(const T* p, uint32_t& nan) {
    Reg x = _mm512_loadu_si512(p);
    const __mmask16 bad = _mm512_cmp_ps_mask(_mm512_castsi512_ps(x), _mm512_castsi512_ps(x), _CMP_UNORD_Q);
    const Reg rest = _mm512_set1_epi32(0x7fffffff);
    x = _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(x, rest), x);
    x = _mm512_ternarylogic_epi32(x, _mm512_srai_epi32(x, 31), rest, 0x78);  // x ^ (sign & rest)
    nan |= bad;
    return _mm512_mask_mov_epi32(x, bad, _mm512_set1_epi32(kNanKey));
  }
  template <int M>
  static uint64_t before(Reg key, int r) {
    const Reg partner = _mm512_permutexvar_epi32(_mm512_load_si512(tables<M>.index[r]), key);
    return _mm512_cmpgt_epi32_mask(partner, _mm512_add_epi32(key, _mm512_load_si512(tables<M>.lower[r])));
  }
};

struct Wide16 {
  static constexpr int kLanes = 32;
  using Reg = __m512i;
  template <int M>
  static constexpr Tables<int16_t, kLanes, M> tables{};

  static Reg keys16(const void* p, int16_t infinity, uint32_t& nan) {
    Reg x = _mm512_loadu_si512(p);
    const Reg rest = _mm512_set1_epi16(0x7fff);
    const __mmask32 bad = _mm512_cmpgt_epi16_mask(_mm512_and_si512(x, rest), _mm512_set1_epi16(infinity));
    x = _mm512_maskz_mov_epi16(_mm512_test_epi16_mask(x, rest), x);
    x = _mm512_ternarylogic_epi32(x, _mm512_srai_epi16(x, 15), rest, 0x78);
    nan |= bad;
    return _mm512_mask_mov_epi16(x, bad, _mm512_set1_epi16(-0x7fff));
  }
  static Reg keys(const f16* p, uint32_t& nan) { return keys16(p, 0x7c00, nan); }
  static Reg keys(const bf16* p, uint32_t& nan) { return keys16(p, 0x7f80, nan); }
  template <int M>
  static uint64_t before(Reg key, int r) {
    const Reg partner = _mm512_permutexvar_epi16(_mm512_load_si512(tables<M>.index[r]), key);
    return _mm512_cmpgt_epi16_mask(partner, _mm512_add_epi16(key, _mm512_load_si512(tables<M>.lower[r])));
  }
};

#elif defined(__AVX2__)

inline __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

struct Wide32 {
  static constexpr int kLanes = 8;
  using Reg = __m256i;
  template <int M>
  static constexpr Tables<int32_t, kLanes, M> tables{};

  template <class T>
  static Reg keys(const T* p, uint32_t& nan) {
    Reg x = load256(p);
    const __m256 v = _mm256_castsi256_ps(x);
    const __m256 bad = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    x = _mm256_andnot_si256(_mm256_cmpeq_epi32(_mm256_slli_epi32(x, 1), _mm256_setzero_si256()), x);
    x = _mm256_xor_si256(x, _mm256_srli_epi32(_mm256_srai_epi32(x, 31), 1));
    nan |= uint32_t(_mm256_movemask_ps(bad));
    return _mm256_blendv_epi8(x, _mm256_set1_epi32(kNanKey), _mm256_castps_si256(bad));
  }
  template <int M>
  static uint64_t before(Reg key, int r) {
    const Reg partner = _mm256_permutevar8x32_epi32(key, load256(tables<M>.index[r]));
    const Reg first = _mm256_cmpgt_epi32(partner, _mm256_add_epi32(key, load256(tables<M>.lower[r])));
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(first)));
  }
};

struct Wide16 {
  static constexpr int kLanes = 16;
  using Reg = __m256i;
  template <int M>
  static constexpr Tables<int16_t, kLanes, M> tables{};

  static Reg keys16(const void* p, int16_t infinity, uint32_t& nan) {
    Reg x = load256(p);
    const Reg bad =
        _mm256_cmpgt_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7fff)), _mm256_set1_epi16(infinity));
    x = _mm256_andnot_si256(_mm256_cmpeq_epi16(_mm256_slli_epi16(x, 1), _mm256_setzero_si256()), x);
    x = _mm256_xor_si256(x, _mm256_srli_epi16(_mm256_srai_epi16(x, 15), 1));
    nan |= uint32_t(_mm256_movemask_epi8(bad));
    return _mm256_blendv_epi8(x, _mm256_set1_epi16(-0x7fff), bad);
  }
  static Reg keys(const f16* p, uint32_t& nan) { return keys16(p, 0x7c00, nan); }
  static Reg keys(const bf16* p, uint32_t& nan) { return keys16(p, 0x7f80, nan); }
  template <int M>
  static uint64_t before(Reg key, int r) {
    // Groups of at most eight 16-bit keys never cross a 128-bit lane: a byte shuffle does it.
    const Reg at = _mm256_and_si256(load256(tables<M>.index[r]), _mm256_set1_epi16(7));
    const Reg bytes =
        _mm256_add_epi16(_mm256_mullo_epi16(at, _mm256_set1_epi16(0x0202)), _mm256_set1_epi16(0x0100));
    const Reg partner = _mm256_shuffle_epi8(key, bytes);
    const Reg first = _mm256_cmpgt_epi16(partner, _mm256_add_epi16(key, load256(tables<M>.lower[r])));
    return uint32_t(_mm_movemask_epi8(
        _mm_packs_epi16(_mm256_castsi256_si128(first), _mm256_extracti128_si256(first, 1))));
  }
};

#endif

template <class T>
inline void load_keys(const T* p, int n, int32_t* key, bool& nan) {
  for (int i = 0; i < n; ++i) {
    key[i] = nm::key_of(to_float(p[i]));
    nan |= key[i] == kNanKey;
  }
}

#if defined(__AVX2__)
// Sums of one bit for each of 64 columns, as words of equal weight.
struct Sum {
  uint64_t ones, twos;
};
inline Sum add3(uint64_t a, uint64_t b, uint64_t c) {
  return {a ^ b ^ c, (a & b) | (c & (a ^ b))};
}

// Moves every group of M bits round by r, towards the higher columns.
template <int M>
inline uint64_t rotate(uint64_t x, int r) {
  constexpr uint64_t kFirst = ~uint64_t(0) / ((uint64_t(1) << M) - 1);  // bit 0 of every group
  const uint64_t low = kFirst * ((uint64_t(1) << r) - 1);
  return ((x << r) & ~low) | ((x >> (M - r)) & low);
}

// Which of 64 columns are kept, of b[r - 1][w]: whether the partner (i + r) % M comes before i. Where it does
// not, i comes before that partner, which the rotated word says. Ranks are added bit by bit; n[k] is bit k of
// n everywhere.
template <int M, int kWords>
inline uint64_t keep_word(const uint64_t (&b)[M / 2][kWords], int w, const uint64_t (&n)[4]) {
  const auto here = [&](int r) { return b[r - 1][w]; };
  const auto there = [&](int r) { return rotate<M>(~b[r - 1][w], r); };
  if constexpr (M == 2) return ~here(1);  // 0 < n < 2
  uint64_t rank[4] = {};
  if constexpr (M == 4) {
    const Sum s = add3(here(1), there(1), here(2));
    rank[0] = s.ones, rank[1] = s.twos;
  } else {
    // Seven of the ranks' terms: r = 1, 2, 3 both ways and the middle one.
    const Sum x = add3(here(1), there(1), here(2));
    const Sum y = add3(there(2), here(3), there(3));
    const Sum z = add3(x.ones, y.ones, here(4));
    const Sum v = add3(x.twos, y.twos, z.twos);
    rank[0] = z.ones, rank[1] = v.ones, rank[2] = v.twos;
    if constexpr (M == 16) {
      const Sum x2 = add3(there(4), here(5), there(5));
      const Sum y2 = add3(here(6), there(6), here(7));
      const Sum z2 = add3(x2.ones, y2.ones, there(7));
      const Sum v2 = add3(x2.twos, y2.twos, z2.twos);
      const Sum s0 = add3(rank[0], z2.ones, here(8));
      const Sum s1 = add3(rank[1], v2.ones, s0.twos);
      const Sum s2 = add3(rank[2], v2.twos, s1.twos);
      rank[0] = s0.ones, rank[1] = s1.ones, rank[2] = s2.ones, rank[3] = s2.twos;
    }
  }
  // rank < n, from the lowest bit up.
  uint64_t below = 0;
  for (int k = 0; k < 4; ++k) below = (~rank[k] & n[k]) | (~(rank[k] ^ n[k]) & below);
  return below;
}

template <class T>
struct WideOf {
  using type = Wide16;
};
template <>
struct WideOf<float> {
  using type = Wide32;
};

// The columns in whole words, block by block: comparisons of a block go to memory as bits, and then a loop
// over its words, which the compiler turns into vectors again, adds the ranks.
template <int M, class T>
int64_t run_wide(const T* p, int64_t count, int n, uint8_t* out, bool& nan) {
  using V = typename WideOf<T>::type;
  constexpr int kWords = 32;
  uint64_t n_bits[4];
  for (int k = 0; k < 4; ++k) n_bits[k] = n >> k & 1 ? ~uint64_t(0) : 0;
  const int64_t words = count / 64;
  alignas(64) uint64_t b[M / 2][kWords] = {}, kept[kWords];
  uint32_t bad = 0;
  for (int64_t first = 0; first < words; first += kWords) {
    const int here = int(words - first < kWords ? words - first : kWords);
    const T* from = p + first * 64;
    for (int at = 0; at < here * 64; at += V::kLanes) {
      const auto key = V::keys(from + at, bad);
#pragma GCC unroll 8
      for (int r = 1; r <= M / 2; ++r) {
        const auto bits = V::template before<M>(key, r);
        memcpy(reinterpret_cast<uint8_t*>(b[r - 1]) + at / 8, &bits, V::kLanes / 8);
      }
    }
    for (int w = 0; w < kWords; ++w) kept[w] = keep_word<M>(b, w, n_bits);
    memcpy(out + first * 8, kept, size_t(here) * 8);
  }
  nan |= bad != 0;
  return words * 64;
}

#endif

// `count` columns, a multiple of M, from a byte of the mask on.
template <int M, class T>
bool run_fixed(const T* p, int64_t count, int n, uint8_t* out) {
  bool nan = false;
  int64_t i = 0;
#if defined(__AVX2__)
  i = run_wide<M>(p, count, n, out, nan);
#endif
  int32_t key[8];
  for (; i + 8 <= count; i += 8) {
    load_keys(p + i, 8, key, nan);
    out[i / 8] = uint8_t(nm::byte_of<M>(key, n));
  }
  if (i < count) {
    for (int j = 0; j < 8; ++j) key[j] = 0;
    load_keys(p + i, int(count - i), key, nan);
    out[i / 8] = uint8_t(nm::byte_of<M>(key, n) & ((1u << (count - i)) - 1u));
  }
  return nan;
}

// ---- any m up to kMaxGroup
// --------------------------------------------------------------------------------- As many groups at a time
// as a register has lanes, a group a lane: their keys are transposed, a copy is sorted by a network, and the
// n-th largest of every group says what is kept. Keys of 16-bit scores carry their column, so that no two are
// equal; of fp32 scores a tie at the n-th largest is looked at once more.

#if defined(__AVX512F__)
constexpr int kGroups = 16;
#elif defined(__AVX2__)
constexpr int kGroups = 8;
#else
constexpr int kGroups = 4;
#endif
typedef int32_t Lanes __attribute__((vector_size(4 * kGroups)));
typedef uint16_t Half __attribute__((vector_size(2 * kGroups)));

template <int... I>
inline void interleave(const Lanes& a, const Lanes& b, Lanes& low, Lanes& high,
                       std::integer_sequence<int, I...>) {
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * kGroups)...);
  high = __builtin_shufflevector(a, b, (kGroups / 2 + I / 2 + I % 2 * kGroups)...);
#else
  low = __builtin_shuffle(a, b, Lanes{(I / 2 + I % 2 * kGroups)...});
  high = __builtin_shuffle(a, b, Lanes{(kGroups / 2 + I / 2 + I % 2 * kGroups)...});
#endif
}

template <int... I>
inline void shuffle(const Lanes* x, Lanes* y, std::integer_sequence<int, I...>) {
  (interleave(x[I], x[I + kGroups / 2], y[2 * I], y[2 * I + 1], std::make_integer_sequence<int, kGroups>()),
   ...);
}
// log2(kGroups) perfect shuffles of kGroups x kGroups keys are a transposition, x -> y.
inline void transpose(const Lanes* x, Lanes* y) {
  constexpr std::make_integer_sequence<int, kGroups / 2> half;
  Lanes a[kGroups], b[kGroups];
  shuffle(x, a, half);
  if constexpr (kGroups == 4) {
    shuffle(a, y, half);
  } else {
    shuffle(a, b, half);
    if constexpr (kGroups == 8) {
      shuffle(b, y, half);
    } else {
      shuffle(b, a, half);
      shuffle(a, y, half);
    }
  }
}

#if defined(__AVX512F__)
inline Lanes lower(const Lanes& a, const Lanes& b) {
  return Lanes(_mm512_min_epi32(__m512i(a), __m512i(b)));
}
inline Lanes upper(const Lanes& a, const Lanes& b) {
  return Lanes(_mm512_max_epi32(__m512i(a), __m512i(b)));
}
#elif defined(__AVX2__)
inline Lanes lower(const Lanes& a, const Lanes& b) {
  return Lanes(_mm256_min_epi32(__m256i(a), __m256i(b)));
}
inline Lanes upper(const Lanes& a, const Lanes& b) {
  return Lanes(_mm256_max_epi32(__m256i(a), __m256i(b)));
}
#else
inline Lanes lower(const Lanes& a, const Lanes& b) {
  return a < b ? a : b;
}
inline Lanes upper(const Lanes& a, const Lanes& b) {
  return a < b ? b : a;
}
#endif

inline bool any(const Lanes& x) {
  uint64_t words[kGroups / 2], all = 0;
  memcpy(words, &x, sizeof(words));
  for (uint64_t word : words) all |= word;
  return all != 0;
}

// Scores as the integers that their bits are. `odd` collects what is no key as it stands: negative ones (-0.0
// among them) and NaN; without those the order of the integers is that of the scores.
inline Lanes load_lanes(const float* p, Lanes& odd) {
  Lanes x;
  memcpy(&x, p, sizeof(x));
  odd |= x | (0x7f800000 - x);
  return x;
}
template <class T>
inline Lanes load_lanes(const T* p, Lanes& odd) {
  Half narrow;
  memcpy(&narrow, p, sizeof(narrow));
  const Lanes x = __builtin_convertvector(narrow, Lanes);
  odd |= (std::is_same_v<T, f16> ? 0x7c00 : 0x7f80) - x;
  return x;
}
// The key of any score (nm::key_of), of what load_lanes gave.
template <class T>
inline Lanes key_of(const Lanes& x, Lanes& nan) {
  constexpr bool kWide = sizeof(T) == 4;
  constexpr int32_t kRest = kWide ? 0x7fffffff : 0x7fff;
  constexpr int32_t kInfinity = kWide ? 0x7f800000 : std::is_same_v<T, f16> ? 0x7c00 : 0x7f80;
  const Lanes rest = x & kRest, sign = kWide ? x >> 31 : -(x >> 15), bad = rest > kInfinity;
  nan |= bad;
  return (((rest ^ sign) - sign) & ~bad) | (bad & -kRest);
}
inline bool any_sign(const Lanes& x) {
  return any(x < 0);
}

#if defined(__AVX512F__)
// Unrolled, with the keys in registers.
template <int A, int B>
inline void order(Lanes* key) {
  const Lanes a = key[A], b = key[B];
  key[A] = lower(a, b);
  key[B] = upper(a, b);
}
template <int M, int... I>
__attribute__((always_inline)) inline void sort(Lanes* key, std::integer_sequence<int, I...>) {
  (order<nm::kNetwork<M>.low[I], nm::kNetwork<M>.high[I]>(key), ...);
}
template <int M>
__attribute__((always_inline)) inline void sort(Lanes* key) {
  sort<M>(key, std::make_integer_sequence<int, nm::Network<M>::count()>());
}
#else
template <int M>
__attribute__((always_inline)) inline void sort(Lanes* key) {
  for (int i = 0; i < nm::Network<M>::count(); ++i) {
    Lanes &low = key[nm::kNetwork<M>.low[i]], &high = key[nm::kNetwork<M>.high[i]];
    const Lanes a = low, b = high;
    low = lower(a, b);
    high = upper(a, b);
  }
}
#endif

// kept[half]: bit c % 32 of a lane is that of column c of the lane's group.
template <int M, bool Unique>
inline void select(const Lanes* key, int n, int m, Lanes* kept) {
  Lanes sorted[M];
  for (int c = 0; c < M; ++c) sorted[c] = key[c];
  sort<M>(sorted);
  const Lanes last = sorted[M - n];
  kept[0] = kept[1] = Lanes{};
  if (Unique || !any(sorted[M - n - 1] == last)) {
    for (int c = 0; c < m; ++c) kept[c / 32] |= (key[c] >= last) & int32_t(1u << (c % 32));
    return;
  }
  // Of those equal to the last one that is kept, the lowest columns.
  Lanes left = Lanes{} + n;
  for (int c = 0; c < m; ++c) left += key[c] > last;
  for (int c = 0; c < m; ++c) {
    const Lanes equal = (key[c] == last) & (left > 0);
    left += equal;
    kept[c / 32] |= ((key[c] > last) | equal) & int32_t(1u << (c % 32));
  }
}

// The bits of a group are appended to a word that is written when it is full.
struct BitWriter {
  uint8_t* out;
  uint64_t word = 0;
  int filled = 0;
  inline void put(uint64_t bits, int m) {
    word |= bits << filled;
    if (filled + m >= 64) {
      memcpy(out, &word, 8);
      out += 8;
      const int used = 64 - filled;
      word = used < 64 ? bits >> used : 0;
      filled = m - used;
    } else {
      filled += m;
    }
  }
  inline void finish() {
    for (int at = 0; at < filled; at += 8) *out++ = uint8_t(word >> at);
  }
};

// M: the power of two that m is filled up to, with columns that are never kept.
template <int M, class T>
bool run_any(const T* p, int64_t count, int n, int m, uint8_t* out) {
  constexpr bool kUnique = sizeof(T) == 2;
  constexpr int kBlocks = M / kGroups > 0 ? M / kGroups : 1, kReach = kGroups * kBlocks;
  BitWriter writer{out};
  Lanes seen{};
  Lanes key[kReach];
  for (int c = m; c < M; ++c) key[c] = Lanes{} + INT32_MIN;
  T edge[kGroups * kReach] = {};
  const int64_t groups = count / m;
  for (int64_t g = 0; g < groups; g += kGroups) {
    const int here = int(groups - g < kGroups ? groups - g : kGroups);
    const T* from = p + g * m;
    int64_t stride = m;
    if (here < kGroups || g * m + (kGroups - 1) * int64_t(m) + kReach > count) {
      for (int l = 0; l < here; ++l) memcpy(edge + l * kReach, from + l * m, size_t(m) * sizeof(T));
      from = edge;
      stride = kReach;
    }
    for (int b = 0; b < kBlocks; ++b) {
      Lanes rows[kGroups], columns[kGroups], odd{};
#pragma GCC unroll 16
      for (int l = 0; l < kGroups; ++l) rows[l] = load_lanes(from + l * stride + kGroups * b, odd);
      if (__builtin_expect(any_sign(odd), 0))
        for (int l = 0; l < kGroups; ++l) rows[l] = key_of<T>(rows[l], seen);
      transpose(rows, columns);
      const int first = kGroups * b;
#pragma GCC unroll 16
      for (int c = 0; c < kGroups; ++c)
        if (first + c < m) key[first + c] = kUnique ? (columns[c] << 6) + (63 - first - c) : columns[c];
    }
    Lanes kept[2];
    select<M, kUnique>(key, n, m, kept);
    if (here == kGroups && m == 16) {
      const auto narrow = __builtin_convertvector(kept[0], Half);
      memcpy(out + g * 2, &narrow, sizeof(narrow));
    } else if (here == kGroups && m == 32) {
      memcpy(out + g * 4, &kept[0], sizeof(kept[0]));
    } else {
      if (m == 16 || m == 32) writer.out = out + g * m / 8;
      for (int l = 0; l < here; ++l)
        writer.put(uint64_t(uint32_t(kept[0][l])) | uint64_t(uint32_t(kept[1][l])) << 32, m);
    }
  }
  writer.finish();
  return any(seen);
}

// Sixteen 16-bit keys have their rotations in one register; what does not fill a word goes the other way.
template <class T>
bool run_sixteen(const T* p, int64_t count, int n, uint8_t* out) {
  bool nan = false;
  int64_t i = 0;
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2) i = run_wide<16>(p, count, n, out, nan);
#endif
  return run_any<16>(p + i, count - i, n, 16, out + i / 8) || nan;
}

template <class T>
bool run(const T* p, int64_t count, int n, int m, uint8_t* out) {
  switch (m) {
    case 2:
      return run_fixed<2>(p, count, n, out);
    case 4:
      return run_fixed<4>(p, count, n, out);
    case 8:
      return run_fixed<8>(p, count, n, out);
    case 16:
      return run_sixteen(p, count, n, out);
    default:
      return m < 8     ? run_any<8>(p, count, n, m, out)
             : m <= 16 ? run_any<16>(p, count, n, m, out)
             : m <= 32 ? run_any<32>(p, count, n, m, out)
                       : run_any<64>(p, count, n, m, out);
  }
}

int64_t piece_of(int m) {
  return int64_t(8) * m * (8192 / m);  // whole groups, whole bytes
}

// Rows of whole bytes are one long row.
inline int64_t row_length(const NmItem& t) {
  return t.cols % 8 == 0 ? t.rows * t.cols : t.cols;
}

template <class T>
bool run_piece(const NmItem& t, int64_t i, int64_t piece, int n, int m) {
  const int64_t length = row_length(t), per_row = (length + piece - 1) / piece;
  const int64_t row = i / per_row, at = i % per_row * piece;
  return run(static_cast<const T*>(t.scores) + row * length + at, length - at < piece ? length - at : piece,
             n, m, t.bits + row * ((length + 7) / 8) + at / 8);
}

}  // namespace

int nm_mask(NmItem* items, int64_t count, int n, int m) {
  const int64_t piece = piece_of(m);
  int64_t pieces = 0, entries = 0;
  for (int64_t t = 0; t < count; ++t) {
    items[t].first = pieces;
    const int64_t all = items[t].rows * items[t].cols, length = row_length(items[t]);
    entries += all;
    if (all) pieces += all / length * ((length + piece - 1) / piece);
  }
  int nan = 0;
#pragma omp parallel for schedule(static) reduction(| : nan) if (entries > kSerial)
  for (int64_t i = 0; i < pieces; ++i) {
    int64_t low = 0, high = count;  // the last tensor that starts at or before piece i
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (items[middle].first <= i ? low : high) = middle;
    }
    const NmItem& t = items[low];
    nan |= t.dtype == kF32   ? run_piece<float>(t, i - t.first, piece, n, m)
           : t.dtype == kF16 ? run_piece<f16>(t, i - t.first, piece, n, m)
                             : run_piece<bf16>(t, i - t.first, piece, n, m);
  }
  return nan;
}

}  // namespace fu::FU_ISA
