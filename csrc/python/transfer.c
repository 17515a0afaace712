#include "transfer.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "core/message.h"
#include "cpu/pool.h"

/* Page-locked are 2 * BLOCKS * BLOCK_BYTES, 64 MB for each device, and more only where one token's row is larger than a
 * block. In device memory are PIECES * PIECE_BYTES, 60 MB, and more only where 64 tokens take more than a piece. */
enum { BLOCKS = 16, MOST_TASKS = 64, CACHE_LINE = 64 };
/* So many keep both directions of PCIe 5 busy. More of them only take memory's time from one another. */
enum { MOST_WORKERS = 14 };
/* Of a block: large enough that a copy's start does not count. */
static const int64_t BLOCK_BYTES = INT64_C(2) << 20;
/* What a thread copies between arrays and blocks at a time. */
static const int64_t TASK_BYTES = INT64_C(64) << 10;
/* Of a piece: short, since nothing overlaps the first one's way in and the last one's work and way out. */
static const int64_t PIECE_BYTES = INT64_C(20) << 20;
/* Up to here overlapping costs more than it saves. */
static const int64_t AT_ONCE_BYTES = INT64_C(512) << 10;

/* Of fresh memory, which the system gives a page of this size, or so many of the ordinary ones, at the first write. */
static const int64_t REGION_BYTES = INT64_C(2) << 20;
/* From here on what a caller gets is not kept in the caches. */
static const int64_t STREAMED_BYTES = INT64_C(64) << 10;

/* Some rows of a part in a piece (batch and tokens as one axis) and where they are in the block. */
typedef struct task {
  const part *part;
  int64_t row, rows;
  char *place;
} task;

typedef struct block {
  char *host; /* page-locked */
  int64_t size;
  void *copied; /* event: the device has read it, or written it */
  piece piece;
  int64_t from, until; /* bytes of the piece */
  int ends;            /* the piece's way in this direction */
  task tasks[MOST_TASKS];
  int count;
  _Alignas(CACHE_LINE) _Atomic uint64_t open; /* tasks that nobody has taken, a bit for each */
  atomic_int left;                            /* tasks that are not done */
} block;

/* Blocks in the order in which they came. */
typedef struct line {
  block *blocks[BLOCKS];
  int count;
} line;

/* One direction. Its blocks go from line to line: on the way in they are free, then at work (filled from the arrays),
 * then copied; on the way out free, copied, then at work (emptied into the arrays). They do not leave work in turn: a
 * thread that the system takes off its CPU holds up the block that it is at, and no other. */
typedef struct flow {
  void *stream;
  block blocks[BLOCKS];
  line free, at_work, copying;
  piece piece; /* that the next block is of, from this part and row on */
  int part;
  int64_t row;
  /* What workers know of the blocks at work, oldest first. They may see it half changed: which tasks there are the
   * blocks say, and `version` changes last. */
  _Alignas(CACHE_LINE) _Atomic uint64_t version; /* from 1 on */
  atomic_int count;
  atomic_uchar order[BLOCKS];
} flow;

/* A worker's lookout for tasks of a direction: the version in which it found no task. */
typedef struct lookout {
  flow *flow;
  uint64_t emptied;
} lookout;

struct staging {
  flow in, out;
  void *computed[PIECES], *returned[PIECES]; /* events: worked on; copied out */
  void *ready;                               /* event: what the caller's stream held before */
};

/* The state of a region: a thread that finds a page missing while another one fills it would fill one as well. */
enum { UNTOUCHED, IN_HAND, TOUCHED };

typedef struct run {
  const transfer *transfer;
  const transfer_plan *plan;
  struct staging *staging;
  /* Pieces: whose place may be written; that came; that are worked on; whose results leave. */
  int64_t opened, arrived, computed, returning;
  piece next; /* to be worked on */
  int width;  /* workers, of whom the first leads */
  atomic_int over;
  char *first_region;    /* the region that holds the first byte of fresh memory */
  atomic_uchar *regions; /* NULL: no memory is fresh */
  int64_t region_count;
  _Atomic int64_t next_region;
  lola_status status;
  lola_message *message;
} run;

