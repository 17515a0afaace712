/* --- phi(q)^T H and phi(q)^T s of a query head ----------------------------------------------------- */

__device__ __forceinline__ float finish_feature(float x, float floor, bool round) {
  x = fmaxf(x, floor);
  return round ? __bfloat162float(__float2bfloat16_rn(x)) : x;
}

/* The sum of `count` numbers that lie `step` apart, in order. */
__device__ __forceinline__ float add_groups(const float *from, int count, int step) {
  float total = 0;
#pragma unroll 4
  for (int j = 0; j < count; j++) total += from[j * step];
  return total;
}

/* projected = x W, W (D, M). Waits for the block before it reads x, so that the first weights are on their way by then,
 * and after it has written `projected`. */
template <int VECTOR>
__device__ __forceinline__ void project(const float *weights, int D, int M, int lanes, const float *x, float *reduce,
                                        float *projected) {
  constexpr int AHEAD = 8;
  const int groups = THREADS / lanes, lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int block = lanes * VECTOR;
  bool waited = false;
  for (int first = 0; first < M; first += block) {
    const int column = first + lane * VECTOR;
    float sum[VECTOR] = {};
    for (int d = group; d - group < D; d += AHEAD * groups) {
      float w[AHEAD][VECTOR];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int row = d + i * groups;
#pragma unroll
        for (int e = 0; e < VECTOR; e++) w[i][e] = 0;
        if (row < D && column < M) load_floats<VECTOR>(weights + static_cast<int64_t>(row) * M + column, w[i]);
      }
      if (!waited) __syncthreads();
      waited = true;
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int row = d + i * groups;
        const float factor = row < D ? x[row] : 0;
#pragma unroll
        for (int e = 0; e < VECTOR; e++) sum[e] = fmaf(factor, w[i][e], sum[e]);
      }
    }
    store_floats<VECTOR>(reduce + group * block + lane * VECTOR, sum);
    __syncthreads();
    for (int i = threadIdx.x; i < block && first + i < M; i += THREADS)
      projected[first + i] = add_groups(reduce + i, groups, block);
    __syncthreads();
  }
}

/* One side of Hedgehog by one warp: exp(sign (x - shift)) over M, shift the highest (lowest) x, divided by its sum when
 * `normalise`. */
__device__ __forceinline__ void exponentials(const float *x, int M, float sign, bool normalise, bool round,
                                             float *phi) {
  const int lane = threadIdx.x % 32;
  float high = -INFINITY, sum = 0;
#pragma unroll 1
  for (int j = lane; j < M; j += 32) high = fmaxf(high, sign * x[j]);
  high = warp_max(high);
#pragma unroll 1
  for (int j = lane; j < M; j += 32) {
    const float e = expf(sign * x[j] - high);
    phi[j] = e;
    sum += e;
  }
  sum = warp_sum(sum);
  const float scale = normalise ? 1 / sum : 1;
#pragma unroll 1
  for (int j = lane; j < M; j += 32) phi[j] = finish_feature(phi[j] * scale, FEATURE_FLOOR, round);
}

/* phi(q) into shared memory. The block waits for it before it goes on. */
__device__ __forceinline__ void query_features(const lola_device_segment &g, const decode_plan &plan,
                                               const lola_device_span &span, int head, char *shared) {
  float *x = reinterpret_cast<float *>(shared + plan.x_at);
  float *projected = reinterpret_cast<float *>(shared + plan.projected_at);
  float *phi = reinterpret_cast<float *>(shared + plan.phi_at);
  const bool round = g.dtype != LOLA_FLOAT32;
  if (g.stores_features) {
    const char *given = lola_device_at(g.q_features, span.batch, span.first, head);
#pragma unroll 1
    for (int f = threadIdx.x; f < g.F; f += THREADS) {
      const float y = lola_device_load(given, f, g.q_features.dtype);
      phi[f] = round ? __bfloat162float(__float2bfloat16_rn(y)) : y;
    }
    __syncthreads();
    return;
  }
  const char *q = lola_device_at(g.q, span.batch, span.first, head);
#pragma unroll 1
  for (int d = threadIdx.x; d < g.D; d += THREADS) x[d] = lola_device_load(q, d, g.q.dtype);
  const bool hedgehog = g.map.kind == LOLA_MAP_HEDGEHOG || g.map.kind == LOLA_MAP_HEDGEHOG_EXP;
  const int M = hedgehog ? g.F / 2 : g.F;
  const bool projects = hedgehog || (g.map.kind == LOLA_MAP_RELU && g.map.w_q);
  if (projects) {
    const float *weights = g.map.w_q + static_cast<int64_t>(head) * g.D * M;
    float *reduce = reinterpret_cast<float *>(shared + plan.reduce_at);
    if (plan.weight_vector == 4)
      project<4>(weights, g.D, M, plan.weight_lanes, x, reduce, projected);
    else
      project<1>(weights, g.D, M, plan.weight_lanes, x, reduce, projected);
  } else {
    projected = x; /* F = D */
    __syncthreads();
  }
  if (hedgehog) {
    const int warp = threadIdx.x / 32;
    if (warp < 2)
      exponentials(projected, M, warp ? -1.0f : 1.0f, g.map.kind == LOLA_MAP_HEDGEHOG, round, phi + warp * M);
  } else {
#pragma unroll 1
    for (int f = threadIdx.x; f < M; f += THREADS) {
      const float y = projected[f];
      phi[f] = g.map.kind == LOLA_MAP_RELU ? finish_feature(y, FEATURE_FLOOR, round)
                                           : finish_feature(y > 0 ? y + 1 : expf(y), 0, round);
    }
  }
  __syncthreads();
}

