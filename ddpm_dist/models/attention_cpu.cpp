// Attention of one network layer on a CPU with bf16 arithmetic (AVX-512 BF16), forward and backward.
//
// softmax(q k^T / sqrt(D)) v is computed block by block, so that the weights of a block never leave the first caches (the idea of
// Dao et al. 2022, FlashAttention). With heads of 16 features a product of two features costs little and everything around it much, so
// the layout is chosen for what lies around: the 16 numbers of a register belong to 16 queries, and maxima, sums and exponentials of a
// query never cross its lane. The one instruction that multiplies takes a pair of bf16 numbers of each lane; its other factor is a pair
// that all lanes share. What is multiplied lies in memory as such pairs:
//
//   rows   [N][D]       a token after the other: two features of a token are a pair
//   pairs  [N/2][D][2]  two tokens side by side: one feature of two tokens is a pair
//   lanes  [N/16][D/2]  16 registers' lanes are 16 tokens, each with a pair of features
//
// Products and sums are in float32, weights and their gradients are rounded to bf16 before they are multiplied. Every query and, backward,
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

namespace {

using bf16 = uint16_t;
constexpr int LANES = 16;                  // float32 numbers in a register: queries that are computed together
constexpr int KEYS = 64;                   // of a block; what belongs to a block stays in the first cache
constexpr float NOTHING = -1e30f;          // score of a key that is not there: its weight is 0, and no infinities meet
constexpr float LOG2_E = 1.44269504088896f;

inline __m512bh shared(const void* pair) {
  int32_t both;
  std::memcpy(&both, pair, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}
inline __m512bh load(const uint32_t* p) { return (__m512bh)_mm512_load_si512(p); }
inline float wide(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// 2^x, off by at most 3e-6 of it: a polynomial for the fraction (fitted to the least largest relative error), the exponent set apart.
inline __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(0.009570102207362652f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.05591786280274391f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.240247443318367f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.6931217908859253f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.9999992847442627f));
  return _mm512_scalef_ps(y, whole);
}

// Two registers of float32 as bf16 (rounded to the nearest): first all of a, then all of b; and as pairs, a and b of each lane.
inline __m512i narrow(__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }
inline __m512i paired(__m512i narrowed) {
  alignas(64) static const uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), narrowed);
}
inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

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
// logs [batch][heads][tokens].
template <int D>
struct Head {
  int64_t tokens, padded, row, out_row, q, k, v, out, logs;
  Head(int64_t tokens, int64_t heads, int64_t number)
      : tokens(tokens), padded((tokens + KEYS - 1) / KEYS * KEYS), row(3 * heads * D), out_row(heads * D),
        q(number / heads * tokens * row + number % heads * D), k(q + heads * D), v(k + heads * D),
        out(number / heads * tokens * out_row + number % heads * D), logs(number * tokens) {}

  // The three layouts; tokens that are not there are zeros.
  void rows(const bf16* from, int64_t stride, bf16* to) const {
    for (int64_t i = 0; i < tokens; ++i) std::memcpy(to + i * D, from + i * stride, D * sizeof(bf16));
    std::memset(to + tokens * D, 0, (padded - tokens) * D * sizeof(bf16));
  }
  void pairs(const bf16* rows, uint32_t* to) const {
    for (int64_t i = 0; i < padded; i += 2)
      for (int d = 0; d < D; ++d) to[i / 2 * D + d] = uint32_t(rows[i * D + d]) | uint32_t(rows[(i + 1) * D + d]) << 16;
  }
  void lanes(const bf16* rows, uint32_t* to) const {
    for (int64_t b = 0; b < padded / LANES; ++b)
      for (int p = 0; p < D / 2; ++p)
        for (int i = 0; i < LANES; ++i)
          std::memcpy(to + (b * (D / 2) + p) * LANES + i, rows + (b * LANES + i) * D + 2 * p, sizeof(uint32_t));
  }
};

// 16 queries (or their gradients) times one key (or value).
template <int D>
inline __attribute__((always_inline)) __m512 product(const __m512bh* queries, const bf16* key) {
  __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 32
  for (int p = 0; p < D / 2; ++p) sum = _mm512_dpbf16_ps(sum, queries[p], shared(key + 2 * p));
  return sum;
}

