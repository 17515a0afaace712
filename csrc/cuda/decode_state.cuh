/* A query head's hidden state, for all types and sizes: N = phi(q)^T H and z = phi(q)^T s.
 *
 * H (F x Dv float32) comes by cp.async; a thread multiplies the very pieces of H that it copied. `even` states, where a
 * pass of the block over H is one run of memory (Dv = 32, 64 or 128), go in stages of PASSES passes at fixed offsets;
 * others piece by piece. */
#ifndef LOLA_CUDA_DECODE_STATE_CUH
#define LOLA_CUDA_DECODE_STATE_CUH

#include "decode.cuh"

namespace {

constexpr int DEPTH = 16; /* pieces of H that one thread has under way, when it is not even */
constexpr int PASSES = 8; /* pieces of H of one thread and stage */
constexpr int AHEAD = 4;  /* stages under way */
constexpr int STAGE_FLOATS = PASSES * THREADS * 4;

/* --- an even state ------------------------------------------------------------------------------------ */

/* Asks for a stage of H; the ring has room for AHEAD of them. */
__device__ __forceinline__ void ask_stage(const float *hidden, int stage, int slot, char *shared) {
  const float *from = hidden + static_cast<int64_t>(stage) * STAGE_FLOATS + threadIdx.x * 4;
  float *to = reinterpret_cast<float *>(shared) + slot * STAGE_FLOATS + threadIdx.x * 4;
#pragma unroll
  for (int i = 0; i < PASSES; i++) copy_async<16>(to + i * THREADS * 4, from + i * THREADS * 4);
}

__device__ __forceinline__ void begin_even(const float *hidden, const decode_plan &plan, char *shared) {
#pragma unroll 1
  for (int i = 0; i < AHEAD; i++) {
    if (i < plan.state_stages) ask_stage(hidden, i, i, shared);
    cp_async_commit();
  }
}

/* This thread's part of N: columns 4 lane .. + 3, rows group, group + groups, ... */
__device__ __forceinline__ void recall_even(const float *hidden, const decode_plan &plan, const float *phi,
                                            char *shared, float (&sum)[4]) {
  const int group = threadIdx.x >> plan.state_shift, groups = THREADS >> plan.state_shift;
  int slot = 0;
  phi += group;
#pragma unroll 1
  for (int stage = 0; stage < plan.state_stages; stage++) {
    cp_async_wait<AHEAD - 1>();
    const float *from = reinterpret_cast<const float *>(shared) + slot * STAGE_FLOATS + threadIdx.x * 4;
#pragma unroll
    for (int i = 0; i < PASSES; i++, phi += groups) {
      float x[4];
      load_floats<4>(from + i * THREADS * 4, x);
#pragma unroll
      for (int e = 0; e < 4; e++) sum[e] = fmaf(*phi, x[e], sum[e]);
    }
    if (stage + AHEAD < plan.state_stages) ask_stage(hidden, stage + AHEAD, slot, shared);
    cp_async_commit();
    slot = (slot + 1) % AHEAD;
  }
}

/* --- any state ----------------------------------------------------------------------------------------- */

/* A thread's walk over H: its rows for one block of columns after the other. */
struct state_walk {
  const float *hidden;
  float *stage; /* this thread's first piece in shared memory */
  int row, column, slot;
};

/* Asks for the next piece of H, if there is one. */
template <int VECTOR> __device__ __forceinline__ void ask(state_walk &walk, const decode_plan &plan, int F, int Dv) {
  const int lanes = 1 << plan.state_shift, lane = threadIdx.x & (lanes - 1), group = threadIdx.x >> plan.state_shift;
  if (walk.column - lane * VECTOR < Dv) {
    if (walk.row < F && walk.column < Dv)
      copy_async<VECTOR * 4>(walk.stage + walk.slot * (THREADS * VECTOR),
                             walk.hidden + static_cast<int64_t>(walk.row) * Dv + walk.column);
    walk.row += THREADS >> plan.state_shift;
    if (walk.row - group >= F) {
      walk.row = group;
      walk.column += lanes * VECTOR;
    }
  }
  walk.slot = walk.slot + 1 == DEPTH ? 0 : walk.slot + 1;
  cp_async_commit();
}

template <int VECTOR>
__device__ __forceinline__ state_walk begin_walk(const float *hidden, const decode_plan &plan, int F, int Dv,
                                                 char *shared) {
  const int lane = threadIdx.x & ((1 << plan.state_shift) - 1), group = threadIdx.x >> plan.state_shift;
  state_walk walk = {hidden, reinterpret_cast<float *>(shared) + threadIdx.x * VECTOR, group, lane * VECTOR, 0};
#pragma unroll 1
  for (int i = 0; i < DEPTH; i++) ask<VECTOR>(walk, plan, F, Dv);
  return walk;
}

/* This thread's part of N for columns first .. first + lanes * VECTOR - 1, as the walk goes on. */
template <int VECTOR>
__device__ __forceinline__ void recall_block(state_walk &walk, int &taken, int first, const decode_plan &plan, int F,
                                             int Dv, const float *phi, float (&sum)[VECTOR]) {
  const int groups = THREADS >> plan.state_shift, group = threadIdx.x >> plan.state_shift;
  const int lane = threadIdx.x & ((1 << plan.state_shift) - 1);
#pragma unroll 2
  for (int f = group; f - group < F; f += groups) {
    cp_async_wait<DEPTH - 1>();
    if (f < F && first + lane * VECTOR < Dv) {
      float x[VECTOR];
      load_floats<VECTOR>(walk.stage + taken * (THREADS * VECTOR), x);
#pragma unroll
      for (int e = 0; e < VECTOR; e++) sum[e] = fmaf(phi[f], x[e], sum[e]);
    }
    taken = taken + 1 == DEPTH ? 0 : taken + 1;
    ask<VECTOR>(walk, plan, F, Dv);
  }
}

/* --- N and z --------------------------------------------------------------------------------------------- */

/* Sums of the groups for columns first .. first + block - 1, in order of group; with the first ones also z. */
template <int VECTOR>
__device__ __forceinline__ void write_sums(const decode_plan &plan, int first, int Dv, const float (&sum)[VECTOR],
                                           float *reduce, const float *reduce_z, float *partial) {
  const int groups = THREADS >> plan.state_shift, block = VECTOR << plan.state_shift;
  store_floats<VECTOR>(reduce + threadIdx.x * VECTOR, sum);
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < block && first + i < Dv; i += THREADS)
    partial[first + i] = add_groups(reduce + i, groups, block);
  if (first == 0 && threadIdx.x == 0) partial[plan.columns] = add_groups(reduce_z, WARPS, 1);
}

