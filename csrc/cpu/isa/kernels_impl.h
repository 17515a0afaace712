/* The inner loops of kernels.h, written once over the vector `vf` of a simd_*.h and compiled once per instruction set
 * (avx512.c, avx2.c, neon.c, scalar.c include that header and then this one). */
#include <math.h>
#include <string.h>

#include "cpu/isa/kernels.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* --- elements of any dtype ------------------------------------------------------------------- */

static inline size_t width_of(lola_dtype dtype) { return dtype == LOLA_FLOAT32 ? 4 : 2; }

ALWAYS_INLINE vf load_as(const void *p, int64_t i, lola_dtype dtype) {
  if (dtype == LOLA_FLOAT32) return vf_load((const float *)p + i);
  if (dtype == LOLA_BFLOAT16) return vf_load_bfloat16((const uint16_t *)p + i);
  return vf_load_float16((const uint16_t *)p + i);
}

/* The first n < VF_LANES elements from i on, then zeros. */
ALWAYS_INLINE vf load_tail_as(const void *p, int64_t i, lola_dtype dtype, int64_t n) {
  if (dtype == LOLA_FLOAT32) return vf_load_tail((const float *)p + i, n, 0);
  uint16_t lanes[VF_LANES] = {0};
  memcpy(lanes, (const uint16_t *)p + i, (size_t)n * 2);
  return load_as(lanes, 0, dtype);
}

ALWAYS_INLINE void store_as(void *p, int64_t i, lola_dtype dtype, vf v) {
  if (dtype == LOLA_FLOAT32)
    vf_store((float *)p + i, v);
  else if (dtype == LOLA_BFLOAT16)
    vf_store_bfloat16((uint16_t *)p + i, v);
  else
    vf_store_float16((uint16_t *)p + i, v);
}

/* --- 2^x and e^x for x <= 0 ------------------------------------------------------------------ */

/* 2^f on [-1/2, 1/2], relative error 1e-7: a weighted least-squares fit that keeps 2^0 = 1 exact. */
ALWAYS_INLINE vf power_of_fraction(vf f) {
  vf p = vf_set1(0x1.41fbbcp-13f);
  p = vf_fma(p, f, vf_set1(0x1.5f3e54p-10f));
  p = vf_fma(p, f, vf_set1(0x1.3b2d4cp-7f));
  p = vf_fma(p, f, vf_set1(0x1.c6aee8p-5f));
  p = vf_fma(p, f, vf_set1(0x1.ebfbdcp-3f));
  p = vf_fma(p, f, vf_set1(0x1.62e430p-1f));
  return vf_fma(p, f, vf_set1(1));
}

/* Below 2^-125 the result is 0, so nothing is ever subnormal and -inf gives an exact 0. */
ALWAYS_INLINE vf exp2_not_positive(vf x) {
  vf clamped = vf_max(x, vf_set1(-125));
  vf n = vf_round(clamped);
  return vf_zero_below(vf_scale2(power_of_fraction(vf_sub(clamped, n)), n), x, -125);
}

ALWAYS_INLINE vf exp_not_positive(vf x) {
  const float log2e = 0x1.715476p+0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  vf clamped = vf_max(x, vf_set1(-86));
  vf n = vf_round(vf_mul(clamped, vf_set1(log2e)));
  vf rest = vf_fma(n, vf_set1(-ln2_low), vf_fma(n, vf_set1(-ln2_high), clamped));
  return vf_zero_below(vf_scale2(power_of_fraction(vf_mul(rest, vf_set1(log2e))), n), x, -86);
}

/* --- matrix products ------------------------------------------------------------------------- */

enum { AHEAD = 16 }; /* rows of scattered memory that are asked for before they are used */

/* Memory that is read once, in order, is asked for so many bytes ahead, into the L2 cache. The machine's own
 * prefetching ends at each page and is confused by rows that are visited in turn. What lies past the end is the next
 * head's. */
enum { STREAM_AHEAD = 8192 };

ALWAYS_INLINE void ask_for(const char *from, int64_t bytes) {
#pragma GCC unroll 8
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
}

