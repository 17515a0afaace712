/* attend: softmax over window and sparse pairs, mixed with the linear term (Eq. 14).
 *
 * S^T = K Q^T with a query per lane, so the softmax runs lane-wise and S^T is already the broadcast operand of P V.
 * Pairs are gathered and widened to float32 once per block of queries, KEYS at a time, with an online softmax between.
 * Scores carry a factor log2(e) in Q, so the exponential is a power of two. */
#include <math.h>
#include <string.h>

#include "cpu/pool.h"
#include "cpu/steps.h"

enum { KEYS = 128 };
static const float LOG2E = 0x1.715476p+0f;

static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

static int64_t panels_of(int64_t tokens, int64_t heads) { return (tokens * heads + LOLA_PANEL - 1) / LOLA_PANEL; }

void lola_attend_scratch_take(lola_scratch *scratch, lola_attend_scratch *pieces, int64_t tokens, int64_t heads,
                              int64_t D, int64_t Dv) {
  int64_t rows = panels_of(tokens, heads) * LOLA_PANEL;
  pieces->q = lola_scratch_take(scratch, rows * D, sizeof(float));
  pieces->k = lola_scratch_take(scratch, KEYS * D, sizeof(float));
  pieces->v = lola_scratch_take(scratch, KEYS * padded(Dv), sizeof(float));
  pieces->s = lola_scratch_take(scratch, KEYS * LOLA_PANEL, sizeof(float));
  pieces->o = lola_scratch_take(scratch, rows * padded(Dv), sizeof(float));
  pieces->m = lola_scratch_take(scratch, rows, sizeof(float));
  pieces->l = lola_scratch_take(scratch, rows, sizeof(float));
  pieces->alpha = lola_scratch_take(scratch, LOLA_PANEL, sizeof(float));
  pieces->x = lola_scratch_take(scratch, 4 * (D > Dv ? D : Dv), sizeof(float));
  pieces->position = lola_scratch_take(scratch, rows, sizeof(int32_t));
  pieces->rows = lola_scratch_take(scratch, KEYS, sizeof(void *));
}

lola_weights lola_mix(lola_mixing mixing, float gate, float m, float l, float z) {
  lola_weights w = {0, 0, 0};
  if (mixing == LOLA_MIXING_CACHE_ONLY || !(z > 0)) {
    w.softmax = l > 0 ? 1 / l : 0;
    return w;
  }
  if (mixing == LOLA_MIXING_LOLCATS) {
    float sum = gate * l + z;
    w = (lola_weights){gate / sum, 1 / sum, z / sum};
    return w;
  }
  /* The state is one more pair of logit log z (+ log((1-g)/g)) and value N / z. */
  float logit = log2f(z);
  if (mixing == LOLA_MIXING_GATED) logit += log2f((1 - gate) / gate);
  float high = m > logit ? m : logit;
  float softmax = exp2f(m - high), linear = exp2f(logit - high);
  float sum = softmax * l + linear;
  w = (lola_weights){softmax / sum, linear / sum / z, linear / sum};
  return w;
}

/* Q of one panel, scaled, a query per lane: q[d LOLA_PANEL + lane]. Lanes past the last query repeat zeros. */
static void pack_queries(const lola_kernels *kernels, const lola_block *block, int64_t first, int64_t rows,
                         int64_t width, float *q, float *x) {
  int64_t D = block->D;
  for (int64_t lane = 0; lane < width; lane += 4) {
    const void *from[4];
    int64_t n = rows - lane < 4 ? rows - lane : 4;
    if (n < 4) memset(x, 0, (size_t)(4 * D) * sizeof(float));
    for (int64_t i = 0; i < n; i++)
      from[i] = lola_at(&block->q, 0, (first + lane + i) / block->heads, (first + lane + i) % block->heads);
    if (n > 0) kernels->load_rows(x, D, from, block->q.dtype, n, D, block->scale * LOG2E);
    for (int64_t d = 0; d < D; d++)
      for (int64_t i = 0; i < 4; i++) q[d * LOLA_PANEL + lane + i] = x[i * D + d];
  }
}

static lola_weights row_weights(const lola_block *block, int64_t row, const lola_attend_scratch *scratch) {
  int64_t head = row % block->heads;
  float z = block->z ? block->z[row / block->heads * block->linear_stride + head] : 0;
  return lola_mix(block->mixing, block->gate ? block->gate[head] : 0, scratch->m[row], scratch->l[row], z);
}

static void finish_row(const lola_kernels *kernels, const lola_block *block, int64_t row, const float *o,
                       const lola_attend_scratch *scratch) {
  int64_t token = row / block->heads, head = row % block->heads;
  lola_weights w = row_weights(block, row, scratch);
  const float *recalled = w.linear != 0 ? block->recalled + (token * block->linear_stride + head) * block->Dv : NULL;
  kernels->mix_row(block->Dv, scratch->x, w.softmax, o, w.linear, recalled);
  kernels->store_row(lola_at(&block->out, 0, token, head), block->out.dtype, scratch->x, block->Dv);
  if (block->share.data) *(float *)lola_at(&block->share, 0, token, head) = w.share;
}

