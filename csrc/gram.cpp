#include "gram.h"

#include "widen.h"

namespace fu::FU_ISA {
namespace {

using namespace fu::gram;

// Entries that are widened at once, where they must be.
constexpr int kBlock = 1024;
// Vectors of products that are summed in fp32, lane by lane, before fp64 takes over.
constexpr int kRun = 8;
// Groups whose products are formed together; more are taken in squares of so many.
constexpr int kTogether = 5;

// sums[pair] += the products of n entries of G lists: FIRST 0: of each with itself and those before it; else
// of each from number FIRST on with each before number FIRST.
template <int G, int FIRST, class T>
void products(const T* const* x, int64_t n, double* const* sums) {
  constexpr int kPairs = FIRST ? (G - FIRST) * FIRST : G * (G + 1) / 2;
  Double16 total[kPairs] = {};
  int64_t i = 0;
  auto run = [&](int vectors) {
    Float16 part[kPairs] = {};
    for (int k = 0; k < vectors; ++k, i += kLanes) {
      Float16 v[G];
      for (int g = 0; g < G; ++g) v[g] = load_lanes(x[g] + i);
      int pair = 0;
      for (int g = FIRST; g < G; ++g)
        for (int h = 0; h < (FIRST ? FIRST : g + 1); ++h, ++pair) part[pair] += v[g] * v[h];
    }
    for (int p = 0; p < kPairs; ++p) total[p] += __builtin_convertvector(part[p], Double16);
  };
  while (i + kRun * kLanes <= n) run(kRun);
  run(int((n - i) / kLanes));
  int pair = 0;
  for (int g = FIRST; g < G; ++g)
    for (int h = 0; h < (FIRST ? FIRST : g + 1); ++h, ++pair) {
      double sum = 0;
      for (int l = 0; l < kLanes; ++l) sum += total[pair][l];
      for (int64_t k = i; k < n; ++k) sum += double(to_float(x[g][k]) * to_float(x[h][k]));
      *sums[pair] += sum;
    }
}

template <class T>
void dispatch(int first, int g, const T* const* x, int64_t n, double* const* sums) {
  constexpr int k = kTogether;
  switch (first == 0 ? g : k + g) {
    case 1:
      return products<1, 0>(x, n, sums);
    case 2:
      return products<2, 0>(x, n, sums);
    case 3:
      return products<3, 0>(x, n, sums);
    case 4:
      return products<4, 0>(x, n, sums);
    case 5:
      return products<5, 0>(x, n, sums);
    case 2 * k + 1:
      return products<k + 1, k>(x, n, sums);
    case 2 * k + 2:
      return products<k + 2, k>(x, n, sums);
    case 2 * k + 3:
      return products<k + 3, k>(x, n, sums);
    case 2 * k + 4:
      return products<k + 4, k>(x, n, sums);
    default:
      return products<k + 5, k>(x, n, sums);
  }
}

struct Unit {
  const int64_t* row;
  int64_t groups, begin, end;

