/* features: phi(x) for Hedgehog (arXiv 2402.04347, LoLCATs' softmax_dim and exp_dim), 1 + elu and relu maps.
 * float32 throughout; beside 16-bit keys the result is rounded to bfloat16, so that matrix units see exact operands. */
#include "cpu/pool.h"
#include "cpu/steps.h"

static const float *weights(const lola_feature_map *map, int side_key) { return side_key ? map->w_k : map->w_q; }

int64_t lola_map_columns(const lola_feature_map *map, int side_key, int64_t F) {
  if (!weights(map, side_key)) return 0;
  return map->kind == LOLA_MAP_RELU ? F : F / 2;
}

void lola_map_rows(const lola_kernels *kernels, const lola_feature_map *map, int side_key, int64_t head, int64_t count,
                   int64_t D, int64_t F, const float *x, int64_t ldx, float *projection, float *out, int64_t ldo,
                   int round_bfloat16) {
  int64_t M = lola_map_columns(map, side_key, F);
  if (!M) {
    kernels->feature_rows(map->kind, count, F, x, ldx, out, ldo, round_bfloat16);
    return;
  }
  const float *w = weights(map, side_key) + head * D * M;
  for (int64_t i = 0; i < count; i += LOLA_ROWS) {
    int64_t n = count - i < LOLA_ROWS ? count - i : LOLA_ROWS;
    kernels->gemm(n, M, D, x + i * ldx, ldx, 1, w, M, projection, M, 0);
    kernels->feature_rows(map->kind, n, M, projection, M, out + i * ldo, ldo, round_bfloat16);
  }
}

typedef struct {
  const lola_kernels *kernels;
  const lola_array *x;
  const lola_feature_map *map;
  int64_t T, Hx, D, Hq, F;
  int side_key;
  float *out;
  struct {
    float *x, *projection;
    const void **rows;
  } scratch[LOLA_MAX_THREADS];
} features_job;

/* One task: up to LOLA_ROWS tokens of one head. */
static void features_task(void *context, int64_t index, int worker) {
  features_job *job = context;
  int64_t parts = (job->T + LOLA_ROWS - 1) / LOLA_ROWS;
  int64_t h = index % job->Hq, part = index / job->Hq % parts, b = index / job->Hq / parts;
  int64_t first = part * LOLA_ROWS, n = job->T - first < LOLA_ROWS ? job->T - first : LOLA_ROWS;
  float *x = job->scratch[worker].x;
  for (int64_t i = 0; i < n; i++) job->scratch[worker].rows[i] = lola_at(job->x, b, first + i, h / (job->Hq / job->Hx));
  job->kernels->load_rows(x, job->D, job->scratch[worker].rows, job->x->dtype, n, job->D, 1);
  lola_map_rows(job->kernels, job->map, job->side_key, h, n, job->D, job->F, x, job->D, job->scratch[worker].projection,
                job->out + ((b * job->T + first) * job->Hq + h) * job->F, job->Hq * job->F,
                job->x->dtype != LOLA_FLOAT32);
}

lola_status lola_cpu_features(const lola_array *x, int64_t B, int64_t T, int64_t Hx, int64_t D, int64_t Hq, int64_t F,
                              const lola_feature_map *map, int side_key, float *out, lola_message *message) {
  features_job job = {lola_cpu_kernels(), x, map, T, Hx, D, Hq, F, side_key, out, {{0}}};
  int64_t tasks = B * Hq * ((T + LOLA_ROWS - 1) / LOLA_ROWS);
  int width = lola_pool_width(tasks);
  lola_scratch scratch = {0};
  for (int pass = 0; pass < 2; pass++) {
    for (int i = 0; i < width; i++) {
      job.scratch[i].x = lola_scratch_take(&scratch, LOLA_ROWS * D, sizeof(float));
      job.scratch[i].projection =
          lola_scratch_take(&scratch, LOLA_ROWS * lola_map_columns(map, side_key, F), sizeof(float));
      job.scratch[i].rows = lola_scratch_take(&scratch, LOLA_ROWS, sizeof(void *));
    }
    lola_status status = pass ? LOLA_OK : lola_scratch_open(&scratch, message);
    if (status) return status;
  }
  lola_pool_run(tasks, width, features_task, &job);
  lola_scratch_close(&scratch);
  return LOLA_OK;
}