/* A ROWS x (VECTORS VF_LANES) tile of c stays in registers while k runs. `tail` > 0: the last vector holds that many
 * columns. Whatever the tile, an element is one chain of multiply-adds in ascending k. */
ALWAYS_INLINE void tile(const int ROWS, const int VECTORS, int64_t tail, int64_t K, const float *a, int64_t am,
                        int64_t ak, const float *b, int64_t ldb, float *c, int64_t ldc, int accumulate) {
  vf sum[TILE_ROWS][TILE_VECTORS];
  const float *row[TILE_ROWS];
  const int full = tail ? VECTORS - 1 : VECTORS;
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++) {
    row[i] = a + i * am;
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) {
      if (!accumulate)
        sum[i][j] = vf_zero();
      else if (j < full)
        sum[i][j] = vf_load(c + i * ldc + j * VF_LANES);
      else
        sum[i][j] = vf_load_tail(c + i * ldc + j * VF_LANES, tail, 0);
    }
  }
  for (int64_t k = 0, at = 0; k < K; k++, at += ak, b += ldb) {
    vf line[TILE_VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++)
      line[j] = j < full ? vf_load(b + j * VF_LANES) : vf_load_tail(b + j * VF_LANES, tail, 0);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      vf x = vf_set1(row[i][at]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; j++) sum[i][j] = vf_fma(x, line[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) {
      if (j < full)
        vf_store(c + i * ldc + j * VF_LANES, sum[i][j]);
      else
        vf_store_tail(c + i * ldc + j * VF_LANES, sum[i][j], tail);
    }
  }
}

/* All rows of one panel of columns. */
ALWAYS_INLINE void panel(const int VECTORS, int64_t tail, int64_t M, int64_t K, const float *a, int64_t am, int64_t ak,
                         const float *b, int64_t ldb, float *c, int64_t ldc, int accumulate) {
  int64_t m = 0;
  for (; m + TILE_ROWS <= M; m += TILE_ROWS)
    tile(TILE_ROWS, VECTORS, tail, K, a + m * am, am, ak, b, ldb, c + m * ldc, ldc, accumulate);
  a += m * am;
  c += m * ldc;
  switch (M - m) {
#define LAST_ROWS(n)                                                                                                   \
  case n:                                                                                                              \
    tile(n, VECTORS, tail, K, a, am, ak, b, ldb, c, ldc, accumulate);                                                  \
    break;
    LAST_ROWS(1)
    LAST_ROWS(2)
    LAST_ROWS(3)
#if TILE_LAST_ROWS > 3
    LAST_ROWS(4)
    LAST_ROWS(5)
#endif
#undef LAST_ROWS
  default:
    break;
  }
}

#define DEFINE_PANEL(name, vectors, tail_value)                                                                        \
  static __attribute__((noinline)) void name(int64_t M, int64_t K, const float *a, int64_t am, int64_t ak,             \
                                             const float *b, int64_t ldb, float *c, int64_t ldc, int accumulate,       \
                                             int64_t tail) {                                                           \
    (void)tail;                                                                                                        \
    panel(vectors, tail_value, M, K, a, am, ak, b, ldb, c, ldc, accumulate);                                           \
  }
DEFINE_PANEL(panel_widest, TILE_VECTORS, 0)
DEFINE_PANEL(panel_2, 2, 0)
DEFINE_PANEL(panel_1, 1, 0)
DEFINE_PANEL(panel_tail, 1, tail)
#undef DEFINE_PANEL

/* With few rows the product is as fast as b arrives, so b is read once and nearly as it lies in memory: a few of its
 * rows stay in the L1 cache while panels of columns go over them. */
enum { FEW_ROWS = 4, STREAM_ROWS = 8 };

