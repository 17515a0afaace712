/* The five steps on plain device arrays, as lola_cuda_api lists them; each lives in the file of its name. */
#ifndef LOLA_CUDA_STEPS_CUH
#define LOLA_CUDA_STEPS_CUH

#include "core/message.h"
#include "lola/cuda.h"

lola_status lola_cuda_features(const lola_array *x, int64_t B, int64_t T, int64_t Hx, int64_t D, int64_t Hq, int64_t F,
                               const lola_feature_map *map, int side_key, float *out, int device, void *stream,
                               lola_message *message);
lola_status lola_cuda_score(const lola_array *fk, const lola_array *v, const float *H, const float *s, int64_t B,
                            int64_t S, int64_t Hq, int64_t Hs, int64_t F, int64_t Dv, float *out, int device,
                            void *stream, lola_message *message);
lola_status lola_cuda_select(const float *scores, const int64_t *count, int64_t B, int64_t S, int64_t Hs, int64_t keep,
                             int64_t *kept, int64_t *dropped, int device, void *stream, lola_message *message);
lola_status lola_cuda_fold(const lola_array *fk, const lola_array *v, float *H, float *s, const int64_t *count,
                           int64_t B, int64_t S, int64_t Hq, int64_t Hs, int64_t F, int64_t Dv, int device,
                           void *stream, lola_message *message);
lola_status lola_cuda_attend(const lola_attend_call *call, int device, void *stream, lola_message *message);

lola_status lola_cuda_attention(lola_cache *cache, void *workspace, const lola_cuda_call *call, lola_message *message);
int64_t lola_cuda_workspace_bytes(const lola_cache *cache, int device);
lola_status lola_cuda_check_finite(const lola_cache *cache, const lola_cuda_call *call, int *odd,
                                   lola_message *message);

#endif
