// topk_mask on a CPU: a sample brackets the k-th value; one pass over the scores writes the bits that the
// bracket decides and gathers the few entries inside it; an exact selection among those patches the rest.
// Where the bracket fails (ties, a hostile order) histograms of keys narrow it in further passes: always
// exact.
#include "topk.h"

#include "topk_sample.h"
#include "topk_scan.h"

namespace fu::FU_ISA {
namespace {

constexpr int64_t kChunk = 1 << 15;  // entries: 128 KiB of fp32, in the cache for a second density
constexpr int64_t kSmallRow = 1 << 16;
constexpr int64_t kOneThread = 1 << 21;  // entries of a tensor that a thread selects from alone

// A run of scores that is worked on at once; it starts on a byte of the mask. `rows` > 1: short rows that do
// not end on a byte.
struct Chunk {
  const char* scores;
  int64_t byte;  // of the tensor's bits
  int32_t tensor, rows, cols;
  int64_t entries() const { return int64_t(rows) * cols; }
  int64_t stride() const { return (cols + 7) / 8; }
};

// Calls f(first entry, first byte, rows, cols) for the chunks of one tensor, in order.
template <class F>
void for_chunks(int64_t rows, int64_t cols, F f) {
  if (rows == 0 || cols == 0) return;
  if (cols % 8 == 0) {
    cols *= rows;
    rows = 1;
  }
  const int64_t width = (cols + 7) / 8;
  if (cols > kChunk) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; c += kChunk)
        f(r * cols + c, r * width + c / 8, int32_t(1), int32_t(cols - c < kChunk ? cols - c : kChunk));
    return;
  }
  const int64_t step = kChunk / cols;
  for (int64_t r = 0; r < rows; r += step)
    f(r * cols, r * width, int32_t(rows - r < step ? rows - r : step), int32_t(cols));
}

struct Candidate {
  uint32_t key, bit;  // bit: from the chunk's first byte
};

// What a chunk has inside a bracket: its candidates in the pool of a thread, or only their number.
struct Record {
  int64_t start;
  int32_t thread, count;
};

struct Tally {
  int64_t above = 0, within = 0, nan = 0;
  bool overflow = false;
};

template <class T, bool Abs>
class Selector {
 public:
  Selector(const TopkTensor* tensors, int64_t n, int threads = available_threads())
      : tensors_(tensors), n_(n), threads_(threads) {
    int64_t chunks = 0;
    for (int64_t i = 0; i < n; ++i) {
      total_ += tensors[i].rows * tensors[i].cols;
      for_chunks(tensors[i].rows, tensors[i].cols, [&](int64_t, int64_t, int32_t, int32_t) { ++chunks; });
    }
    if (!chunks_.resize(chunks)) throw Failure{kTopkNoMemory};
    Chunk* c = chunks_.p;
    for (int64_t i = 0; i < n; ++i)
      for_chunks(tensors[i].rows, tensors[i].cols,
                 [&](int64_t first, int64_t byte, int32_t rows, int32_t cols) {
                   *c++ = {scores(i) + first * int64_t(sizeof(T)), byte, int32_t(i), rows, cols};
                 });
    if (total_ < 2 * kChunk) threads_ = 1;
    most_ = total_ / 8 / threads_ > kSmallRow ? total_ / 8 / threads_ : kSmallRow;
  }

  // The k-th largest: bits[d * n + tensor]. Returns the number of NaN.
  int64_t select(int64_t counts, const int64_t* ks, const uint64_t* bits) {
    Array<Bracket> brackets(counts);
    Array<Tally> tallies(counts);
    Array<Record> records(counts * chunks_.n);
    Sampler<T, Abs>(tensors_, n_, threads_).first_brackets(counts, ks, brackets.p);
    stream(counts, brackets.p, bits, records.p, tallies.p);
    for (int64_t d = 0; d < counts; ++d) {
      const uint64_t* out = bits + d * n_;
      Record* mine = records.p + d * chunks_.n;
      if (finish(ks[d], brackets[d], out, mine, tallies[d])) continue;
      const Bracket narrow = narrow_bracket(ks[d], tallies[d].nan);
      stream(1, &narrow, out, mine, &tallies[d]);
      if (!finish(ks[d], narrow, out, mine, tallies[d]))
        throw Failure{tallies[d].overflow ? kTopkNoMemory : kTopkNotFound};
    }
    return counts > 0 ? tallies[0].nan : 0;
  }