/* c (ROWS, VECTORS VF_LANES) += A b; each row of b asks for as many bytes as it has, from `ask` on. */
ALWAYS_INLINE void few_rows_panel(const int ROWS, const int VECTORS, int64_t tail, lola_dtype dtype, int64_t K,
                                  const float *a, int64_t am, int64_t ak, const char *b, int64_t ldb, float *c,
                                  int64_t ldc, const char *ask) {
  vf sum[FEW_ROWS][FEW_SUMS];
  const int64_t width = (int64_t)width_of(dtype), bytes = VECTORS * VF_LANES * width;
  const int full = tail ? VECTORS - 1 : VECTORS;
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++)
      sum[i][j] = j < full ? vf_load(c + i * ldc + j * VF_LANES) : vf_load_tail(c + i * ldc + j * VF_LANES, tail, 0);
  for (int64_t k = 0; k < K; k++, b += ldb * width) {
    ask_for(ask, bytes);
    ask += bytes;
    vf line[FEW_SUMS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++)
      line[j] = j < full ? load_as(b, j * VF_LANES, dtype) : load_tail_as(b, j * VF_LANES, dtype, tail);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      vf x = vf_set1(a[i * am + k * ak]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; j++) sum[i][j] = vf_fma(x, line[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) {
      if (j < full)
        vf_store(c + i * ldc + j * VF_LANES, sum[i][j]);
      else
        vf_store_tail(c + i * ldc + j * VF_LANES, sum[i][j], tail);
    }
}

/* All panels of a few rows of b. */
ALWAYS_INLINE void few_rows_of(const int ROWS, const int VECTORS, lola_dtype dtype, int64_t N, int64_t K,
                               const float *a, int64_t am, int64_t ak, const char *b, int64_t ldb, float *c,
                               int64_t ldc, const char *ask) {
  const int64_t width = (int64_t)width_of(dtype);
  int64_t n = 0, step = VECTORS * VF_LANES;
  for (; n + step <= N; n += step, ask += K * step * width)
    few_rows_panel(ROWS, VECTORS, 0, dtype, K, a, am, ak, b + n * width, ldb, c + n, ldc, ask);
  step = VECTORS / 2 * VF_LANES;
  for (; n + step <= N; n += step, ask += K * step * width)
    few_rows_panel(ROWS, VECTORS / 2, 0, dtype, K, a, am, ak, b + n * width, ldb, c + n, ldc, ask);
  for (; n + VF_LANES <= N; n += VF_LANES, ask += K * VF_LANES * width)
    few_rows_panel(ROWS, 1, 0, dtype, K, a, am, ak, b + n * width, ldb, c + n, ldc, ask);
  if (n < N) few_rows_panel(ROWS, 1, N - n, dtype, K, a, am, ak, b + n * width, ldb, c + n, ldc, ask);
}

/* c (M, N) += A b for any M. */
ALWAYS_INLINE void few_rows_as(lola_dtype dtype, int64_t M, int64_t N, int64_t K, const float *a, int64_t am,
                               int64_t ak, const void *b, int64_t ldb, float *c, int64_t ldc) {
  const int64_t width = (int64_t)width_of(dtype);
  /* One row that is as wide as the registers needs no blocks. */
  const int64_t rows = M == 1 && N <= FEW_SUMS / 2 * VF_LANES ? K : STREAM_ROWS;
  for (int64_t k = 0; k < K; k += rows) {
    const int64_t n = K - k < rows ? K - k : rows;
    const float *x = a + k * ak;
    /* One row is done sooner, and so asks for less that is not its own past the end. */
    const char *from = (const char *)b + k * ldb * width, *ask = from + (M == 1 ? STREAM_AHEAD / 2 : STREAM_AHEAD);
    int64_t m = 0;
    /* Each 16-bit element is widened once for four rows; wider panels are nearer to how float32 lies in memory. */
    for (; dtype != LOLA_FLOAT32 && m + 4 <= M; m += 4)
      few_rows_of(4, FEW_SUMS / 4, dtype, N, n, x + m * am, am, ak, from, ldb, c + m * ldc, ldc, ask);
    for (; m + 2 <= M; m += 2)
      few_rows_of(2, FEW_SUMS / 2, dtype, N, n, x + m * am, am, ak, from, ldb, c + m * ldc, ldc, ask);
    if (m < M) few_rows_of(1, FEW_SUMS / 2, dtype, N, n, x + m * am, am, ak, from, ldb, c + m * ldc, ldc, ask);
  }
}

static __attribute__((noinline)) void few_rows(int64_t M, int64_t N, int64_t K, const float *a, int64_t am, int64_t ak,
                                               const float *b, int64_t ldb, float *c, int64_t ldc, int accumulate) {
  for (int64_t i = 0; i < M && !accumulate; i++) memset(c + i * ldc, 0, (size_t)N * sizeof *c);
  few_rows_as(LOLA_FLOAT32, M, N, K, a, am, ak, b, ldb, c, ldc);
}

static void gemm(int64_t M, int64_t N, int64_t K, const float *a, int64_t am, int64_t ak, const float *b, int64_t ldb,
                 float *c, int64_t ldc, int accumulate) {
  if (M <= FEW_ROWS) {
    few_rows(M, N, K, a, am, ak, b, ldb, c, ldc, accumulate);
    return;
  }
  int64_t n = 0;
  for (; n + TILE_VECTORS * VF_LANES <= N; n += TILE_VECTORS * VF_LANES)
    panel_widest(M, K, a, am, ak, b + n, ldb, c + n, ldc, accumulate, 0);
  for (; n + 2 * VF_LANES <= N; n += 2 * VF_LANES) panel_2(M, K, a, am, ak, b + n, ldb, c + n, ldc, accumulate, 0);
  for (; n + VF_LANES <= N; n += VF_LANES) panel_1(M, K, a, am, ak, b + n, ldb, c + n, ldc, accumulate, 0);
  if (n < N) panel_tail(M, K, a, am, ak, b + n, ldb, c + n, ldc, accumulate, N - n);
}

/* --- moving rows ----------------------------------------------------------------------------- */

ALWAYS_INLINE void load_rows_as(float *to, int64_t ld, const void *const *rows, lola_dtype dtype, int64_t count,
                                int64_t n, float factor) {
  /* Rows of the sparse cache lie anywhere: ask for them early. */
  const vf scale = vf_set1(factor);
  const int64_t bytes = n * (int64_t)width_of(dtype);
  for (int64_t i = 0; i < count; i++) {
    if (i + AHEAD < count)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)rows[i + AHEAD] + at);
    float *line = to + i * ld;
    int64_t j = 0;
    for (; j + VF_LANES <= n; j += VF_LANES) vf_store(line + j, vf_mul(load_as(rows[i], j, dtype), scale));
    if (j < n) vf_store_tail(line + j, vf_mul(load_tail_as(rows[i], j, dtype, n - j), scale), n - j);
    for (j = n; j < ld; j++) line[j] = 0;
  }
}

