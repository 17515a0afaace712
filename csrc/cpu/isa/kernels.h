/* The inner loops that exist once per instruction set. The drivers in cpu/ call them through this table.
 *
 * All arithmetic is float32. An element's bits depend on its own operands in a fixed order, never on where in a tile
 * or batch it was computed: the invariants on cutting, batching and threads rest on that. No fast-math. */
#ifndef LOLA_CPU_ISA_KERNELS_H
#define LOLA_CPU_ISA_KERNELS_H

#include "lola/lola.h"

enum { LOLA_PANEL = 64 }; /* query rows of one attention panel; the leading dimension of its scores */

typedef struct lola_kernels {
  const char *name;
  int lanes; /* floats in a vector; divides LOLA_PANEL */

  /* c (M, N) = or += A b with A(m, k) = a[m am + k ak], b (K, N) with leading dimension ldb, k in ascending order. */
  void (*gemm)(int64_t M, int64_t N, int64_t K, const float *a, int64_t am, int64_t ak, const float *b, int64_t ldb,
               float *c, int64_t ldc, int accumulate);

  /* to[i ld + j] = rows[i][j] * factor as float32 for j < n; j from n to ld - 1 become 0. */
  void (*load_rows)(float *to, int64_t ld, const void *const *rows, lola_dtype dtype, int64_t count, int64_t n,
                    float factor);
  void (*store_row)(void *to, lola_dtype dtype, const float *from, int64_t n);
  int (*all_finite)(const void *x, lola_dtype dtype, int64_t n, int not_negative);

  /* phi: x (count, M) is the projection xW, or x itself; out (count, F). */
  void (*feature_rows)(lola_map_kind kind, int64_t count, int64_t M, const float *x, int64_t ldx, float *out,
                       int64_t ldo, int round_bfloat16);

  /* out[i] = x_i . y over n; out[i] = |x_i|^2. */
  void (*dot_rows)(int64_t count, int64_t n, const float *x, int64_t ld, const float *y, float *out);
  void (*square_rows)(int64_t count, int64_t n, const float *x, int64_t ld, float *out);
  /* out[i] = or += | recalled_i / z_i - v_i |^2, and |v_i|^2 where z_i = 0. */
  void (*recall_errors)(int64_t count, int64_t n, const float *recalled, int64_t ldr, const float *z, const float *v,
                        int64_t ldv, float *out, int accumulate);
  /* sum[j] += x_ij over i in ascending order. */
  void (*add_rows)(int64_t count, int64_t n, const float *x, int64_t ld, float *sum);

  /* Scores in base 2, s (keys, LOLA_PANEL), a query per lane, `width` lanes in use (a multiple of `lanes`). */
  /* s[lane] = -inf unless from <= position[lane] < until. */
  void (*mask_row)(float *s, int64_t width, const int32_t *position, int32_t from, int32_t until);
  /* One online softmax step: s becomes 2^(s - m'), m the new maximum, l its sum, alpha what older terms shrink by. */
  void (*softmax_step)(int64_t keys, int64_t width, float *s, float *m, float *l, float *alpha);
  /* received[i] += sum over lanes of weight[lane] 2^(s[i, lane] - m[lane]). */
  void (*weigh_rows)(int64_t keys, int64_t width, const float *s, const float *m, const float *weight, float *received);
  /* x_i *= alpha_i over n. */
  void (*scale_rows)(int64_t count, int64_t n, float *x, int64_t ld, const float *alpha);
  /* out = a x + b y (y may be NULL). */
  void (*mix_row)(int64_t n, float *out, float a, const float *x, float b, const float *y);

  /* Decoding: s[h lds + i] = q_h . k_i for `heads` float32 queries and `keys` rows of any dtype. */
  void (*dot_keys)(int64_t heads, int64_t keys, int64_t n, const float *q, int64_t ldq, const void *k, lola_dtype dtype,
                   int64_t ldk, float *s, int64_t lds);
  /* o[h ldo + j] += sum over i, in ascending order, of s[h lds + i] v_i[j], for `keys` rows of any dtype. */
  void (*add_values)(int64_t heads, int64_t keys, int64_t n, const float *s, int64_t lds, const void *v,
                     lola_dtype dtype, int64_t ldv, float *o, int64_t ldo);
  /* The softmax step for one query whose scores lie along the vector. Returns alpha. */
  float (*softmax_row)(int64_t keys, float *s, float *m, float *l);
} lola_kernels;

extern const lola_kernels lola_kernels_scalar;
#ifdef LOLA_HAVE_AVX2
extern const lola_kernels lola_kernels_avx2;
#endif
#ifdef LOLA_HAVE_AVX512
extern const lola_kernels lola_kernels_avx512;
#endif
#ifdef LOLA_HAVE_NEON
extern const lola_kernels lola_kernels_neon;
#endif

/* The table in use (isa.c). */
const lola_kernels *lola_cpu_kernels(void);

#endif
