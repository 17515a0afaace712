/* fold: a pair moves into the hidden state, for good (Eq. 12): H += phi(k) v^T, s += phi(k). */
#include "cpu/pool.h"
#include "cpu/steps.h"

void lola_fold_rows(const lola_kernels *kernels, int64_t count, int64_t F, int64_t Dv, const float *fk, const float *v,
                    int64_t ldv, float *H, float *s) {
  kernels->gemm(F, Dv, count, fk, 1, F, v, ldv, H, Dv, 1);
  kernels->add_rows(count, F, fk, F, s);
}

typedef struct {
  const lola_kernels *kernels;
  const lola_array *fk, *v;
  float *H, *s;
  const int64_t *count;
  int64_t S, Hq, Hs, F, Dv;
  struct {
    float *fk, *v;
    const void **rows;
  } scratch[LOLA_MAX_THREADS];
} fold_job;

/* One task: all pairs of one query head, in order. */
static void fold_task(void *context, int64_t index, int worker) {
  fold_job *job = context;
  int64_t h = index % job->Hq, b = index / job->Hq, set = h / (job->Hq / job->Hs), F = job->F, Dv = job->Dv;
  int64_t count = job->count ? job->count[b * job->Hs + set] : job->S;
  const void **rows = job->scratch[worker].rows;
  for (int64_t first = 0; first < count; first += LOLA_ROWS) {
    int64_t n = count - first < LOLA_ROWS ? count - first : LOLA_ROWS;
    for (int64_t i = 0; i < n; i++) rows[i] = lola_at(job->fk, b, first + i, h);
    job->kernels->load_rows(job->scratch[worker].fk, F, rows, job->fk->dtype, n, F, 1);
    for (int64_t i = 0; i < n; i++) rows[i] = lola_at(job->v, b, first + i, set);
    job->kernels->load_rows(job->scratch[worker].v, Dv, rows, job->v->dtype, n, Dv, 1);
    lola_fold_rows(job->kernels, n, F, Dv, job->scratch[worker].fk, job->scratch[worker].v, Dv, job->H + index * F * Dv,
                   job->s + index * F);
  }
}

lola_status lola_cpu_fold(const lola_array *fk, const lola_array *v, float *H, float *s, const int64_t *count,
                          int64_t B, int64_t S, int64_t Hq, int64_t Hs, int64_t F, int64_t Dv, lola_message *message) {
  fold_job job = {lola_cpu_kernels(), fk, v, H, s, count, S, Hq, Hs, F, Dv, {{0}}};
  int width = lola_pool_width(B * Hq);
  lola_scratch scratch = {0};
  for (int pass = 0; pass < 2; pass++) {
    for (int i = 0; i < width; i++) {
      job.scratch[i].fk = lola_scratch_take(&scratch, LOLA_ROWS * F, sizeof(float));
      job.scratch[i].v = lola_scratch_take(&scratch, LOLA_ROWS * Dv, sizeof(float));
      job.scratch[i].rows = lola_scratch_take(&scratch, LOLA_ROWS, sizeof(void *));
    }
    lola_status status = pass ? LOLA_OK : lola_scratch_open(&scratch, message);
    if (status) return status;
  }
  lola_pool_run(B * Hq, width, fold_task, &job);
  lola_scratch_close(&scratch);
  return LOLA_OK;
}