static void load_rows(float *to, int64_t ld, const void *const *rows, lola_dtype dtype, int64_t count, int64_t n,
                      float factor) {
  switch (dtype) {
  case LOLA_FLOAT32:
    load_rows_as(to, ld, rows, LOLA_FLOAT32, count, n, factor);
    break;
  case LOLA_FLOAT16:
    load_rows_as(to, ld, rows, LOLA_FLOAT16, count, n, factor);
    break;
  case LOLA_BFLOAT16:
    load_rows_as(to, ld, rows, LOLA_BFLOAT16, count, n, factor);
    break;
  }
}

static void store_row(void *to, lola_dtype dtype, const float *from, int64_t n) {
  if (dtype == LOLA_FLOAT32) {
    memcpy(to, from, (size_t)n * 4);
    return;
  }
  int64_t j = 0;
  for (; j + VF_LANES <= n; j += VF_LANES) store_as(to, j, dtype, vf_load(from + j));
  if (j < n) {
    uint16_t lanes[VF_LANES];
    store_as(lanes, 0, dtype, vf_load_tail(from + j, n - j, 0));
    memcpy((uint16_t *)to + j, lanes, (size_t)(n - j) * 2);
  }
}

static int all_finite(const void *x, lola_dtype dtype, int64_t n, int not_negative) {
  /* x - x is 0 for a finite x and NaN for any other. */
  vf odd = vf_zero(), lowest = vf_zero();
  int64_t j = 0;
  for (; j + VF_LANES <= n; j += VF_LANES) {
    vf v = load_as(x, j, dtype);
    odd = vf_add(odd, vf_sub(v, v));
    lowest = vf_min(v, lowest);
  }
  if (j < n) {
    vf v = load_tail_as(x, j, dtype, n - j);
    odd = vf_add(odd, vf_sub(v, v));
    lowest = vf_min(v, lowest);
  }
  return vf_sum(odd) == 0 && !(not_negative && vf_lowest(lowest) < 0);
}