  // Entries above `key`, and the first `take` equal to it.
  void write(uint32_t key, int64_t take, const uint64_t* bits) {
    if (key < topk_key_min(Abs)) {
      key = topk_key_min(Abs);
      take = total_;
    } else if (key > topk_key_max(Abs)) {
      key = topk_key_max(Abs);
      take = 0;
    }
    const Bracket tie = make_bracket(key, key, Abs);
    Array<Record> records(chunks_.n);
    Tally tally;
    stream(1, &tie, bits, records.p, &tally);
    patch_ties(take < tally.within ? take : tally.within, tie, bits, records.p);
  }

  // out[tensor * bins + b] += entries with (key - lo[tensor]) >> shift[tensor] == b.
  void histogram(const int64_t* lo, const int64_t* shift, int64_t bins, int64_t* out, bool per_tensor) {
#pragma omp parallel num_threads(threads_)
    {
      int64_t local[kTopkBins];
      int32_t owner = -1;
      const auto flush = [&] {
        if (owner < 0) return;
        int64_t* to = out + (per_tensor ? owner * bins : 0);
        for (int64_t b = 0; b < bins; ++b) {
          if (local[b] == 0) continue;
#pragma omp atomic
          to[b] += local[b];
        }
      };
#pragma omp for schedule(static)
      for (int64_t c = 0; c < chunks_.n; ++c) {
        const Chunk& chunk = chunks_.p[c];
        const int32_t wanted = per_tensor ? chunk.tensor : 0;
        if (wanted != owner) {
          flush();
          memset(local, 0, sizeof local);
          owner = wanted;
        }
        count_chunk(chunk, uint32_t(lo[owner]), int(shift[owner]), uint32_t(bins), local);
      }
      flush();
    }
  }

 private:
  const char* scores(int64_t i) const { return reinterpret_cast<const char*>(tensors_[i].scores); }
  static uint8_t* bytes(const uint64_t* bits, const Chunk& chunk) {
    return reinterpret_cast<uint8_t*>(bits[chunk.tensor]) + chunk.byte;
  }

  static void count_chunk(const Chunk& chunk, uint32_t lo, int shift, uint32_t bins, int64_t* local) {
    const T* x = reinterpret_cast<const T*>(chunk.scores);
    const uint64_t last = uint64_t(lo) + (uint64_t(bins) << shift) - 1;
    if (lo == 0 && last >= 0xffffffffu) {
      for (int64_t i = 0; i < chunk.entries(); ++i) {
        const uint32_t key = key_of<T, Abs>(x[i]);
        if (key != 0) ++local[key >> shift];
      }
      return;
    }
    // Few entries lie in a narrow range: they are found as those of a bracket are.
    const ExactFloats exact;
    const Bracket range = make_bracket(lo, last < 0xffffffffu ? uint32_t(last) : 0xffffffffu, Abs);
    uint64_t within[kChunk / 64];
    uint8_t unused[kChunk / 8];
    Seen seen;
    scan_run<T, Abs>(x, chunk.entries(), range, unused, within, &seen);
    for (int64_t w = 0; seen.within > 0 && w < (chunk.entries() + 63) / 64; ++w)
      for (uint64_t word = within[w]; word; word &= word - 1) {
        const uint32_t key = key_of<T, Abs>(x[w * 64 + __builtin_ctzll(word)]);
        if (key >= lo && key <= last) ++local[(key - lo) >> shift];
      }
  }

