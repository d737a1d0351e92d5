// Gradient of a two-dimensional convolution of NHWC maps with respect to its kernel.
//
// The pixels under a row of the kernel are contiguous in an NHWC map: a "run" of w c values. The
// gradient is a sum over pixels of outer products of runs and output gradients, with a tile of
// kRows x kBlock sums in registers.
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
enum Buffer { kInputs, kGradients, kSums, kBuffers };
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

  // Copies the padded row under row `i` of the kernel for output row `index` of all images.
  // Returns false, and leaves zeros, if that row lies outside the image.
  bool copy_row(const float* x, int64_t index, int64_t i, float* out) const {
    const int64_t y = index % rows * stride_y + i - pad_y;
    const int64_t size = padded_row();
    if (y < 0 || y >= H) {
      std::memset(out, 0, 4 * size);
      return false;
    }
    const int64_t left = std::min(pad_x * c, size);
    const int64_t count = std::max<int64_t>(0, std::min(W * c, size - left));
    std::memset(out, 0, 4 * left);
    std::memcpy(out + left, x + (index / rows * H + y) * W * c, 4 * count);
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
        if (!s.copy_row(x, index, i, inputs + count * row)) continue;
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
