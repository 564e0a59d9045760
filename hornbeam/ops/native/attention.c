/* Between the projection of queries, keys and values and that of attention's output: norms, rotation, the write to the
 * paged cache, and attention over it, all in float32.
 *
 * Queries that read the same keys are attended to in blocks: for 16 keys at a time, these are transposed once, and each
 * query's scores are then a vector. A query's arithmetic (keys in order, 16 at a time, counted from the first that it
 * may see in its table) does not depend on which block it is in.
 */
#include <math.h>
#include <string.h>

#include "team.h"
#include "vectors.h"

enum {
    MOST_QUERIES = 32, /* heads times tokens of a block */
    MOST_HEAD = 256,   /* features of a head */
    TOKENS_PER_TASK = 16,
};

/* ---- queries, keys and values of a step's tokens ---- */

struct store {
    float *q, *k, *v; /* [tokens, heads, size]: heads follow each other, tokens are so many floats apart: */
    int64_t q_stride, k_stride, v_stride;
    const float *q_norm, *k_norm; /* [size] or null */
    const float *table;           /* [positions, rotated]: cosines, then sines; or null */
    const int64_t *positions;     /* [tokens] */
    float *k_pages, *v_pages;     /* [places, kv_heads, size] */
    const int64_t *places;        /* [tokens] */
    int64_t tokens, heads, kv_heads, size, rotated;
    float eps;
};

static void norm_head(float *x, const float *weight, int size, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < size; i += LANES) {
        __m512 lanes = _mm512_loadu_ps(x + i);
        squares = _mm512_fmadd_ps(lanes, lanes, squares);
    }
    __m512 inverse = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / (float)size + eps));
    for (int i = 0; i < size; i += LANES) {
        __m512 normed = _mm512_mul_ps(_mm512_loadu_ps(x + i), inverse);
        _mm512_storeu_ps(x + i, _mm512_mul_ps(normed, _mm512_loadu_ps(weight + i)));
    }
}

static void rotate_head(float *restrict first, float *restrict second, const float *restrict turn, int half) {
    for (int i = 0; i < half; i++) {
        float a = first[i], b = second[i], cosine = turn[i], sine = turn[half + i];
        first[i] = a * cosine - b * sine;
        second[i] = b * cosine + a * sine;
    }
}

static void prepare_heads(const struct store *s, float *x, int64_t heads, const float *norm, int64_t token) {
    int size = (int)s->size, half = (int)s->rotated / 2;
    const float *turn = s->table ? s->table + s->positions[token] * s->rotated : 0;
    for (int64_t h = 0; h < heads; h++, x += size) {
        if (norm) norm_head(x, norm, size, s->eps);
        if (turn) rotate_head(x, x + half, turn, half);
    }
}

static void store_task(const void *context, int task) {
    const struct store *s = context;
    int64_t width = s->kv_heads * s->size;
    for (int64_t t = (int64_t)task * TOKENS_PER_TASK; t < s->tokens && t < (int64_t)(task + 1) * TOKENS_PER_TASK; t++) {
        float *k = s->k + t * s->k_stride;
        prepare_heads(s, s->q + t * s->q_stride, s->heads, s->q_norm, t);
        prepare_heads(s, k, s->kv_heads, s->k_norm, t);
        memcpy(s->k_pages + s->places[t] * width, k, (size_t)width * sizeof *k);
        memcpy(s->v_pages + s->places[t] * width, s->v + t * s->v_stride, (size_t)width * sizeof *k);
    }
}

void hornbeam_store(const struct store *s) {
    team_run(store_task, s, (int)((s->tokens + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK));
}

/* ---- attention ---- */

/* Queries are listed block by block. */
struct attention {
    const int32_t *page_tables; /* [slots, table_len] */
    const int32_t *block_ends;  /* [blocks]: where in the list each block ends */
    const int32_t *common;      /* [blocks]: keys that all of a block's queries read from the first one's table: a
                                 * multiple of 16, or all keys */
    const int32_t *tokens;      /* [queries]: row among q and out */
    const int32_t *slots;       /* [queries] */
    const int32_t *lens;        /* [queries]: keys up to the query's own */
    int64_t table_len, blocks, heads, kv_heads, size, page_size, window; /* window: 0 for none */
    float scale;
};

struct attend {
    const struct attention *plan;
    const float *q; /* tokens are q_stride apart, their heads adjacent */
    int64_t q_stride;
    const float *k_pages, *v_pages; /* [places, kv_heads, size] */
    const float *sinks;             /* [heads] or null */
    float *out;                     /* [tokens, heads, size] */
};

/* What is known of a block's queries after some keys: heads of the first query, then of the next. */
struct progress {
    float largest[MOST_QUERIES], total[MOST_QUERIES]; /* score, and sum of 2^(score - largest) */
    float out[MOST_QUERIES * MOST_HEAD] __attribute__((aligned(64)));
};

/* 16 features of 16 tokens' keys as vectors of one feature each. */
INLINE void transpose16(const float *const *rows, int feature, float *to) {
    __m512 a[LANES], b[LANES];
    UNROLL for (int i = 0; i < LANES; i++) a[i] = _mm512_loadu_ps(rows[i] + feature);
    UNROLL for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < LANES; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
        a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
    /* a[4 i + j] holds features j, 4 + j, 8 + j, 12 + j of tokens 4 i .. 4 i + 3 */
    UNROLL for (int j = 0; j < 4; j++) {
        __m512 low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
        __m512 low2 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd), high2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_store_ps(to + j * LANES, _mm512_shuffle_f32x4(low, high, 0x88));
        _mm512_store_ps(to + (8 + j) * LANES, _mm512_shuffle_f32x4(low, high, 0xdd));
        _mm512_store_ps(to + (4 + j) * LANES, _mm512_shuffle_f32x4(low2, high2, 0x88));
        _mm512_store_ps(to + (12 + j) * LANES, _mm512_shuffle_f32x4(low2, high2, 0xdd));
    }
}