  // One pass over the scores for any number of brackets: writes what they decide, gathers what they do not.
  void stream(int64_t counts, const Bracket* brackets, const uint64_t* bits, Record* records,
              Tally* tallies) {
    for (int64_t d = 0; d < counts; ++d) tallies[d] = Tally();
    if (!pools_) pools_ = new (std::nothrow) Buffer<Candidate>[size_t(threads_)];
    if (!pools_) throw Failure{kTopkNoMemory};
    Array<Tally> of_threads(counts * threads_);
#pragma omp parallel num_threads(threads_)
    {
      const ExactFloats exact;
      const int me = thread_index();
      Buffer<Candidate>& pool = pools_[me];
      pool.n = 0;
      Tally* mine = of_threads.p + me * counts;
      uint64_t within[kChunk / 64];
      // Small steps keep a machine busy that does other things; big ones keep the scores in order.
#pragma omp for schedule(dynamic, 4)
      for (int64_t c = 0; c < chunks_.n; ++c) {
        const Chunk& chunk = chunks_.p[c];
        for (int64_t d = 0; d < counts; ++d) {
          uint8_t* dst = bytes(bits + d * n_, chunk);
          const bool tie = brackets[d].lo == brackets[d].hi;
          Seen seen;
          const int64_t start = pool.n;
          for (int32_t row = 0; row < chunk.rows; ++row) {
            const T* x = reinterpret_cast<const T*>(chunk.scores) + int64_t(row) * chunk.cols;
            const int64_t before = seen.within;
            scan_run<T, Abs>(x, chunk.cols, brackets[d], dst + row * chunk.stride(), within, &seen);
            const int64_t found = seen.within - before;
            if (found == 0 || tie || mine[d].overflow) continue;
            if (pool.n + found > counts * most_ || !pool.reserve(pool.n + found + 1))
              mine[d].overflow = true;
            else
              gather(x, within, (chunk.cols + 63) / 64, uint32_t(row * chunk.stride() * 8), pool);
          }
          records[d * chunks_.n + c] = {start, me, int32_t(seen.within)};
          mine[d].above += seen.above;
          mine[d].within += seen.within;
          mine[d].nan += seen.nan;
        }
      }
#pragma omp critical(fu_topk)
      for (int64_t d = 0; d < counts; ++d) {
        tallies[d].above += mine[d].above;
        tallies[d].within += mine[d].within;
        tallies[d].nan += mine[d].nan;
        tallies[d].overflow |= mine[d].overflow;
      }
    }
  }

  // Appends the entries of the set bits to the pool (which has room for them and one more).
  static void gather(const T* x, const uint64_t* within, int64_t words, uint32_t bit,
                     Buffer<Candidate>& pool) {
    uint16_t list[kChunk / 64 + 1];
    int64_t found = 0;
    for (int64_t w = 0; w < words; ++w) {
      list[found] = uint16_t(w);
      found += within[w] != 0;
    }
    Candidate* out = pool.p + pool.n;
    for (int64_t i = 0; i < found; ++i) {
      const uint32_t first = uint32_t(list[i]) * 64;
      for (uint64_t word = within[list[i]]; word; word &= word - 1) {
        const uint32_t at = first + uint32_t(__builtin_ctzll(word));
        *out++ = {key_of<T, Abs>(x[at]), bit + at};
      }
    }
    pool.n = out - pool.p;
  }

  // Completes the bits from the candidates; false when the bracket does not hold the k-th value.
  bool finish(int64_t k, const Bracket& bracket, const uint64_t* bits, const Record* records,
              const Tally& tally) {
    int64_t need = k - tally.above;
    if (bracket.lo == topk_key_min(Abs) && need > tally.within) need = tally.within;  // the rest is NaN
    if (need < 0 || need > tally.within) return false;
    if (need == 0) return true;
    if (bracket.lo == bracket.hi) {
      patch_ties(need, bracket, bits, records);
      return true;
    }
    if (tally.overflow) return false;
    int64_t greater = 0, equal = 0;
    const uint32_t key = kth_candidate(need, bracket, records, &greater, &equal);
    patch(key, need - greater, equal, bits, records);
    return true;
  }

