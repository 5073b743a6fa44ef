// The gradient of a weight on some of its square tiles: dW = dY^T X where a block mask is set, nothing
// computed elsewhere (fastunlearn/reference/block_weight_grad.py). Of a linear layer, or of a convolution,
// whose X is read as if it had been unfolded.
#pragma once

#include "common.h"

namespace fu::block_grad {

// Entries of T taken at once: what is packed of dY and of X stays in the second-level cache.
constexpr int kChunk = 256;
// Tiles of one column of blocks that share what is packed of X.
constexpr int kGroup = 4;

// Row-major memory. Linear: dY [tokens, rows], X [tokens, cols]. Convolution (channels > 0): dY [tokens /
// places, rows, out_height * out_width], X [tokens / places, channels, height, width], cols = channels *
// kernel_height * kernel_width.
struct Layer {
  int64_t tokens, rows, cols;
  int64_t channels, height, width, out_height, out_width, kernel_height, kernel_width;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
};

// Where a tile stands: block row, block column, and its number among the set ones, row-major.
struct Tile {
  int64_t row, col, number;
};

}  // namespace fu::block_grad

// `tiles` sorted by column. `out` of the inputs' type: dense [rows, cols] (only tiles are written), or with
// `packed` [tiles, block, block], zeros where a tile hangs over the edge. The order of the sums depends on
// sizes alone, not on the number of threads. False: no memory for what threads work in.
FU_DECLARE(bool, block_weight_grad,
           (const void* grad, const void* x, int dtype, const fu::block_grad::Layer& layer,
            const fu::block_grad::Tile* tiles, int64_t count, int64_t block, void* out, bool packed))