/* --- lines ---------------------------------------------------------------------------------- */

static void join(line *line, block *block) { line->blocks[line->count++] = block; }

static block *leave(line *line, int at) {
  block *block = line->blocks[at];
  line->count--;
  memmove(&line->blocks[at], &line->blocks[at + 1], (size_t)(line->count - at) * sizeof *line->blocks);
  return block;
}

/* --- the plan ------------------------------------------------------------------------------- */

static int64_t row_bytes(const part *part) { return part->heads * part->line; }

/* Bytes of the first `count` parts that go one way, in a piece of so many tokens. */
static int64_t parts_bytes(const transfer_plan *plan, int count, int output, int64_t tokens) {
  int64_t used = 0;
  for (int i = 0; i < count; i++)
    if (plan->parts[i].output == output) used += (plan->batch * tokens * row_bytes(&plan->parts[i]) + 255) / 256 * 256;
  return used;
}

/* Results lie behind the inputs of a whole piece, so that one piece comes in where another has not gone out. */
int64_t transfer_offset(const transfer_plan *plan, int part, int64_t tokens) {
  int output = plan->parts[part].output;
  int64_t inputs = output ? parts_bytes(plan, plan->count, 0, plan->length) : 0;
  return inputs + parts_bytes(plan, part, output, tokens);
}

/* From one piece in device memory to the next. */
static int64_t pitch_of(const transfer_plan *plan) {
  return parts_bytes(plan, plan->count, 0, plan->length) + parts_bytes(plan, plan->count, 1, plan->length);
}

static int64_t token_bytes(const transfer_plan *plan) {
  int64_t bytes = 0;
  for (int i = 0; i < plan->count; i++) bytes += plan->batch * row_bytes(&plan->parts[i]);
  return bytes ? bytes : 1;
}

/* No token is left alone at the end: a call of one is a decoding step, whose sums are rounded in another order. */
static int64_t tokens_from(const transfer_plan *plan, int64_t first) {
  int64_t left = plan->tokens - first;
  if (left == plan->length + 1) return plan->length - plan->grain;
  return left < plan->length ? left : plan->length;
}

static piece first_piece(const transfer_plan *plan) { return (piece){0, 0, tokens_from(plan, 0)}; }

static void advance(const transfer_plan *plan, piece *piece) {
  piece->index++;
  piece->first += piece->tokens;
  piece->tokens = tokens_from(plan, piece->first);
}

void transfer_cut(transfer_plan *plan, int64_t grain) {
  int64_t length = PIECE_BYTES / token_bytes(plan);
  if (length < 64) length = 64;
  if (length <= grain) grain = 1;
  length -= length % grain;
  plan->grain = grain;
  plan->length = length < plan->tokens ? length : plan->tokens;
  plan->pieces = (plan->tokens + plan->length - 1) / plan->length;
}

void transfer_leave(transfer_plan *plan) {
  plan->length = plan->tokens;
  plan->pieces = 1;
}

int64_t transfer_bytes(const transfer_plan *plan) {
  return (plan->pieces < PIECES ? plan->pieces : PIECES) * pitch_of(plan);
}

/* --- tasks ---------------------------------------------------------------------------------- */

/* Writes past the caches: memory that is written whole need not be read first. */
static void stream_bytes(char *target, const char *source, int64_t bytes) {
#if defined(__SSE2__)
  int64_t odd = -(intptr_t)target & 63;
  memcpy(target, source, (size_t)odd);
  for (target += odd, source += odd, bytes -= odd; bytes >= 64; target += 64, source += 64, bytes -= 64)
    for (int i = 0; i < 64; i += 16)
      _mm_stream_si128((__m128i *)(void *)(target + i), _mm_loadu_si128((const __m128i *)(const void *)(source + i)));
  _mm_sfence();
#endif
  memcpy(target, source, (size_t)bytes);
}

/* Has a region's memory there, unless another thread is about it. */
static void touch(run *run, int64_t region) {
  const transfer *transfer = run->transfer;
  unsigned char found = UNTOUCHED;
  if (!atomic_compare_exchange_strong(&run->regions[region], &found, IN_HAND)) return;
  char *from = run->first_region + region * REGION_BYTES, *until = from + REGION_BYTES;
  char *end = transfer->fresh + transfer->fresh_bytes;
  if (from < transfer->fresh) from = transfer->fresh;
  if (until > end) until = end;
  for (; from < until; from += 4096) *(volatile char *)from = 0;
  atomic_store(&run->regions[region], TOUCHED);
}

