/* lola.h - LoLA, low-rank linear attention with sparse caching (arXiv 2505.23666), in C.
 *
 * Symbols: B batch rows, T tokens of a call, Hq query heads, Hkv key/value heads, r = Hq / Hkv,
 * D key size, Dv value size, F feature size, W window, C chunk, L = `sparse` (lambda),
 * R = W + C slots of the window ring, S head sets: Hq ("query_head") or Hkv ("kv_head").
 * Strides are in elements; the last axis of every array is contiguous.
 * No function prints, aborts or keeps a pointer after it returns, caches apart. */
#ifndef LOLA_LOLA_H
#define LOLA_LOLA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lola_status {
  LOLA_OK = 0,
  LOLA_VALUE_ERROR,  /* a wrong shape, value or combination */
  LOLA_MEMORY_ERROR, /* the text names the bytes asked for */
  LOLA_DEVICE_ERROR, /* a fault of the machine */
  LOLA_INTERRUPTED   /* `interrupted` returned non-zero; nothing was committed */
} lola_status;

/* Filled whenever a function returns anything but LOLA_OK. */
typedef struct lola_message {
  char text[256];
} lola_message;

typedef enum lola_dtype { LOLA_FLOAT32 = 0, LOLA_FLOAT16 = 1, LOLA_BFLOAT16 = 2 } lola_dtype;

typedef enum lola_mixing {
  LOLA_MIXING_PAPER = 0,
  LOLA_MIXING_GATED = 1,
  LOLA_MIXING_LOLCATS = 2,
  LOLA_MIXING_CACHE_ONLY = 3
} lola_mixing;

typedef enum lola_score {
  LOLA_SCORE_SELF_RECALL = 0,
  LOLA_SCORE_VALUE_NORM = 1,
  LOLA_SCORE_KEY_NORM = 2,
  LOLA_SCORE_RECENCY = 3,
  LOLA_SCORE_RANDOM = 4,
  LOLA_SCORE_EXTERNAL = 5,
  LOLA_SCORE_ATTENTION = 6
} lola_score;

typedef enum lola_sharing { LOLA_PER_QUERY_HEAD = 0, LOLA_PER_KV_HEAD = 1 } lola_sharing;

typedef enum lola_map_kind {
  LOLA_MAP_GIVEN = 0, /* the caller passes features */
  LOLA_MAP_HEDGEHOG = 1,
  LOLA_MAP_HEDGEHOG_EXP = 2,
  LOLA_MAP_ELU_PLUS_ONE = 3,
  LOLA_MAP_RELU = 4
} lola_map_kind;

typedef struct lola_config {
  int64_t window, chunk, sparse;
  lola_score score;
  lola_sharing sparse_per;
  uint64_t seed;
} lola_config;

typedef struct lola_shape {
  int64_t batch, heads, kv_heads, head_dim, value_dim, feature_dim;
  lola_dtype dtype; /* of keys and values */
} lola_shape;

/* phi(x). `w_q`, `w_k`: float32, contiguous, (Hq, D, M) with M = F/2 (Hedgehog) or F (Relu),
 * or NULL (identity, Relu only). Only the side in use must be given. */
typedef struct lola_feature_map {
  lola_map_kind kind;
  const float *w_q, *w_k;
} lola_feature_map;

/* A (B, T, H, n) array; data NULL means "not given". */
typedef struct lola_array {
  void *data;
  lola_dtype dtype;
  int64_t stride_b, stride_t, stride_h;
} lola_array;

/* --- the cache ------------------------------------------------------------------------------ */

/* A device's memory, as far as a cache needs it; who creates the cache fills it. Functions queue their work, one after
 * the other, but for `write` and `read`, which return when it is done; they take host addresses where they say so, and
 * device addresses otherwise. The copies move `rows` rows of `bytes` bytes, which lie a pitch apart. */
typedef struct lola_memory lola_memory;
struct lola_memory {
  int device;
  lola_status (*allocate)(const lola_memory *memory, int64_t bytes, void **data, lola_message *message); /* zeroed */
  void (*release)(const lola_memory *memory, void *data);
  lola_status (*zero)(const lola_memory *memory, void *data, int64_t bytes, lola_message *message);
  /* -1 into each of `chunks`, `first`, first + 1, .. into `row_ids`. */
  lola_status (*begin)(const lola_memory *memory, int64_t *chunks, int64_t *row_ids, int64_t first, int64_t rows,
                       lola_message *message);
  lola_status (*move)(const lola_memory *memory, void *target, int64_t target_pitch, const void *source,
                      int64_t source_pitch, int64_t bytes, int64_t rows, lola_message *message);
  /* from the host */
  lola_status (*write)(const lola_memory *memory, void *target, int64_t target_pitch, const void *source,
                       int64_t source_pitch, int64_t bytes, int64_t rows, lola_message *message);
  /* to the host */
  lola_status (*read)(const lola_memory *memory, void *target, int64_t target_pitch, const void *source,
                      int64_t source_pitch, int64_t bytes, int64_t rows, lola_message *message);
};

