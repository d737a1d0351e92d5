// Decode step of Mamba-2 between two matrix products, in the recurrent and the dual form, and the
// residual update between two layers. aim_jax/ops/decode.py documents the operations.
//
// Axes: L layers, b rows, h heads, p headdim, e = h p, n state, g groups, w convolution width,
// T tokens, c = e + 2 g n convolution channels, d model.
#include <cmath>
#include <vector>

#include "parallel.h"

namespace aim {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using I32 = ffi::Buffer<ffi::S32>;
using Out = ffi::Result<ffi::AnyBuffer>;
using OutF32 = ffi::ResultBuffer<ffi::F32>;

// Work on fewer numbers than this runs on one thread, because waking another one takes longer.
constexpr int64_t kWorthSharing = 1 << 15;

template <typename F>
void maybe_parallel_for(ffi::ThreadPool& pool, int64_t count, int64_t numbers, const F& work) {
  if (numbers >= kWorthSharing) return parallel_for(pool, count, work);
  for (int64_t i = 0; i < count; ++i) work(i);
}

float softplus(float x) { return std::max(x, 0.f) + std::log1p(std::exp(-std::abs(x))); }

struct Sizes {
  int64_t b, h, p, n, g, w, e, c, q;  // q = e + c + h columns of the projection
};

// One layer's parameters, and this step's inputs.
struct Layer {
  const float *projected, *conv_weight, *conv_bias, *dt_bias, *A, *D, *norm_scale;
  int64_t layer, position;
};

Sizes sizes_of(const F32& projected, const F32& conv_weight, const F32& A, const F32& norm_scale,
               int64_t n) {
  Sizes s;
  s.b = projected.dimensions()[0];
  s.q = projected.dimensions()[1];
  s.w = conv_weight.dimensions()[1];
  s.c = conv_weight.dimensions()[2];
  s.h = A.dimensions()[1];
  s.e = norm_scale.dimensions()[1];
  s.p = s.e / s.h;
  s.n = n;
  s.g = (s.c - s.e) / (2 * n);
  return s;
}

Layer layer_of(const Sizes& s, const F32& projected, const F32& conv_weight, const F32& conv_bias,
               const F32& dt_bias, const F32& A, const F32& D, const F32& norm_scale,
               const I32& layer, const I32& position) {
  const int64_t l = layer.typed_data()[0];
  return {projected.typed_data(),
          conv_weight.typed_data() + l * s.w * s.c,
          conv_bias.typed_data() + l * s.c,
          dt_bias.typed_data() + l * s.h,
          A.typed_data() + l * s.h,
          D.typed_data() + l * s.h,
          norm_scale.typed_data() + l * s.e,
          l,
          position.typed_data()[0]};
}

// Returns an error message if the layer does not exist or the position is not before `end`, else
// null.
const char* out_of_range(const F32& A, const I32& layer, const I32& position, int64_t end) {
  const int64_t l = layer.typed_data()[0], t = position.typed_data()[0];
  if (l < 0 || l >= A.dimensions()[0]) return "layer is out of range";
  return t < 0 || t >= end ? "position is out of range" : nullptr;
}

// Computes x, B and C of one row, silu(conv(projection)), and stores the projection as the newest
// input of the ring buffer.
template <typename R>
void convolve(const Sizes& s, const Layer& in, int64_t row, R* ring, float* out) {
  const float* now = in.projected + row * s.q + s.e;
  ring += (in.layer * s.b + row) * s.w * s.c;
  for (int64_t i = 0; i < s.c; i += kLanes) {
    const int64_t count = s.c - i;
    const V x = load(now + i, count);
    V y = load(in.conv_bias + i, count) + load(in.conv_weight + (s.w - 1) * s.c + i, count) * x;
    for (int64_t k = 0; k < s.w - 1; ++k) {
      const int64_t slot = (in.position + 1 + k) % s.w;
      y += load(in.conv_weight + k * s.c + i, count) * load(ring + slot * s.c + i, count);
    }
    store(ring + (in.position % s.w) * s.c + i, x, count);
    store(out + i, silu(y), count);
  }
}

template <typename R>
void convolve_rows(ffi::ThreadPool& pool, const Sizes& s, const Layer& in, R* ring, float* xBC) {
  maybe_parallel_for(pool, s.b, s.b * s.c * s.w,
                     [&](int64_t row) { convolve(s, in, row, ring, xBC + row * s.c); });
}

// Stores y = u norm_scale and returns the sum of u^2, with u = (out + D x) silu(z), for one head of
// one row.
float gate_head(const Sizes& s, const Layer& in, int64_t row, int64_t head, const float* out,
                const float* x, float* y) {
  const float* z = in.projected + row * s.q + head * s.p;
  const float* scale = in.norm_scale + head * s.p;
  V squares{};
  for (int64_t i = 0; i < s.p; i += kLanes) {
    const int64_t count = s.p - i;
    const V u = (load(out + i, count) + in.D[head] * load(x + i, count)) * silu(load(z + i, count));
    squares += u * u;
    store(y + i, u * load(scale + i, count), count);
  }
  return sum(squares);
}

// Updates S = decay S + inputs B^T and computes out = S C, for one head of one row.
template <typename S>
void update_state(S* state, const float* inputs, const float* B, const float* C, float decay,
                  float* out, int64_t p, int64_t n) {
  for (int64_t first = 0; first < p; first += kLanes) {
    V acc[kLanes] = {};
    const int64_t count = std::min<int64_t>(kLanes, p - first);
    for (int64_t i = 0; i < count; ++i) {
      S* row = state + (first + i) * n;
      const float input = inputs[first + i];
      int64_t j = 0;
      for (; j + kLanes <= n; j += kLanes) {
        const V now = load(row + j) * decay + load(B + j) * input;
        acc[i] += now * load(C + j);
        store(row + j, now);
      }
      if (j < n) {
        const V now = load(row + j, n - j) * decay + load(B + j, n - j) * input;
        acc[i] += now * load(C + j, n - j);
        store(row + j, now, n - j);
      }
    }
    store(out + first, sums(acc), count);
  }
}

template <typename R, typename S>
void mamba2_step(ffi::ThreadPool& pool, const Sizes& s, const Layer& in, R* ring, S* state,
                 float* xBC, float* y, float* sum_squares) {
  convolve_rows(pool, s, in, ring, xBC);
  parallel_for(pool, s.b * s.h, [&](int64_t i) {
    const int64_t row = i / s.h, head = i % s.h, group = head / (s.h / s.g);
    const float* x = xBC + row * s.c + head * s.p;
    const float* B = xBC + row * s.c + s.e + group * s.n;
    const float* C = B + s.g * s.n;
    const float dt = softplus(in.projected[row * s.q + s.e + s.c + head] + in.dt_bias[head]);
    thread_local std::vector<float> inputs, out;
    inputs.resize(s.p);
    out.resize(s.p + kLanes);
    for (int64_t k = 0; k < s.p; ++k) inputs[k] = dt * x[k];
    update_state(state + ((in.layer * s.b + row) * s.h + head) * s.p * s.n, inputs.data(), B, C,
                 std::exp(dt * in.A[head]), out.data(), s.p, s.n);
    sum_squares[row * s.h + head] =
        gate_head(s, in, row, head, out.data(), x, y + row * s.e + head * s.p);
  });
}

// Runs the dual-form step for heads [first, last) of one group in one row.
template <typename T>
void dual_heads(const Sizes& s, const Layer& in, int64_t tokens, int64_t row, int64_t first,
                int64_t last, const float* xBC, const float* scores, T* inputs, float* log_decay,
                float* y, float* sum_squares) {
  const int64_t cell = in.layer * s.b + row, t = in.position, heads = last - first;
  const int64_t width = heads * s.p;
  inputs += cell * tokens * s.e + first * s.p;
  log_decay += cell * tokens * s.h + first;
  const float* x = xBC + row * s.c + first * s.p;
  thread_local std::vector<float> out, weights, step;
  out.assign(width + kLanes, 0.f);
  weights.resize((t + 1) * heads + kLanes);
  step.resize(heads + kLanes);

  for (int64_t k = 0; k < heads; ++k) {
    const int64_t head = first + k;
    const float dt = softplus(in.projected[row * s.q + s.e + s.c + head] + in.dt_bias[head]);
    step[k] = dt * in.A[head];
    log_decay[t * s.h + k] = 0.f;
    for (int64_t i = 0; i < s.p; ++i) {
      const float input = dt * x[k * s.p + i];
      store1(inputs + t * s.e + k * s.p + i, input);
      out[k * s.p + i] = scores[t] * input;  // token t itself, not rounded to the cache's dtype
    }
  }
  for (int64_t token = 0; token < t; ++token) {
    for (int64_t k = 0; k < heads; k += kLanes) {
      float* sums = log_decay + token * s.h + k;
      const V sum = load(sums, heads - k) + load(&step[k], heads - k);
      store(sums, sum, heads - k);
      store(&weights[token * heads + k], exp(sum) * scores[token], heads - k);
    }
  }
  // Four tokens at a time, to read and write the sums a quarter as often.
  int64_t token = 0;
  for (; token < t; token += 4) {
    const int64_t count = std::min<int64_t>(4, t - token);
    for (int64_t k = 0; k < heads; ++k) {
      float weight[4] = {};
      const T* past[4];
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t from = token + std::min(j, count - 1);
        past[j] = inputs + from * s.e + k * s.p;
        if (j < count) weight[j] = weights[from * heads + k];
      }
      float* sums = &out[k * s.p];
      for (int64_t i = 0; i < s.p; i += kLanes) {
        const int64_t lanes = s.p - i;
        V acc = load(sums + i, lanes);
        for (int j = 0; j < 4; ++j) {
          __builtin_prefetch(past[j] + i + 4 * s.e);
          acc += weight[j] * load(past[j] + i, lanes);
        }
        store(sums + i, acc, lanes);
      }
    }
  }
  for (int64_t k = 0; k < heads; ++k) {
    const int64_t head = first + k;
    sum_squares[row * s.h + head] = gate_head(s, in, row, head, &out[k * s.p], x + k * s.p,
                                              y + row * s.e + head * s.p);
  }
}