/* The next region that nobody has been at, if there is one left. */
static int touch_one(run *run) {
  if (!run->regions || atomic_load(&run->next_region) >= run->region_count) return 0;
  int64_t region = atomic_fetch_add(&run->next_region, 1);
  if (region >= run->region_count) return 0;
  touch(run, region);
  return 1;
}

/* Before something is written to an array. Who would have to wait for a region goes on to later ones. */
static void touch_all(run *run, const char *array, int64_t bytes) {
  const transfer *transfer = run->transfer;
  if (!run->regions || array < transfer->fresh || array >= transfer->fresh + transfer->fresh_bytes) return;
  int64_t region = (array - run->first_region) / REGION_BYTES;
  for (; region <= (array + bytes - 1 - run->first_region) / REGION_BYTES; region++) {
    touch(run, region);
    for (int idle = 0; atomic_load(&run->regions[region]) != TOUCHED;)
      if (!touch_one(run)) lola_pool_rest(idle++);
  }
}

static void move_bytes(run *run, const part *part, char *array, char *place, int64_t bytes) {
  if (part->output) touch_all(run, array, bytes);
  if (!part->output)
    memcpy(place, array, (size_t)bytes);
  else if (bytes >= STREAMED_BYTES)
    stream_bytes(array, place, bytes);
  else
    memcpy(array, place, (size_t)bytes);
}

static void move_tokens(run *run, const part *part, char *array, char *place, int64_t tokens) {
  int64_t token = row_bytes(part);
  int whole = part->heads == 1 || part->strides[2] == part->line;
  if (whole && (tokens == 1 || part->strides[1] == token)) {
    move_bytes(run, part, array, place, tokens * token);
    return;
  }
  for (int64_t t = 0; t < tokens; t++, place += token, array += part->strides[1]) {
    if (whole)
      move_bytes(run, part, array, place, token);
    else
      for (int64_t h = 0; h < part->heads; h++)
        move_bytes(run, part, array + h * part->strides[2], place + h * part->line, part->line);
  }
}

static void do_task(run *run, const piece *piece, const task *task) {
  const part *part = task->part;
  char *place = task->place;
  for (int64_t row = task->row, end = row + task->rows; row < end;) {
    int64_t b = row / piece->tokens, t = row % piece->tokens, tokens = piece->tokens - t;
    if (tokens > end - row) tokens = end - row;
    move_tokens(run, part, part->data + b * part->strides[0] + (piece->first + t) * part->strides[1], place, tokens);
    place += tokens * row_bytes(part);
    row += tokens;
  }
}

static void publish(flow *flow) {
  for (int i = 0; i < flow->at_work.count; i++)
    atomic_store_explicit(&flow->order[i], flow->at_work.blocks[i] - flow->blocks, memory_order_relaxed);
  atomic_store_explicit(&flow->count, flow->at_work.count, memory_order_relaxed);
  atomic_fetch_add(&flow->version, 1);
}

/* Lets the workers have a block's tasks. */
static void give_out(flow *flow, block *block) {
  join(&flow->at_work, block);
  atomic_store(&block->left, block->count);
  atomic_store(&block->open, block->count == MOST_TASKS ? UINT64_MAX : (UINT64_C(1) << block->count) - 1);
  publish(flow);
}

/* Takes a block back whose tasks are done. */
static block *take_back(flow *flow, int at) {
  block *block = leave(&flow->at_work, at);
  publish(flow);
  return block;
}

/* Takes one of these tasks of a block; -1: none of them is left. */
static int take(block *block, uint64_t tasks) {
  uint64_t found;
  while ((found = atomic_load_explicit(&block->open, memory_order_relaxed) & tasks)) {
    int at = __builtin_ctzll(found);
    if (atomic_fetch_and(&block->open, ~(UINT64_C(1) << at)) >> at & 1) return at;
  }
  return -1;
}

