// Attention of one network layer on a CPU with AVX-512, forward and backward, in float32 and in bf16.
//
// softmax(q k^T / sqrt(D)) v is computed block by block, so that the weights of a block never leave the first caches (the idea of
// Dao et al. 2022, FlashAttention). With heads of 16 features a product of two features costs little and everything around it much, so
// the layout is chosen for what lies around: the 16 numbers of a register belong to 16 queries, and maxima, sums and exponentials of a
// query never cross its lane. What multiplies takes a pack of numbers in each lane and another pack that all lanes share: in float32 a
// pack is one number, in bf16 two, whose products are added. So what is multiplied lies in memory in one of these ways:
//
//   rows   [N][D]         a token after the other: a pack is one or two features of a token
//   packs  [N/P][D][P]    P tokens side by side: a pack is one feature of one or two tokens
//   lanes  [N/16][D/P]    16 registers' lanes are 16 tokens, each with a pack of features
//
// Sums are in float32; in bf16 the weights and their gradients are rounded to bf16 before they are multiplied. Every query and, backward,
// every head is computed by one thread in a fixed order: the result does not depend on the number of threads, or on the rest of the batch.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;                  // float32 numbers in a register: queries that are computed together
constexpr int KEYS = 64;                   // of a block; what belongs to a block stays in the first cache
constexpr float NOTHING = -1e30f;          // score of a key that is not there: its weight is 0 beside any sane score
constexpr float LOG2_E = 1.44269504088896f;

// 2^x by a polynomial for the fraction, fitted to the least largest relative error, the exponent set apart.
template <int N>
INLINE __m512 exp2(__m512 x, const float (&coefficients)[N]) {
  const __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(coefficients[0]);
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(coefficients[i]));
  return _mm512_scalef_ps(y, whole);
}

#ifndef __AVX512BF16__
struct Float32 {
  using Number = float;
  using Pack = float;
  using Register = __m512;
  static constexpr int P = 1;  // numbers in a pack
  static INLINE __m512 shared(const void* pack) { return _mm512_set1_ps(*static_cast<const float*>(pack)); }
  static INLINE __m512 load(const float* p) { return _mm512_load_ps(p); }
  static INLINE __m512 multiply(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
  static INLINE void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
  static INLINE void columns(float* to, __m512 a, __m512 b) { packs(to, a, b); }
  static INLINE void packs(float* to, __m512 a, __m512 b) {
    _mm512_store_ps(to, a);
    _mm512_store_ps(to + LANES, b);
  }
  static INLINE void pack(const float* const rows, int64_t, float* to) { *to = *rows; }
  static float wide(float x) { return x; }
  static INLINE __m512 power(__m512 x) {  // off by at most 1e-7 of it
    static constexpr float C[] = {0.0013276472454890609f, 0.009675541892647743f, 0.05550713092088699f,
                                  0.24022120237350464f, 0.6931469440460205f, 1.0000001192092896f};
    return exp2(x, C);
  }
};

#else
struct Bf16 {
  using Number = uint16_t;
  using Pack = uint32_t;
  using Register = __m512bh;
  static constexpr int P = 2;
  static INLINE __m512bh shared(const void* pack) {
    int32_t both;
    std::memcpy(&both, pack, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
  }
  static INLINE __m512bh load(const uint32_t* p) { return (__m512bh)_mm512_load_si512(p); }
  static INLINE __m512 multiply(__m512 sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
  static INLINE void store(uint16_t* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }
  // All of a, then all of b; or a and b of each lane side by side.
  static INLINE void columns(uint16_t* to, __m512 a, __m512 b) { _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
  static INLINE void packs(uint32_t* to, __m512 a, __m512 b) {
    alignas(64) static const uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both));
  }
  static INLINE void pack(const uint16_t* const rows, int64_t next, uint32_t* to) { *to = uint32_t(rows[0]) | uint32_t(rows[next]) << 16; }
  static float wide(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
  }
  static INLINE __m512 power(__m512 x) {  // off by at most 3e-6 of it; bf16 rounds by 4e-3
    static constexpr float C[] = {0.009570102207362652f, 0.05591786280274391f, 0.240247443318367f, 0.6931217908859253f,
                                  0.9999992847442627f};
    return exp2(x, C);
  }
};
#endif

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// One head of one image. qkv and its gradient are [batch][tokens][3][heads][D], out and its gradient [batch][tokens][heads][D],
// logs [batch][heads][2][tokens].
template <class A, int D>
struct Head {
  using Number = typename A::Number;
  using Pack = typename A::Pack;
  int64_t tokens, padded, row, out_row, q, k, v, out, logs;
  Head(int64_t tokens, int64_t heads, int64_t number)
      : tokens(tokens), padded((tokens + KEYS - 1) / KEYS * KEYS), row(3 * heads * D), out_row(heads * D),
        q(number / heads * tokens * row + number % heads * D), k(q + heads * D), v(k + heads * D),
        out(number / heads * tokens * out_row + number % heads * D), logs(number * 2 * tokens) {}

