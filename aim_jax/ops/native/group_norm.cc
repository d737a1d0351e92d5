// Group normalization of maps with channels last, followed by swish, and its gradients.
#include <cmath>
#include <vector>

#include "parallel.h"

namespace aim {
namespace {

namespace ffi = xla::ffi;

struct Shape {
  int64_t b, n, c, groups;  // images, pixels, channels
};

// A number of channels: all 16 of a vector, known to the compiler, or fewer.
using Full = std::integral_constant<int64_t, kLanes>;

// Runs f(first, count) for every block of 16 channels; the last one may be smaller.
template <typename F>
void for_blocks(int64_t c, const F& f) {
  int64_t first = 0;
  for (; first + kLanes <= c; first += kLanes) f(first, Full());
  if (first < c) f(first, c - first);
}

// Sums f(channel, offset, count) over the pixels of an image; f returns 16 channels from an offset.
//
// Sums of 64 pixels are added in double precision, because an image can have many pixels.
template <typename F>
void sum_pixels(const Shape& s, std::vector<double>& sums, const F& f) {
  sums.assign(s.c, 0.0);
  for_blocks(s.c, [&](int64_t first, auto count) {
    for (int64_t start = 0; start < s.n; start += 64) {
      const int64_t end = std::min(s.n, start + 64);
      V even{}, odd{};
      int64_t p = start;
      for (; p + 1 < end; p += 2) {
        even += f(first, p * s.c + first, count);
        odd += f(first, (p + 1) * s.c + first, count);
      }
      if (p < end) even += f(first, p * s.c + first, count);
      even += odd;
      for (int64_t i = 0; i < count; ++i) sums[first + i] += even[i];
    }
  });
}

// Replaces sums of channels by means of their groups, one for each channel and padded to 16.
std::vector<float> group_means(const Shape& s, const std::vector<double>& sums) {
  const int64_t size = s.c / s.groups;
  std::vector<float> means(s.c + kLanes);
  for (int64_t g = 0; g < s.c; g += size) {
    double total = 0;
    for (int64_t i = g; i < g + size; ++i) total += sums[i];
    for (int64_t i = g; i < g + size; ++i) means[i] = float(total / double(size * s.n));
  }
  return means;
}

struct Statistics {
  std::vector<float> mean, inverse;  // of a channel's group: mean and 1 / standard deviation
};

Statistics statistics(const Shape& s, const float* x, float eps) {
  std::vector<double> sums;
  sum_pixels(s, sums, [&](int64_t, int64_t offset, auto count) {
    return load(x + offset, count);
  });
  Statistics result;
  result.mean = group_means(s, sums);
  const float* mean = result.mean.data();
  sum_pixels(s, sums, [&](int64_t channel, int64_t offset, auto count) {
    const V centered = load(x + offset, count) - load(mean + channel);
    return centered * centered;
  });
  result.inverse = group_means(s, sums);
  for (float& v : result.inverse) v = 1 / std::sqrt(v + eps);
  return result;
}

// Runs f(channel, offset, count) for every pixel and every block of 16 channels.
template <typename F>
void for_pixels(const Shape& s, const F& f) {
  for_blocks(s.c, [&](int64_t first, auto count) {
    for (int64_t p = 0; p < s.n; ++p) f(first, p * s.c + first, count);
  });
}

void forward(ffi::ThreadPool& pool, const Shape& s, const float* all_x, const float* scale,
             const float* bias, float eps, bool swish, float* all_y) {
  parallel_for(pool, s.b, [&](int64_t image) {
    const float* x = all_x + image * s.n * s.c;
    float* y = all_y + image * s.n * s.c;
    const Statistics stats = statistics(s, x, eps);
    std::vector<float> factor(s.c + kLanes), shift(s.c + kLanes);
    for (int64_t i = 0; i < s.c; ++i) {
      factor[i] = stats.inverse[i] * scale[i];
      shift[i] = bias[i];
    }
    for_pixels(s, [&](int64_t channel, int64_t offset, auto count) {
      const V centered = load(x + offset, count) - load(stats.mean.data() + channel);
      const V z = centered * load(factor.data() + channel) + load(shift.data() + channel);
      store(y + offset, swish ? silu(z) : z, count);
    });
  });
}

void backward(ffi::ThreadPool& pool, const Shape& s, const float* all_x, const float* scale,
              const float* bias, const float* all_g, float eps, bool swish, float* all_dx,
              float* dscale, float* dbias) {
  parallel_for(pool, s.b, [&](int64_t image) {
    const float* x = all_x + image * s.n * s.c;
    const float* g = all_g + image * s.n * s.c;
    float* dx = all_dx + image * s.n * s.c;
    const Statistics stats = statistics(s, x, eps);
    const float *mean = stats.mean.data(), *inverse = stats.inverse.data();
    std::vector<float> weight(s.c + kLanes), shift(s.c + kLanes);
    std::copy(scale, scale + s.c, weight.begin());
    std::copy(bias, bias + s.c, shift.begin());
    auto normalized = [&](int64_t channel, int64_t offset, auto count) {
      return (load(x + offset, count) - load(mean + channel)) * load(inverse + channel);
    };
    // The gradient before swish is kept in dx.
    std::vector<double> sums, products;
    sum_pixels(s, sums, [&](int64_t channel, int64_t offset, auto count) {
      V d = load(g + offset, count);
      if (swish) {
        const V n = normalized(channel, offset, count);
        const V z = n * load(weight.data() + channel) + load(shift.data() + channel);
        const V sigmoid = 1.f / (1.f + exp(-z));
        d *= sigmoid * (1.f + z * (1.f - sigmoid));
      }
      store(dx + offset, d, count);
      return d;
    });
    sum_pixels(s, products, [&](int64_t channel, int64_t offset, auto count) {
      return load(dx + offset, count) * normalized(channel, offset, count);
    });
    for (int64_t i = 0; i < s.c; ++i) {
      dbias[image * s.c + i] = float(sums[i]);
      dscale[image * s.c + i] = float(products[i]);
      sums[i] *= scale[i];
      products[i] *= scale[i];
    }
    const std::vector<float> along_one = group_means(s, sums), along_x = group_means(s, products);
    for_pixels(s, [&](int64_t channel, int64_t offset, auto count) {
      const V d = load(dx + offset, count) * load(weight.data() + channel);
      const V n = normalized(channel, offset, count);
      const V centered = d - load(along_one.data() + channel) - n * load(along_x.data() + channel);
      store(dx + offset, centered * load(inverse + channel), count);
    });
  });
}

Shape shape_of(ffi::Buffer<ffi::F32>& x, int32_t groups) {
  const auto sizes = x.dimensions();
  return {sizes[0], sizes[1], sizes[2], groups};
}

ffi::Error group_norm_impl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                           ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> bias,
                           ffi::ResultBuffer<ffi::F32> y, int32_t groups, float eps,
                           int32_t swish) {
  forward(pool, shape_of(x, groups), x.typed_data(), scale.typed_data(), bias.typed_data(), eps,
          swish, y->typed_data());
  return ffi::Error::Success();
}

ffi::Error group_norm_gradient_impl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                                    ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> bias,
                                    ffi::Buffer<ffi::F32> g, ffi::ResultBuffer<ffi::F32> dx,
                                    ffi::ResultBuffer<ffi::F32> dscale,
                                    ffi::ResultBuffer<ffi::F32> dbias, int32_t groups, float eps,
                                    int32_t swish) {
  backward(pool, shape_of(x, groups), x.typed_data(), scale.typed_data(), bias.typed_data(),
           g.typed_data(), eps, swish, dx->typed_data(), dscale->typed_data(),
           dbias->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(aim_group_norm, group_norm_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x
                                  .Arg<ffi::Buffer<ffi::F32>>()  // scale
                                  .Arg<ffi::Buffer<ffi::F32>>()  // bias
                                  .Ret<ffi::Buffer<ffi::F32>>()  // y
                                  .Attr<int32_t>("groups")
                                  .Attr<float>("eps")
                                  .Attr<int32_t>("swish"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(aim_group_norm_gradient, group_norm_gradient_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x
                                  .Arg<ffi::Buffer<ffi::F32>>()  // scale
                                  .Arg<ffi::Buffer<ffi::F32>>()  // bias
                                  .Arg<ffi::Buffer<ffi::F32>>()  // g
                                  .Ret<ffi::Buffer<ffi::F32>>()  // gradient of x
                                  .Ret<ffi::Buffer<ffi::F32>>()  // of scale, for each image
                                  .Ret<ffi::Buffer<ffi::F32>>()  // of bias, for each image
                                  .Attr<int32_t>("groups")
                                  .Attr<float>("eps")
                                  .Attr<int32_t>("swish"));

}  // namespace aim
