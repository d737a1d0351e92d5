// Vectors of 16 floats, and parallel loops on XLA's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace aim {

constexpr int kLanes = 16;
typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));

inline V splat(float x) { return V{} + x; }

// bfloat16: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// GCC splits the conversion of wide vectors into many instructions, hence the intrinsics.
inline V load(const bf16* p) {
#ifdef __AVX512F__
  __m256i half = _mm256_loadu_si256((const __m256i*)p);
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
  typedef uint16_t H __attribute__((vector_size(32)));
  H half;
  std::memcpy(&half, p, sizeof half);
  return (V)(__builtin_convertvector(half, U) << 16);
#endif
}

inline float load1(const float* p) { return *p; }
inline float load1(const bf16* p) {
  uint32_t bits = uint32_t{p->bits} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }

// Rounds to the nearest bfloat16, ties to even.
inline void store(bf16* p, V v) {
  typedef uint16_t H __attribute__((vector_size(32)));
  U bits = (U)v;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  H half = __builtin_convertvector(bits, H);
  std::memcpy(p, &half, sizeof half);
}

inline void store1(float* p, float x) { *p = x; }
inline void store1(bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  p->bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Loads the first `count` lanes; the others become 0, and their memory is not accessed.
template <typename T>
inline V load(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_loadu_ps((1u << count) - 1, p);
#endif
  V v{};
  for (int i = 0; i < count; ++i) v[i] = load1(p + i);
  return v;
}

template <typename T>
inline void store(T* p, V v, int64_t count) {
  if (count >= kLanes) return store(p, v);
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)v);
#endif
  for (int i = 0; i < count; ++i) store1(p + i, v[i]);
}

// Pairwise reductions: four rounds turn 16 vectors into one vector of their sums, in order.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
typedef int32_t Lanes __attribute__((vector_size(64)));
#define AIM_FOLD(a, b, ...) __builtin_shuffle(a, b, (Lanes{__VA_ARGS__}))
#else
#define AIM_FOLD(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
inline V fold8(V a, V b) {
  return AIM_FOLD(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         AIM_FOLD(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
inline V fold4(V a, V b) {
  return AIM_FOLD(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         AIM_FOLD(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
inline V fold2(V a, V b) {
  return AIM_FOLD(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
         AIM_FOLD(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}
inline V fold1(V a, V b) {
  return AIM_FOLD(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         AIM_FOLD(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#undef AIM_FOLD

// Returns the sums over lanes of 16 vectors.
inline V sums(const V* v) {
  V a[8], b[4];
  for (int i = 0; i < 8; ++i) a[i] = fold8(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < 4; ++i) b[i] = fold4(a[2 * i], a[2 * i + 1]);
  return fold1(fold2(b[0], b[1]), fold2(b[2], b[3]));
}

inline float sum(V v) {
  v = fold8(v, v);
  v = fold4(v, v);
  v = fold2(v, v);
  return v[0] + v[1];
}

// exp(x) to 2 ulps: 2^k times a polynomial in the remainder r, |r| <= log(2) / 2.
template <typename F, typename N>
inline F exp_of(F x) {
  const F high = F{} + 88.3762626f, low = F{} - 87.3365402f;
  x = x > high ? high : x;
  const F tiny = x < low ? F{} : F{} + 1.f;
  x = x < low ? low : x;
  // Adding 1.5 * 2^23 rounds to an integer, held in the low bits of the sum.
  const F magic = F{} + 12582912.f;
  const F shifted = x * 1.44269504f + magic;
  const N k = (N)shifted - (N)magic;
  const F integer = shifted - magic;
  const F r = (x - integer * 0.693359375f) + integer * 2.12194440e-4f;
  F q = F{} + 1.f / 5040;
  q = q * r + 1.f / 720;
  q = q * r + 1.f / 120;
  q = q * r + 1.f / 24;
  q = q * r + 1.f / 6;
  q = q * r + 0.5f;
  q = q * r + 1.f;
  q = q * r + 1.f;
  return q * (F)((k + 127) << 23) * tiny;
}

// Applies f to the halves of v: GCC turns comparisons of vectors wider than the machine's into
// scalar ones.
template <typename F>
inline V by_halves(V v, const F& f) {
#ifdef __AVX512F__
  return f(v, I{});
#else
  typedef float Half __attribute__((vector_size(32)));
  typedef int32_t Int __attribute__((vector_size(32)));
  Half half[2];
  std::memcpy(half, &v, sizeof v);
  half[0] = f(half[0], Int{});
  half[1] = f(half[1], Int{});
  std::memcpy(&v, half, sizeof v);
  return v;
#endif
}

inline V exp(V x) {
  return by_halves(x, [](auto half, auto i) { return exp_of<decltype(half), decltype(i)>(half); });
}

inline V silu(V x) {
  return by_halves(x, [](auto half, auto i) {
    return half / (1.f + exp_of<decltype(half), decltype(i)>(-half));
  });
}

inline int32_t sum(I v) {
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// Runs work(i) for i in [0, count) on XLA's threads, including the calling thread.
//
// Free threads take the next index. The calling thread works too, and then waits only for indices
// that other threads have started, so a pool whose threads all wait here cannot deadlock.
template <typename F>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const F& work) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  auto progress = std::make_shared<Progress>();
  // A helper that starts late finds no index left and does not touch `work`, already out of scope.
  auto run = [progress, count, &work] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < count;) {
      work(i);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(run));
  run();
  while (progress->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace aim