/* Does a task of a direction, of the oldest block that has one: of a worker's own, or any (`own` is NULL). */
static int do_one(run *run, lookout *lookout, const uint64_t *own) {
  flow *flow = lookout->flow;
  uint64_t version = atomic_load(&flow->version);
  if (version == lookout->emptied) return 0;
  int count = atomic_load_explicit(&flow->count, memory_order_relaxed);
  for (int i = 0; i < count; i++) {
    int at = atomic_load_explicit(&flow->order[i], memory_order_relaxed);
    block *block = &flow->blocks[at];
    int task = take(block, own ? own[at] : UINT64_MAX);
    if (task < 0) continue;
    do_task(run, &block->piece, &block->tasks[task]);
    atomic_fetch_sub(&block->left, 1);
    return 1;
  }
  if (!own) lookout->emptied = version;
  return 0;
}

/* A worker's own tasks are the same ones of a block each time. To fill a block takes twice as long where another CPU's
 * caches hold it. What comes back the device has written: there all tasks are alike. */
static void choose_own(int worker, int workers, uint64_t *own) {
  for (int i = worker; i < BLOCKS * MOST_TASKS; i += workers) own[i / MOST_TASKS] |= UINT64_C(1) << i % MOST_TASKS;
}

/* Workers take from both directions in turn, so that neither waits for the other, and others' tasks where nothing else
 * is to be done. One in five sees to fresh memory first, the others last. */
static void help(run *run, int worker) {
  lookout in = {&run->staging->in, 0}, out = {&run->staging->out, 0};
  uint64_t own[BLOCKS] = {0};
  int touches = worker % 5 == 0;
  choose_own(worker - 1, run->width - 1, own);
  for (int idle = 0, turn = worker; !atomic_load(&run->over);) {
    if ((touches && touch_one(run)) || (turn % 2 && do_one(run, &out, NULL)) || do_one(run, &in, own) ||
        do_one(run, &out, NULL) || do_one(run, &in, NULL) || touch_one(run)) {
      turn++;
      idle = 0;
    } else {
      lola_pool_rest(idle++);
    }
  }
}

/* --- blocks --------------------------------------------------------------------------------- */

static const part *next_part(const transfer_plan *plan, flow *flow, int output) {
  for (; flow->part < plan->count; flow->part++, flow->row = 0) {
    const part *part = &plan->parts[flow->part];
    if (part->output == output && row_bytes(part) && flow->row < plan->batch * flow->piece.tokens) return part;
  }
  return NULL;
}

/* Cuts the next block off the arrays; one is free. */
static block *next_block(const run *run, flow *flow) {
  const transfer_plan *plan = run->plan;
  block *block = leave(&flow->free, flow->free.count - 1);
  int output = flow == &run->staging->out;
  const part *part;
  block->piece = flow->piece;
  block->count = 0;
  block->from = block->until = 0;
  while ((part = next_part(plan, flow, output)) && block->count < MOST_TASKS) {
    int64_t bytes = row_bytes(part), rows = TASK_BYTES / bytes, left = plan->batch * flow->piece.tokens - flow->row;
    int64_t offset = transfer_offset(plan, flow->part, flow->piece.tokens) + flow->row * bytes;
    if (rows < 1) rows = 1;
    if (rows > left) rows = left;
    if (!block->count) block->from = offset;
    if (offset + rows * bytes - block->from > block->size) break;
    block->tasks[block->count++] = (task){part, flow->row, rows, block->host + (offset - block->from)};
    block->until = offset + rows * bytes;
    flow->row += rows;
  }
  block->ends = !part;
  if (block->ends) {
    advance(plan, &flow->piece);
    flow->part = 0;
    flow->row = 0;
  }
  return block;
}

static char *memory_of(const run *run, int64_t piece) {
  return run->transfer->memory + piece % PIECES * pitch_of(run->plan);
}

static lola_status copy_block(const run *run, const block *block, int output, void *stream) {
  const device *device = run->transfer->device;
  char *memory = memory_of(run, block->piece.index) + block->from;
  return device->api->copy(device->number, output ? block->host : memory, output ? memory : block->host,
                           block->until - block->from, output ? LOLA_COPY_TO_HOST : LOLA_COPY_TO_DEVICE, stream,
                           run->message);
}