/* A thread's walk over H: its rows for one block of columns after the other. */
struct state_walk {
  const float *hidden;
  float *stage; /* this thread's first piece in shared memory */
  int row, column, slot;
};

/* Asks for the next piece of H, if there is one. */
template <int VECTOR> __device__ __forceinline__ void ask(state_walk &walk, const decode_plan &plan, int F, int Dv) {
  const int lanes = plan.state_lanes, lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  if (walk.column - lane * VECTOR < Dv) {
    if (walk.row < F && walk.column < Dv)
      copy_async<VECTOR * 4>(walk.stage + walk.slot * (THREADS * VECTOR),
                             walk.hidden + static_cast<int64_t>(walk.row) * Dv + walk.column);
    walk.row += THREADS / lanes;
    if (walk.row - group >= F) {
      walk.row = group;
      walk.column += lanes * VECTOR;
    }
  }
  walk.slot = walk.slot + 1 == DEPTH ? 0 : walk.slot + 1;
  copies_end_group();
}

template <int VECTOR>
__device__ __forceinline__ state_walk begin_walk(const float *hidden, const decode_plan &plan, int F, int Dv,
                                                 char *shared) {
  const int lane = threadIdx.x % plan.state_lanes, group = threadIdx.x / plan.state_lanes;
  state_walk walk = {hidden, reinterpret_cast<float *>(shared) + threadIdx.x * VECTOR, group, lane * VECTOR, 0};
#pragma unroll 1
  for (int i = 0; i < DEPTH; i++) ask<VECTOR>(walk, plan, F, Dv);
  return walk;
}

/* N = phi^T H as the walk goes on, and z from the warps' sums in `reduce_z`. */
template <int VECTOR>
__device__ __forceinline__ void recall(state_walk walk, const decode_plan &plan, int F, int Dv, const float *phi,
                                       float *reduce, const float *reduce_z, float *partial) {
  const int lanes = plan.state_lanes, groups = THREADS / lanes;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int block = lanes * VECTOR;
  int taken = 0;
  for (int first = 0; first < Dv; first += block) {
    float sum[VECTOR] = {};
#pragma unroll 2
    for (int f = group; f - group < F; f += groups) {
      copies_wait<DEPTH - 1>();
      if (f < F && first + lane * VECTOR < Dv) {
        float x[VECTOR];
        load_floats<VECTOR>(walk.stage + taken * (THREADS * VECTOR), x);
#pragma unroll
        for (int e = 0; e < VECTOR; e++) sum[e] = fmaf(phi[f], x[e], sum[e]);
      }
      taken = taken + 1 == DEPTH ? 0 : taken + 1;
      ask<VECTOR>(walk, plan, F, Dv);
    }
    store_floats<VECTOR>(reduce + group * block + lane * VECTOR, sum);
    __syncthreads();
    for (int i = threadIdx.x; i < block && first + i < Dv; i += THREADS)
      partial[first + i] = add_groups(reduce + i, groups, block);
    if (first == 0 && threadIdx.x == 0) partial[plan.columns] = add_groups(reduce_z, WARPS, 1);
    __syncthreads();
  }
}

/* N and z into the head's partial; the call's own features of the token into the ring. */
__device__ __forceinline__ void state_item(const lola_device_segment &g, const decode_plan &plan,
                                           const lola_device_span &span, int64_t state, int head, bool folded,
                                           char *shared, float *partial) {
  const int F = g.F, Dv = g.Dv;
  if (g.stores_features) {
    const lola_dtype type = g.dtype == LOLA_FLOAT32 ? LOLA_FLOAT32 : LOLA_BFLOAT16;
    const char *from = lola_device_at(g.k_features, span.batch, span.first, head);
    char *to =
        static_cast<char *>(g.window_features) + (state * g.R + span.position % g.R) * F * lola_device_item(type);
#pragma unroll 1
    for (int f = threadIdx.x; f < F; f += THREADS)
      lola_device_store(to, f, type, lola_device_load(from, f, g.k_features.dtype));
  }
  if (g.mixing == LOLA_MIXING_CACHE_ONLY || !folded) {
    if (threadIdx.x == 0) partial[plan.columns] = 0;
    return;
  }
  const float *hidden = g.hidden + state * F * Dv, *normalizer = g.normalizer + state * F;
  const bool by_four = plan.state_vector == 4;
  const state_walk walk =
      by_four ? begin_walk<4>(hidden, plan, F, Dv, shared) : begin_walk<1>(hidden, plan, F, Dv, shared);
  const float first_s = threadIdx.x < F ? normalizer[threadIdx.x] : 0;

  query_features(g, plan, span, head, shared);

  float *reduce = reinterpret_cast<float *>(shared + plan.reduce_at), *reduce_z = reduce + THREADS * 4;
  const float *phi = reinterpret_cast<const float *>(shared + plan.phi_at);
  float z = threadIdx.x < F ? phi[threadIdx.x] * first_s : 0;
#pragma unroll 1
  for (int f = threadIdx.x + THREADS; f < F; f += THREADS) z = fmaf(phi[f], normalizer[f], z);
  z = warp_sum(z);
  if (threadIdx.x % 32 == 0) reduce_z[threadIdx.x / 32] = z;
  if (by_four)
    recall<4>(walk, plan, F, Dv, phi, reduce, reduce_z, partial);
  else
    recall<1>(walk, plan, F, Dv, phi, reduce, reduce_z, partial);
}