/* Loads keys, and values too when `values`, of pairs keys[0 .. count) into scratch. */
static void load_block_pairs(const lola_kernels *kernels, const lola_block *block, const lola_key *keys, int64_t count,
                             int values, const lola_attend_scratch *scratch) {
  for (int64_t i = 0; i < count; i++) scratch->rows[i] = keys[i].k;
  kernels->load_rows(scratch->k, block->D, scratch->rows, block->dtype, count, block->D, 1);
  if (!values) return;
  for (int64_t i = 0; i < count; i++) scratch->rows[i] = keys[i].v;
  kernels->load_rows(scratch->v, padded(block->Dv), scratch->rows, block->dtype, count, block->Dv, 1);
}

/* A panel: up to LOLA_PANEL of the block's rows (query, head). */
typedef struct {
  int64_t first, rows, width;
} panel_t;

static panel_t panel_at(const lola_kernels *kernels, int64_t rows, int64_t index) {
  int64_t first = index * LOLA_PANEL, n = rows - first < LOLA_PANEL ? rows - first : LOLA_PANEL;
  int64_t lanes = kernels->lanes < 4 ? 4 : kernels->lanes; /* pack_queries works on four rows */
  return (panel_t){first, n, (n + lanes - 1) / lanes * lanes};
}

/* S^T of a panel over `count` loaded pairs, -inf where a query does not see a pair. Returns how many pairs, from the
 * first on, any of its queries can see. */
static int64_t score_panel(const lola_kernels *kernels, const lola_block *block, const lola_key *keys, int64_t count,
                           panel_t panel, const lola_attend_scratch *scratch) {
  const int32_t *position = scratch->position + panel.first;
  int32_t earliest = position[0], latest = position[panel.rows - 1];
  while (count && keys[count - 1].from > latest) count--;
  kernels->gemm(count, panel.width, block->D, scratch->k, block->D, 1, scratch->q + panel.first * block->D, LOLA_PANEL,
                scratch->s, LOLA_PANEL, 0);
  for (int64_t i = 0; i < count; i++)
    if (keys[i].from > earliest || keys[i].until <= latest)
      kernels->mask_row(scratch->s + i * LOLA_PANEL, panel.width, position, keys[i].from, keys[i].until);
  return count;
}

/* With every query's maximum and sum known, adds up what each pair received. */
static void weigh_pairs(const lola_kernels *kernels, const lola_block *block, const lola_attend_scratch *scratch) {
  int64_t rows = block->tokens * block->heads;
  for (int64_t at = 0; at < block->key_count; at += KEYS) {
    int64_t count = block->key_count - at < KEYS ? block->key_count - at : KEYS;
    load_block_pairs(kernels, block, block->keys + at, count, 0, scratch);
    for (int64_t p = 0; p < panels_of(block->tokens, block->heads); p++) {
      panel_t panel = panel_at(kernels, rows, p);
      int64_t seen = score_panel(kernels, block, block->keys + at, count, panel, scratch);
      for (int64_t i = 0; i < panel.width; i++)
        scratch->alpha[i] = i < panel.rows ? row_weights(block, panel.first + i, scratch).softmax : 0;
      kernels->weigh_rows(seen, panel.width, scratch->s, scratch->m + panel.first, scratch->alpha,
                          block->received + at);
    }
  }
}

void lola_attend_block(const lola_kernels *kernels, const lola_block *block, const lola_attend_scratch *scratch) {
  const int64_t D = block->D, Dvp = padded(block->Dv), rows = block->tokens * block->heads;
  const int64_t panels = panels_of(block->tokens, block->heads);
  for (int64_t p = 0; p < panels; p++) {
    panel_t panel = panel_at(kernels, rows, p);
    pack_queries(kernels, block, panel.first, panel.rows, panel.width, scratch->q + panel.first * D, scratch->x);
    for (int64_t i = panel.first; i < panel.first + LOLA_PANEL; i++) {
      scratch->m[i] = -INFINITY;
      scratch->l[i] = 0;
      scratch->position[i] = (int32_t)((i < rows ? i : rows - 1) / block->heads);
    }
  }
  memset(scratch->o, 0, (size_t)(rows * Dvp) * sizeof(float));
  for (int64_t at = 0; at < block->key_count; at += KEYS) {
    int64_t count = block->key_count - at < KEYS ? block->key_count - at : KEYS;
    load_block_pairs(kernels, block, block->keys + at, count, 1, scratch);
    for (int64_t p = 0; p < panels; p++) {
      panel_t panel = panel_at(kernels, rows, p);
      float *o = scratch->o + panel.first * Dvp;
      int64_t seen = score_panel(kernels, block, block->keys + at, count, panel, scratch);
      if (!seen) continue;
      kernels->softmax_step(seen, panel.width, scratch->s, scratch->m + panel.first, scratch->l + panel.first,
                            scratch->alpha);
      kernels->scale_rows(panel.rows, Dvp, o, Dvp, scratch->alpha);
      kernels->gemm(panel.rows, Dvp, seen, scratch->s, 1, LOLA_PANEL, scratch->v, Dvp, o, Dvp, 1);
    }
  }
  for (int64_t i = 0; i < rows; i++) finish_row(kernels, block, i, scratch->o + i * Dvp, scratch);
  if (block->received) weigh_pairs(kernels, block, scratch);
}

