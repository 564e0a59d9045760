/* Products of float32 activations with weights of four, eight or 32 bits.
 *
 * Those of 32 bits are floats, row by row. Of the others, a weight is scale * code + minimum, where the code is unsigned and 32 inputs of an output share the two float16
 * numbers. A row of activations becomes int8, with a scale for the same 32 inputs: the largest magnitude is 127. Where
 * that is far above the row's usual magnitude, what was rounded off is kept, too, as int8 with a scale 254 times as
 * fine: few groups hold such outliers, but most of the error would come from them.
 *
 * The products of a group are summed exactly, as integers; groups are summed in float32, in their order. So what is
 * computed for a row does not depend on the other rows, nor on how many threads there are.
 *
 * Weights are laid out in tiles of 16 outputs, one after the other. A tile holds its groups in order; a group holds
 * its codes, as vectors of 16 outputs x 4 inputs, then 16 scales and 16 minima. Of four bits, two vectors share their
 * bytes: inputs 0..15 of the group are the lower halves, inputs 16..31 the upper ones.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "team.h"
#include "vectors.h"

enum {
    GROUP = 32,     /* inputs that share a scale */
    MOST_ROWS = 8,  /* that a weight in a register is multiplied with at once: rows of a block */
    FINER = 254,    /* how many of the second scale make the first */
    TASKS_PER_THREAD = 6,
};
static const float OUTLIER = 4; /* a group's largest magnitude, in root mean squares of its row, from which on it has
                                 * a second term; chosen by measured divergence from float32 */
static const float TOLERANCE = 0.02f; /* of a step of a grid */

/* A weight matrix [outputs, inputs]. */
struct weights {
    void *data; /* tiles, or rows of floats */
    int64_t inputs, outputs, bits;
};

/* 32 activations of one row. */
struct activations {
    int8_t values[GROUP];
    float scale, sum; /* sum: of the values times the scale, second terms included */
};

/* What is left of 32 activations. */
struct remainder {
    int8_t values[GROUP];
    float scale;
    int32_t row; /* of the block */
};

/* Up to MOST_ROWS rows of activations: as floats, and rounded, group by group. */
struct block {
    int rows;
    float *prepared;           /* [rows, groups * GROUP] */
    struct activations *first; /* [groups, rows] */
    struct remainder *second;  /* of those groups that have one, in order */
    int32_t *second_ends;      /* [groups]: where each group's end */
};

struct product {
    const struct weights *weights;
    const float *x, *residual; /* [rows, inputs]; residual may be null */
    const float *norm, *bias;  /* [inputs] and [outputs], or null */
    float eps;
    float *total, *out; /* [rows, inputs] if there is a residual, and [rows, outputs] or, gated, half of that */
    int rows, gated, tiles_per_task;
    struct block *blocks;
};

INLINE int ceil_div(int64_t a, int64_t b) { return (int)((a + b - 1) / b); }
INLINE int num_groups(const struct weights *w) { return ceil_div(w->inputs, GROUP); }
INLINE int num_tiles(const struct weights *w) { return ceil_div(w->outputs, LANES); }
INLINE int code_bytes(int bits) { return LANES * GROUP * bits / 8; }
INLINE int group_bytes(int bits) { return code_bytes(bits) + 2 * LANES * 2; }

static __m512 lanes_of(const float *from, int count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }

/* ---- activations ---- */

/* Add the residual, normalise, and pad with zeros. Returns the root mean square of the row. */
static float prepare_row(const struct product *p, int r, float *to) {
    int inputs = (int)p->weights->inputs, padded = num_groups(p->weights) * GROUP;
    const float *x = p->x + (int64_t)r * inputs;
    if (p->residual) {
        const float *residual = p->residual + (int64_t)r * inputs;
        float *total = p->total + (int64_t)r * inputs;
        for (int i = 0; i < inputs; i++) total[i] = x[i] + residual[i];
        x = total;
    }
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < padded; i += LANES) {
        __m512 lanes = lanes_of(x + i, inputs - i);
        squares = _mm512_fmadd_ps(lanes, lanes, squares);
        _mm512_storeu_ps(to + i, lanes);
    }
    float mean = _mm512_reduce_add_ps(squares) / (float)inputs;
    if (!p->norm) return sqrtf(mean);
    __m512 inverse = _mm512_set1_ps(1 / sqrtf(mean + p->eps));
    squares = _mm512_setzero_ps();
    for (int i = 0; i < inputs; i += LANES) {
        __m512 lanes = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(to + i), inverse), lanes_of(p->norm + i, inputs - i));
        squares = _mm512_fmadd_ps(lanes, lanes, squares);
        _mm512_storeu_ps(to + i, lanes);
    }
    return sqrtf(_mm512_reduce_add_ps(squares) / (float)inputs);
}

