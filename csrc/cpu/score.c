/* score: self-recall error, how badly the hidden state recalls a pair (Eq. 10):
 * SRE(k, v | H, s) = || phi(k)^T H / (phi(k)^T s) - v ||^2, and ||v||^2 where phi(k)^T s = 0. */
#include "cpu/pool.h"
#include "cpu/steps.h"

void lola_recall_scores(const lola_kernels *kernels, int64_t count, int64_t F, int64_t Dv, const float *fk,
                        const float *v, int64_t ldv, const float *H, const float *s, float *recalled, float *out,
                        int accumulate) {
  float *z = recalled + LOLA_ROWS * Dv;
  for (int64_t i = 0; i < count; i += LOLA_ROWS) {
    int64_t n = count - i < LOLA_ROWS ? count - i : LOLA_ROWS;
    kernels->gemm(n, Dv, F, fk + i * F, F, 1, H, Dv, recalled, Dv, 0);
    kernels->dot_rows(n, F, fk + i * F, F, s, z);
    kernels->recall_errors(n, Dv, recalled, Dv, z, v + i * ldv, ldv, out + i, accumulate);
  }
}

typedef struct {
  const lola_kernels *kernels;
  const lola_array *fk, *v;
  const float *H, *s;
  int64_t S, Hq, Hs, F, Dv;
  float *out;
  struct {
    float *fk, *v, *recalled, *scores;
    const void **rows;
  } scratch[LOLA_MAX_THREADS];
} score_job;

/* One task: up to LOLA_ROWS pairs of one query head. */
static void score_task(void *context, int64_t index, int worker) {
  score_job *job = context;
  int64_t parts = (job->S + LOLA_ROWS - 1) / LOLA_ROWS, F = job->F, Dv = job->Dv;
  int64_t h = index % job->Hq, part = index / job->Hq % parts, b = index / job->Hq / parts;
  int64_t first = part * LOLA_ROWS, n = job->S - first < LOLA_ROWS ? job->S - first : LOLA_ROWS;
  const void **rows = job->scratch[worker].rows;
  for (int64_t i = 0; i < n; i++) rows[i] = lola_at(job->fk, b, first + i, h);
  job->kernels->load_rows(job->scratch[worker].fk, F, rows, job->fk->dtype, n, F, 1);
  for (int64_t i = 0; i < n; i++) rows[i] = lola_at(job->v, b, first + i, h / (job->Hq / job->Hs));
  job->kernels->load_rows(job->scratch[worker].v, Dv, rows, job->v->dtype, n, Dv, 1);
  float *scores = job->scratch[worker].scores;
  lola_recall_scores(job->kernels, n, F, Dv, job->scratch[worker].fk, job->scratch[worker].v, Dv,
                     job->H + (b * job->Hq + h) * F * Dv, job->s + (b * job->Hq + h) * F, job->scratch[worker].recalled,
                     scores, 0);
  for (int64_t i = 0; i < n; i++) job->out[(b * job->S + first + i) * job->Hq + h] = scores[i];
}

lola_status lola_cpu_score(const lola_array *fk, const lola_array *v, const float *H, const float *s, int64_t B,
                           int64_t S, int64_t Hq, int64_t Hs, int64_t F, int64_t Dv, float *out,
                           lola_message *message) {
  score_job job = {lola_cpu_kernels(), fk, v, H, s, S, Hq, Hs, F, Dv, out, {{0}}};
  int64_t tasks = B * Hq * ((S + LOLA_ROWS - 1) / LOLA_ROWS);
  int width = lola_pool_width(tasks);
  lola_scratch scratch = {0};
  for (int pass = 0; pass < 2; pass++) {
    for (int i = 0; i < width; i++) {
      job.scratch[i].fk = lola_scratch_take(&scratch, LOLA_ROWS * F, sizeof(float));
      job.scratch[i].v = lola_scratch_take(&scratch, LOLA_ROWS * Dv, sizeof(float));
      job.scratch[i].recalled = lola_scratch_take(&scratch, LOLA_ROWS * (Dv + 1), sizeof(float));
      job.scratch[i].scores = lola_scratch_take(&scratch, LOLA_ROWS, sizeof(float));
      job.scratch[i].rows = lola_scratch_take(&scratch, LOLA_ROWS, sizeof(void *));
    }
    lola_status status = pass ? LOLA_OK : lola_scratch_open(&scratch, message);
    if (status) return status;
  }
  lola_pool_run(tasks, width, score_task, &job);
  lola_scratch_close(&scratch);
  return LOLA_OK;
}
