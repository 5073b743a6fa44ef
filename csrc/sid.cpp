#include "sid.h"

#include "widen.h"

namespace fu::FU_ISA {
namespace {

using namespace fu::sid;

// Entries that one thread has done before the others are awake.
constexpr int64_t kSerial = 1 << 15;

inline Float16 modulus(const Float16& x) {
  return as<Float16>(as<Word16>(x) & 0x7fffffffu);
}

template <class T, class E>
void sum_unit(const T* teacher, const T* fake, const E* noise, int64_t n, float alpha, double* out) {
  Float16 distance = {}, product = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Float16 t = load_lanes(teacher + i), u = load_lanes(noise + i) - t, v = load_lanes(fake + i) - t;
    distance += modulus(u);
    product += v * (u - alpha * v);
  }
  double sums[2] = {};
  for (int l = 0; l < kLanes; ++l) {
    sums[0] += double(distance[l]);
    sums[1] += double(product[l]);
  }
  for (; i < n; ++i) {
    const float t = to_float(teacher[i]), u = to_float(noise[i]) - t, v = to_float(fake[i]) - t;
    sums[0] += double(u < 0 ? -u : u);
    sums[1] += double(v * (u - alpha * v));
  }
  out[0] = sums[0];
  out[1] = sums[1];
}

template <class T, class E>
void gradient_unit(const T* teacher, const T* fake, const E* noise, int64_t n, float alpha, float c,
                   T* of_teacher, T* of_fake) {
  const float twice = 2 * alpha;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Float16 t = load_lanes(teacher + i), u = load_lanes(noise + i) - t, v = load_lanes(fake + i) - t;
    const Float16 g = c * (u - twice * v);
    store_lanes(g, of_fake + i);
    store_lanes(-g - c * v, of_teacher + i);
  }
  for (; i < n; ++i) {
    const float t = to_float(teacher[i]), u = to_float(noise[i]) - t, v = to_float(fake[i]) - t;
    const float g = c * (u - twice * v);
    of_fake[i] = from_float<T>(g);
    of_teacher[i] = from_float<T>(-g - c * v);
  }
}

// Calls f(image, its part, first entry, entries) on every unit of every image.
template <class F>
void for_units(const Inputs& x, F f) {
  const int64_t parts = ceil_div(x.size, kUnit);
#pragma omp parallel for schedule(static) if (x.n * x.size > kSerial)
  for (int64_t i = 0; i < x.n * parts; ++i) {
    const int64_t image = i / parts, at = i % parts * kUnit, left = x.size - at;
    f(image, i, image * x.size + at, left < kUnit ? left : kUnit);
  }
}

template <class T, class E>
void sum_images(const Inputs& x, double* partial, float* out) {
  for_units(x, [&](int64_t, int64_t unit, int64_t at, int64_t n) {
    sum_unit(static_cast<const T*>(x.teacher) + at, static_cast<const T*>(x.fake) + at,
             static_cast<const E*>(x.noise) + at, n, x.alpha, partial + 2 * unit);
  });
  const int64_t parts = ceil_div(x.size, kUnit);
  for (int64_t image = 0; image < x.n; ++image)
    for (int k = 0; k < 2; ++k) {
      double sum = 0;
      for (int64_t p = 0; p < parts; ++p) sum += partial[2 * (image * parts + p) + k];
      out[2 * image + k] = float(sum);
    }
}

template <class T, class E>
void image_gradients(const Inputs& x, const float* factor, void* of_teacher, void* of_fake) {
  for_units(x, [&](int64_t image, int64_t, int64_t at, int64_t n) {
    gradient_unit(static_cast<const T*>(x.teacher) + at, static_cast<const T*>(x.fake) + at,
                  static_cast<const E*>(x.noise) + at, n, x.alpha, factor[image],
                  static_cast<T*>(of_teacher) + at, static_cast<T*>(of_fake) + at);
  });
}

}  // namespace

void sid_sums(const Inputs& x, double* partial, float* out) {
  const bool wide = x.noise_dtype == kF32;
  if (x.dtype == kF32)
    sum_images<float, float>(x, partial, out);
  else if (x.dtype == kF16)
    wide ? sum_images<f16, float>(x, partial, out) : sum_images<f16, f16>(x, partial, out);
  else
    wide ? sum_images<bf16, float>(x, partial, out) : sum_images<bf16, bf16>(x, partial, out);
}

void sid_gradients(const Inputs& x, const float* factor, void* of_teacher, void* of_fake) {
  const bool wide = x.noise_dtype == kF32;
  if (x.dtype == kF32)
    image_gradients<float, float>(x, factor, of_teacher, of_fake);
  else if (x.dtype == kF16)
    wide ? image_gradients<f16, float>(x, factor, of_teacher, of_fake)
         : image_gradients<f16, f16>(x, factor, of_teacher, of_fake);
  else
    wide ? image_gradients<bf16, float>(x, factor, of_teacher, of_fake)
         : image_gradients<bf16, bf16>(x, factor, of_teacher, of_fake);
}

}  // namespace fu::FU_ISA