/* --- the thread that talks to the device ---------------------------------------------------- */

static lola_status record(const run *run, void *event, void *stream) {
  const device *device = run->transfer->device;
  return device->api->event_record(device->number, event, stream, run->message);
}

static lola_status wait_for(const run *run, void *event, void *stream) {
  const device *device = run->transfer->device;
  return device->api->event_wait(device->number, event, stream, run->message);
}

/* 1 if the device is through with a flow's oldest copy. */
static int has_copied(run *run, const flow *flow) {
  const device *device = run->transfer->device;
  int done = 0;
  if (!flow->copying.count) return 0;
  run->status = device->api->event_query(device->number, flow->copying.blocks[0]->copied, &done, run->message);
  return !run->status && done;
}

/* Queues a filled block's copy, in a place of a piece that was worked on. */
static lola_status send_block(run *run, block *block) {
  struct staging *staging = run->staging;
  void *stream = staging->in.stream;
  lola_status status = LOLA_OK;
  for (; run->opened <= block->piece.index && !status; run->opened++)
    if (run->opened >= PIECES) status = wait_for(run, staging->computed[run->opened % PIECES], stream);
  if (!status) status = copy_block(run, block, 0, stream);
  if (!status) status = record(run, block->copied, stream);
  join(&staging->in.copying, block);
  return status;
}

/* Counts the pieces of which every block was sent, after each: the work waits for the one that was sent last. */
static lola_status count_arrived(run *run) {
  const flow *in = &run->staging->in;
  int64_t arrived = in->at_work.count ? in->at_work.blocks[0]->piece.index : in->piece.index;
  if (arrived == run->arrived) return LOLA_OK;
  run->arrived = arrived;
  return wait_for(run, in->copying.blocks[in->copying.count - 1]->copied, run->transfer->stream);
}

/* Queues the work on a piece that will have arrived, in a place whose results were copied out. */
static lola_status compute_piece(run *run) {
  const transfer *transfer = run->transfer;
  struct staging *staging = run->staging;
  int64_t at = run->computed % PIECES;
  lola_status status = LOLA_OK;
  if (run->computed >= PIECES && !transfer->only) status = wait_for(run, staging->returned[at], transfer->stream);
  if (!status && transfer->work)
    status = transfer->work(transfer->context, &run->next, memory_of(run, run->computed), run->message);
  if (!status) status = record(run, staging->computed[at], transfer->stream);
  advance(run->plan, &run->next);
  run->computed++;
  return status;
}

/* Queues the copy of results to a free block. It waits for the work on its own piece, which may be queued long before
 * there is a free block, and for no later one's: that waits in turn for an earlier piece's results to leave. */
static lola_status fetch_block(run *run) {
  struct staging *staging = run->staging;
  block *block = next_block(run, &staging->out);
  lola_status status = LOLA_OK;
  for (; run->returning <= block->piece.index && !status; run->returning++)
    status = wait_for(run, staging->computed[run->returning % PIECES], staging->out.stream);
  if (!status) status = copy_block(run, block, 1, staging->out.stream);
  if (!status) status = record(run, block->copied, staging->out.stream);
  if (!status && block->ends) status = record(run, staging->returned[block->piece.index % PIECES], staging->out.stream);
  join(&staging->out.copying, block);
  return status;
}

static int is_over(const flow *flow) { return !flow->piece.tokens && !flow->at_work.count && !flow->copying.count; }

/* These three do what can be done without waiting, and return how much that was. */
static int move_in(run *run) {
  flow *in = &run->staging->in;
  int moved = 0;
  for (; has_copied(run, in); moved++) join(&in->free, leave(&in->copying, 0));
  for (; in->piece.tokens && in->free.count; moved++) give_out(in, next_block(run, in));
  for (int i = 0; i < in->at_work.count && !run->status;) {
    const block *block = in->at_work.blocks[i];
    if (atomic_load(&block->left) || block->piece.index >= run->computed + PIECES) {
      i++;
    } else {
      run->status = send_block(run, take_back(in, i));
      if (!run->status) run->status = count_arrived(run);
      moved++;
    }
  }
  return moved;
}