/* One buffer of a cache: `data` is a dense array whose first axis is the batch. */
typedef enum lola_buffer_kind { LOLA_BUFFER_FLOAT = 0, LOLA_BUFFER_INT64 = 1 } lola_buffer_kind;

typedef struct lola_buffer {
  const char *name; /* also its name in a saved file and in Cache.buffers() */
  const char *part; /* what memory() counts it under: "window", "sparse", "state", "counters" */
  lola_buffer_kind kind;
  lola_dtype dtype; /* when kind is LOLA_BUFFER_FLOAT */
  int ndim;
  int64_t shape[4];
  int64_t nbytes;
  void *data;
} lola_buffer;

enum { LOLA_MAX_BUFFERS = 20 };

typedef struct lola_cache {
  lola_config config;
  lola_shape shape;
  int64_t sets;        /* S */
  int64_t ring;        /* R */
  int stores_features; /* 1 once bound to a caller's own features */

  const lola_memory *memory; /* where the buffers lie; NULL: the host's */
  int device;                /* its number; -1: the host */

  int64_t *tokens_seen;      /* (B,) */
  int64_t *chunks;           /* (B,) chunk whose update is done; -1 before the first token */
  int64_t *row_ids;          /* (B,) travel with select and repeat */
  void *window_keys;         /* (B, Hkv, R, D): position p lives in slot p mod R */
  void *window_values;       /* (B, Hkv, R, Dv) */
  void *sparse_keys;         /* (B, S, L, D): slots 0 .. count-1 are in use, in no order */
  void *sparse_values;       /* (B, S, L, Dv) */
  int64_t *sparse_positions; /* (B, S, L) */
  float *sparse_scores;      /* (B, S, L) at the last ranking, NaN before it */
  int64_t *sparse_count;     /* (B, S) */
  float *hidden;             /* (B, Hq, F, Dv) */
  float *normalizer;         /* (B, Hq, F) */
  int64_t *folded;           /* (B, Hq) */
  /* score "external" (given) and "attention" (received so far): a pair's own score, else NULL */
  float *window_given; /* (B, S, R) */
  float *sparse_given; /* (B, S, L) */
  /* a caller's own features, else NULL: float32, or bfloat16 beside 16-bit keys */
  void *window_features; /* (B, Hq, R, F) */
  void *sparse_features; /* (B, Hq, L, F) */

  int buffer_count;
  lola_buffer buffers[LOLA_MAX_BUFFERS];
  void *blocks[2]; /* the allocations behind the buffers */
} lola_cache;

/* Checks sizes and values; the text names the field, what it must be and what it was. */
lola_status lola_config_check(const lola_config *config, lola_message *message);
lola_status lola_shape_check(const lola_config *config, const lola_shape *shape, lola_message *message);

/* Allocates an empty cache (row ids 0 .. B-1) in `memory`, which must outlive it; NULL: the host's. `*cache` is NULL on
 * failure. The functions below work on caches of any memory, where they do not say otherwise. */
lola_status lola_cache_create(const lola_config *config, const lola_shape *shape, const lola_memory *memory,
                              lola_cache **cache, lola_message *message);
void lola_cache_destroy(lola_cache *cache);
/* Adds the buffers that hold a caller's own features (allowed while no token was seen). */
lola_status lola_cache_store_features(lola_cache *cache, lola_message *message);
/* Takes them away again: the call that asked for them failed. Allowed while no token was seen. */
void lola_cache_drop_features(lola_cache *cache);
/* Bytes of all buffers. */
int64_t lola_cache_nbytes(const lola_cache *cache);
/* target row i becomes source row rows[i]; both of one configuration and shape but for the batch;
 * target->shape.batch entries in `rows`, each in range. Not for target == source. One of the two may lie on the host
 * and the other on a device; both on a device share its `memory`'s order. Never fails on the host. */
lola_status lola_cache_gather(lola_cache *target, const lola_cache *source, const int64_t *rows, lola_message *message);
/* Empties the given rows; row ids return to the row's index. Never fails on the host. */
lola_status lola_cache_reset(lola_cache *cache, const int64_t *rows, int64_t count, lola_message *message);
/* Forgets positions >= tokens in every row; a row may go back to the start of its current chunk. */
lola_status lola_cache_crop(lola_cache *cache, int64_t tokens, lola_message *message);
/* First position held in the window of a row in chunk `chunk`; the window is first .. tokens_seen - 1. */
int64_t lola_cache_window_start(const lola_cache *cache, int64_t chunk);
/* What a loaded cache must satisfy: counters within their ranges and of each other. On the host only. */
lola_status lola_cache_check(const lola_cache *cache, lola_message *message);

/* --- attention ------------------------------------------------------------------------------ */