  // The r-th largest candidate; how many are greater and how many are equal.
  uint32_t kth_candidate(int64_t r, const Bracket& bracket, const Record* records, int64_t* greater,
                         int64_t* equal) {
    int shift = 0;
    while ((bracket.hi - bracket.lo) >> shift >= uint32_t(kTopkBins)) ++shift;
    int64_t bins[kTopkBins] = {};
#pragma omp parallel num_threads(threads_)
    {
      int32_t local[kTopkBins] = {};
#pragma omp for schedule(static)
      for (int64_t c = 0; c < chunks_.n; ++c) {
        const Candidate* p = pools_[records[c].thread].p + records[c].start;
        for (int32_t i = 0; i < records[c].count; ++i) ++local[(p[i].key - bracket.lo) >> shift];
      }
#pragma omp critical(fu_topk)
      for (int b = 0; b < kTopkBins; ++b) bins[b] += local[b];
    }
    int b = kTopkBins - 1;
    for (; bins[b] < r; --b) {
      r -= bins[b];
      *greater += bins[b];
    }
    Buffer<uint32_t> keys;
    if (!keys.resize(bins[b] + 1)) throw Failure{kTopkNoMemory};
    int64_t n = 0;
    for (int64_t c = 0; c < chunks_.n; ++c) {
      const Candidate* p = pools_[records[c].thread].p + records[c].start;
      for (int32_t i = 0; i < records[c].count; ++i) {
        keys.p[n] = p[i].key;
        n += (p[i].key - bracket.lo) >> shift == uint32_t(b);
      }
    }
    const uint32_t key = kth_largest(keys.p, n, r);
    for (int64_t i = 0; i < n; ++i) {
      *greater += keys.p[i] > key;
      *equal += keys.p[i] == key;
    }
    return key;
  }

  // Sets the candidates above `key` and the first `take` of the `equal` ones that have it.
  void patch(uint32_t key, int64_t take, int64_t equal, const uint64_t* bits, const Record* records) {
    Buffer<int64_t> left;  // ties that a chunk may still take
    if (take < equal) {
      if (!left.resize(chunks_.n)) throw Failure{kTopkNoMemory};
      for (int64_t c = 0; c < chunks_.n; ++c) {
        left.p[c] = take;
        const Candidate* p = pools_[records[c].thread].p + records[c].start;
        for (int32_t i = 0; i < records[c].count && take > 0; ++i) take -= p[i].key == key;
      }
    }
#pragma omp parallel for schedule(static) num_threads(threads_)
    for (int64_t c = 0; c < chunks_.n; ++c) {
      const Candidate* p = pools_[records[c].thread].p + records[c].start;
      uint8_t* dst = bytes(bits, chunks_.p[c]);
      int64_t ties = left.p ? left.p[c] : records[c].count;
      for (int32_t i = 0; i < records[c].count; ++i) {
        const bool tie = p[i].key == key && ties > 0;
        ties -= tie;
        dst[p[i].bit >> 3] |= uint8_t(uint32_t(tie || p[i].key > key) << (p[i].bit & 7));
      }
    }
  }

  // Sets the first `take` entries equal to the bracket's only key; the records hold their number by chunk.
  void patch_ties(int64_t take, const Bracket& tie, const uint64_t* bits, const Record* records) {
    if (take <= 0) return;
    Array<int64_t> before(chunks_.n + 1);
    for (int64_t c = 0; c < chunks_.n; ++c) before[c + 1] = before[c] + records[c].count;
#pragma omp parallel num_threads(threads_)
    {
      const ExactFloats exact;
      uint64_t within[kChunk / 64];
#pragma omp for schedule(dynamic, 4)
      for (int64_t c = 0; c < chunks_.n; ++c) {
        int64_t left = take - before[c];
        if (left <= 0 || records[c].count == 0) continue;
        const Chunk& chunk = chunks_.p[c];
        Seen seen;
        for (int32_t row = 0; row < chunk.rows && left > 0; ++row) {
          const T* x = reinterpret_cast<const T*>(chunk.scores) + int64_t(row) * chunk.cols;
          uint8_t* dst = bytes(bits, chunk) + row * chunk.stride();
          scan_run<T, Abs>(x, chunk.cols, tie, dst, within, &seen);
          for (int64_t i = 0; i < chunk.cols && left > 0; i += 64) {
            uint64_t word = within[i / 64];
            const int64_t found = __builtin_popcountll(word);
            if (found > left) word = lowest_bits(word, left);
            left -= found;
            or_word(dst + i / 8, word, chunk.cols - i);
          }
        }
      }
    }
  }