/* Where the keys of 16 tokens stand, and their values. Of those that are not among `from` .. `to` - 1 nothing may be
 * read: one that is stands in for them. */
static void find_rows(const struct attention *p, const int32_t *table, int first, int from, int to, int64_t *offsets) {
    for (int i = 0; i < LANES; i++) {
        int token = first + i < from ? from : first + i < to ? first + i : to - 1;
        int64_t place = table[token / p->page_size] * p->page_size + token % p->page_size;
        offsets[i] = place * p->kv_heads * p->size;
    }
}

/* Scores of `count` query heads against 16 keys; two chains of sums hide the latency of one. */
INLINE void score(const int count, const float *const *q, const float *keys, int size, __m512 *scores) {
    __m512 even[4], odd[4];
    UNROLL for (int i = 0; i < count; i++) even[i] = odd[i] = _mm512_setzero_ps();
    for (int f = 0; f < size; f += 2) {
        __m512 key = _mm512_load_ps(keys + f * LANES), next = _mm512_load_ps(keys + (f + 1) * LANES);
        UNROLL for (int i = 0; i < count; i++) {
            even[i] = _mm512_fmadd_ps(_mm512_set1_ps(q[i][f]), key, even[i]);
            odd[i] = _mm512_fmadd_ps(_mm512_set1_ps(q[i][f + 1]), next, odd[i]);
        }
    }
    UNROLL for (int i = 0; i < count; i++) scores[i] = _mm512_add_ps(even[i], odd[i]);
}

/* out = out * shrink + weights . values, of `vectors` vectors of features */
INLINE void add_values(const int vectors, float shrink, const float *weights, const float *const *values, float *out) {
    __m512 sums[4];
    UNROLL for (int i = 0; i < vectors; i++)
        sums[i] = _mm512_mul_ps(_mm512_load_ps(out + i * LANES), _mm512_set1_ps(shrink));
    for (int t = 0; t < LANES; t++) {
        __m512 weight = _mm512_set1_ps(weights[t]);
        UNROLL for (int i = 0; i < vectors; i++)
            sums[i] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(values[t] + i * LANES), sums[i]);
    }
    UNROLL for (int i = 0; i < vectors; i++) _mm512_store_ps(out + i * LANES, sums[i]);
}

/* Let one query head see the keys that `seen` says, given their scores. */
static void take(struct progress *progress, int query, int size, __mmask16 seen, __m512 scores,
                 const float *const *values) {
    float largest = _mm512_mask_reduce_max_ps(seen, scores), *out = progress->out + query * size;
    if (largest < progress->largest[query]) largest = progress->largest[query];
    __m512 weights = _mm512_maskz_mov_ps(seen, exp2_16(_mm512_sub_ps(scores, _mm512_set1_ps(largest))));
    float shrink = _mm512_cvtss_f32(exp2_16(_mm512_set1_ps(progress->largest[query] - largest)));
    progress->total[query] = progress->total[query] * shrink + _mm512_reduce_add_ps(weights);
    progress->largest[query] = largest;
    float spread[LANES] __attribute__((aligned(64)));
    _mm512_store_ps(spread, weights);
    const float *rows[LANES];
    memcpy(rows, values, sizeof rows);
    int f = 0;
    for (; f + 4 * LANES <= size; f += 4 * LANES) {
        add_values(4, shrink, spread, rows, out + f);
        for (int t = 0; t < LANES; t++) rows[t] += 4 * LANES;
    }
    for (; f < size; f += LANES) {
        add_values(1, shrink, spread, rows, out + f);
        for (int t = 0; t < LANES; t++) rows[t] += LANES;
    }
}

