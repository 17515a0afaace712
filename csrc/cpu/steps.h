/* The five steps on float32 rows in scratch, shared by the prefill scan, decoding and lola.kernels.
 * Each public lola_cpu_<step> in the same file is that step on a caller's arrays. */
#ifndef LOLA_CPU_STEPS_H
#define LOLA_CPU_STEPS_H

#include "core/message.h"
#include "core/schedule.h"
#include "cpu/isa/kernels.h"
#include "cpu/scratch.h"

/* Rows that go through a matrix product at a time: enough to use the registers, few enough for the L1 cache. */
enum { LOLA_ROWS = 96 };

static inline int64_t lola_item_size(lola_dtype dtype) { return dtype == LOLA_FLOAT32 ? 4 : 2; }

static inline void *lola_at(const lola_array *array, int64_t b, int64_t t, int64_t h) {
  return (char *)array->data +
         (b * array->stride_b + t * array->stride_t + h * array->stride_h) * lola_item_size(array->dtype);
}

/* --- features: phi(x) --- */

/* Columns of the projection xW, and so of the scratch that lola_map_rows needs per row; 0: no projection. */
int64_t lola_map_columns(const lola_feature_map *map, int side_key, int64_t F);
/* x (count, D) float32 -> out (count, F) with `head`'s weights. projection: (LOLA_ROWS, columns) scratch. */
void lola_map_rows(const lola_kernels *kernels, const lola_feature_map *map, int side_key, int64_t head, int64_t count,
                   int64_t D, int64_t F, const float *x, int64_t ldx, float *projection, float *out, int64_t ldo,
                   int round_bfloat16);

/* --- score: SRE, Eq. 10 --- */

/* out[i] = or += || phi_i^T H / (phi_i^T s) - v_i ||^2. recalled: (LOLA_ROWS, Dv + 1) scratch. */
void lola_recall_scores(const lola_kernels *kernels, int64_t count, int64_t F, int64_t Dv, const float *fk,
                        const float *v, int64_t ldv, const float *H, const float *s, float *recalled, float *out,
                        int accumulate);

/* --- select --- */

/* A key that orders as the score does: -0 equals +0, NaN is highest. */
uint64_t lola_score_key(float score);
/* dropped[i] = 1 for the `drops` lowest keys, ties to the later position; 0 for the rest. */
void lola_mark_dropped(int64_t count, const uint64_t *keys, const int64_t *positions, int64_t drops, uint8_t *dropped);

/* --- fold: Eq. 12 --- */

/* H += sum_i phi_i v_i^T, s += sum_i phi_i, in ascending i. */
void lola_fold_rows(const lola_kernels *kernels, int64_t count, int64_t F, int64_t Dv, const float *fk, const float *v,
                    int64_t ldv, float *H, float *s);

/* --- attend: Eq. 14 --- */

/* A pair that queries from <= i < until of a block see. */
typedef struct lola_key {
  const void *k, *v;
  int32_t from, until;
} lola_key;

enum { LOLA_ALWAYS = INT32_MAX };

/* Up to LOLA_BLOCK queries of `heads` heads that see the same pairs. Pairs whose `from` is past the first query come
 * last, in ascending order of it. */
typedef struct lola_block {
  int64_t tokens, heads, D, Dv;
  lola_dtype dtype;         /* of the pairs */
  lola_array q, out, share; /* of the block's first query and head; share.data may be NULL */
  const lola_key *keys;
  int64_t key_count;
  /* N = phi(q)^T H at recalled[(token * linear_stride + head) * Dv], z = phi(q)^T s at z[token * linear_stride + head];
   * NULL: no linear term. */
  const float *recalled, *z;
  int64_t linear_stride;
  const float *gate; /* of the block's first head */
  lola_mixing mixing;
  float scale;
  float *received; /* (key_count,) += the weight each pair gets from these queries; may be NULL */
} lola_block;

typedef struct lola_attend_scratch {
  float *q, *k, *v, *s, *o, *m, *l, *alpha, *x;
  int32_t *position;
  const void **rows;
} lola_attend_scratch;

void lola_attend_scratch_take(lola_scratch *scratch, lola_attend_scratch *pieces, int64_t tokens, int64_t heads,
                              int64_t D, int64_t Dv);
void lola_attend_block(const lola_kernels *kernels, const lola_block *block, const lola_attend_scratch *scratch);

/* How a query's softmax sums (maximum m in base 2, sum l) and linear sums combine: out = softmax O + linear N. */
typedef struct lola_weights {
  float softmax, linear, share;
} lola_weights;
lola_weights lola_mix(lola_mixing mixing, float gate, float m, float l, float z);

#endif