/* Which tokens of the arrays enter a cache row: offsets first .. first+count-1 of batch index b. */
typedef struct lola_row {
  int64_t b, first, count;
} lola_row;

typedef struct lola_call {
  lola_array q, k, v;                /* (., T, Hq, D), (., T, Hkv, D), (., T, Hkv, Dv); k, v of the cache's dtype */
  lola_array out;                    /* (., T, Hq, Dv); only the rows' tokens are written */
  lola_array q_features, k_features; /* (., T, Hq, F) float32, with map.kind LOLA_MAP_GIVEN */
  lola_array scores;                 /* (., T, Hq) float32 (stride_h 1 apart allowed), with LOLA_SCORE_EXTERNAL */
  lola_array share;                  /* (., T, Hq) float32 or not given: the linear term's part of the denominator */
  const lola_row *rows;              /* B of them */
  lola_feature_map map;
  const float *gate; /* (Hq,), needed by GATED and LOLCATS */
  lola_mixing mixing;
  float scale;
  int check_finite;           /* non-finite values among the entering tokens are an error */
  int (*interrupted)(void *); /* asked between segments, may be NULL */
  void *interrupted_context;
} lola_call;

/* Appends the rows' tokens to the cache and writes their outputs. On any status but LOLA_OK the cache is as
 * it was. The caller holds whatever lock guards the cache. */
lola_status lola_cpu_attention(lola_cache *cache, const lola_call *call, lola_message *message);

/* --- the five steps on plain arrays ----------------------------------------------------------- */

/* x (B, T, Hx, D) -> out (B, T, Hq, F) float32 dense; head h reads x head h / (Hq / Hx).
 * `side_key` picks w_k; 16-bit x rounds the features to bfloat16 values. */
lola_status lola_cpu_features(const lola_array *x, int64_t B, int64_t T, int64_t Hx, int64_t D, int64_t Hq, int64_t F,
                              const lola_feature_map *map, int side_key, float *out, lola_message *message);

/* Self-recall error: fk (B, S, Hq, F) float32, v (B, S, Hs, Dv), H (B, Hq, F, Dv) and s (B, Hq, F) float32 dense
 * -> out (B, S, Hq) float32 dense. */
lola_status lola_cpu_score(const lola_array *fk, const lola_array *v, const float *H, const float *s, int64_t B,
                           int64_t S, int64_t Hq, int64_t Hs, int64_t F, int64_t Dv, float *out, lola_message *message);

/* The `keep` highest of the first count[b, h] of scores (B, S, Hs) float32 dense, ties to the earlier index:
 * kept (B, Hs, min(keep, S)) and dropped (B, Hs, S - min(keep, S)), ascending, padded with -1. count may be NULL. */
lola_status lola_cpu_select(const float *scores, const int64_t *count, int64_t B, int64_t S, int64_t Hs, int64_t keep,
                            int64_t *kept, int64_t *dropped, lola_message *message);

/* H += sum_i fk_i v_i^T, s += sum_i fk_i over the first count[b, h of Hs] pairs (NULL: all), in place. */
lola_status lola_cpu_fold(const lola_array *fk, const lola_array *v, float *H, float *s, const int64_t *count,
                          int64_t B, int64_t S, int64_t Hq, int64_t Hs, int64_t F, int64_t Dv, lola_message *message);

typedef struct lola_attend_call {
  lola_array q, k, v, out;          /* (B, T, Hq, D), (B, S, Hs, D), (B, S, Hs, Dv), (B, T, Hq, Dv) */
  lola_array q_features;            /* (B, T, Hq, F) float32, or not given: no linear term */
  const float *hidden, *normalizer; /* (B, Hq, F, Dv), (B, Hq, F) dense, with q_features */
  const float *gate;                /* (Hq,) */
  const int64_t *count;             /* (B, Hs) dense valid pairs, or NULL: all S */
  int64_t B, T, S, Hq, Hs, D, Dv, F;
  lola_mixing mixing;
  float scale;
  int causal; /* bottom-right: query i sees pairs j <= S - T + i */
} lola_attend_call;

/* A query that sees nothing at all gets zeros. */
lola_status lola_cpu_attend(const lola_attend_call *call, lola_message *message);

/* --- the machine ------------------------------------------------------------------------------ */

/* Instruction sets compiled in and present: "avx512", "avx2", "neon", "scalar", best first. */
int lola_cpu_isa_count(void);
const char *lola_cpu_isa_name(int index);
const char *lola_cpu_isa(void); /* the one in use */
/* Takes one of the above, or says which there are. NULL or "": the best. */
lola_status lola_cpu_set_isa(const char *name, lola_message *message);

int lola_cpu_threads(void);
/* 0: as many as the process may run on. */
lola_status lola_cpu_set_threads(int threads, lola_message *message);
/* Scratch bytes that the calling thread's last call used. */
int64_t lola_cpu_scratch_peak(void);

#ifdef __cplusplus
}
#endif
#endif
