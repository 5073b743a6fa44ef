// Every op is bound here, once: fastunlearn._C.
//
// Tensors are passed as addresses (int) and sizes; the Python side has checked them. No call holds the GIL.
// Compiled with FU_HOST_SIMT the module has another name and its cuda_* functions run the CUDA kernel bodies
// on the host (csrc/simt.h): the tests build it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "adamw.h"
#include "block_weight_grad.h"
#include "common.h"
#include "gram.h"
#include "hamu.h"
#include "mask.h"
#include "masked_lora.h"
#include "nm.h"
#include "nm_tensor.h"
#include "redistribute.h"
#include "saliency.h"
#include "sid.h"
#include "topk.h"

#if defined(FU_WITH_CUDA) && !defined(FU_HOST_SIMT)
#include <cuda_runtime.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if !defined(FU_MODULE)
#define FU_MODULE _C
#endif

namespace py = pybind11;
using Address = uintptr_t;

namespace {

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

const py::call_guard<py::gil_scoped_release> no_gil;

void bind_mask(py::module_& m) {
  m.def(
      "mask_pack_cpu",
      [](Address bools, int64_t rows, int64_t cols, Address bits) {
        FU_CALL(mask_pack, at<const uint8_t>(bools), rows, cols, at<uint8_t>(bits));
      },
      no_gil);
  m.def(
      "mask_unpack_cpu",
      [](Address bits, int64_t rows, int64_t cols, Address bools) {
        FU_CALL(mask_unpack, at<const uint8_t>(bits), rows, cols, at<uint8_t>(bools));
      },
      no_gil);
  m.def(
      "mask_count_cpu",
      [](Address bits, int64_t bytes) { return FU_CALL(mask_count, at<const uint8_t>(bits), bytes); },
      no_gil);
  m.def(
      "mask_counts_cpu",
      [](Address masks, int64_t n, Address out) {
        FU_CALL(mask_counts, at<const int64_t>(masks), n, at<int64_t>(out));
      },
      no_gil);
  m.def(
      "mask_prefix_cpu",
      [](Address bits, int64_t bytes, int64_t chunk, Address out) {
        FU_CALL(mask_prefix, at<const uint8_t>(bits), bytes, chunk, at<int64_t>(out));
      },
      no_gil);
#if defined(FU_WITH_CUDA)
  m.def(
      "mask_pack_cuda",
      [](Address bools, int64_t rows, int64_t cols, Address bits, int device, Address stream) {
        fu::cuda::mask_pack(at<const uint8_t>(bools), rows, cols, at<uint8_t>(bits), device, stream);
      },
      no_gil);
  m.def(
      "mask_unpack_cuda",
      [](Address bits, int64_t rows, int64_t cols, Address bools, int device, Address stream) {
        fu::cuda::mask_unpack(at<const uint8_t>(bits), rows, cols, at<uint8_t>(bools), device, stream);
      },
      no_gil);
  m.def(
      "mask_count_cuda",
      [](Address bits, int64_t bytes, Address out, int device, Address stream) {
        fu::cuda::mask_count(at<const uint8_t>(bits), bytes, at<int64_t>(out), device, stream);
      },
      no_gil);
  m.def(
      "mask_prefix_cuda",
      [](Address bits, int64_t bytes, int64_t chunk, Address out, Address partial, int device,
         Address stream) {
        fu::cuda::mask_prefix(at<const uint8_t>(bits), bytes, chunk, at<int64_t>(out), at<int64_t>(partial),
                              device, stream);
      },
      no_gil);
#endif
}

fu::masked::Work masked_work(Address table, Address hyper, Address keys, Address unit_tensor,
                             Address first_unit, int64_t units, Address grad_scale) {
  return {at<const int64_t>(table),       at<const float>(hyper),        at<const uint32_t>(keys),
          at<const int32_t>(unit_tensor), at<const int64_t>(first_unit), units,
          at<const float>(grad_scale)};
}

void bind_adamw(py::module_& m) {
  m.def(
      "masked_adamw_cpu",
      [](Address table, Address hyper, Address keys, Address unit_tensor, Address first_unit, int64_t units,
         Address grad_scale) {
        FU_CALL(masked_adamw, masked_work(table, hyper, keys, unit_tensor, first_unit, units, grad_scale));
      },
      no_gil);
  m.def(
      "masked_sgd_cpu",
      [](Address table, Address hyper, Address keys, Address unit_tensor, Address first_unit, int64_t units,
         Address grad_scale) {
        FU_CALL(masked_sgd, masked_work(table, hyper, keys, unit_tensor, first_unit, units, grad_scale));
      },
      no_gil);
  m.def(
      "masked_sumsq_cpu",
      [](Address table, Address unit_tensor, Address first_unit, int64_t units, Address partial) {
        FU_CALL(masked_sumsq, masked_work(table, 0, 0, unit_tensor, first_unit, units, 0),
                at<double>(partial));
      },
      no_gil);
#if defined(FU_WITH_CUDA)
  const auto step = [](auto run) {
    return [run](Address table, Address hyper, Address keys, Address unit_tensor, Address first_unit,
                 int64_t units, Address grad_scale, uint32_t kinds, int device, Address stream) {
      run(masked_work(table, hyper, keys, unit_tensor, first_unit, units, grad_scale), kinds, device, stream);
    };
  };
  m.def("masked_adamw_cuda", step(&fu::cuda::masked_adamw), no_gil);
  m.def("masked_sgd_cuda", step(&fu::cuda::masked_sgd), no_gil);
  m.def(
      "masked_sumsq_cuda",
      [](Address table, Address unit_tensor, Address first_unit, int64_t units, Address partial,
         uint32_t kinds, int device, Address stream) {
        fu::cuda::masked_sumsq(masked_work(table, 0, 0, unit_tensor, first_unit, units, 0),
                               at<double>(partial), kinds, device, stream);
      },
      no_gil);
#endif
}

// `items`, `one`: addresses of NmItem.
void bind_nm(py::module_& m) {
  m.def(
      "nm_mask_cpu",
      [](Address items, int64_t count, int n, int group) {
        return FU_CALL(nm_mask, at<fu::NmItem>(items), count, n, group) != 0;
      },
      no_gil);
#if defined(FU_WITH_CUDA)
  m.def("nm_tile_bytes", [] { return fu::cuda::kNmTile; });
  m.def(
      "nm_mask_cuda",
      [](Address items, Address one, int64_t count, int64_t tiles, int dtype, int n, int group,
         Address nan_seen, int device, Address stream) {
        fu::cuda::nm_mask(at<const fu::NmItem>(items), at<const fu::NmItem>(one), count, tiles, dtype, n,
                          group, at<int>(nan_seen), device, stream);
      },
      no_gil);
#endif
}

void bind_masked_lora(py::module_& m) {
  m.def(
      "masked_lora_effective_cpu",
      [](Address weight, int weight_dtype, Address A, Address B, Address bits, int64_t rows, int64_t cols,
         int64_t rank, float scale, Address out, int out_dtype) {
        FU_CALL(masked_lora_effective, at<const void>(weight), weight_dtype, at<const float>(A),
                at<const float>(B), at<const uint8_t>(bits), rows, cols, rank, scale, at<void>(out),
                out_dtype);
      },
      no_gil);
  m.def(
      "masked_lora_keep_cpu",
      [](Address x, int dtype, Address bits, int64_t rows, int64_t cols) {
        FU_CALL(masked_lora_keep, at<void>(x), dtype, at<const uint8_t>(bits), rows, cols);
      },
      no_gil);
  m.def("masked_lora_strips", [](int64_t cols) { return fu::ceil_div(cols, fu::masked_lora::strip(cols)); });
  m.def(
      "masked_lora_contract_cpu",
      [](Address G, int dtype, Address A, Address B, Address bits, int64_t rows, int64_t cols, int64_t rank,
         Address partial, Address dA, Address dB) {
        FU_CALL(masked_lora_contract, at<const void>(G), dtype, at<const float>(A), at<const float>(B),
                at<const uint8_t>(bits), rows, cols, rank, at<float>(partial), at<float>(dA), at<float>(dB));
      },
      no_gil);
}

// `layer`: the numbers of fu::block_grad::Layer; `tiles` int64 [count, 3].
void bind_block_weight_grad(py::module_& m) {
  m.def(
      "block_weight_grad_cpu",
      [](Address grad, Address x, int dtype, const std::array<int64_t, 16>& layer, Address tiles,
         int64_t count, int64_t block, Address out, bool packed) {
        fu::block_grad::Layer l;
        static_assert(sizeof l == sizeof layer);
        std::memcpy(&l, layer.data(), sizeof l);
        if (!FU_CALL(block_weight_grad, at<const void>(grad), at<const void>(x), dtype, l,
                     at<const fu::block_grad::Tile>(tiles), count, block, at<void>(out), packed))
          throw std::bad_alloc();
      },
      no_gil);
}

// Addresses of the dense tensor [rows, cols], of its mask's bits and of its values; `size` is an entry's
// bytes.
void bind_nm_tensor(py::module_& m) {
  m.def(
      "nm_gather_cpu",
      [](Address dense, Address bits, int64_t rows, int64_t cols, int n, int group, int size,
         Address values) {
        FU_CALL(nm_gather, at<const void>(dense), at<const uint8_t>(bits), rows, cols, n, group, size,
                at<void>(values));
      },
      no_gil);
  m.def(
      "nm_expand_cpu",
      [](Address values, Address bits, int64_t rows, int64_t cols, int n, int group, int size,
         Address dense) {
        FU_CALL(nm_expand, at<const void>(values), at<const uint8_t>(bits), rows, cols, n, group, size,
                at<void>(dense));
      },
      no_gil);
  m.def(
      "nm_first_wrong_row_cpu",
      [](Address bits, int64_t rows, int64_t cols, int n, int group) {
        return FU_CALL(nm_first_wrong_row, at<const uint8_t>(bits), rows, cols, n, group);
      },
      no_gil);
#if defined(FU_WITH_CUDA)
  m.def(
      "nm_gather_cuda",
      [](Address dense, Address bits, int64_t rows, int64_t cols, int n, int group, int size, Address values,
         Address wrong_row, int device, Address stream) {
        fu::cuda::nm_gather(at<const void>(dense), at<const uint8_t>(bits), rows, cols, n, group, size,
                            at<void>(values), at<int64_t>(wrong_row), device, stream);
      },
      no_gil);
  m.def(
      "nm_expand_cuda",
      [](Address values, Address bits, int64_t rows, int64_t cols, int n, int group, int size, Address dense,
         int device, Address stream) {
        fu::cuda::nm_expand(at<const void>(values), at<const uint8_t>(bits), rows, cols, n, group, size,
                            at<void>(dense), device, stream);
      },
      no_gil);
#endif
}

void bind_redistribute(py::module_& m) {
  // `tensors`: RedistributeItem for each, but for first_row and first_unit, which are filled in here.
  m.def(
      "redistribute_cpu",
      [](Address tensors, int64_t count, float beta, float clip) -> int64_t {
        auto* items = at<fu::RedistributeItem>(tensors);
        std::vector<fu::RedistributeUnit> units;
        int64_t rows = 0;
        for (int64_t t = 0; t < count; ++t) {
          items[t].first_row = rows;
          items[t].first_unit = int64_t(units.size());
          const int64_t step = fu::redistribute_unit_rows(items[t].cols);
          for (int64_t row = 0; row < items[t].rows; row += step)
            units.push_back({t, row, std::min(step, items[t].rows - row), 0, 0, 0.0});
          rows += items[t].rows;
        }
        std::vector<double> row_scale(static_cast<size_t>(rows));
        std::vector<float> normaliser(static_cast<size_t>(count));
        return FU_CALL(redistribute, items, count, beta, clip, units.data(), int64_t(units.size()),
                       row_scale.data(), normaliser.data());
      },
      no_gil);
}

void bind_gram(py::module_& m) {
  m.def(
      "gram_cpu",
      [](Address table, int64_t tensors, int64_t groups, Address unit_tensor, Address first_unit,
         int64_t units, Address out) {
        std::vector<double> partial(size_t(units * fu::gram::pairs(groups)));
        FU_CALL(gram_products, at<const int64_t>(table), tensors, groups, at<const int32_t>(unit_tensor),
                at<const int64_t>(first_unit), units, partial.data(), at<double>(out));
      },
      no_gil);
  m.def(
      "hamu_combine_cpu",
      [](Address table, int64_t groups, Address factors, Address keys, Address unit_tensor,
         Address first_unit, int64_t units) {
        FU_CALL(hamu_combine, at<const int64_t>(table), groups, at<const float>(factors),
                at<const uint32_t>(keys), at<const int32_t>(unit_tensor), at<const int64_t>(first_unit),
                units);
      },
      no_gil);
}

void bind_saliency(py::module_& m) {
  // Rows of (address of scores, of the gradient, of the weight or 0, entries, dtype of both).
  using Row = std::tuple<Address, Address, Address, int64_t, int, int>;
  m.def(
      "saliency_accumulate_cpu",
      [](const std::vector<Row>& rows, int kind) {
        std::vector<fu::SaliencyItem> items;
        items.reserve(rows.size());
        for (const auto& [score, grad, weight, numel, grad_dtype, weight_dtype] : rows)
          items.push_back({at<float>(score), at<const void>(grad), at<const void>(weight), numel, grad_dtype,
                           weight_dtype});
        std::vector<int64_t> first_piece(rows.size() + 1);
        FU_CALL(saliency_accumulate, items.data(), int64_t(items.size()), kind, first_piece.data());
      },
      no_gil);
}

void check_topk(int result) {
  if (result == fu::kTopkNoMemory) throw std::runtime_error("topk_mask: out of memory for its workspace");
  if (result != fu::kTopkDone)
    throw std::runtime_error(
        "topk_mask: the k-th score was not found; did another thread write to the scores?");
}

void bind_topk(py::module_& m) {
  m.def(
      "topk_select_cpu",
      [](Address tensors, int64_t n, int dtype, bool absolute, int64_t counts, Address ks, Address bits) {
        int64_t nan = 0;
        check_topk(FU_CALL(topk_select, at<const fu::TopkTensor>(tensors), n, dtype, absolute, counts,
                           at<const int64_t>(ks), at<const uint64_t>(bits), &nan));
        return nan;
      },
      no_gil);
  m.def(
      "topk_tensors_cpu",
      [](Address tensors, int64_t n, int dtype, bool absolute, int64_t counts, Address ks, Address bits) {
        int64_t nan = 0;
        check_topk(FU_CALL(topk_tensors, at<const fu::TopkTensor>(tensors), n, dtype, absolute, counts,
                           at<const int64_t>(ks), at<const uint64_t>(bits), &nan));
        return nan;
      },
      no_gil);
  m.def(
      "topk_rows_cpu",
      [](Address tensors, int64_t n, int dtype, bool absolute, int64_t counts, Address ks, Address bits) {
        int64_t nan = 0;
        check_topk(FU_CALL(topk_rows, at<const fu::TopkTensor>(tensors), n, dtype, absolute, counts,
                           at<const int64_t>(ks), at<const uint64_t>(bits), &nan));
        return nan;
      },
      no_gil);
  m.def(
      "topk_histogram_cpu",
      [](Address tensors, int64_t n, int dtype, bool absolute, Address lo, Address shift, int64_t bins,
         Address out) {
        check_topk(FU_CALL(topk_histogram, at<const fu::TopkTensor>(tensors), n, dtype, absolute,
                           at<const int64_t>(lo), at<const int64_t>(shift), bins, at<int64_t>(out)));
      },
      no_gil);
  m.def(
      "topk_write_cpu",
      [](Address tensors, int64_t n, int dtype, bool absolute, Address key, Address take, Address bits) {
        check_topk(FU_CALL(topk_write, at<const fu::TopkTensor>(tensors), n, dtype, absolute,
                           at<const int64_t>(key), at<const int64_t>(take), at<const uint64_t>(bits)));
      },
      no_gil);
#if defined(FU_WITH_CUDA)
  // Arguments of every call: see TopkCudaCall.
  const auto call = [](Address tensors, Address bits, Address params, int64_t n, int64_t counts,
                       int64_t scopes, int64_t total, int64_t tiles, int dtype, bool absolute,
                       Address workspace, Address nan, int device, Address stream) {
    return fu::cuda::TopkCudaCall{at<const fu::cuda::TopkCudaTensor>(tensors),
                                  at<const uint64_t>(bits),
                                  at<const int64_t>(params),
                                  n,
                                  counts,
                                  scopes,
                                  total,
                                  tiles,
                                  dtype,
                                  absolute,
                                  workspace,
                                  at<int64_t>(nan),
                                  device,
                                  stream};
  };
  using Call = fu::cuda::TopkCudaCall;
  // module_local: the tests load a second module, with the same bodies compiled for the host.
  py::class_<Call>(m, "TopkCudaCall", py::module_local()).def(py::init(call));
  m.def("topk_tile_bytes", &fu::cuda::topk_tile_bytes);
  m.def("topk_workspace_cuda", &fu::cuda::topk_workspace);
  m.def("topk_select_cuda", &fu::cuda::topk_select, no_gil);
  m.def("topk_rows_cuda", &fu::cuda::topk_rows, no_gil);
  m.def(
      "topk_histogram_cuda",
      [](const Call& c, Address out) { fu::cuda::topk_histogram(c, at<int64_t>(out)); }, no_gil);
  m.def("topk_write_cuda", &fu::cuda::topk_write, no_gil);
#endif
}

fu::sid::Inputs sid_inputs(Address teacher, Address fake, Address noise, int dtype, int noise_dtype,
                           int64_t n, int64_t size, float alpha) {
  return {at<const void>(teacher),
          at<const void>(fake),
          at<const void>(noise),
          dtype,
          noise_dtype,
          n,
          size,
          alpha};
}

void bind_sid(py::module_& m) {
  m.attr("sid_unit") = fu::sid::kUnit;
  m.def(
      "sid_sums_cpu",
      [](Address teacher, Address fake, Address noise, int dtype, int noise_dtype, int64_t n, int64_t size,
         float alpha, Address partial, Address out) {
        FU_CALL(sid_sums, sid_inputs(teacher, fake, noise, dtype, noise_dtype, n, size, alpha),
                at<double>(partial), at<float>(out));
      },
      no_gil);
  m.def(
      "sid_gradients_cpu",
      [](Address teacher, Address fake, Address noise, int dtype, int noise_dtype, int64_t n, int64_t size,
         float alpha, Address factor, Address of_teacher, Address of_fake) {
        FU_CALL(sid_gradients, sid_inputs(teacher, fake, noise, dtype, noise_dtype, n, size, alpha),
                at<const float>(factor), at<void>(of_teacher), at<void>(of_fake));
      },
      no_gil);
}

// Asks for huge pages behind memory that nobody has touched yet: then it costs a fifth to touch it.
void huge_pages(Address first, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr Address kPage = 4096;
  const Address begin = (first + kPage - 1) / kPage * kPage, end = (first + Address(bytes)) / kPage * kPage;
  // Only advice: where the kernel has no huge pages nothing is lost.
  if (begin < end) (void)madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)first, (void)bytes;
#endif
}