  // The three layouts; tokens that are not there are zeros.
  void rows(const Number* from, int64_t stride, Number* to) const {
    for (int64_t i = 0; i < tokens; ++i) std::memcpy(to + i * D, from + i * stride, D * sizeof(Number));
    std::memset(to + tokens * D, 0, (padded - tokens) * D * sizeof(Number));
  }
  void packs(const Number* rows, Pack* to) const {
    for (int64_t i = 0; i < padded; i += A::P)
      for (int d = 0; d < D; ++d) A::pack(rows + i * D + d, D, to + i / A::P * D + d);
  }
  void lanes(const Number* rows, Pack* to) const {
    for (int64_t b = 0; b < padded / LANES; ++b)
      for (int p = 0; p < D / A::P; ++p)
        for (int i = 0; i < LANES; ++i)
          std::memcpy(to + (b * (D / A::P) + p) * LANES + i, rows + (b * LANES + i) * D + A::P * p, sizeof(Pack));
  }
};

INLINE void add(float* to, __m512 x) { _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), x)); }

// 16 queries (or their gradients) times one key (or value).
template <class A, int D>
INLINE __m512 product(const typename A::Register* queries, const typename A::Number* key) {
  __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 64
  for (int p = 0; p < D / A::P; ++p) sum = A::multiply(sum, queries[p], A::shared(key + A::P * p));
  return sum;
}

// sums[D][16] += for every pack of KEYS tokens: weights [KEYS/P][16] times that pack's features [KEYS/P][D]. A block has a sum of its own,
// which is added at its end: the rounding of thousands of additions one after the other would show.
template <class A, int D>
INLINE void accumulate(float* sums, const typename A::Pack* weights, const typename A::Pack* features) {
  for (int part = 0; part < D; part += LANES) {
    __m512 sum[LANES];
#pragma GCC unroll 16
    for (int d = 0; d < LANES; ++d) sum[d] = _mm512_setzero_ps();
    for (int j = 0; j < KEYS / A::P; ++j) {
      const typename A::Register weight = A::load(weights + j * LANES);
#pragma GCC unroll 16
      for (int d = 0; d < LANES; ++d) sum[d] = A::multiply(sum[d], weight, A::shared(features + j * D + part + d));
    }
#pragma GCC unroll 16
    for (int d = 0; d < LANES; ++d) add(sums + (part + d) * LANES, sum[d]);
  }
}

// columns[D][16] as up to 16 rows of D numbers.
template <class A, int D>
void write(const float* columns, __m512 factor, typename A::Number* to, int64_t stride, int count) {
  typename A::Number column[LANES];
  for (int d = 0; d < D; ++d) {
    A::store(column, _mm512_mul_ps(_mm512_load_ps(columns + d * LANES), factor));
    for (int i = 0; i < count; ++i) to[i * stride + d] = column[i];
  }
}