// sums[D][16] += for every pair of KEYS tokens: weights [KEYS/2][16] times that pair's features [KEYS/2][D].
template <int D>
inline __attribute__((always_inline)) void accumulate(float* sums, const uint32_t* weights, const uint32_t* features) {
  for (int part = 0; part < D; part += LANES) {
    __m512 sum[LANES];
#pragma GCC unroll 16
    for (int d = 0; d < LANES; ++d) sum[d] = _mm512_load_ps(sums + (part + d) * LANES);
    for (int j = 0; j < KEYS / 2; ++j) {
      const __m512bh weight = load(weights + j * LANES);
#pragma GCC unroll 16
      for (int d = 0; d < LANES; ++d) sum[d] = _mm512_dpbf16_ps(sum[d], weight, shared(features + j * D + part + d));
    }
#pragma GCC unroll 16
    for (int d = 0; d < LANES; ++d) _mm512_store_ps(sums + (part + d) * LANES, sum[d]);
  }
}

// columns[D][16] as up to 16 rows of D bf16 numbers.
template <int D>
inline void write(const float* columns, __m512 factor, bf16* to, int64_t stride, int count) {
  alignas(32) bf16 column[LANES];
  for (int d = 0; d < D; ++d) {
    _mm256_store_si256((__m256i*)column, narrow(_mm512_mul_ps(_mm512_load_ps(columns + d * LANES), factor)));
    for (int i = 0; i < count; ++i) to[i * stride + d] = column[i];
  }
}

// Part `part` of `parts` of the queries of a head. logs: log2 of the sum of exponentials, which the backward pass starts from.
template <int D>
void forward(const Head<D>& head, const bf16* qkv, bf16* out, float* logs, int64_t part, int64_t parts) {
  Buffer<bf16> rows(head.padded * D), keys(head.padded * D);
  Buffer<uint32_t> values(head.padded / 2 * D), queries(head.padded / 2 * D);
  head.rows(qkv + head.q, head.row, rows);
  head.lanes(rows, queries);
  head.rows(qkv + head.k, head.row, keys);
  head.rows(qkv + head.v, head.row, rows);
  head.pairs(rows, values);
  const float scale = LOG2_E / std::sqrt(float(D));
  alignas(64) float sums[D * LANES], scores[KEYS * LANES], most[LANES], total[LANES];
  alignas(64) uint32_t weights[KEYS / 2 * LANES];
  const int64_t blocks = (head.tokens + LANES - 1) / LANES;
  for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) {
    __m512bh q[D / 2];
    for (int p = 0; p < D / 2; ++p) q[p] = load(queries + (b * (D / 2) + p) * LANES);
    __m512 maximum = _mm512_set1_ps(NOTHING), sum = _mm512_setzero_ps();
    std::memset(sums, 0, sizeof sums);
    for (int64_t first = 0; first < head.tokens; first += KEYS) {
      __m512 higher = maximum;
      for (int j = 0; j < KEYS; ++j) {
        const __m512 score = first + j < head.tokens ? product<D>(q, keys + (first + j) * D) : _mm512_set1_ps(NOTHING);
        _mm512_store_ps(scores + j * LANES, score);
        higher = _mm512_max_ps(higher, score);
      }
      if (_mm512_cmp_ps_mask(higher, maximum, _CMP_GT_OQ)) {  // what was summed so far counts less
        const __m512 less = exp2(_mm512_mul_ps(_mm512_sub_ps(maximum, higher), _mm512_set1_ps(scale)));
        sum = _mm512_mul_ps(sum, less);
        for (int d = 0; d < D; ++d) _mm512_store_ps(sums + d * LANES, _mm512_mul_ps(_mm512_load_ps(sums + d * LANES), less));
        maximum = higher;
      }
      const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_mul_ps(maximum, _mm512_set1_ps(-scale));
      for (int j = 0; j < KEYS; j += 2) {
        const __m512 a = exp2(_mm512_fmadd_ps(_mm512_load_ps(scores + j * LANES), factor, shift));
        const __m512 b = exp2(_mm512_fmadd_ps(_mm512_load_ps(scores + (j + 1) * LANES), factor, shift));
        sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
        _mm512_store_si512(weights + j / 2 * LANES, paired(narrow(a, b)));
      }
      accumulate<D>(sums, weights, values + first / 2 * D);
    }
    const int count = int(std::min<int64_t>(LANES, head.tokens - b * LANES));
    write<D>(sums, _mm512_div_ps(_mm512_set1_ps(1.0f), sum), out + head.out + b * LANES * head.out_row, head.out_row, count);
    _mm512_store_ps(most, maximum);
    _mm512_store_ps(total, sum);
    for (int i = 0; i < count; ++i) logs[head.logs + b * LANES + i] = most[i] * scale + std::log2(total[i]);
  }
}