/* Round 32 numbers to `first` and, if their largest magnitude is above `usual`, what is left of them to `second`.
 * Returns whether it is. */
static int quantize_group(const float *x, float usual, struct activations *first, struct remainder *second) {
    __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + LANES);
    float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    __m512 inverse = _mm512_set1_ps(largest > 0 ? 127 / largest : 0);
    low = _mm512_mul_ps(low, inverse);
    high = _mm512_mul_ps(high, inverse);
    __m512i low_code = _mm512_cvtps_epi32(low), high_code = _mm512_cvtps_epi32(high);
    _mm_storeu_si128((__m128i *)first->values, _mm512_cvtsepi32_epi8(low_code));
    _mm_storeu_si128((__m128i *)(first->values + LANES), _mm512_cvtsepi32_epi8(high_code));
    first->scale = largest / 127;
    first->sum = first->scale * (float)_mm512_reduce_add_epi32(_mm512_add_epi32(low_code, high_code));
    if (largest <= usual) return 0;
    const __m512 finer = _mm512_set1_ps(FINER);
    low_code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(low, _mm512_cvtepi32_ps(low_code)), finer));
    high_code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(high, _mm512_cvtepi32_ps(high_code)), finer));
    _mm_storeu_si128((__m128i *)second->values, _mm512_cvtsepi32_epi8(low_code));
    _mm_storeu_si128((__m128i *)(second->values + LANES), _mm512_cvtsepi32_epi8(high_code));
    second->scale = first->scale / FINER;
    first->sum += second->scale * (float)_mm512_reduce_add_epi32(_mm512_add_epi32(low_code, high_code));
    return 1;
}

static void prepare_task(const void *context, int task) {
    const struct product *p = context;
    const struct block *block = p->blocks + task;
    int groups = num_groups(p->weights), count = 0;
    float usual[MOST_ROWS];
    for (int r = 0; r < block->rows; r++)
        usual[r] = OUTLIER * prepare_row(p, task * MOST_ROWS + r, block->prepared + (int64_t)r * groups * GROUP);
    if (p->weights->bits == 32) return;
    for (int g = 0; g < groups; g++) {
        for (int r = 0; r < block->rows; r++) {
            struct activations *first = block->first + (int64_t)g * block->rows + r;
            const float *x = block->prepared + ((int64_t)r * groups + g) * GROUP;
            block->second[count].row = r;
            count += quantize_group(x, usual[r], first, block->second + count);
        }
        block->second_ends[g] = count;
    }
}

/* ---- products ---- */

INLINE __m512i four_inputs(const int8_t *values) {
    int32_t word;
    memcpy(&word, values, 4);
    return _mm512_set1_epi32(word);
}

/* A group's eight vectors of codes, one after the other. */
INLINE __m512i codes(const int bits, const uint8_t *group, int i) {
    const __m512i lower = _mm512_set1_epi8(15);
    if (bits == 8) return _mm512_loadu_si512(group + 64 * i);
    __m512i both = _mm512_loadu_si512(group + 64 * (i % 4));
    return _mm512_and_si512(i < 4 ? both : _mm512_srli_epi16(both, 4), lower);
}