// Part `part` of `parts` of the queries of a head. logs: what the backward pass makes the weights of again, the largest score of each query
// and log2 of the sum of its exponentials, those of the differences to that score. (Added up they would lose what is small.)
template <class A, int D>
void forward(const Head<A, D>& head, const typename A::Number* qkv, typename A::Number* out, float* logs, int64_t part, int64_t parts) {
  using Pack = typename A::Pack;
  Buffer<typename A::Number> rows(head.padded * D), keys(head.padded * D);
  Buffer<Pack> values(head.padded / A::P * D), queries(head.padded / A::P * D);
  head.rows(qkv + head.q, head.row, rows);
  head.lanes(rows, queries);
  head.rows(qkv + head.k, head.row, keys);
  head.rows(qkv + head.v, head.row, rows);
  head.packs(rows, values);
  const float scale = LOG2_E / std::sqrt(float(D));
  alignas(64) float sums[D * LANES], scores[KEYS * LANES], most[LANES], total[LANES];
  alignas(64) Pack weights[KEYS / A::P * LANES];
  const int64_t blocks = (head.tokens + LANES - 1) / LANES;
  for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) {
    typename A::Register q[D / A::P];
    for (int p = 0; p < D / A::P; ++p) q[p] = A::load(queries + (b * (D / A::P) + p) * LANES);
    __m512 maximum = _mm512_set1_ps(NOTHING), sum = _mm512_setzero_ps();
    std::memset(sums, 0, sizeof sums);
    for (int64_t first = 0; first < head.tokens; first += KEYS) {
      __m512 higher = maximum;
      for (int j = 0; j < KEYS; ++j) {
        const __m512 score = first + j < head.tokens ? product<A, D>(q, keys + (first + j) * D) : _mm512_set1_ps(NOTHING);
        _mm512_store_ps(scores + j * LANES, score);
        higher = _mm512_max_ps(higher, score);
      }
      if (_mm512_cmp_ps_mask(higher, maximum, _CMP_GT_OQ)) {  // what was summed so far counts less
        const __m512 less = A::power(_mm512_mul_ps(_mm512_sub_ps(maximum, higher), _mm512_set1_ps(scale)));
        sum = _mm512_mul_ps(sum, less);
        for (int d = 0; d < D; ++d) _mm512_store_ps(sums + d * LANES, _mm512_mul_ps(_mm512_load_ps(sums + d * LANES), less));
        maximum = higher;
      }
      // The difference first: it is exact for the largest scores, however large they are.
      const __m512 factor = _mm512_set1_ps(scale);
      __m512 of_block = _mm512_setzero_ps();
      for (int j = 0; j < KEYS; j += 2) {
        const __m512 a = A::power(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(scores + j * LANES), maximum), factor));
        const __m512 b = A::power(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(scores + (j + 1) * LANES), maximum), factor));
        of_block = _mm512_add_ps(of_block, _mm512_add_ps(a, b));
        A::packs(weights + j / A::P * LANES, a, b);
      }
      sum = _mm512_add_ps(sum, of_block);
      accumulate<A, D>(sums, weights, values + first / A::P * D);
    }
    const int count = int(std::min<int64_t>(LANES, head.tokens - b * LANES));
    write<A, D>(sums, _mm512_div_ps(_mm512_set1_ps(1.0f), sum), out + head.out + b * LANES * head.out_row, head.out_row, count);
    _mm512_store_ps(most, maximum);
    _mm512_store_ps(total, sum);
    for (int i = 0; i < count; ++i) {
      logs[head.logs + b * LANES + i] = most[i];
      logs[head.logs + head.tokens + b * LANES + i] = std::log2(total[i]);
    }
  }
}