// With w the weights and g the gradient of the output: dv = w^T g, dw = g v^T, ds = w (dw - sum of g out), dq = ds k, dk = ds^T q.
template <int D>
void backward(const Head<D>& head, const bf16* qkv, const bf16* out, const float* logs, const bf16* gradient, bf16* result) {
  const int64_t size = head.padded * D;
  Buffer<bf16> rows(size), keys(size), values(size);
  Buffer<uint32_t> key_pairs(size / 2), query_lanes(size / 2), query_pairs(size / 2), gradient_lanes(size / 2), gradient_pairs(size / 2);
  Buffer<float> dq(size), log(head.padded), drift(head.padded);
  head.rows(qkv + head.q, head.row, rows);
  head.lanes(rows, query_lanes);
  head.pairs(rows, query_pairs);
  head.rows(qkv + head.k, head.row, keys);
  head.pairs(keys, key_pairs);
  head.rows(qkv + head.v, head.row, values);
  head.rows(gradient + head.out, head.out_row, rows);
  head.lanes(rows, gradient_lanes);
  head.pairs(rows, gradient_pairs);
  for (int64_t i = 0; i < head.padded; ++i) {
    float sum = 0;
    for (int d = 0; d < D && i < head.tokens; ++d) sum += wide(rows[i * D + d]) * wide(out[head.out + i * head.out_row + d]);
    drift[i] = sum;
    log[i] = i < head.tokens ? logs[head.logs + i] : -NOTHING;  // of a query that is not there every weight is 0
  }
  std::memset(dq, 0, size * sizeof(float));
  const float root = 1.0f / std::sqrt(float(D)), scale = LOG2_E * root;
  alignas(64) float dk[KEYS * D], dv[KEYS * D];
  alignas(64) bf16 weights[KEYS * LANES], ds[KEYS * LANES];  // 16 queries of one key, then of the next: pairs of queries
  alignas(64) uint32_t ds_pairs[KEYS / 2 * LANES];           // pairs of keys of 16 queries
  for (int64_t first = 0; first < head.tokens; first += KEYS) {
    std::memset(dk, 0, sizeof dk);
    std::memset(dv, 0, sizeof dv);
    const int count = int(std::min<int64_t>(KEYS, head.tokens - first));
    for (int64_t b = 0; b * LANES < head.tokens; ++b) {
      __m512bh q[D / 2], g[D / 2];
      for (int p = 0; p < D / 2; ++p) {
        q[p] = load(query_lanes + (b * (D / 2) + p) * LANES);
        g[p] = load(gradient_lanes + (b * (D / 2) + p) * LANES);
      }
      const __m512 factor = _mm512_set1_ps(scale), minus = _mm512_load_ps(log + b * LANES), mean = _mm512_load_ps(drift + b * LANES);
      for (int j = 0; j < KEYS; j += 2) {
        __m512 w[2], e[2];
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m512 score = product<D>(q, keys + (first + j + h) * D), dw = product<D>(g, values + (first + j + h) * D);
          w[h] = j + h < count ? exp2(_mm512_fmsub_ps(score, factor, minus)) : _mm512_setzero_ps();
          e[h] = j + h < count ? _mm512_mul_ps(w[h], _mm512_sub_ps(dw, mean)) : _mm512_setzero_ps();
        }
        const __m512i both = narrow(e[0], e[1]);
        _mm512_store_si512(weights + j * LANES, narrow(w[0], w[1]));
        _mm512_store_si512(ds + j * LANES, both);
        _mm512_store_si512(ds_pairs + j / 2 * LANES, paired(both));
      }
      for (int part = 0; part < D; part += LANES) {
        __m512bh queries[LANES / 2], gradients[LANES / 2];
#pragma GCC unroll 8
        for (int r = 0; r < LANES / 2; ++r) {
          queries[r] = load(query_pairs + (b * (LANES / 2) + r) * D + part);
          gradients[r] = load(gradient_pairs + (b * (LANES / 2) + r) * D + part);
        }
        for (int j = 0; j < KEYS; ++j) {
          __m512 v = _mm512_load_ps(dv + j * D + part), k = _mm512_load_ps(dk + j * D + part);
#pragma GCC unroll 8
          for (int r = 0; r < LANES / 2; ++r) {
            v = _mm512_dpbf16_ps(v, gradients[r], shared(weights + j * LANES + 2 * r));
            k = _mm512_dpbf16_ps(k, queries[r], shared(ds + j * LANES + 2 * r));
          }
          _mm512_store_ps(dv + j * D + part, v);
          _mm512_store_ps(dk + j * D + part, k);
        }
      }
      accumulate<D>(dq + b * LANES * D, ds_pairs, key_pairs + first / 2 * D);
    }
    for (int j = 0; j < count; ++j)
      for (int part = 0; part < D; part += LANES) {
        const __m512 k = _mm512_mul_ps(_mm512_load_ps(dk + j * D + part), _mm512_set1_ps(root)), v = _mm512_load_ps(dv + j * D + part);
        _mm256_storeu_si256((__m256i*)(result + head.k + (first + j) * head.row + part), narrow(k));
        _mm256_storeu_si256((__m256i*)(result + head.v + (first + j) * head.row + part), narrow(v));
      }
  }
  for (int64_t b = 0; b * LANES < head.tokens; ++b) {
    const int count = int(std::min<int64_t>(LANES, head.tokens - b * LANES));
    write<D>(dq + b * LANES * D, _mm512_set1_ps(root), result + head.q + b * LANES * head.row, head.row, count);
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

template <int D>
int forward_all(const bf16* qkv, bf16* out, float* logs, int64_t batch, int64_t tokens, int64_t heads, int64_t threads) {
  const int64_t all = batch * heads, parts = std::max<int64_t>(1, std::min((threads + all - 1) / all, tokens / (4 * LANES)));
  return share(all * parts, threads, [=](int64_t unit) {
    forward<D>(Head<D>(tokens, heads, unit / parts), qkv, out, logs, unit % parts, parts);
  });
}

template <int D>
int backward_all(const bf16* qkv, const bf16* out, const float* logs, const bf16* gradient, bf16* result, int64_t batch, int64_t tokens,
                 int64_t heads, int64_t threads) {
  return share(batch * heads, threads, [=](int64_t unit) {
    backward<D>(Head<D>(tokens, heads, unit), qkv, out, logs, gradient, result);
  });
}

}  // namespace

// Both return 0, 1 when there is no memory, 2 for heads of another size.
extern "C" int attention_forward(const bf16* qkv, bf16* out, float* logs, int64_t batch, int64_t tokens, int64_t heads, int64_t width,
                                 int64_t threads) {
  if (batch * tokens * heads == 0) return 0;
  if (width == 16) return forward_all<16>(qkv, out, logs, batch, tokens, heads, threads);
  if (width == 32) return forward_all<32>(qkv, out, logs, batch, tokens, heads, threads);
  if (width == 64) return forward_all<64>(qkv, out, logs, batch, tokens, heads, threads);
  return 2;
}

extern "C" int attention_backward(const bf16* qkv, const bf16* out, const float* logs, const bf16* gradient, bf16* result, int64_t batch,
                                  int64_t tokens, int64_t heads, int64_t width, int64_t threads) {
  if (batch * tokens * heads == 0) return 0;
  if (width == 16) return backward_all<16>(qkv, out, logs, gradient, result, batch, tokens, heads, threads);
  if (width == 32) return backward_all<32>(qkv, out, logs, gradient, result, batch, tokens, heads, threads);
  if (width == 64) return backward_all<64>(qkv, out, logs, gradient, result, batch, tokens, heads, threads);
  return 2;
}