/* One tile times `rows` rows of activations: sums [rows] of 16 outputs. */
INLINE void multiply(const int rows, const int bits, const uint8_t *tile, int groups, const struct block *block,
                     __m512 *sums) {
    const struct activations *a = block->first;
    const struct remainder *next = block->second;
    __m512 sum[MOST_ROWS], rest[MOST_ROWS];
    UNROLL for (int r = 0; r < rows; r++) sum[r] = rest[r] = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++, tile += group_bytes(bits), a += rows) {
        const uint8_t *numbers = tile + code_bytes(bits);
        __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)numbers));
        __m512 minima = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(numbers + 2 * LANES)));
        __m512i dot[MOST_ROWS];
        UNROLL for (int r = 0; r < rows; r++) dot[r] = _mm512_setzero_si512();
        UNROLL for (int i = 0; i < 8; i++) {
            __m512i weights = codes(bits, tile, i);
            UNROLL for (int r = 0; r < rows; r++)
                dot[r] = _mm512_dpbusd_epi32(dot[r], weights, four_inputs(a[r].values + 4 * i));
        }
        UNROLL for (int r = 0; r < rows; r++) {
            sum[r] = _mm512_fmadd_ps(minima, _mm512_set1_ps(a[r].sum), sum[r]);
            __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(a[r].scale));
            sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r]), scale, sum[r]);
        }
        for (const struct remainder *end = block->second + block->second_ends[g]; next < end; next++) {
            __m512i fine = _mm512_setzero_si512();
            UNROLL for (int i = 0; i < 8; i++)
                fine = _mm512_dpbusd_epi32(fine, codes(bits, tile, i), four_inputs(next->values + 4 * i));
            __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(next->scale));
            rest[next->row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(fine), scale, rest[next->row]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) sums[r] = _mm512_add_ps(sum[r], rest[r]);
}