/* --- features -------------------------------------------------------------------------------- */

static const float FEATURE_FLOOR = 1e-12f;

ALWAYS_INLINE vf finish_feature(vf x, float floor, int round_bfloat16) {
  x = vf_max(x, vf_set1(floor));
  return round_bfloat16 ? vf_round_bfloat16(x) : x;
}

/* out = exp(x - highest) or exp(lowest - x) over M, divided by its sum when `normalise`. */
ALWAYS_INLINE void exponentials(int64_t M, const float *x, float *out, float sign, float shift, int normalise,
                                int round_bfloat16) {
  const vf s = vf_set1(sign), t = vf_set1(shift);
  vf sum = vf_zero();
  int64_t j = 0;
  for (; j + VF_LANES <= M; j += VF_LANES) {
    vf e = exp_not_positive(vf_mul(s, vf_sub(vf_load(x + j), t)));
    vf_store(out + j, e);
    sum = vf_add(sum, e);
  }
  if (j < M) {
    vf_store_tail(out + j, exp_not_positive(vf_mul(s, vf_sub(vf_load_tail(x + j, M - j, shift), t))), M - j);
    sum = vf_add(sum, vf_load_tail(out + j, M - j, 0));
  }
  const vf scale = vf_set1(normalise ? 1 / vf_sum(sum) : 1);
  for (j = 0; j + VF_LANES <= M; j += VF_LANES)
    vf_store(out + j, finish_feature(vf_mul(vf_load(out + j), scale), FEATURE_FLOOR, round_bfloat16));
  if (j < M)
    vf_store_tail(out + j,
                  finish_feature(vf_mul(vf_load_tail(out + j, M - j, 0), scale), FEATURE_FLOOR, round_bfloat16), M - j);
}

static void hedgehog_row(int64_t M, const float *x, float *out, int normalise, int round_bfloat16) {
  vf high = vf_set1(x[0]), low = high;
  int64_t j = 0;
  for (; j + VF_LANES <= M; j += VF_LANES) {
    high = vf_max(high, vf_load(x + j));
    low = vf_min(low, vf_load(x + j));
  }
  if (j < M) {
    high = vf_max(high, vf_load_tail(x + j, M - j, x[0]));
    low = vf_min(low, vf_load_tail(x + j, M - j, x[0]));
  }
  exponentials(M, x, out, 1, vf_highest(high), normalise, round_bfloat16);
  exponentials(M, x, out + M, -1, vf_lowest(low), normalise, round_bfloat16);
}

ALWAYS_INLINE vf elementwise_feature(vf x, lola_map_kind kind, int round_bfloat16) {
  if (kind == LOLA_MAP_RELU) return finish_feature(x, FEATURE_FLOOR, round_bfloat16);
  vf e = exp_not_positive(vf_min(x, vf_zero()));
  return finish_feature(vf_if_positive(x, vf_add(x, vf_set1(1)), e), 0, round_bfloat16);
}

static void feature_rows(lola_map_kind kind, int64_t count, int64_t M, const float *x, int64_t ldx, float *out,
                         int64_t ldo, int round_bfloat16) {
  for (int64_t i = 0; i < count; i++, x += ldx, out += ldo) {
    if (kind == LOLA_MAP_HEDGEHOG || kind == LOLA_MAP_HEDGEHOG_EXP) {
      hedgehog_row(M, x, out, kind == LOLA_MAP_HEDGEHOG, round_bfloat16);
      continue;
    }
    int64_t j = 0;
    for (; j + VF_LANES <= M; j += VF_LANES)
      vf_store(out + j, elementwise_feature(vf_load(x + j), kind, round_bfloat16));
    if (j < M) vf_store_tail(out + j, elementwise_feature(vf_load_tail(x + j, M - j, 0), kind, round_bfloat16), M - j);
  }
}

