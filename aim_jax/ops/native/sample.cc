// Samples one token per image from logits, with guidance, temperature, top-k, top-p and min-p.
#include <cmath>
#include <limits>

#include "parallel.h"

namespace aim {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using I32 = ffi::Buffer<ffi::S32>;

// Maps the bits of floats to integers in the same order; the function is its own inverse.
I flip(I bits) { return bits < 0 ? bits ^ std::numeric_limits<int32_t>::max() : bits; }

// Returns the largest integer in [low, high] for which `holds` is true. `holds` must be true at low
// and monotone: true up to some integer and false above it.
template <typename F>
int32_t largest(int32_t low, int32_t high, const F& holds) {
  while (low < high) {
    const int32_t middle = (low | high) - ((low ^ high) >> 1);  // rounded up, without overflow
    if (holds(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

struct Row {
  const float *cond, *uncond;  // uncond may be null: no guidance
  float scale, temperature, top_p, min_p, uniform;
  int32_t top_k;
};

// `order` and `weights` are scratch space for v numbers, rounded up to whole vectors.
int32_t sample_row(const Row& in, int64_t v, int32_t* order, float* weights) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const int64_t padded = (v + kLanes - 1) / kLanes * kLanes;
  V high = splat(-kInf), low = splat(kInf);
  for (int64_t i = 0; i < padded; i += kLanes) {
    V x = load(in.cond + i, v - i);
    if (in.uncond) {
      const V u = load(in.uncond + i, v - i);
      x = u + (x - u) * in.scale;
    }
    x = x / in.temperature;
    // Lanes beyond the row sort below every logit.
    for (int64_t k = std::max<int64_t>(0, v - i); k < kLanes; ++k) x[k] = -kInf;
    high = x > high ? x : high;
    low = x < low ? x : low;
    const I bits = flip((I)x);
    std::memcpy(order + i, &bits, sizeof bits);
  }
  float top = -kInf, bottom = kInf;
  for (int k = 0; k < kLanes; ++k) top = std::max(top, high[k]), bottom = std::min(bottom, low[k]);
  const int32_t lowest = flip((I)splat(bottom))[0], highest = flip((I)splat(top))[0];

  auto at = [&](int64_t i) {
    I o;
    std::memcpy(&o, order + i, sizeof o);
    return o;
  };
  int32_t threshold = lowest;
  if (in.top_k >= 1 && in.top_k < v) {
    threshold = largest(lowest, highest, [&](int32_t t) {
      I count{};
      for (int64_t i = 0; i < padded; i += kLanes) count -= at(i) >= t;
      return sum(count) >= in.top_k;
    });
  }
  V total{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const I o = at(i);
    const V w = o >= threshold ? exp((V)flip(o) - top) : splat(0.f);
    total += w;
    store(weights + i, w);
  }
  if (in.top_p < 1) {
    const float removed = (1 - in.top_p) * sum(total);
    threshold = largest(threshold, highest, [&](int32_t t) {
      V below{};
      for (int64_t i = 0; i < padded; i += kLanes) {
        below += at(i) < t ? load(weights + i) : splat(0.f);
      }
      return sum(below) <= removed;
    });
    total = V{};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const V w = at(i) >= threshold ? load(weights + i) : splat(0.f);
      total += w;
      store(weights + i, w);
    }
  }
  if (in.min_p > 0) {  // the most likely token has weight 1
    total = V{};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const V w = load(weights + i);
      const V kept = w >= splat(in.min_p) ? w : splat(0.f);
      total += kept;
      store(weights + i, kept);
    }
  }
  // Choose the first token at which the running sum of weights exceeds the target, by blocks and
  // then within a block. If rounding leaves the target at or beyond the end of the sums, choose the
  // last token of positive weight that was passed.
  float remaining = in.uniform * sum(total);
  int64_t chosen = 0;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const float block = sum(load(weights + i));
    const bool in_block = remaining < block;
    for (int64_t k = i; block > 0 && k < i + kLanes; ++k) {
      if (weights[k] <= 0) continue;
      chosen = k;
      if (in_block && remaining < weights[k]) return k;
      if (in_block) remaining -= weights[k];
    }
    if (in_block) break;
    remaining -= block;
  }
  return chosen;
}

ffi::Error sample_impl(ffi::ThreadPool pool, F32 logits, F32 uniform, F32 cfg_scale,
                       F32 temperature, I32 top_k, F32 top_p, F32 min_p,
                       ffi::ResultBuffer<ffi::S32> token, ffi::ResultBuffer<ffi::S32> order,
                       ffi::ResultBuffer<ffi::F32> weights) {
  const int64_t b = uniform.dimensions()[0], v = logits.dimensions()[1];
  const int64_t padded = order->dimensions()[1];
  const bool guided = logits.dimensions()[0] == 2 * b;
  parallel_for(pool, b, [&](int64_t i) {
    const float* cond = logits.typed_data() + i * v;
    token->typed_data()[i] = sample_row(
        {cond, guided ? cond + b * v : nullptr, cfg_scale.typed_data()[i],
         temperature.typed_data()[i], top_p.typed_data()[i], min_p.typed_data()[i],
         uniform.typed_data()[i],
         top_k.typed_data()[i]},
        v, order->typed_data() + i * padded, weights->typed_data() + i * padded);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(aim_sample, sample_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<I32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Ret<I32>()
                                  .Ret<I32>()
                                  .Ret<F32>());

}  // namespace aim