  // Histograms over all scores until few enough entries are left (or one key).
  Bracket narrow_bracket(int64_t k, int64_t nan) {
    const int64_t valid = total_ - nan;
    if (k >= valid) return make_bracket(0, 0, Abs);
    if (k == 0) return make_bracket(~0u, ~0u, Abs);
    int64_t lo = 0;
    const int64_t shifts[3] = {21, 10, 0};
    for (const int64_t shift : shifts) {
      int64_t bins[kTopkBins] = {};
      histogram(&lo, &shift, shift ? kTopkBins : kTopkBins / 2, bins, false);
      int64_t b = kTopkBins - 1;
      while (bins[b] < k) k -= bins[b--];
      lo += b << shift;
      if (bins[b] <= most_) return make_bracket(uint32_t(lo), uint32_t(lo + (int64_t(1) << shift) - 1), Abs);
    }
    return make_bracket(uint32_t(lo), uint32_t(lo), Abs);
  }

 public:
  ~Selector() { delete[] pools_; }
  Selector(const Selector&) = delete;

 private:
  const TopkTensor* tensors_;
  int64_t n_, total_ = 0, most_ = 0;
  int threads_;
  Buffer<Chunk> chunks_;
  Buffer<Candidate>* pools_ = nullptr;
};

// A row short enough that its keys stay in the cache: they are computed once for all counts.
template <class T, bool Abs>
int64_t select_row(const T* x, int64_t cols, int64_t counts, const int64_t* ks, int64_t step, int64_t byte,
                   const uint64_t* bits, Buffer<uint32_t>& keys) {
  if (!keys.reserve((cols + 63) / 64 * 64)) throw Failure{kTopkNoMemory};
  uint32_t* p = keys.p;
  int64_t valid = 0;
  for (int64_t i = 0; i < cols; ++i) {
    p[i] = key_of<T, Abs>(x[i]);
    valid += p[i] != 0;
  }
  for (int64_t i = cols; i < (cols + 63) / 64 * 64; ++i) p[i] = 0;
  for (int64_t d = 0; d < counts; ++d) {
    uint8_t* dst = reinterpret_cast<uint8_t*>(bits[d * step]) + byte;
    const int64_t k = ks[d * step] < valid ? ks[d * step] : valid;
    if (k == 0) {
      memset(dst, 0, size_t((cols + 7) / 8));
      continue;
    }
    const uint32_t key = kth_largest(p, cols, k);
    int64_t left = k;
    for (int64_t i = 0; i < cols; ++i) left -= p[i] > key;
    for (int64_t i = 0; i < cols; i += 64) {
      uint64_t above = 0, equal = 0;
      for (int j = 0; j < 64; ++j) {
        above |= uint64_t(p[i + j] > key) << j;
        equal |= uint64_t(p[i + j] == key) << j;
      }
      const int64_t found = __builtin_popcountll(equal);
      if (found > left) equal = lowest_bits(equal, left);
      left -= found < left ? found : left;
      store_word(dst + i / 8, above | equal, cols - i);
    }
  }
  return cols - valid;
}

template <class T, bool Abs>
int64_t select_rows(const TopkTensor* tensors, int64_t n, int64_t counts, const int64_t* ks,
                    const uint64_t* bits) {
  int64_t nan = 0;
  for (int64_t t = 0; t < n; ++t) {
    const int64_t rows = tensors[t].rows, cols = tensors[t].cols, width = (cols + 7) / 8;
    if (rows == 0 || cols == 0) continue;
    const T* x = reinterpret_cast<const T*>(tensors[t].scores);
    if (cols <= kSmallRow) {
      int failed = kTopkDone;
#pragma omp parallel reduction(+ : nan) if (rows * cols > kChunk)
      {
        Buffer<uint32_t> keys;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) try {
            nan += select_row<T, Abs>(x + r * cols, cols, counts, ks + t, n, r * width, bits + t, keys);
          } catch (const Failure& failure) {
#pragma omp atomic write
            failed = failure.code;
          }
      }
      if (failed) throw Failure{failed};
      continue;
    }
    Array<int64_t> k(counts);
    Array<uint64_t> out(counts);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < counts; ++d) {
        k[d] = ks[d * n + t];
        out[d] = bits[d * n + t] + uint64_t(r * width);
      }
      const TopkTensor row{uint64_t(reinterpret_cast<uintptr_t>(x + r * cols)), 1, cols, 0};
      nan += Selector<T, Abs>(&row, 1).select(counts, k.p, out.p);
    }
  }
  return nan;
}