// With w the weights and g the gradient of the output: dv = w^T g, dw = g v^T, ds = w (dw - sum of g out), dq = ds k, dk = ds^T q.
template <class A, int D>
void backward(const Head<A, D>& head, const typename A::Number* qkv, const typename A::Number* out, const float* logs,
              const typename A::Number* gradient, typename A::Number* result) {
  using Number = typename A::Number;
  using Pack = typename A::Pack;
  constexpr int P = A::P;
  const int64_t size = head.padded * D;
  Buffer<Number> rows(size), keys(size), values(size);
  Buffer<Pack> key_packs(size / P), query_lanes(size / P), query_packs(size / P), gradient_lanes(size / P), gradient_packs(size / P);
  Buffer<float> dq(size), most(head.padded), log(head.padded), drift(head.padded);
  head.rows(qkv + head.q, head.row, rows);
  head.lanes(rows, query_lanes);
  head.packs(rows, query_packs);
  head.rows(qkv + head.k, head.row, keys);
  head.packs(keys, key_packs);
  head.rows(qkv + head.v, head.row, values);
  head.rows(gradient + head.out, head.out_row, rows);
  head.lanes(rows, gradient_lanes);
  head.packs(rows, gradient_packs);
  for (int64_t i = 0; i < head.padded; ++i) {
    float sum = 0;
    for (int d = 0; d < D && i < head.tokens; ++d) sum += A::wide(rows[i * D + d]) * A::wide(out[head.out + i * head.out_row + d]);
    drift[i] = sum;
    most[i] = i < head.tokens ? logs[head.logs + i] : 0;
    log[i] = i < head.tokens ? logs[head.logs + head.tokens + i] : -NOTHING;  // of a query that is not there every weight is 0
  }
  std::memset(dq, 0, size * sizeof(float));
  const float root = 1.0f / std::sqrt(float(D)), scale = LOG2_E * root;
  alignas(64) float dk[KEYS * D], dv[KEYS * D];
  alignas(64) Number weights[KEYS * LANES], ds[KEYS * LANES];  // 16 queries of one key, then of the next: packs of queries
  alignas(64) Pack ds_packs[KEYS / P * LANES];                 // packs of keys, of 16 queries
  for (int64_t first = 0; first < head.tokens; first += KEYS) {
    std::memset(dk, 0, sizeof dk);
    std::memset(dv, 0, sizeof dv);
    const int count = int(std::min<int64_t>(KEYS, head.tokens - first));
    for (int64_t b = 0; b * LANES < head.tokens; ++b) {
      typename A::Register q[D / P], g[D / P];
      for (int p = 0; p < D / P; ++p) {
        q[p] = A::load(query_lanes + (b * (D / P) + p) * LANES);
        g[p] = A::load(gradient_lanes + (b * (D / P) + p) * LANES);
      }
      const __m512 factor = _mm512_set1_ps(scale), mean = _mm512_load_ps(drift + b * LANES);
      const __m512 maximum = _mm512_load_ps(most + b * LANES), minus = _mm512_load_ps(log + b * LANES);
      for (int j = 0; j < KEYS; j += 2) {
        __m512 w[2], e[2];
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m512 score = product<A, D>(q, keys + (first + j + h) * D), dw = product<A, D>(g, values + (first + j + h) * D);
          w[h] = j + h < count ? A::power(_mm512_fmsub_ps(_mm512_sub_ps(score, maximum), factor, minus)) : _mm512_setzero_ps();
          e[h] = j + h < count ? _mm512_mul_ps(w[h], _mm512_sub_ps(dw, mean)) : _mm512_setzero_ps();
        }
        A::columns(weights + j * LANES, w[0], w[1]);
        A::columns(ds + j * LANES, e[0], e[1]);
        A::packs(ds_packs + j / P * LANES, e[0], e[1]);
      }
      for (int part = 0; part < D; part += LANES) {
        typename A::Register queries[LANES / P], gradients[LANES / P];
#pragma GCC unroll 16
        for (int r = 0; r < LANES / P; ++r) {
          queries[r] = A::load(query_packs + (b * (LANES / P) + r) * D + part);
          gradients[r] = A::load(gradient_packs + (b * (LANES / P) + r) * D + part);
        }
        for (int j = 0; j < KEYS; ++j) {
          __m512 v = _mm512_setzero_ps(), k = _mm512_setzero_ps();
#pragma GCC unroll 16
          for (int r = 0; r < LANES / P; ++r) {
            v = A::multiply(v, gradients[r], A::shared(weights + j * LANES + P * r));
            k = A::multiply(k, queries[r], A::shared(ds + j * LANES + P * r));
          }
          add(dv + j * D + part, v);
          add(dk + j * D + part, k);
        }
      }
      accumulate<A, D>(dq + b * LANES * D, ds_packs, key_packs + first / P * D);
    }
    for (int j = 0; j < count; ++j)
      for (int part = 0; part < D; part += LANES) {
        const __m512 k = _mm512_mul_ps(_mm512_load_ps(dk + j * D + part), _mm512_set1_ps(root));
        A::store(result + head.k + (first + j) * head.row + part, k);
        A::store(result + head.v + (first + j) * head.row + part, _mm512_load_ps(dv + j * D + part));
      }
  }
  for (int64_t b = 0; b * LANES < head.tokens; ++b) {
    const int count = int(std::min<int64_t>(LANES, head.tokens - b * LANES));
    write<A, D>(dq + b * LANES * D, _mm512_set1_ps(root), result + head.q + b * LANES * head.row, head.row, count);
  }
}