template <typename R, typename T>
void dual_step(ffi::ThreadPool& pool, const Sizes& s, const Layer& in, int64_t tokens, R* ring,
               T* inputs, T* B_cache, float* log_decay, float* xBC, float* y,
               float* sum_squares) {
  const int64_t t = in.position;
  convolve_rows(pool, s, in, ring, xBC);
  // The fewest parts per row that keep all threads busy: every part reads all past tokens.
  const int64_t parts = std::min<int64_t>(
      s.h / s.g, std::max<int64_t>(1, (2 * pool.num_threads() + s.b * s.g - 1) / (s.b * s.g)));
  const int64_t heads = (s.h / s.g + parts - 1) / parts;
  parallel_for(pool, s.b * s.g * parts, [&](int64_t i) {
    const int64_t row = i / (s.g * parts), group = i / parts % s.g, part = i % parts;
    const int64_t begin = group * (s.h / s.g);
    const int64_t first = begin + part * heads;
    const int64_t last = std::min(first + heads, begin + s.h / s.g);
    if (first >= last) return;
    const float* B = xBC + row * s.c + s.e + group * s.n;
    const float* C = B + s.g * s.n;
    T* rows = B_cache + (in.layer * s.b + row) * tokens * s.g * s.n + group * s.n;
    if (part == 0) {
      for (int64_t j = 0; j < s.n; j += kLanes) {
        store(rows + t * s.g * s.n + j, load(B + j, s.n - j), s.n - j);
      }
    }
    thread_local std::vector<float> scores;
    scores.resize(t + 1 + kLanes);
    for (int64_t from = 0; from < t; from += kLanes) {
      V acc[kLanes] = {};
      for (int64_t k = 0; k < std::min<int64_t>(kLanes, t - from); ++k) {
        const T* past = rows + (from + k) * s.g * s.n;
        for (int64_t j = 0; j < s.n; j += kLanes) {
          acc[k] += load(past + j, s.n - j) * load(C + j, s.n - j);
        }
      }
      store(&scores[from], sums(acc));
    }
    V now{};
    for (int64_t j = 0; j < s.n; j += kLanes) now += load(B + j, s.n - j) * load(C + j, s.n - j);
    scores[t] = sum(now);
    dual_heads(s, in, tokens, row, first, last, xBC, scores.data(), inputs, log_decay, y,
               sum_squares);
  });
}