  int64_t address(int64_t g) const { return row[2 + g]; }
  int64_t dtype(int64_t g) const { return row[2 + groups + g]; }
};

// All of them of type T and without a mask: read where they lie.
template <class T>
void direct(const Unit& u, int first, int count, const int64_t* groups, double* const* sums) {
  const T* x[2 * kTogether];
  for (int g = 0; g < count; ++g) x[g] = reinterpret_cast<const T*>(u.address(groups[g])) + u.begin;
  dispatch(first, count, x, u.end - u.begin, sums);
}

// first 0: the products of `count` groups with one another; else those of the groups after the first five
// with these five.
void some(const Unit& u, int first, int count, const int64_t* groups, double* const* sums) {
  bool same = !u.row[1];
  for (int g = 1; g < count; ++g) same = same && u.dtype(groups[g]) == u.dtype(groups[0]);
  if (same && u.dtype(groups[0]) == kF32) return direct<float>(u, first, count, groups, sums);
  if (same && u.dtype(groups[0]) == kF16) return direct<f16>(u, first, count, groups, sums);
  if (same) return direct<bf16>(u, first, count, groups, sums);
  alignas(64) float room[2 * kTogether][kBlock];
  const float* x[2 * kTogether];
  const uint8_t* const bits = reinterpret_cast<const uint8_t*>(u.row[1]);
  for (int64_t at = u.begin; at < u.end; at += kBlock) {
    const int n = int(u.end - at < kBlock ? u.end - at : kBlock);
    for (int g = 0; g < count; ++g) {
      widen(u.address(groups[g]), u.dtype(groups[g]), at, n, bits ? bits + at / 8 : nullptr, room[g]);
      x[g] = room[g];
    }
    dispatch(first, count, x, n, sums);
  }
}

// Where the product of groups i and j stands among the sums.
inline double* place(double* sums, int64_t i, int64_t j) {
  return i >= j ? sums + pairs(i) + j : sums + pairs(j) + i;
}

void unit_products(const Unit& u, double* sums) {
  int64_t here[kTogether];
  int64_t both[2 * kTogether];
  double* to[kTogether * kTogether];
  for (int64_t i = 0; i < u.groups; i += kTogether) {
    int mine = 0;
    for (int64_t g = i; g < i + kTogether && g < u.groups; ++g)
      if (u.address(g)) here[mine++] = g;
    if (!mine) continue;
    for (int a = 0, p = 0; a < mine; ++a)
      for (int b = 0; b <= a; ++b) to[p++] = place(sums, here[a], here[b]);
    some(u, 0, mine, here, to);
    for (int64_t j = i + kTogether; j < u.groups; j += kTogether) {
      int count = kTogether;
      // A square of fewer than five is filled up with one of its own, whose products go nowhere.
      double nowhere[kTogether];
      for (int a = 0; a < kTogether; ++a) both[a] = here[a < mine ? a : 0];
      for (int64_t g = j; g < j + kTogether && g < u.groups; ++g)
        if (u.address(g)) both[count++] = g;
      if (count == kTogether) continue;
      for (int a = kTogether, p = 0; a < count; ++a)
        for (int b = 0; b < kTogether; ++b)
          to[p++] = b < mine ? place(sums, both[a], both[b]) : (nowhere[b] = 0, nowhere + b);
      some(u, kTogether, count, both, to);
    }
  }
}

}  // namespace

void gram_products(const int64_t* table, int64_t tensors, int64_t groups, const int32_t* unit_tensor,
                   const int64_t* first_unit, int64_t units, double* partial, double* out) {
  const int64_t fields = 2 + 2 * groups, n = pairs(groups);
#pragma omp parallel for schedule(static) if (units > 1)
  for (int64_t i = 0; i < units; ++i) {
    const int64_t t = unit_tensor[i];
    const int64_t begin = (i - first_unit[t]) * kUnit, left = table[t * fields];
    const Unit unit{table + t * fields, groups, begin, begin + kUnit < left ? begin + kUnit : left};
    for (int64_t k = 0; k < n; ++k) partial[i * n + k] = 0;
    unit_products(unit, partial + i * n);
  }
  for (int64_t k = 0; k < tensors * groups * groups; ++k) out[k] = 0;
  for (int64_t i = 0; i < units; ++i) {
    double* const square = out + unit_tensor[i] * groups * groups;
    for (int64_t r = 0; r < groups; ++r)
      for (int64_t c = 0; c <= r; ++c) square[r * groups + c] += partial[i * n + pairs(r) + c];
  }
  for (int64_t t = 0; t < tensors; ++t)
    for (int64_t r = 0; r < groups; ++r)
      for (int64_t c = 0; c < r; ++c) out[(t * groups + c) * groups + r] = out[(t * groups + r) * groups + c];
}

}  // namespace fu::FU_ISA