/* --- row reductions -------------------------------------------------------------------------- */

static void dot_rows(int64_t count, int64_t n, const float *x, int64_t ld, const float *y, float *out) {
  for (int64_t i = 0; i < count; i++, x += ld) {
    vf sum = vf_zero();
    int64_t j = 0;
    for (; j + VF_LANES <= n; j += VF_LANES) sum = vf_fma(vf_load(x + j), vf_load(y + j), sum);
    if (j < n) sum = vf_fma(vf_load_tail(x + j, n - j, 0), vf_load_tail(y + j, n - j, 0), sum);
    out[i] = vf_sum(sum);
  }
}

ALWAYS_INLINE float square_row(int64_t n, const float *x) {
  vf sum = vf_zero();
  int64_t j = 0;
  for (; j + VF_LANES <= n; j += VF_LANES) {
    vf v = vf_load(x + j);
    sum = vf_fma(v, v, sum);
  }
  if (j < n) {
    vf v = vf_load_tail(x + j, n - j, 0);
    sum = vf_fma(v, v, sum);
  }
  return vf_sum(sum);
}

static void square_rows(int64_t count, int64_t n, const float *x, int64_t ld, float *out) {
  for (int64_t i = 0; i < count; i++) out[i] = square_row(n, x + i * ld);
}

static void recall_errors(int64_t count, int64_t n, const float *recalled, int64_t ldr, const float *z, const float *v,
                          int64_t ldv, float *out, int accumulate) {
  for (int64_t i = 0; i < count; i++, recalled += ldr, v += ldv) {
    float error;
    if (z[i] == 0) {
      error = square_row(n, v);
    } else {
      /* 1 / z overflows for a z near the smallest float: lift both sides first. */
      float lift = z[i] < 1e-30f ? 0x1p64f : 1;
      const vf up = vf_set1(lift), inverse = vf_set1(1 / (z[i] * lift));
      vf sum = vf_zero();
      int64_t j = 0;
      for (; j + VF_LANES <= n; j += VF_LANES) {
        vf d = vf_sub(vf_mul(vf_mul(vf_load(recalled + j), up), inverse), vf_load(v + j));
        sum = vf_fma(d, d, sum);
      }
      if (j < n) {
        vf d = vf_sub(vf_mul(vf_mul(vf_load_tail(recalled + j, n - j, 0), up), inverse), vf_load_tail(v + j, n - j, 0));
        sum = vf_fma(d, d, sum);
      }
      error = vf_sum(sum);
    }
    out[i] = accumulate ? out[i] + error : error;
  }
}

static void add_rows(int64_t count, int64_t n, const float *x, int64_t ld, float *sum) {
  for (int64_t i = 0; i < count; i++, x += ld)
    for (int64_t j = 0; j < n; j++) sum[j] += x[j];
}

/* --- softmax, a query per lane --------------------------------------------------------------- */

static void mask_row(float *s, int64_t width, const int32_t *position, int32_t from, int32_t until) {
  for (int64_t j = 0; j < width; j += VF_LANES)
    vf_store(s + j, vf_keep_between(vf_load(s + j), position + j, from, until));
}

ALWAYS_INLINE void softmax_lanes(const int VECTORS, int64_t keys, float *s, float *m, float *l, float *alpha) {
  vf high[4], sum[4];
#pragma GCC unroll 4
  for (int j = 0; j < VECTORS; j++) high[j] = vf_load(m + j * VF_LANES);
  for (int64_t i = 0; i < keys; i++)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) high[j] = vf_max(high[j], vf_load(s + i * LOLA_PANEL + j * VF_LANES));