template <int VECTOR>
__device__ __forceinline__ void recall_walk(state_walk walk, const decode_plan &plan, int F, int Dv, const float *phi,
                                            float *reduce, const float *reduce_z, float *partial) {
  int taken = 0;
  for (int first = 0; first < Dv; first += VECTOR << plan.state_shift) {
    if (first) __syncthreads(); /* the last sums were read */
    float sum[VECTOR] = {};
    recall_block<VECTOR>(walk, taken, first, plan, F, Dv, phi, sum);
    write_sums<VECTOR>(plan, first, Dv, sum, reduce, reduce_z, partial);
  }
}

/* The call's own features of the token into the ring. */
__device__ __forceinline__ void keep_features(const lola_device_segment &g, int64_t batch, int64_t offset,
                                              int64_t ring_slot, int64_t state, int head) {
  const lola_dtype type = g.dtype == LOLA_FLOAT32 ? LOLA_FLOAT32 : LOLA_BFLOAT16;
  const char *from = lola_device_at(g.k_features, batch, offset, head);
  char *to = static_cast<char *>(g.window_features) + (state * g.R + ring_slot) * g.F * lola_device_item(type);
#pragma unroll 1
  for (int f = threadIdx.x; f < g.F; f += THREADS)
    lola_device_store(to, f, type, lola_device_load(from, f, g.k_features.dtype));
}

/* N and z into the head's partial. */
__device__ __forceinline__ void state_item(const lola_device_segment &g, const decode_plan &plan,
                                           const lola_device_span &span, int64_t state, int head, bool folded,
                                           const float *query_phi, char *shared, float *partial) {
  const int F = g.F, Dv = g.Dv;
  if (g.stores_features) keep_features(g, span.batch, span.first, span.position % g.R, state, head);
  if (g.mixing == LOLA_MIXING_CACHE_ONLY || !folded) {
    if (threadIdx.x == 0) partial[plan.columns] = 0;
    return;
  }
  const float *hidden = g.hidden + state * F * Dv, *normalizer = g.normalizer + state * F;
  float *phi = reinterpret_cast<float *>(shared + plan.phi_at);
  const float first_phi = threadIdx.x < F ? __ldcg(query_phi + state * F + threadIdx.x) : 0;
  const float first_s = threadIdx.x < F ? normalizer[threadIdx.x] : 0;
  state_walk walk = {};
  if (plan.state_stages)
    begin_even(hidden, plan, shared);
  else if (plan.state_vector == 4)
    walk = begin_walk<4>(hidden, plan, F, Dv, shared);
  else
    walk = begin_walk<1>(hidden, plan, F, Dv, shared);
  if (threadIdx.x < F) phi[threadIdx.x] = first_phi;
#pragma unroll 1
  for (int f = threadIdx.x + THREADS; f < F; f += THREADS) phi[f] = __ldcg(query_phi + state * F + f);
  __syncthreads();

  float *reduce = reinterpret_cast<float *>(shared + plan.reduce_at), *reduce_z = reduce + THREADS * 4;
  float sum[4] = {};
  if (plan.state_stages) recall_even(hidden, plan, phi, shared, sum);
  float z = first_phi * first_s;
#pragma unroll 1
  for (int f = threadIdx.x + THREADS; f < F; f += THREADS) z = fmaf(phi[f], normalizer[f], z);
  z = warp_sum(z);
  if (threadIdx.x % 32 == 0) reduce_z[threadIdx.x / 32] = z;
  if (plan.state_stages)
    write_sums<4>(plan, 0, Dv, sum, reduce, reduce_z, partial);
  else if (plan.state_vector == 4)
    recall_walk<4>(walk, plan, F, Dv, phi, reduce, reduce_z, partial);
  else
    recall_walk<1>(walk, plan, F, Dv, phi, reduce, reduce_z, partial);
}

} // namespace

#endif