static int move_on(run *run) {
  const flow *out = &run->staging->out;
  int moved = 0;
  for (; !run->status && run->computed < run->arrived; moved++) {
    if (!run->transfer->only && out->piece.index <= run->computed - PIECES) break;
    run->status = compute_piece(run);
  }
  return moved;
}

static int move_out(run *run) {
  flow *out = &run->staging->out;
  int moved = 0;
  for (int i = 0; i < out->at_work.count;) {
    if (atomic_load(&out->at_work.blocks[i]->left)) {
      i++;
    } else {
      join(&out->free, take_back(out, i));
      moved++;
    }
  }
  for (; !run->status && out->free.count && out->piece.tokens && out->piece.index < run->computed; moved++)
    run->status = fetch_block(run);
  for (; !run->status && has_copied(run, out); moved++) give_out(out, leave(&out->copying, 0));
  return moved;
}

static void lead(run *run) {
  flow *in = &run->staging->in, *out = &run->staging->out;
  lookout in_lookout = {in, 0}, out_lookout = {out, 0};
  int only = run->transfer->only, idle = 0;
  while (!run->status && !((only == ONLY_OUT || is_over(in)) && (only == ONLY_IN || is_over(out)))) {
    int moved = only == ONLY_OUT ? 0 : move_in(run);
    moved += move_on(run);
    moved += only == ONLY_IN ? 0 : move_out(run);
    if (moved || do_one(run, &in_lookout, NULL) || do_one(run, &out_lookout, NULL))
      idle = 0;
    else
      lola_pool_rest(idle++);
  }
  atomic_store(&run->over, 1);
}

/* A pool that is in use elsewhere runs all of these on the calling thread, one after the other. */
static void take_part(void *context, int64_t index, int worker) {
  (void)index;
  if (worker)
    help(context, worker);
  else
    lead(context);
}

/* --- a transfer ----------------------------------------------------------------------------- */

static lola_status open_staging(device *device, lola_message *message) {
  const lola_cuda_api *api = device->api;
  if (!device->staging) {
    device->staging = aligned_alloc(CACHE_LINE, sizeof *device->staging);
    if (!device->staging) return lola_out_of_memory(message, sizeof *device->staging);
    memset(device->staging, 0, sizeof *device->staging);
  }
  struct staging *staging = device->staging;
  lola_status status = LOLA_OK;
  flow *flows[] = {&staging->in, &staging->out};
  for (int i = 0; i < 2; i++) {
    if (!status && !flows[i]->stream) status = api->stream_create(device->number, &flows[i]->stream, message);
    for (int j = 0; j < BLOCKS && !status; j++)
      if (!flows[i]->blocks[j].copied) status = api->event_create(device->number, &flows[i]->blocks[j].copied, message);
  }
  void **events[2 * PIECES + 1] = {&staging->ready};
  for (int i = 0; i < PIECES; i++) {
    events[1 + 2 * i] = &staging->computed[i];
    events[2 + 2 * i] = &staging->returned[i];
  }
  for (int i = 0; i < 2 * PIECES + 1 && !status; i++)
    if (!*events[i]) status = api->event_create(device->number, events[i], message);
  return status;
}

static int64_t bytes_of(const transfer_plan *plan, int output, int64_t *largest_row) {
  int64_t bytes = 0;
  for (int i = 0; i < plan->count; i++) {
    const part *part = &plan->parts[i];
    if (part->output != output) continue;
    if (row_bytes(part) > *largest_row) *largest_row = row_bytes(part);
    bytes += plan->batch * plan->tokens * row_bytes(part);
  }
  return bytes;
}

