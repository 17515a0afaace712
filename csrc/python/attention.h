/* One call of lola.attention, from its checks (attention.c) to where it runs (attend_host.c, attend_device.c). */
#ifndef LOLA_PYTHON_ATTENTION_H
#define LOLA_PYTHON_ATTENTION_H

#include "device.h"

/* The arguments of _lola.attention, in order; the keywords live in lola/_attention.py. */
enum {
  ARG_Q,
  ARG_K,
  ARG_V,
  ARG_CACHE,
  ARG_CONFIG,
  ARG_FEATURE_MAP,
  ARG_Q_FEATURES,
  ARG_K_FEATURES,
  ARG_GATE,
  ARG_SCORES,
  ARG_STARTS,
  ARG_STOPS,
  ARG_CU_SEQLENS,
  ARG_DEVICE,
  ARG_STREAM,
  ARG_CHECK,
  ARG_OUT,
  ARG_WITH_SHARE,
  ARG_COUNT
};

enum { FEW_ROWS = 16 };

/* One call's state. Everything in it that must be given back is given back by call_close. */
typedef struct call {
  binding_state *state;
  PyObject *const *arguments;
  view q, k, v, q_features, k_features, scores, out_given;
  view gate_given, starts_given, stops_given, cu_given;            /* open where they lie on a device */
  PyArrayObject *scores_made, *gate, *starts, *stops, *cu_seqlens; /* on the host */
  cache_object *cache;
  result out, share;
  lola_row few_rows[FEW_ROWS], *rows;
  int64_t row_count, tokens; /* cache rows; tokens that enter any of them, at most where a device alone knows */
  lola_call raw;
  int place;      /* where it runs: a device's number, or ON_HOST */
  int staged;     /* NumPy arrays to and from a device */
  device *device; /* with a place on one */
  void *stream;
} call;

int given(const call *call, int argument);
/* Whether the call names sequences of one packed row. */
int is_packed(const call *call);

/* The terms that the first call with a cache fixes; the caller holds its lock. */
int check_terms(call *call);
void fix_terms(call *call);

int run_host(call *call);
int run_device(call *call);

#endif
