// Two-dimensional convolution of NHWC maps, and its gradient with respect to the kernel.
//
// The pixels under a row of the kernel are contiguous in an NHWC map: a "run" of w c values. An
// output pixel is a sum over runs of products of their values and rows of the kernel. The gradient
// is a sum over pixels of outer products of runs and output gradients. Both keep a tile of kRows x
// kBlock sums in registers.
#include <vector>

#include "parallel.h"

namespace aim {
namespace {

namespace ffi = xla::ffi;

#ifdef __AVX512F__
constexpr int kWidth = 16, kRows = 12;
#else
constexpr int kWidth = 8, kRows = 6;
#endif
constexpr int kBlock = 2 * kWidth;  // output channels of a tile
constexpr int kPixels = 128;        // whose sums are added at once; their maps fit in the L1 cache
typedef float Half __attribute__((vector_size(4 * kWidth)));

inline Half load_half(const float* p) {
  Half v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_half(float* p, Half v) { std::memcpy(p, &v, sizeof v); }

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Memory of a thread that later tasks reuse.
enum Buffer { kInputs, kGradients, kSums, kWeights, kBuffers };
inline float* scratch(Buffer buffer, int64_t size) {
  thread_local std::vector<float> memory[kBuffers];
  if (int64_t(memory[buffer].size()) < size) memory[buffer].resize(size);
  return memory[buffer].data();
}

struct Shape {
  int64_t b, H, W, c;                 // inputs
  int64_t h, w, d;                    // kernel
  int64_t rows, columns;              // outputs
  int64_t stride_y, stride_x, pad_y, pad_x;

  int64_t run() const { return w * c; }
  int64_t step() const { return stride_x * c; }  // from a window to the next
  // Values of a padded row; tiles may read up to kRows past the last window.
  int64_t padded_row() const { return (columns - 1) * step() + run() + kRows; }

  // Copies row `y` of an image with its padding. Returns false, and leaves zeros, if the row lies
  // outside the image.
  bool copy_row(const float* x, int64_t image, int64_t y, float* out) const {
    const int64_t size = padded_row();
    if (y < 0 || y >= H) {
      std::memset(out, 0, 4 * size);
      return false;
    }
    const int64_t left = std::min(pad_x * c, size);
    const int64_t count = std::max<int64_t>(0, std::min(W * c, size - left));
    std::memset(out, 0, 4 * left);
    std::memcpy(out + left, x + (image * H + y) * W * c, 4 * count);
    std::memset(out + left + count, 0, 4 * (size - left - count));
    return true;
  }
};

// Copies channels [first, first + kBlock) of rows of d channels; channels from d on become 0.
inline void pack_block(const float* rows, int64_t count, int64_t d, int64_t first, float* out) {
  const int64_t width = std::min<int64_t>(kBlock, d - first);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(out + i * kBlock, rows + i * d + first, 4 * width);
    if (width < kBlock) std::memset(out + i * kBlock + width, 0, 4 * (kBlock - width));
  }
}

// Runs f(image, first, count) for bands of rows of all images, on all threads.
//
// A band's padded inputs fit in the L2 cache, and there are enough bands for all threads.
template <typename F>
void for_bands(ffi::ThreadPool& pool, const Shape& s, const F& f) {
  constexpr int64_t kFloats = 1 << 16, kBands = 16;
  const int64_t fitting = (kFloats / s.padded_row() - s.h) / s.stride_y + 1;
  const int64_t shared = s.b * s.rows / kBands;
  const int64_t band = std::clamp<int64_t>(std::min(fitting, shared), 1, s.rows);
  const int64_t bands = blocks_of(s.rows, band);
  parallel_for(pool, s.b * bands, [&](int64_t task) {
    const int64_t first = task % bands * band;
    f(task / bands, first, std::min(band, s.rows - first));
  });
}

// Adds up kRows outputs of kBlock channels; `windows` are their first inputs.
inline void convolve_tile(const Shape& s, const float* const* windows, const float* weights,
                          Half sums[kRows][2]) {
  const float* window[kRows];
  for (int r = 0; r < kRows; ++r) window[r] = windows[r];
  const int64_t run = s.run(), row = s.padded_row();
  Half total[kRows][2] = {};
  for (int64_t i = 0; i < s.h; ++i) {
    for (int64_t j = 0; j < run; ++j, weights += kBlock) {
      const Half low = load_half(weights), high = load_half(weights + kWidth);
      for (int r = 0; r < kRows; ++r) {
        total[r][0] += window[r][j] * low;
        total[r][1] += window[r][j] * high;
      }
    }
    for (int r = 0; r < kRows; ++r) window[r] += row;
  }
  std::memcpy(sums, total, sizeof total);
}

void convolve(ffi::ThreadPool& pool, const Shape& s, const float* x, const float* kernel,
              float* out) {
  const int64_t terms = s.h * s.run(), row = s.padded_row(), blocks = blocks_of(s.d, kBlock);
  float* weights = scratch(kWeights, blocks * terms * kBlock);
  for (int64_t block = 0; block < blocks; ++block) {
    pack_block(kernel, terms, s.d, block * kBlock, weights + block * terms * kBlock);
  }
  for_bands(pool, s, [&](int64_t image, int64_t first, int64_t count) {
    const int64_t taken = (count - 1) * s.stride_y + s.h;
    float* inputs = scratch(kInputs, taken * row);
    for (int64_t i = 0; i < taken; ++i) {
      s.copy_row(x, image, first * s.stride_y + i - s.pad_y, inputs + i * row);
    }
    const int64_t pixels = count * s.columns;
    float* target = out + (image * s.rows + first) * s.columns * s.d;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t width = std::min<int64_t>(kBlock, s.d - block * kBlock);
      for (int64_t p = 0; p < pixels; p += kRows) {
        const int64_t size = std::min<int64_t>(kRows, pixels - p);
        const float* windows[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t pixel = std::min(p + r, pixels - 1);
          windows[r] = inputs + pixel / s.columns * s.stride_y * row + pixel % s.columns * s.step();
        }
        Half sums[kRows][2];
        convolve_tile(s, windows, weights + block * terms * kBlock, sums);
        for (int64_t r = 0; r < size; ++r) {
          std::memcpy(target + (p + r) * s.d + block * kBlock, sums[r], 4 * width);
        }
      }
    }
  });
}

void kernel_gradient(ffi::ThreadPool& pool, const Shape& s, const float* x, const float* g,
                     float* out) {
  // A task is a row of the kernel and a block of its output channels. It goes through all pixels in
  // the same order, so sums do not depend on the number of threads.
  const int64_t run = s.run(), row = s.padded_row(), blocks = blocks_of(s.d, kBlock);
  const int64_t padded_run = blocks_of(run, kRows) * kRows;
  const int64_t all = s.b * s.rows, taken = std::max<int64_t>(1, kPixels / s.columns);
  parallel_for(pool, s.h * blocks, [&](int64_t task) {
    const int64_t i = task / blocks, block = task % blocks;
    const int64_t width = std::min<int64_t>(kBlock, s.d - block * kBlock);
    float* inputs = scratch(kInputs, taken * row);
    float* gradients = scratch(kGradients, taken * s.columns * kBlock);
    float* total = scratch(kSums, padded_run * kBlock);
    std::memset(total, 0, 4 * padded_run * kBlock);
    for (int64_t index = 0; index < all;) {
      int64_t count = 0;
      for (; count < taken && index < all; ++index) {
        const int64_t y = index % s.rows * s.stride_y + i - s.pad_y;
        if (!s.copy_row(x, index / s.rows, y, inputs + count * row)) continue;
        pack_block(g + index * s.columns * s.d, s.columns, s.d, block * kBlock,
                   gradients + count++ * s.columns * kBlock);
      }
      for (int64_t j = 0; j < run; j += kRows) {
        float* target = total + j * kBlock;
        Half sums[kRows][2] = {};  // of these pixels alone: long sums lose digits
        const float* gradient = gradients;
        for (int64_t k = 0; k < count; ++k) {
          const float* window = inputs + k * row + j;
          for (int64_t p = 0; p < s.columns; ++p, window += s.step(), gradient += kBlock) {
            const Half low = load_half(gradient), high = load_half(gradient + kWidth);
            for (int r = 0; r < kRows; ++r) {
              sums[r][0] += window[r] * low;
              sums[r][1] += window[r] * high;
            }
          }
        }
        for (int r = 0; r < kRows; ++r) {
          float* low = target + r * kBlock;
          float* high = low + kWidth;
          store_half(low, load_half(low) + sums[r][0]);
          store_half(high, load_half(high) + sums[r][1]);
        }
      }
    }
    for (int64_t j = 0; j < run; ++j) {
      std::memcpy(out + (i * run + j) * s.d + block * kBlock, total + j * kBlock, 4 * width);
    }
  });
}

ffi::Error conv2d_impl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                       ffi::Buffer<ffi::F32> kernel, ffi::ResultBuffer<ffi::F32> y,
                       int32_t stride_y, int32_t stride_x, int32_t pad_y, int32_t pad_x) {
  const auto in = x.dimensions(), size = kernel.dimensions(), out = y->dimensions();
  const Shape s{in[0],   in[1],  in[2],  in[3],    size[0],  size[1], size[3],
                out[1], out[2], stride_y, stride_x, pad_y,    pad_x};
  convolve(pool, s, x.typed_data(), kernel.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

ffi::Error kernel_gradient_impl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                                ffi::Buffer<ffi::F32> g, ffi::ResultBuffer<ffi::F32> kernel,
                                int32_t stride_y, int32_t stride_x, int32_t pad_y,
                                int32_t pad_x) {
  const auto in = x.dimensions(), size = kernel->dimensions(), out = g.dimensions();
  const Shape s{in[0],   in[1],  in[2],  in[3],    size[0],  size[1], size[3],
                out[1], out[2], stride_y, stride_x, pad_y,    pad_x};
  kernel_gradient(pool, s, x.typed_data(), g.typed_data(), kernel->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(aim_conv2d, conv2d_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x
                                  .Arg<ffi::Buffer<ffi::F32>>()  // kernel
                                  .Ret<ffi::Buffer<ffi::F32>>()  // y
                                  .Attr<int32_t>("stride_y")
                                  .Attr<int32_t>("stride_x")
                                  .Attr<int32_t>("pad_y")
                                  .Attr<int32_t>("pad_x"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(aim_conv2d_kernel_gradient, kernel_gradient_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x
                                  .Arg<ffi::Buffer<ffi::F32>>()  // g
                                  .Ret<ffi::Buffer<ffi::F32>>()  // gradient
                                  .Attr<int32_t>("stride_y")
                                  .Attr<int32_t>("stride_x")
                                  .Attr<int32_t>("pad_y")
                                  .Attr<int32_t>("pad_x"));

}  // namespace aim