/* Let queries `begin` .. `end` - 1 of the list, whose heads' progress begins at `base`, see the keys `from` .. `to` - 1
 * of the first one's table. */
static void see(const struct attend *a, int begin, int end, int kv_head, int from, int to, int base,
                struct progress *progress) {
    const struct attention *p = a->plan;
    int size = (int)p->size, group = (int)(p->heads / p->kv_heads), count = (end - begin) * group;
    const int32_t *table = p->page_tables + p->slots[begin] * p->table_len;
    __m512 scale = _mm512_set1_ps(p->scale * 1.44269504f); /* powers are of 2 */
    float keys[MOST_HEAD * LANES] __attribute__((aligned(64)));
    for (int first = from / LANES * LANES; first < to; first += LANES) {
        int64_t offsets[LANES];
        const float *rows[LANES], *values[LANES];
        find_rows(p, table, first, from, to, offsets);
        for (int i = 0; i < LANES; i++) {
            rows[i] = a->k_pages + offsets[i] + kv_head * size;
            values[i] = a->v_pages + offsets[i] + kv_head * size;
        }
        for (int f = 0; f < size; f += LANES) transpose16(rows, f, keys + f * LANES);
        for (int query = 0; query < count; query += 4) {
            const float *q[4];
            __m512 scores[4];
            int some = count - query < 4 ? count - query : 4;
            for (int i = 0; i < some; i++)
                q[i] = a->q + p->tokens[begin + (query + i) / group] * a->q_stride +
                       (kv_head * group + (query + i) % group) * size;
            switch (some) {
                case 1: score(1, q, keys, size, scores); break;
                case 2: score(2, q, keys, size, scores); break;
                case 3: score(3, q, keys, size, scores); break;
                default: score(4, q, keys, size, scores);
            }
            for (int i = 0; i < some; i++) {
                int len = p->lens[begin + (query + i) / group], last = len < to ? len : to;
                __mmask16 seen = first_lanes(last - first);
                if (p->window && len - p->window > first) seen &= ~first_lanes(len - (int)p->window - first);
                if (seen) take(progress, base + query + i, size, seen, _mm512_mul_ps(scores[i], scale), values);
            }
        }
    }
}

static void finish(const struct attend *a, int token, int kv_head, int query, const struct progress *progress) {
    const struct attention *p = a->plan;
    int size = (int)p->size, group = (int)(p->heads / p->kv_heads);
    float *out = a->out + ((int64_t)token * p->heads + kv_head * group) * size;
    for (int h = 0; h < group; h++, query++, out += size) {
        __m512 inverse = _mm512_set1_ps(1 / progress->total[query]);
        for (int f = 0; f < size; f += LANES)
            _mm512_storeu_ps(out + f, _mm512_mul_ps(_mm512_load_ps(progress->out + query * size + f), inverse));
    }
}

/* The first key that a query of length `len` sees. */
static int first_key(const struct attention *p, int len) {
    return p->window && len > p->window ? len - (int)p->window : 0;
}

/* One block and key-value head: first what its queries read together, then what each reads alone. */
static void attend_task(const void *context, int task) {
    const struct attend *a = context;
    const struct attention *p = a->plan;
    int block = task / (int)p->kv_heads, kv_head = task % (int)p->kv_heads, group = (int)(p->heads / p->kv_heads);
    int begin = block ? p->block_ends[block - 1] : 0, end = p->block_ends[block], common = p->common[block];
    struct progress progress;
    for (int query = 0; query < (end - begin) * group; query++) {
        float sink = a->sinks ? a->sinks[kv_head * group + query % group] * 1.44269504f : -1e30f;
        progress.largest[query] = sink;
        progress.total[query] = a->sinks ? 1 : 0;
    }
    memset(progress.out, 0, sizeof(float) * (size_t)((end - begin) * group * p->size));
    int first = p->lens[begin];
    for (int i = begin; i < end; i++) first = p->lens[i] < first ? p->lens[i] : first;
    see(a, begin, end, kv_head, first_key(p, first), common, 0, &progress);
    for (int i = begin; i < end; i++) {
        int own = first_key(p, p->lens[i]);
        if (p->lens[i] > common)
            see(a, i, i + 1, kv_head, own > common ? own : common, p->lens[i], (i - begin) * group, &progress);
        finish(a, p->tokens[i], kv_head, (i - begin) * group, &progress);
    }
}

void hornbeam_attend(const struct attention *plan, const float *q, int64_t q_stride, const float *k_pages,
                     const float *v_pages, const float *sinks, float *out) {
    struct attend a = {plan, q, q_stride, k_pages, v_pages, sinks, out};
    team_run(attend_task, &a, (int)(plan->blocks * plan->kv_heads));
}
