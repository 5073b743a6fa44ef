// BitMask: pack, unpack, count and prefix counts of masks of one bit an entry.
//
// Layout: uint8 [rows, ceil(cols / 8)], little-endian in a byte, every row starts on a byte, padding bits are
// 0.
#pragma once

#include "common.h"

// `bools` [rows, cols], one byte an entry, any value but 0 is true -> `bits`.
FU_DECLARE(void, mask_pack, (const uint8_t* bools, int64_t rows, int64_t cols, uint8_t* bits))
FU_DECLARE(void, mask_unpack, (const uint8_t* bits, int64_t rows, int64_t cols, uint8_t* bools))
FU_DECLARE(int64_t, mask_count, (const uint8_t* bits, int64_t bytes))
// `masks` [n, 2]: address and bytes of each; out [n]: their counts.
FU_DECLARE(void, mask_counts, (const int64_t* masks, int64_t n, int64_t* out))
// out[i] = number of set bits in bytes [0, i * chunk), i = 0 .. ceil(bytes / chunk); the last entry is the
// count.
FU_DECLARE(void, mask_prefix, (const uint8_t* bits, int64_t bytes, int64_t chunk, int64_t* out))

namespace fu::cuda {
void mask_pack(const uint8_t* bools, int64_t rows, int64_t cols, uint8_t* bits, int device, uintptr_t stream);
void mask_unpack(const uint8_t* bits, int64_t rows, int64_t cols, uint8_t* bools, int device,
                 uintptr_t stream);
// *out = number of set bits.
void mask_count(const uint8_t* bits, int64_t bytes, int64_t* out, int device, uintptr_t stream);
// `partial`: int64 workspace of ceil(ceil(bytes / chunk) / 1024) entries.
void mask_prefix(const uint8_t* bits, int64_t bytes, int64_t chunk, int64_t* out, int64_t* partial,
                 int device, uintptr_t stream);
}  // namespace fu::cuda