#pragma GCC unroll 4
  for (int j = 0; j < VECTORS; j++) {
    vf old = vf_load(m + j * VF_LANES);
    vf_store(m + j * VF_LANES, high[j]);
    /* A lane that has seen no key yet keeps -inf; the lowest float stands in so that -inf - it stays -inf. */
    high[j] = vf_max(high[j], vf_set1(-3e38f));
    vf shrink = exp2_not_positive(vf_sub(old, high[j]));
    vf_store(alpha + j * VF_LANES, shrink);
    sum[j] = vf_mul(vf_load(l + j * VF_LANES), shrink);
  }
  for (int64_t i = 0; i < keys; i++)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
      vf p = exp2_not_positive(vf_sub(vf_load(s + i * LOLA_PANEL + j * VF_LANES), high[j]));
      vf_store(s + i * LOLA_PANEL + j * VF_LANES, p);
      sum[j] = vf_add(sum[j], p);
    }
#pragma GCC unroll 4
  for (int j = 0; j < VECTORS; j++) vf_store(l + j * VF_LANES, sum[j]);
}

static void softmax_step(int64_t keys, int64_t width, float *s, float *m, float *l, float *alpha) {
  int64_t j = 0;
  for (; j + 4 * VF_LANES <= width; j += 4 * VF_LANES) softmax_lanes(4, keys, s + j, m + j, l + j, alpha + j);
  for (; j < width; j += VF_LANES) softmax_lanes(1, keys, s + j, m + j, l + j, alpha + j);
}

static void weigh_rows(int64_t keys, int64_t width, const float *s, const float *m, const float *weight,
                       float *received) {
  for (int64_t i = 0; i < keys; i++, s += LOLA_PANEL) {
    vf sum = vf_zero();
    for (int64_t j = 0; j < width; j += VF_LANES)
      sum = vf_fma(exp2_not_positive(vf_sub(vf_load(s + j), vf_load(m + j))), vf_load(weight + j), sum);
    received[i] += vf_sum(sum);
  }
}

static void scale_rows(int64_t count, int64_t n, float *x, int64_t ld, const float *alpha) {
  for (int64_t i = 0; i < count; i++, x += ld) {
    if (alpha[i] == 1) continue;
    for (int64_t j = 0; j < n; j++) x[j] *= alpha[i];
  }
}

static void mix_row(int64_t n, float *out, float a, const float *x, float b, const float *y) {
  if (y)
    for (int64_t j = 0; j < n; j++) out[j] = a * x[j] + b * y[j];
  else
    for (int64_t j = 0; j < n; j++) out[j] = a * x[j];
}

/* --- decoding -------------------------------------------------------------------------------- */

/* Four keys at a time against HEADS queries: each loaded query serves four keys, and four sums are added up together.
 * A last tile of fewer keys repeats the last one. */
ALWAYS_INLINE void dot_keys_of(const int HEADS, lola_dtype dtype, int64_t count, const char *const *key, int64_t n,
                               const float *q, int64_t ldq, float *s, int64_t lds) {
  vf sum[4][4];
#pragma GCC unroll 4
  for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum[h][i] = vf_zero();
  int64_t j = 0;
  for (; j + VF_LANES <= n; j += VF_LANES) {
    vf x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) x[i] = load_as(key[i], j, dtype);
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++) {
      vf y = vf_load(q + h * ldq + j);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) sum[h][i] = vf_fma(x[i], y, sum[h][i]);
    }
  }
  if (j < n) {
    vf x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) x[i] = load_tail_as(key[i], j, dtype, n - j);
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++) {
      vf y = vf_load_tail(q + h * ldq + j, n - j, 0);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) sum[h][i] = vf_fma(x[i], y, sum[h][i]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < HEADS; h++) {
    float sums[4];
    vf_sum4(sums, sum[h][0], sum[h][1], sum[h][2], sum[h][3]);
    if (count == 4)
      memcpy(s + h * lds, sums, sizeof sums);
    else
      for (int64_t i = 0; i < count; i++) s[h * lds + i] = sums[i];
  }
}

