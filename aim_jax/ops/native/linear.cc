// Products of few rows with a matrix of weights, at the speed of reading the weights.
#include "parallel.h"

namespace aim {
namespace {

namespace ffi = xla::ffi;

// How 16 or 32 products are added at once, by the type of rows and weights.
template <typename X, typename T>
struct Products {
  static constexpr int kStep = kLanes;
  static V row(const X* p) { return load(p); }
  static V weights(const T* p) { return load(p); }
  static V add(V acc, V w, V x) { return acc + w * x; }
};

#ifdef __AVX512BF16__
template <>
struct Products<bf16, bf16> {
  static constexpr int kStep = 2 * kLanes;
  static __m512i row(const bf16* p) { return _mm512_loadu_si512(p); }
  static __m512i weights(const bf16* p) { return _mm512_loadu_si512(p); }
  static V add(V acc, __m512i w, __m512i x) {
    return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
  }
};
#endif

// R rows of x against O rows of W, with R O = 16 sums in registers. `ahead` weights further on the
// next ones begin, which memory is asked for in time: rows of W are too short for the hardware to
// foresee.
template <int R, typename X, typename T>
void tile(const X* x, const T* W, const float* scale, float* y, int64_t k, int64_t m,
          int64_t outputs, int64_t ahead) {
  using P = Products<X, T>;
  constexpr int O = kLanes / R;
  V acc[kLanes] = {};
  const T* w[O];
  for (int o = 0; o < O; ++o) w[o] = W + std::min<int64_t>(o, outputs - 1) * k;
  int64_t i = 0;
  for (; i + P::kStep <= k; i += P::kStep) {
    decltype(P::row(x)) rows[R];
    for (int r = 0; r < R; ++r) rows[r] = P::row(x + r * k + i);
    for (int o = 0; o < O; ++o) {
      auto weights = P::weights(w[o] + i);
      if (ahead) __builtin_prefetch(w[o] + i + ahead);
      for (int r = 0; r < R; ++r) acc[o * R + r] = P::add(acc[o * R + r], weights, rows[r]);
    }
  }
  for (; i < k; i += kLanes) {
    for (int o = 0; o < O; ++o) {
      V weights = load(w[o] + i, k - i);
      for (int r = 0; r < R; ++r) acc[o * R + r] += weights * load(x + r * k + i, k - i);
    }
  }
  float result[kLanes];
  store(result, sums(acc));
  for (int o = 0; o < std::min<int64_t>(O, outputs); ++o) {
    for (int r = 0; r < R; ++r) y[r * m + o] = result[o * R + r] * (scale ? scale[o] : 1.f);
  }
}

template <typename X, typename T>
void linear(ffi::ThreadPool& pool, const X* x, const T* W, const float* scale, float* y,
            int64_t b, int64_t k, int64_t m) {
  // A thread takes 48 outputs at once. Of these, as few meet all rows as stay in its first cache.
  constexpr int64_t kTaken = 48;
  const int64_t part = b <= 4 ? kTaken : 16;
  parallel_for(pool, (m + kTaken - 1) / kTaken, [&](int64_t block) {
    const int64_t end = std::min(m, (block + 1) * kTaken);
    for (int64_t first = block * kTaken; first < end; first += part) {
      const int64_t last = std::min(end, first + part);
      auto rows = [&](auto count, int64_t r, int64_t ahead) {
        constexpr int R = decltype(count)::value, O = kLanes / R;
        for (int64_t o = first; o < last; o += O) {
          tile<R>(x + r * k, W + o * k, scale ? scale + o : nullptr, y + r * m + o, k, m, last - o,
                  ahead ? ahead : O * k * (b <= R));
        }
      };
      int64_t r = 0;
      // While the last rows are at work, the next part comes.
      for (; r + 4 <= b; r += 4) {
        rows(std::integral_constant<int, 4>(), r, r + 4 == b ? part * k : 0);
      }
      for (; r + 2 <= b; r += 2) {
        rows(std::integral_constant<int, 2>(), r, 0);
      }
      for (; r < b; ++r) rows(std::integral_constant<int, 1>(), r, 0);
    }
  });
}

ffi::Error linear_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer W,
                       ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t b = x.dimensions()[0], k = x.dimensions()[1], m = W.dimensions()[0];
  const float* s = scale.element_count() ? scale.typed_data() : nullptr;
  float* out = y->typed_data();
  auto is = [&](ffi::DataType rows, ffi::DataType weights) {
    return x.element_type() == rows && W.element_type() == weights;
  };
  if (is(ffi::F32, ffi::F32)) {
    linear(pool, x.typed_data<float>(), W.typed_data<float>(), s, out, b, k, m);
  } else if (is(ffi::BF16, ffi::BF16)) {
    linear(pool, (const bf16*)x.untyped_data(), (const bf16*)W.untyped_data(), s, out, b, k, m);
  } else if (is(ffi::F32, ffi::S8)) {
    linear(pool, x.typed_data<float>(), W.typed_data<int8_t>(), s, out, b, k, m);
  } else {
    return ffi::Error::InvalidArgument("linear: no code for these types of rows and weights");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(aim_linear, linear_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace aim