// work(0) .. work(units - 1) on up to `threads` threads. 0: all done, 1: out of memory.
template <class Work>
int share(int64_t units, int64_t threads, Work work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto run = [&] {
    try {
      for (int64_t unit; !failed && (unit = next.fetch_add(1)) < units;) work(unit);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(threads, units); ++i) others.emplace_back(run);
  } catch (const std::exception&) {  // no more threads to be had: those that are there do it
  }
  run();
  for (std::thread& other : others) other.join();
  return failed ? 1 : 0;
}

struct Sizes {
  int64_t batch, tokens, heads, width, threads;
};

template <class A, int D>
int forward_all(const void* qkv, void* out, float* logs, Sizes s) {
  using Number = typename A::Number;
  const int64_t all = s.batch * s.heads, parts = std::max<int64_t>(1, std::min((s.threads + all - 1) / all, s.tokens / (4 * LANES)));
  return share(all * parts, s.threads, [=](int64_t unit) {
    const Head<A, D> head(s.tokens, s.heads, unit / parts);
    forward<A, D>(head, static_cast<const Number*>(qkv), static_cast<Number*>(out), logs, unit % parts, parts);
  });
}

template <class A, int D>
int backward_all(const void* qkv, const void* out, const float* logs, const void* gradient, void* result, Sizes s) {
  using Number = typename A::Number;
  return share(s.batch * s.heads, s.threads, [=](int64_t unit) {
    backward<A, D>(Head<A, D>(s.tokens, s.heads, unit), static_cast<const Number*>(qkv), static_cast<const Number*>(out), logs,
                   static_cast<const Number*>(gradient), static_cast<Number*>(result));
  });
}

template <class A>
int forward_of(const void* qkv, void* out, float* logs, Sizes s) {
  if (s.width == 16) return forward_all<A, 16>(qkv, out, logs, s);
  if (s.width == 32) return forward_all<A, 32>(qkv, out, logs, s);
  if (s.width == 64) return forward_all<A, 64>(qkv, out, logs, s);
  return 2;
}

template <class A>
int backward_of(const void* qkv, const void* out, const float* logs, const void* gradient, void* result, Sizes s) {
  if (s.width == 16) return backward_all<A, 16>(qkv, out, logs, gradient, result, s);
  if (s.width == 32) return backward_all<A, 32>(qkv, out, logs, gradient, result, s);
  if (s.width == 64) return backward_all<A, 64>(qkv, out, logs, gradient, result, s);
  return 2;
}

}  // namespace

// bf16: the numbers of qkv, out and gradients are bf16, else float32; it is compiled for one of them. Both return 0, 1 when there is no
// memory, 2 for heads of another size or the other numbers.
extern "C" int attention_forward(int bf16, const void* qkv, void* out, float* logs, int64_t batch, int64_t tokens, int64_t heads,
                                 int64_t width, int64_t threads) {
  const Sizes sizes{batch, tokens, heads, width, threads};
  if (batch * tokens * heads == 0) return 0;
#ifdef __AVX512BF16__
  return bf16 ? forward_of<Bf16>(qkv, out, logs, sizes) : 2;
#else
  return bf16 ? 2 : forward_of<Float32>(qkv, out, logs, sizes);
#endif
}

extern "C" int attention_backward(int bf16, const void* qkv, const void* out, const float* logs, const void* gradient, void* result,
                                  int64_t batch, int64_t tokens, int64_t heads, int64_t width, int64_t threads) {
  const Sizes sizes{batch, tokens, heads, width, threads};
  if (batch * tokens * heads == 0) return 0;
#ifdef __AVX512BF16__
  return bf16 ? backward_of<Bf16>(qkv, out, logs, gradient, result, sizes) : 2;
#else
  return bf16 ? 2 : backward_of<Float32>(qkv, out, logs, gradient, result, sizes);
#endif
}