void add_norm_modulate_row(const float* hidden, const float* residual_in, const float* norm_scale,
                           const float* gate, const float* shift, const float* scale,
                           float divisor, float eps, int64_t d, float* x, float* residual) {
  V squares{};
  for (int64_t i = 0; i < d; i += kLanes) {
    V r = load(hidden + i, d - i) * divisor;
    if (gate) r *= load(gate + i, d - i);
    if (residual_in) r += load(residual_in + i, d - i);
    squares += r * r;
    store(residual + i, r, d - i);
  }
  const float rstd = 1 / std::sqrt(sum(squares) / d + eps);
  for (int64_t i = 0; i < d; i += kLanes) {
    const V normed = load(residual + i, d - i) * rstd * load(norm_scale + i, d - i);
    store(x + i, normed * (1.f + load(scale + i, d - i)) + load(shift + i, d - i), d - i);
  }
}

template <typename F>
ffi::Error with_type(ffi::DataType type, const F& function) {
  if (type == ffi::F32) {
    function(float{});
  } else if (type == ffi::BF16) {
    function(bf16{});
  } else {
    return ffi::Error::InvalidArgument("caches must be float32 or bfloat16");
  }
  return ffi::Error::Success();
}

ffi::Error mamba2_step_impl(ffi::ThreadPool pool, F32 projected, F32 conv_weight, F32 conv_bias,
                            F32 dt_bias, F32 A, F32 D, F32 norm_scale, I32 layer, I32 position,
                            ffi::AnyBuffer, ffi::AnyBuffer, OutF32 y, OutF32 sum_squares, Out ring,
                            Out state, OutF32 scratch) {
  if (const char* wrong = out_of_range(A, layer, position, INT32_MAX)) {
    return ffi::Error::InvalidArgument(wrong);
  }
  const Sizes s = sizes_of(projected, conv_weight, A, norm_scale, state->dimensions()[4]);
  const Layer in = layer_of(s, projected, conv_weight, conv_bias, dt_bias, A, D, norm_scale, layer,
                            position);
  return with_type(state->element_type(), [&](auto kind) {
    mamba2_step(pool, s, in, (float*)ring->untyped_data(), (decltype(kind)*)state->untyped_data(),
                scratch->typed_data(), y->typed_data(), sum_squares->typed_data());
  });
}