/* Room for `bytes` in all that go one way, and for at least a row in each block. */
static lola_status open_flow(const run *run, flow *flow, int64_t bytes, int64_t largest_row) {
  const lola_cuda_api *api = run->transfer->device->api;
  int64_t size = largest_row > BLOCK_BYTES ? largest_row : BLOCK_BYTES;
  lola_status status = LOLA_OK;
  for (int i = 0; i < (bytes > BLOCK_BYTES / 2 ? BLOCKS : 1) && !status; i++) {
    block *block = &flow->blocks[i];
    if (block->size >= size) continue;
    api->release_host(block->host);
    block->host = NULL;
    block->size = 0;
    status = api->allocate_host(size, (void **)&block->host, run->message);
    if (!status) block->size = size;
  }
  flow->free.count = flow->at_work.count = flow->copying.count = 0;
  for (int i = 0; i < BLOCKS; i++) {
    atomic_store(&flow->blocks[i].open, 0); /* a transfer that failed may have left some */
    if (flow->blocks[i].size >= size) join(&flow->free, &flow->blocks[i]);
  }
  flow->piece = run->next;
  flow->part = 0;
  flow->row = 0;
  publish(flow);
  return status;
}

static void do_all(run *run, const block *block) {
  for (int i = 0; i < block->count; i++) do_task(run, &block->piece, &block->tasks[i]);
}

/* Little: one block each way, all in the order of the caller's stream. */
static lola_status run_at_once(run *run) {
  const transfer *transfer = run->transfer;
  const device *device = transfer->device;
  const block *in = next_block(run, &run->staging->in), *out = next_block(run, &run->staging->out);
  lola_status status = LOLA_OK;
  if (transfer->only != ONLY_OUT) {
    do_all(run, in);
    status = copy_block(run, in, 0, transfer->stream);
  }
  if (!status && transfer->work) status = transfer->work(transfer->context, &run->next, transfer->memory, run->message);
  if (!status && transfer->only != ONLY_IN) status = copy_block(run, out, 1, transfer->stream);
  if (!status) status = device->api->synchronize(device->number, transfer->stream, run->message);
  if (!status && transfer->only != ONLY_IN) do_all(run, out);
  return status;
}

/* Fresh memory of many regions is touched by one thread each; without the memory to count them by it is not. */
static void open_regions(run *run) {
  const transfer *transfer = run->transfer;
  if (transfer->fresh_bytes < 2 * REGION_BYTES) return;
  int64_t before = (intptr_t)transfer->fresh % REGION_BYTES;
  run->first_region = transfer->fresh - before;
  run->region_count = (before + transfer->fresh_bytes + REGION_BYTES - 1) / REGION_BYTES;
  run->regions = calloc((size_t)run->region_count, sizeof *run->regions);
}

static lola_status run_overlapped(run *run, int64_t bytes) {
  struct staging *staging = run->staging;
  int width = lola_pool_width(bytes / TASK_BYTES + 1);
  width -= width / 8; /* a worker that loses its CPU to another thread holds up a whole block */
  run->width = width < MOST_WORKERS ? width : MOST_WORKERS;
  run->status = record(run, staging->ready, run->transfer->stream);
  if (!run->status) run->status = wait_for(run, staging->ready, staging->in.stream);
  if (!run->status) run->status = wait_for(run, staging->ready, staging->out.stream);
  if (run->width > 1) open_regions(run);
  if (!run->status) lola_pool_run(run->width, run->width, take_part, run);
  free(run->regions);
  return run->status;
}

lola_status transfer_run(const transfer *transfer, lola_message *message) {
  device *device = transfer->device;
  const transfer_plan *plan = transfer->plan;
  lola_status status = open_staging(device, message);
  if (status) return status;
  run run = {
      .transfer = transfer, .plan = plan, .staging = device->staging, .next = first_piece(plan), .message = message};
  int64_t largest_row = 0, in = bytes_of(plan, 0, &largest_row), out = bytes_of(plan, 1, &largest_row);
  if (transfer->only == ONLY_OUT) run.arrived = plan->pieces;
  status = open_flow(&run, &run.staging->in, in, largest_row);
  if (!status) status = open_flow(&run, &run.staging->out, out, largest_row);
  if (status) return status;
  status = in + out <= AT_ONCE_BYTES ? run_at_once(&run) : run_overlapped(&run, in + out);
  void *streams[] = {run.staging->in.stream, transfer->stream, run.staging->out.stream};
  lola_message ignored;
  for (int i = 0; i < 3 && status; i++) device->api->synchronize(device->number, streams[i], &ignored);
  return status;
}