// Every tensor on its own: small ones a thread each, large ones all threads together.
template <class T, bool Abs>
int64_t select_tensors(const TopkTensor* tensors, int64_t n, int64_t counts, const int64_t* ks,
                       const uint64_t* bits) {
  int64_t nan = 0;
  const auto select = [&](int64_t t, int threads) {
    Array<int64_t> k(counts);
    Array<uint64_t> out(counts);
    for (int64_t d = 0; d < counts; ++d) {
      k[d] = ks[d * n + t];
      out[d] = bits[d * n + t];
    }
    return Selector<T, Abs>(tensors + t, 1, threads).select(counts, k.p, out.p);
  };
  const auto small = [&](int64_t t) { return tensors[t].rows * tensors[t].cols <= kOneThread; };
  int failed = kTopkDone;
#pragma omp parallel for schedule(dynamic) reduction(+ : nan) if (n > 1)
  for (int64_t t = 0; t < n; ++t) try {
      if (small(t)) nan += select(t, 1);
    } catch (const Failure& failure) {
#pragma omp atomic write
      failed = failure.code;
    }
  if (failed) throw Failure{failed};
  for (int64_t t = 0; t < n; ++t)
    if (!small(t)) nan += select(t, available_threads());
  return nan;
}

// Calls f(T(), bool constant) for the element type and the key.
template <bool B>
struct Flag {
  static constexpr bool value = B;
};
template <class F>
int dispatch(int dtype, bool absolute, F f) try {
  const auto by_key = [&](auto type) {
    if (absolute)
      f(type, Flag<true>());
    else
      f(type, Flag<false>());
  };
  if (dtype == kF32) by_key(float());
  if (dtype == kF16) by_key(f16());
  if (dtype == kBF16) by_key(bf16());
  return kTopkDone;
} catch (const Failure& failure) {
  return failure.code;
}

}  // namespace

int topk_select(const TopkTensor* tensors, int64_t n, int dtype, bool absolute, int64_t counts,
                const int64_t* ks, const uint64_t* bits, int64_t* nan) {
  return dispatch(dtype, absolute, [&](auto type, auto flag) {
    *nan = Selector<decltype(type), decltype(flag)::value>(tensors, n).select(counts, ks, bits);
  });
}

int topk_tensors(const TopkTensor* tensors, int64_t n, int dtype, bool absolute, int64_t counts,
                 const int64_t* ks, const uint64_t* bits, int64_t* nan) {
  return dispatch(dtype, absolute, [&](auto type, auto flag) {
    *nan = select_tensors<decltype(type), decltype(flag)::value>(tensors, n, counts, ks, bits);
  });
}

int topk_rows(const TopkTensor* tensors, int64_t n, int dtype, bool absolute, int64_t counts,
              const int64_t* ks, const uint64_t* bits, int64_t* nan) {
  return dispatch(dtype, absolute, [&](auto type, auto flag) {
    *nan = select_rows<decltype(type), decltype(flag)::value>(tensors, n, counts, ks, bits);
  });
}

int topk_histogram(const TopkTensor* tensors, int64_t n, int dtype, bool absolute, const int64_t* lo,
                   const int64_t* shift, int64_t bins, int64_t* out) {
  memset(out, 0, size_t(n * bins) * sizeof(int64_t));
  return dispatch(dtype, absolute, [&](auto type, auto flag) {
    Selector<decltype(type), decltype(flag)::value>(tensors, n).histogram(lo, shift, bins, out, true);
  });
}

int topk_write(const TopkTensor* tensors, int64_t n, int dtype, bool absolute, const int64_t* key,
               const int64_t* take, const uint64_t* bits) {
  return dispatch(dtype, absolute, [&](auto type, auto flag) {
    for (int64_t i = 0; i < n; ++i)
      Selector<decltype(type), decltype(flag)::value>(tensors + i, 1)
          .write(uint32_t(key[i]), take[i], bits + i);
  });
}

}  // namespace fu::FU_ISA