ffi::Error dual_step_impl(ffi::ThreadPool pool, F32 projected, F32 conv_weight, F32 conv_bias,
                          F32 dt_bias, F32 A, F32 D, F32 norm_scale, I32 layer, I32 position,
                          ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer, OutF32 y,
                          OutF32 sum_squares, Out ring, Out inputs, Out B_cache, OutF32 log_decay,
                          OutF32 scratch) {
  if (const char* wrong = out_of_range(A, layer, position, inputs->dimensions()[2])) {
    return ffi::Error::InvalidArgument(wrong);
  }
  const Sizes s = sizes_of(projected, conv_weight, A, norm_scale, B_cache->dimensions()[4]);
  const Layer in = layer_of(s, projected, conv_weight, conv_bias, dt_bias, A, D, norm_scale, layer,
                            position);
  return with_type(inputs->element_type(), [&](auto kind) {
    dual_step(pool, s, in, inputs->dimensions()[2], (float*)ring->untyped_data(),
              (decltype(kind)*)inputs->untyped_data(), (decltype(kind)*)B_cache->untyped_data(),
              log_decay->typed_data(), scratch->typed_data(), y->typed_data(),
              sum_squares->typed_data());
  });
}

ffi::Error add_norm_modulate_impl(ffi::ThreadPool pool, F32 hidden, F32 residual_in,
                                  F32 norm_scale, F32 modulation, F32 sum_squares, I32 layer_of_x,
                                  OutF32 x, OutF32 residual, int32_t shift, int32_t scale,
                                  int32_t gate, int32_t gate_offset, int32_t inner, float eps,
                                  float mixer_eps) {
  const int64_t b = hidden.dimensions()[0], d = hidden.dimensions()[1];
  const int64_t m = modulation.dimensions()[2];
  const int64_t layer = layer_of_x.typed_data()[0];
  if (layer < 0 || layer >= norm_scale.dimensions()[0]) {
    return ffi::Error::InvalidArgument("layer is out of range");
  }
  const int64_t parts = inner ? sum_squares.dimensions()[1] : 0;
  const int64_t source = gate < 0 ? layer : layer + gate_offset;
  maybe_parallel_for(pool, b, b * d * 4, [&](int64_t row) {
    auto part_of = [&](int64_t of_layer, int32_t part) {
      return modulation.typed_data() + ((of_layer * b + row) * m + part) * d;
    };
    float divisor = 1;
    if (parts && source >= 0) {
      float total = 0;
      for (int64_t k = 0; k < parts; ++k) total += sum_squares.typed_data()[row * parts + k];
      divisor = 1 / std::sqrt(total / inner + mixer_eps);
    }
    add_norm_modulate_row(hidden.typed_data() + row * d,
                          source < 0 ? nullptr : residual_in.typed_data() + row * d,
                          norm_scale.typed_data() + layer * d,
                          gate < 0 || source < 0 ? nullptr : part_of(source, gate),
                          part_of(layer, shift), part_of(layer, scale), divisor, eps, d,
                          x->typed_data() + row * d, residual->typed_data() + row * d);
  });
  return ffi::Error::Success();
}

}  // namespace

#define AIM_STEP_PARAMETERS                                                                   \
  ffi::Ffi::Bind()                                                                            \
      .Ctx<ffi::ThreadPool>()                                                                 \
      .Arg<F32>()                                                                             \
      .Arg<F32>()                                                                             \
      .Arg<F32>()                                                                             \
      .Arg<F32>()                                                                             \
      .Arg<F32>()                                                                             \
      .Arg<F32>()                                                                             \
      .Arg<F32>()                                                                             \
      .Arg<I32>()                                                                             \
      .Arg<I32>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(aim_mamba2_step, mamba2_step_impl,
                              AIM_STEP_PARAMETERS.Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(aim_dual_step, dual_step_impl,
                              AIM_STEP_PARAMETERS.Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32>()
                                  .Ret<F32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(aim_add_norm_modulate, add_norm_modulate_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<I32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Attr<int32_t>("shift")
                                  .Attr<int32_t>("scale")
                                  .Attr<int32_t>("gate")
                                  .Attr<int32_t>("gate_offset")
                                  .Attr<int32_t>("inner")
                                  .Attr<float>("eps")
                                  .Attr<float>("mixer_eps"));

}  // namespace aim