/* The sums of the lanes of four vectors. */
INLINE __m128 sum_lanes(const __m512 *v) {
    __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    __m512 four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

/* Four rows of floats times `rows` rows of activations: sums, for each of these the four and room for twelve more. */
INLINE void multiply_floats(const int rows, const float *const *w, int inputs, const float *x, int x_stride,
                            float *sums) {
    __m512 sum[4][4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int n = 0; n < 4; n++) sum[r][n] = _mm512_setzero_ps();
    for (int i = 0; i < inputs; i += LANES) {
        __mmask16 inside = first_lanes(inputs - i);
        __m512 weights[4];
        UNROLL for (int n = 0; n < 4; n++) weights[n] = _mm512_maskz_loadu_ps(inside, w[n] + i);
        UNROLL for (int r = 0; r < rows; r++) {
            __m512 lanes = _mm512_loadu_ps(x + r * x_stride + i);
            UNROLL for (int n = 0; n < 4; n++) sum[r][n] = _mm512_fmadd_ps(weights[n], lanes, sum[r][n]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) _mm_storeu_ps(sums + r * LANES, sum_lanes(sum[r]));
}

/* 16 outputs of floats times a block of rows. */
static void multiply_float_block(const struct weights *w, int tile, int groups, const struct block *block,
                                 __m512 *sums) {
    int inputs = (int)w->inputs, stride = groups * GROUP;
    float *out = (float *)sums;
    for (int lane = 0; lane < LANES; lane += 4) {
        const float *rows[4];
        for (int n = 0; n < 4; n++) {
            int64_t output = tile * LANES + lane + n;
            rows[n] = (const float *)w->data + (output < w->outputs ? output : w->outputs - 1) * inputs;
        }
        for (int r = 0; r < block->rows; r += 4) {
            const float *x = block->prepared + (int64_t)r * stride;
            float *to = out + r * LANES + lane;
            switch (block->rows - r) {
                case 1: multiply_floats(1, rows, inputs, x, stride, to); break;
                case 2: multiply_floats(2, rows, inputs, x, stride, to); break;
                case 3: multiply_floats(3, rows, inputs, x, stride, to); break;
                default: multiply_floats(4, rows, inputs, x, stride, to);
            }
        }
    }
}

#define CASE(rows) \
    case rows: \
        multiply(rows, 4, tile, groups, block, sums); \
        return; \
    case rows + 64: \
        multiply(rows, 8, tile, groups, block, sums); \
        return;

static void multiply_block(const struct weights *w, int number, int groups, const struct block *block, __m512 *sums) {
    if (w->bits == 32) {
        multiply_float_block(w, number, groups, block, sums);
        return;
    }
    const uint8_t *tile = (const uint8_t *)w->data + (int64_t)number * groups * group_bytes((int)w->bits);
    switch (block->rows + (w->bits == 4 ? 0 : 64)) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
    }
}

/* One tile times a block of rows, and the bias. */
static void tile_sums(const struct product *p, int tile, const struct block *block, __m512 *sums) {
    const struct weights *w = p->weights;
    multiply_block(w, tile, num_groups(w), block, sums);
    if (p->bias) {
        __m512 bias = lanes_of(p->bias + tile * LANES, (int)w->outputs - tile * LANES);
        for (int r = 0; r < block->rows; r++) sums[r] = _mm512_add_ps(sums[r], bias);
    }
}

static void product_task(const void *context, int task) {
    const struct product *p = context;
    int tiles = num_tiles(p->weights), width = (int)p->weights->outputs;
    if (p->gated) tiles /= 2, width /= 2;
    for (int tile = task * p->tiles_per_task; tile < tiles && tile < (task + 1) * p->tiles_per_task; tile++) {
        __mmask16 inside = first_lanes(width - tile * LANES);
        for (int first = 0; first < p->rows; first += MOST_ROWS) {
            const struct block *block = p->blocks + first / MOST_ROWS;
            __m512 sums[MOST_ROWS], up[MOST_ROWS];
            tile_sums(p, tile, block, sums);
            if (p->gated) {
                tile_sums(p, tile + tiles, block, up);
                for (int r = 0; r < block->rows; r++) sums[r] = _mm512_mul_ps(silu_16(sums[r]), up[r]);
            }
            float *out = p->out + (int64_t)first * width + tile * LANES;
            for (int r = 0; r < block->rows; r++) _mm512_mask_storeu_ps(out + (int64_t)r * width, inside, sums[r]);
        }
    }
}

/* Memory of the calling thread, kept from call to call. */
static char *scratch(size_t bytes) {
    static __thread char *memory;
    static __thread size_t size;
    if (bytes > size) {
        free(memory);
        size = bytes;
        memory = malloc(size);
    }
    return memory;
}

/* Lay out p->blocks. */
static void allocate(struct product *p) {
    size_t groups = (size_t)num_groups(p->weights), blocks = (size_t)ceil_div(p->rows, MOST_ROWS);
    size_t items = (size_t)p->rows * groups, in_block = MOST_ROWS * groups;
    char *memory = scratch(items * (GROUP * sizeof(float) + sizeof(struct activations) + sizeof(struct remainder)) +
                           blocks * (sizeof(struct block) + groups * sizeof(int32_t)) + sizeof(struct remainder));
    p->blocks = (struct block *)memory;
    float *prepared = (float *)(p->blocks + blocks);
    struct activations *first = (struct activations *)(prepared + items * GROUP);
    struct remainder *second = (struct remainder *)(first + items);
    int32_t *ends = (int32_t *)(second + items + 1); /* the last group's remainder is written before it is counted */
    for (size_t b = 0; b < blocks; b++) {
        int left = p->rows - (int)b * MOST_ROWS;
        struct block *block = p->blocks + b;
        block->rows = left < MOST_ROWS ? left : MOST_ROWS;
        block->prepared = prepared + b * in_block * GROUP;
        block->first = first + b * in_block;
        block->second = second + b * in_block;
        block->second_ends = ends + b * groups;
    }
}

/* out = norm(x + residual) W^T + b, gated or not; see `struct product`. */
void hornbeam_product(const struct weights *w, const float *x, const float *residual, const float *norm, float eps,
                      const float *bias, float *total, float *out, int rows, int gated) {
    struct product p = {
        .weights = w, .x = x, .residual = residual, .norm = norm, .bias = bias, .eps = eps, .total = total, .out = out,
        .rows = rows, .gated = gated,
    };
    int tiles = num_tiles(w) / (gated ? 2 : 1);
    p.tiles_per_task = ceil_div(tiles, team_size() * TASKS_PER_THREAD);
    allocate(&p);
    team_run(prepare_task, &p, ceil_div(rows, MOST_ROWS));
    team_run(product_task, &p, ceil_div(tiles, p.tiles_per_task));
}

/* ---- packing ---- */

/* Whether all numbers of a group are `low` and whole multiples of `scale`, but for errors of arithmetic. */
static int on_grid(const float *group, int count, float low, float scale) {
    const __m512 start = _mm512_set1_ps(low), per_step = _mm512_set1_ps(1 / scale);
    for (int i = 0; i < count; i += LANES) {
        __m512 place = _mm512_mul_ps(_mm512_sub_ps(lanes_of(group + i, count - i), start), per_step);
        __m512 whole = _mm512_roundscale_ps(place, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __m512 error = _mm512_abs_ps(_mm512_sub_ps(place, whole));
        if (_mm512_mask_cmp_ps_mask(first_lanes(count - i), error, _mm512_set1_ps(TOLERANCE), _CMP_GE_OQ)) return 0;
    }
    return 1;
}

/* The numbers of a group of weights: those of the grid that they lie on, if there is one of a common kind and of at
 * most 2^bits values (whether there is, is returned); else of 2^bits values from the smallest to the largest. */
static int find_grid(const float *group, int count, int bits, float *scale, float *minimum) {
    float low = group[0], high = group[0];
    for (int i = 1; i < count; i++) {
        low = group[i] < low ? group[i] : low;
        high = group[i] > high ? group[i] : high;
    }
    *minimum = low;
    *scale = 0;
    if (high == low) return 1;
    *scale = (high > -low ? high : -low) / 127; /* integers of eight bits whose largest magnitude is 127 */
    if (bits == 8 && on_grid(group, count, low, *scale)) return 1;
    for (int steps = bits == 4 ? 15 : 31; steps > 0; steps--) {
        *scale = (high - low) / (float)steps;
        if (on_grid(group, count, low, *scale)) return 1;
    }
    *scale = (high - low) / (float)((1 << bits) - 1);
    return 0;
}

struct packing {
    const struct weights *weights;
    const float *values; /* [outputs, inputs] */
    int *misfits;        /* counted up if there is a group that lies on no grid of 2^bits values */
};

static void fit_task(const void *context, int tile) {
    const struct packing *p = context;
    int inputs = (int)p->weights->inputs;
    for (int n = tile * LANES; n < (tile + 1) * LANES && n < p->weights->outputs; n++)
        for (int i = 0; i < inputs && !__atomic_load_n(p->misfits, __ATOMIC_RELAXED); i += GROUP) {
            float scale, minimum;
            int count = inputs - i < GROUP ? inputs - i : GROUP;
            if (!find_grid(p->values + (int64_t)n * inputs + i, count, (int)p->weights->bits, &scale, &minimum))
                __atomic_fetch_add(p->misfits, 1, __ATOMIC_RELAXED);
        }
}

static void pack_task(const void *context, int tile) {
    const struct packing *p = context;
    int inputs = (int)p->weights->inputs, bits = (int)p->weights->bits, groups = num_groups(p->weights);
    uint8_t *out = (uint8_t *)p->weights->data + (int64_t)tile * groups * group_bytes(bits);
    memset(out, 0, (size_t)groups * group_bytes(bits));
    for (int g = 0; g < groups; g++, out += group_bytes(bits)) {
        int count = inputs - g * GROUP < GROUP ? inputs - g * GROUP : GROUP;
        uint16_t *numbers = (uint16_t *)(out + code_bytes(bits));
        for (int lane = 0; lane < LANES && tile * LANES + lane < p->weights->outputs; lane++) {
            const float *group = p->values + ((int64_t)tile * LANES + lane) * inputs + g * GROUP;
            float scale, minimum;
            find_grid(group, count, bits, &scale, &minimum);
            numbers[lane] = _cvtss_sh(scale, _MM_FROUND_TO_NEAREST_INT);
            numbers[LANES + lane] = _cvtss_sh(minimum, _MM_FROUND_TO_NEAREST_INT);
            scale = _cvtsh_ss(numbers[lane]);
            minimum = _cvtsh_ss(numbers[LANES + lane]);
            for (int i = 0; i < count; i++) {
                float place = scale > 0 ? rintf((group[i] - minimum) / scale) : 0;
                int most = (1 << bits) - 1, code = place < 0 ? 0 : place > (float)most ? most : (int)place;
                int byte = (bits == 4 ? i % LANES : i) / 4 * 64 + lane * 4 + i % 4;
                out[byte] |= (uint8_t)(bits == 4 && i >= LANES ? code << 4 : code);
            }
        }
    }
}

/* Whether every group of `values` [outputs, inputs] lies on a grid of 2^bits values, as w says. */
int hornbeam_fits(const struct weights *w, const float *values) {
    int misfits = 0;
    struct packing p = {.weights = w, .values = values, .misfits = &misfits};
    team_run(fit_task, &p, num_tiles(w));
    return !misfits;
}

/* Fill w->data from `values` [outputs, inputs]. */
void hornbeam_pack(const struct weights *w, const float *values) {
    struct packing p = {.weights = w, .values = values};
    team_run(pack_task, &p, num_tiles(w));
}

/* Bytes that w->data needs. */
int64_t hornbeam_packed_bytes(const struct weights *w) {
    return (int64_t)num_tiles(w) * num_groups(w) * group_bytes((int)w->bits);
}
