// Products of few rows with a weight matrix, at the speed of reading the weights.
#include "parallel.h"

namespace aim {
namespace {

namespace ffi = xla::ffi;

// Multiply-add steps: 16 products at once, or 32 in bfloat16 if the processor supports it.
template <typename T>
struct Products {
  static constexpr int kStep = kLanes;
  static V load(const T* p) { return aim::load(p); }
  static V add(V acc, V w, V x) { return acc + w * x; }
};

#ifdef __AVX512BF16__
template <>
struct Products<bf16> {
  static constexpr int kStep = 2 * kLanes;
  static __m512i load(const bf16* p) { return _mm512_loadu_si512(p); }
  static V add(V acc, __m512i w, __m512i x) {
    return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
  }
};
#endif

constexpr int64_t kLine = 64;  // bytes of a cache line

// Weights to prefetch, because rows of W are too short for the hardware prefetcher: those
// `distance` elements ahead, in every `every`-th row of W starting at row `first`.
struct Ahead {
  int64_t distance;
  int first, every;
};

// Multiplies R rows of x by O rows of W, with R O = 16 sums in registers.
template <int R, typename T>
void tile(const T* x, const T* W, float* y, int64_t k, int64_t m, int64_t outputs, Ahead ahead) {
  using P = Products<T>;
  constexpr int O = kLanes / R;
  V acc[kLanes] = {};
  const T* w[O];
  for (int o = 0; o < O; ++o) w[o] = W + std::min<int64_t>(o, outputs - 1) * k;
  int64_t i = 0;
  for (; i + P::kStep <= k; i += P::kStep) {
    decltype(P::load(x)) rows[R];
    for (int r = 0; r < R; ++r) rows[r] = P::load(x + r * k + i);
    for (int o = 0; o < O; ++o) {
      auto weights = P::load(w[o] + i);
      const bool new_line = P::kStep * sizeof(T) >= kLine || i * sizeof(T) % kLine == 0;
      if (new_line && o % ahead.every == ahead.first) {
        __builtin_prefetch(w[o] + i + ahead.distance);
      }
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
    for (int r = 0; r < R; ++r) y[r * m + o] = result[o * R + r];
  }
}

template <typename T>
void linear(ffi::ThreadPool& pool, const T* x, const T* W, float* y, int64_t b, int64_t k,
            int64_t m) {
  // A task computes 48 outputs, in parts small enough that a part's weights stay in the L1 cache
  // while all rows use them.
  constexpr int64_t kTaken = 48;
  const int64_t part = b <= 4 ? kTaken : 16;
  parallel_for(pool, (m + kTaken - 1) / kTaken, [&](int64_t block) {
    const int64_t end = std::min(m, (block + 1) * kTaken);
    for (int64_t first = block * kTaken; first < end; first += part) {
      const int64_t last = std::min(end, first + part);
      auto rows = [&](auto count, int64_t r, Ahead ahead) {
        constexpr int R = decltype(count)::value, O = kLanes / R;
        for (int64_t o = first; o < last; o += O) {
          tile<R>(x + r * k, W + o * k, y + r * m + o, k, m, last - o, ahead);
        }
      };
      // The rows share the prefetching: together they fetch the next part once.
      int64_t r = 0;
      for (; r + 4 <= b; r += 4) {
        const int tiles = std::min<int64_t>(b / 4, 4);
        rows(std::integral_constant<int, 4>(), r, {b < 8 ? 4 * k : part * k, int(r / 4), tiles});
      }
      for (; r + 2 <= b; r += 2) {
        rows(std::integral_constant<int, 2>(), r, {8 * k, b < 4 ? 0 : 1, 1});
      }
      for (; r < b; ++r) {
        rows(std::integral_constant<int, 1>(), r, {16 * k, b == 1 ? 0 : 1, 1});
      }
    }
  });
}

ffi::Error linear_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer W,
                       ffi::ResultBuffer<ffi::F32> y) {
  const int64_t b = x.dimensions()[0], k = x.dimensions()[1], m = W.dimensions()[0];
  float* out = y->typed_data();
  if (W.element_type() == ffi::F32) {
    linear(pool, x.typed_data<float>(), W.typed_data<float>(), out, b, k, m);
  } else {
    linear(pool, (const bf16*)x.untyped_data(), (const bf16*)W.untyped_data(), out, b, k, m);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(aim_linear, linear_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace aim