ALWAYS_INLINE void dot_keys_as(lola_dtype dtype, int64_t heads, int64_t keys, int64_t n, const float *q, int64_t ldq,
                               const void *k, int64_t ldk, float *s, int64_t lds) {
  const int64_t stride = ldk * (int64_t)width_of(dtype), bytes = n * (int64_t)width_of(dtype);
  for (int64_t i = 0; i < keys; i += 4) {
    const int64_t count = keys - i < 4 ? keys - i : 4;
    const char *key[4];
    for (int64_t j = 0; j < 4; j++) {
      key[j] = (const char *)k + (i + (j < count ? j : count - 1)) * stride;
      ask_for(key[j] + STREAM_AHEAD, bytes);
    }
    int64_t h = 0;
    for (; h + DOT_HEADS <= heads; h += DOT_HEADS)
      dot_keys_of(DOT_HEADS, dtype, count, key, n, q + h * ldq, ldq, s + h * lds + i, lds);
    for (; h < heads; h++) dot_keys_of(1, dtype, count, key, n, q + h * ldq, ldq, s + h * lds + i, lds);
  }
}

static void dot_keys(int64_t heads, int64_t keys, int64_t n, const float *q, int64_t ldq, const void *k,
                     lola_dtype dtype, int64_t ldk, float *s, int64_t lds) {
  switch (dtype) {
  case LOLA_FLOAT32:
    dot_keys_as(LOLA_FLOAT32, heads, keys, n, q, ldq, k, ldk, s, lds);
    break;
  case LOLA_FLOAT16:
    dot_keys_as(LOLA_FLOAT16, heads, keys, n, q, ldq, k, ldk, s, lds);
    break;
  case LOLA_BFLOAT16:
    dot_keys_as(LOLA_BFLOAT16, heads, keys, n, q, ldq, k, ldk, s, lds);
    break;
  }
}

static void add_values(int64_t heads, int64_t keys, int64_t n, const float *s, int64_t lds, const void *v,
                       lola_dtype dtype, int64_t ldv, float *o, int64_t ldo) {
  switch (dtype) {
  case LOLA_FLOAT32:
    few_rows(heads, n, keys, s, lds, 1, v, ldv, o, ldo, 1);
    break;
  case LOLA_FLOAT16:
    few_rows_as(LOLA_FLOAT16, heads, n, keys, s, lds, 1, v, ldv, o, ldo);
    break;
  case LOLA_BFLOAT16:
    few_rows_as(LOLA_BFLOAT16, heads, n, keys, s, lds, 1, v, ldv, o, ldo);
    break;
  }
}

static float softmax_row(int64_t keys, float *s, float *m, float *l) {
  vf high = vf_set1(*m);
  int64_t j = 0;
  for (; j + VF_LANES <= keys; j += VF_LANES) high = vf_max(high, vf_load(s + j));
  if (j < keys) high = vf_max(high, vf_load_tail(s + j, keys - j, -INFINITY));
  float highest = vf_highest(high);
  float old = *m;
  *m = highest;
  const vf shift = vf_set1(highest);
  float lanes[VF_LANES];
  vf_store(lanes, exp2_not_positive(vf_set1(old - highest)));
  float alpha = lanes[0];
  vf sum = vf_zero();
  for (j = 0; j + VF_LANES <= keys; j += VF_LANES) {
    vf p = exp2_not_positive(vf_sub(vf_load(s + j), shift));
    vf_store(s + j, p);
    sum = vf_add(sum, p);
  }
  if (j < keys) {
    vf_store_tail(s + j, exp2_not_positive(vf_sub(vf_load_tail(s + j, keys - j, -INFINITY), shift)), keys - j);
    sum = vf_add(sum, vf_load_tail(s + j, keys - j, 0));
  }
  *l = *l * alpha + vf_sum(sum);
  return alpha;
}

const lola_kernels LOLA_KERNELS = {
    .name = LOLA_KERNELS_NAME,
    .lanes = VF_LANES,
    .gemm = gemm,
    .load_rows = load_rows,
    .store_row = store_row,
    .all_finite = all_finite,
    .feature_rows = feature_rows,
    .dot_rows = dot_rows,
    .square_rows = square_rows,
    .recall_errors = recall_errors,
    .add_rows = add_rows,
    .mask_row = mask_row,
    .softmax_step = softmax_step,
    .weigh_rows = weigh_rows,
    .scale_rows = scale_rows,
    .mix_row = mix_row,
    .dot_keys = dot_keys,
    .add_values = add_values,
    .softmax_row = softmax_row,
};