/* --- lola_cpu_attend: one set of pairs per batch row and head set ------------------------------ */

typedef struct {
  const lola_kernels *kernels;
  const lola_attend_call *call;
  int64_t blocks;
  struct {
    lola_attend_scratch attend;
    lola_key *keys;
    float *q, *projected, *recalled, *z;
    const void **rows;
  } scratch[LOLA_MAX_THREADS];
} attend_job;

static void attend_task(void *context, int64_t index, int worker) {
  attend_job *job = context;
  const lola_attend_call *call = job->call;
  const lola_kernels *kernels = job->kernels;
  int64_t set = index % call->Hs, part = index / call->Hs % job->blocks, b = index / call->Hs / job->blocks;
  int64_t heads = call->Hq / call->Hs, first = part * LOLA_BLOCK, F = call->F, Dv = call->Dv;
  int64_t tokens = call->T - first < LOLA_BLOCK ? call->T - first : LOLA_BLOCK;
  int64_t valid = call->count ? call->count[b * call->Hs + set] : call->S;
  lola_key *keys = job->scratch[worker].keys;
  int64_t count = 0;
  for (int64_t j = 0; j < valid; j++) {
    int64_t from = call->causal ? j - (call->S - call->T) - first : 0;
    if (from >= tokens) break;
    keys[count++] = (lola_key){lola_at(&call->k, b, j, set), lola_at(&call->v, b, j, set), from > 0 ? (int32_t)from : 0,
                               LOLA_ALWAYS};
  }
  lola_block block = {.tokens = tokens,
                      .heads = heads,
                      .D = call->D,
                      .Dv = Dv,
                      .dtype = call->k.dtype,
                      .q = call->q,
                      .out = call->out,
                      .keys = keys,
                      .key_count = count,
                      .linear_stride = heads,
                      .gate = call->gate ? call->gate + set * heads : NULL,
                      .mixing = call->mixing,
                      .scale = call->scale};
  block.q.data = lola_at(&call->q, b, first, set * heads);
  block.out.data = lola_at(&call->out, b, first, set * heads);
  if (call->q_features.data && call->mixing != LOLA_MIXING_CACHE_ONLY) {
    float *fq = job->scratch[worker].q, *z = job->scratch[worker].z, *recalled = job->scratch[worker].recalled;
    for (int64_t h = 0; h < heads; h++) {
      int64_t head = b * call->Hq + set * heads + h;
      for (int64_t t = 0; t < tokens; t++)
        job->scratch[worker].rows[t] = lola_at(&call->q_features, b, first + t, set * heads + h);
      kernels->load_rows(fq, F, job->scratch[worker].rows, call->q_features.dtype, tokens, F, 1);
      kernels->gemm(tokens, Dv, F, fq, F, 1, call->hidden + head * F * Dv, Dv, recalled + h * Dv, heads * Dv, 0);
      kernels->dot_rows(tokens, F, fq, F, call->normalizer + head * F, job->scratch[worker].projected);
      for (int64_t t = 0; t < tokens; t++) z[t * heads + h] = job->scratch[worker].projected[t];
    }
    block.recalled = recalled;
    block.z = z;
  }
  lola_attend_block(kernels, &block, &job->scratch[worker].attend);
}

lola_status lola_cpu_attend(const lola_attend_call *call, lola_message *message) {
  attend_job job = {.kernels = lola_cpu_kernels(), .call = call, .blocks = (call->T + LOLA_BLOCK - 1) / LOLA_BLOCK};
  int64_t tasks = call->B * call->Hs * job.blocks, heads = call->Hq / call->Hs;
  int64_t linear = call->q_features.data ? LOLA_BLOCK : 0;
  int width = lola_pool_width(tasks);
  lola_scratch scratch = {0};
  for (int pass = 0; pass < 2; pass++) {
    for (int i = 0; i < width; i++) {
      lola_attend_scratch_take(&scratch, &job.scratch[i].attend, LOLA_BLOCK, heads, call->D, call->Dv);
      job.scratch[i].keys = lola_scratch_take(&scratch, call->S, sizeof(lola_key));
      job.scratch[i].q = lola_scratch_take(&scratch, linear * call->F, sizeof(float));
      job.scratch[i].projected = lola_scratch_take(&scratch, linear, sizeof(float));
      job.scratch[i].recalled = lola_scratch_take(&scratch, linear * heads * call->Dv, sizeof(float));
      job.scratch[i].z = lola_scratch_take(&scratch, linear * heads, sizeof(float));
      job.scratch[i].rows = lola_scratch_take(&scratch, LOLA_BLOCK, sizeof(void *));
    }
    lola_status status = pass ? LOLA_OK : lola_scratch_open(&scratch, message);
    if (status) return status;
  }
  lola_pool_run(tasks, width, attend_task, &job);
  lola_scratch_close(&scratch);
  return LOLA_OK;
}