// The interface of this module; fastunlearn/_native.py (ABI) wants the same. Goes up when a signature
// changes.
constexpr int kAbi = 4;

py::dict build_info() {
  py::dict d;
  d["abi"] = kAbi;
  d["isa"] = fu::isa_level() >= 4 ? "x86-64-v4" : fu::isa_level() == 3 ? "x86-64-v3" : "baseline";
  d["compiler"] = __VERSION__;
#if defined(_OPENMP)
  d["openmp_threads"] = omp_get_max_threads();
#else
  d["openmp_threads"] = 1;
#endif
#if defined(FU_WITH_CUDA)
  d["cuda"] = true;
  d["cuda_archs"] = FU_CUDA_ARCHS;
#else
  d["cuda"] = false;
  d["cuda_archs"] = "";
#endif
#if defined(FU_HOST_SIMT)
  d["host_simt"] = true;
#else
  d["host_simt"] = false;
#endif
  return d;
}

// (devices, "") or (0, why not).
py::tuple cuda_devices() {
#if defined(FU_HOST_SIMT)
  return py::make_tuple(0, "CUDA kernel bodies compiled for the host");
#elif defined(FU_WITH_CUDA)
  int n = 0;
  const cudaError_t e = cudaGetDeviceCount(&n);
  if (e != cudaSuccess) return py::make_tuple(0, std::string(cudaGetErrorString(e)));
  return py::make_tuple(n, "");
#else
  return py::make_tuple(0, "built without nvcc");
#endif
}

}  // namespace

PYBIND11_MODULE(FU_MODULE, m) {
  m.doc() = "C++ and CUDA kernels of fastunlearn; call them through fastunlearn.ops";
  m.def("build_info", &build_info);
  m.def("cuda_devices", &cuda_devices);
  m.def("huge_pages", &huge_pages);
  m.def("set_isa_level", &fu::set_isa_level);
  bind_mask(m);
  bind_adamw(m);
  bind_block_weight_grad(m);
  bind_gram(m);
  bind_masked_lora(m);
  bind_nm(m);
  bind_nm_tensor(m);
  bind_redistribute(m);
  bind_saliency(m);
  bind_sid(m);
  bind_topk(m);
}
