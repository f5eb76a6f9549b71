/* The C interface of libclipfast_cpu: what clipfast/kernels/cpu_library.py calls through ctypes.
 *
 * Every function returns 0, or a code whose text clipfast_cpu_error_text() gives. Nothing exits, throws or prints. Bump
 * CLIPFAST_CPU_ABI_VERSION with any change here and there.
 */
#ifndef CLIPFAST_CPU_H
#define CLIPFAST_CPU_H

#include <stdint.h>

#define CLIPFAST_CPU_ABI_VERSION 10
/* bytes that clipfast_cpu_read reads at a time */
#define CLIPFAST_CPU_READ_BLOCK 1024
#define CLIPFAST_CPU_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum clipfast_cpu_dtype { CLIPFAST_CPU_FLOAT32 = 0, CLIPFAST_CPU_BFLOAT16 = 1 };

enum clipfast_cpu_error {
    CLIPFAST_CPU_OK = 0,
    CLIPFAST_CPU_ERROR_ARGUMENT = -1,     /* a null pointer, a bad size, an unknown dtype, activation, layout or struct_size */
    CLIPFAST_CPU_ERROR_INSTRUCTIONS = -2, /* this CPU has not the instructions asked for */
    CLIPFAST_CPU_ERROR_MEMORY = -3,       /* no memory for what is computed in between */
    CLIPFAST_CPU_ERROR_INDEX = -4         /* an index that is no row of its sequence, or a sequence without rows */
};

/* Which of the compiled forms runs: the best this CPU has, or one by name. */
enum clipfast_cpu_instructions {
    CLIPFAST_CPU_BEST = 0,
    CLIPFAST_CPU_BASELINE = 1, /* what the compiler assumes of any CPU */
    CLIPFAST_CPU_AVX2 = 2,     /* x86-64-v3 */
    CLIPFAST_CPU_AVX512 = 3,   /* x86-64-v4 */
    CLIPFAST_CPU_AVX512_BF16 = 4
};

enum clipfast_cpu_activation {
    CLIPFAST_CPU_NONE = 0,
    CLIPFAST_CPU_QUICK_GELU = 1, /* x sigmoid(1.702 x) */
    CLIPFAST_CPU_GELU = 2        /* x times the normal distribution's share below x */
};

/* out[t, h] = sum over s of softmax over s of (scale q[t, h] . k[s, h]) v[s, h], s over the rows of t's sequence, and no
 * further than t itself if causal. Everything is float32 but the rows, which are rounded once at the end.
 */
typedef struct clipfast_cpu_attention_args {
    int64_t struct_size;    /* sizeof(clipfast_cpu_attention_args) */
    const void *qkv;        /* [T, 3, heads, width] of dtype, contiguous */
    void *out;              /* [T, heads, width] of dtype, contiguous */
    const int32_t *offsets; /* [sequences + 1]: first row of each sequence, the last entry T; never decreasing */
    int64_t sequences;      /* may be 0: nothing is read or written */
    int32_t heads;
    int32_t width; /* of a head */
    int32_t dtype; /* clipfast_cpu_dtype */
    int32_t causal;
    int32_t threads;      /* OpenMP's, at most */
    int32_t instructions; /* clipfast_cpu_instructions */
    float scale;
} clipfast_cpu_attention_args;

/* How the weight of a linear layer is in memory. */
enum clipfast_cpu_layout {
    CLIPFAST_CPU_ROWS = 0,       /* [columns, terms] */
    CLIPFAST_CPU_TRANSPOSED = 1, /* [terms, columns] */
    CLIPFAST_CPU_PACKED = 2      /* by clipfast_cpu_pack, for this dtype, shape and form; that is not checked */
};

/* out = activation(x weight^T + bias) + residual, or with LayerNorm(x) for x. Sums and all that follows are float32, rounded
 * once at the end; LayerNorm is computed in float32 and rounded to dtype.
 */
typedef struct clipfast_cpu_linear_args {
    int64_t struct_size;     /* sizeof(clipfast_cpu_linear_args) */
    const void *x;           /* [rows, terms] of dtype, contiguous like all of these */
    const void *weight;      /* [columns, terms], or as `layout` says */
    const void *bias;        /* [columns], or null for none */
    const void *residual;    /* [rows, columns], or null for none */
    const void *norm_weight; /* [terms] float32; null: x as it is */
    const void *norm_bias;   /* [terms] float32, if there is a norm_weight */
    void *out;               /* [rows, columns] */
    int64_t rows;
    int64_t columns;
    int64_t terms;
    int32_t dtype;           /* clipfast_cpu_dtype */
    int32_t activation;      /* clipfast_cpu_activation */
    int32_t layout;          /* clipfast_cpu_layout */
    int32_t threads;         /* OpenMP's, at most */
    int32_t instructions;    /* clipfast_cpu_instructions */
    float eps;               /* of LayerNorm */
} clipfast_cpu_linear_args;

/* A weight in the order in which clipfast_cpu_linear multiplies it, so that no call has to turn it. */
typedef struct clipfast_cpu_pack_args {
    int64_t struct_size; /* sizeof(clipfast_cpu_pack_args) */
    const void *weight;  /* [columns, terms] of dtype, contiguous */
    void *packed;        /* of *bytes bytes, 64-byte aligned; or null: nothing is packed */
    void *bytes;         /* an int64_t: how many that takes */
    int64_t columns;
    int64_t terms;
    int32_t dtype;        /* clipfast_cpu_dtype */
    int32_t threads;      /* OpenMP's, at most */
    int32_t instructions; /* clipfast_cpu_instructions */
} clipfast_cpu_pack_args;

/* out[b, h] = sum over s of softmax over s of (q[b, h] . k[s, h] / sqrt(width of a head)) v[s, h] with the projections inside:
 * q = q_weight query[b] + q_bias, k = k_weight tokens[s], v = v_weight tokens[s] + v_bias. Sums of float32 are float64, those
 * of bfloat16 float32; softmax is float32; all is rounded once at the end.
 */
typedef struct clipfast_cpu_attention_pool_args {
    int64_t struct_size;    /* sizeof(clipfast_cpu_attention_pool_args) */
    const void *query;      /* [sequences, terms] of dtype, contiguous like all of these; null with an index */
    const void *tokens;     /* [T, terms] */
    const int64_t *index;   /* [sequences]: the rows of tokens that are the queries, each of its own sequence; or null */
    const void *norm_weight; /* with an index, [terms] float32: of a LayerNorm of tokens before all this, rounded to dtype */
    const void *norm_bias;
    const int32_t *offsets; /* [sequences + 1]: first row of each sequence, the last entry T; increasing */
    const void *q_weight;   /* [inner, terms] */
    const void *q_bias;     /* [inner], or null for none */
    const void *k_weight;
    const void *v_weight;
    const void *v_bias; /* [inner], or null for none */
    void *out;          /* [sequences, inner] */
    int64_t sequences;  /* may be 0: nothing is read or written */
    int64_t terms;
    int64_t inner;        /* a multiple of heads */
    int32_t heads;
    int32_t dtype;        /* clipfast_cpu_dtype */
    int32_t threads;      /* OpenMP's, at most */
    int32_t instructions; /* clipfast_cpu_instructions */
    float eps;            /* of the LayerNorm */
} clipfast_cpu_attention_pool_args;

/* A residual attention block: y = x + out_proj(attention(qkv(norm_1(x)))), out = y + fc2(activation(fc1(norm_2(y)))). What is
 * computed in between is rounded to dtype, as the operators one by one would return it.
 */
typedef struct clipfast_cpu_block_args {
    int64_t struct_size;       /* sizeof(clipfast_cpu_block_args) */
    const void *norm_1_weight; /* [width] float32, as all of the LayerNorms' */
    const void *norm_1_bias;
    const void *qkv_weight; /* [3 width, width] of dtype, contiguous like all of these, or as its layout says */
    const void *qkv_bias;   /* or null for none, as all of the linear layers' */
    const void *out_weight; /* [width, width] */
    const void *out_bias;
    const void *norm_2_weight;
    const void *norm_2_bias;
    const void *fc1_weight; /* [hidden, width] */
    const void *fc1_bias;
    const void *fc2_weight; /* [width, hidden] */
    const void *fc2_bias;
    int64_t hidden;
    int32_t qkv_layout; /* clipfast_cpu_layout, as the next three */
    int32_t out_layout;
    int32_t fc1_layout;
    int32_t fc2_layout;
    int32_t heads;
    int32_t activation; /* clipfast_cpu_activation */
    float scale;        /* of attention's scores */
    float norm_1_eps;
    float norm_2_eps;
} clipfast_cpu_block_args;

/* Blocks one after the other, each of what the one before it returned.
 *
 * With an index, the last computes one row of each sequence, none of which is empty, and the row attends to all of it: the
 * last one's qkv_weight lies in rows, and its scale and causal are not read. These rows may be projected:
 * out = projection(norm(rows)).
 */
typedef struct clipfast_cpu_blocks_args {
    int64_t struct_size;              /* sizeof(clipfast_cpu_blocks_args) */
    const clipfast_cpu_block_args *blocks; /* [count] */
    const void *x;                    /* [T, width] of dtype, contiguous like all of these; not written */
    void *between;                    /* [T, width], not x: what the last block reads, only with an index and two blocks or more */
    void *out;                        /* not x. [T, width]; with an index [sequences, width], projected [sequences, columns] */
    const int32_t *offsets;           /* [sequences + 1]: as clipfast_cpu_attention_args has them */
    const int64_t *index;             /* [sequences]: a row of each sequence; or null */
    const void *norm_weight;          /* [width] float32; this and the next are read with a projection only */
    const void *norm_bias;
    const void *projection; /* [columns, width], or as its layout says; null for none, and without an index */
    int64_t count;          /* at least 1 */
    int64_t sequences;      /* may be 0: nothing is read or written */
    int64_t width;
    int64_t columns;
    int32_t projection_layout; /* clipfast_cpu_layout */
    int32_t dtype;             /* clipfast_cpu_dtype */
    int32_t causal;
    int32_t threads;      /* OpenMP's, at most */
    int32_t instructions; /* clipfast_cpu_instructions */
    float norm_eps;
} clipfast_cpu_blocks_args;

/* Tokens of images: the class token and each patch's pixels . weight, plus positions; then a LayerNorm. Sums are float32; the
 * products are rounded to dtype, and the tokens once more at the end.
 */
typedef struct clipfast_cpu_patch_embed_args {
    int64_t struct_size;         /* sizeof(clipfast_cpu_patch_embed_args) */
    const void *images;          /* [batch, channels, height, width] of dtype, bytes if there is a mean; contiguous like all */
    const void *weight;          /* [features, channels, patch, patch] of dtype */
    const void *class_embedding; /* [features] of dtype */
    const void *positional_embedding; /* [L, features] of dtype, L = 1 + (height / patch) (width / patch), each rounded down */
    const double *mean;          /* [channels]: byte b becomes (b / 255 - mean) / std; null exactly if std is */
    const double *std;
    const void *norm_weight; /* [features] float32, or null for no LayerNorm */
    const void *norm_bias;   /* [features] float32; null exactly if norm_weight is */
    void *out;               /* [batch, L, features] of dtype */
    int64_t batch;           /* may be 0: nothing is read or written */
    int64_t channels;
    int64_t height; /* of an image, in pixels */
    int64_t width;
    int64_t patch; /* side of a patch, in pixels */
    int64_t features;
    int32_t dtype;        /* clipfast_cpu_dtype */
    int32_t threads;      /* OpenMP's, at most */
    int32_t instructions; /* clipfast_cpu_instructions */
    float eps;            /* of the LayerNorm */
} clipfast_cpu_patch_embed_args;

/* Multiplications and additions of numbers that stay in registers, for a benchmark to time: no product can be faster in
 * these instructions. A form without instructions for bfloat16 multiplies float32 for it.
 */
typedef struct clipfast_cpu_peak_args {
    int64_t struct_size;  /* sizeof(clipfast_cpu_peak_args) */
    int64_t steps;        /* of each thread; how long it takes is proportional to them */
    void *flops;          /* an int64_t: operations of all threads, a multiplication and an addition counting as two */
    int32_t dtype;        /* clipfast_cpu_dtype */
    int32_t threads;      /* OpenMP's, at most */
    int32_t instructions; /* clipfast_cpu_instructions */
} clipfast_cpu_peak_args;

/* A buffer read once, each thread its own part, for a benchmark to time: what is only read comes no faster. */
typedef struct clipfast_cpu_read_args {
    int64_t struct_size;  /* sizeof(clipfast_cpu_read_args) */
    const void *data;     /* anything; may be null if bytes is 0 */
    int64_t bytes;        /* a multiple of CLIPFAST_CPU_READ_BLOCK */
    int64_t ahead;        /* bytes between what is read and what is asked for; 0: left to the CPU */
    int32_t threads;      /* OpenMP's, at most */
    int32_t instructions; /* clipfast_cpu_instructions */
} clipfast_cpu_read_args;

/* CLIPFAST_CPU_ABI_VERSION of the built library. */
CLIPFAST_CPU_API int clipfast_cpu_abi_version(void);

/* The best clipfast_cpu_instructions that this CPU has and the library was built for. */
CLIPFAST_CPU_API int clipfast_cpu_best(void);

/* What a returned code means; never null, static storage. */
CLIPFAST_CPU_API const char *clipfast_cpu_error_text(int code);

/* Softmax attention of packed rows; returns when it is done. */
CLIPFAST_CPU_API int clipfast_cpu_attention(const clipfast_cpu_attention_args *args);

/* One query for each sequence; returns when it is done. */
CLIPFAST_CPU_API int clipfast_cpu_attention_pool(const clipfast_cpu_attention_pool_args *args);

/* A linear layer; returns when it is done. */
CLIPFAST_CPU_API int clipfast_cpu_linear(const clipfast_cpu_linear_args *args);

/* Residual attention blocks; returns when they are done. */
CLIPFAST_CPU_API int clipfast_cpu_blocks(const clipfast_cpu_blocks_args *args);

/* Packs a weight; returns when it is done. */
CLIPFAST_CPU_API int clipfast_cpu_pack(const clipfast_cpu_pack_args *args);

/* Embeds patches; returns when it is done. */
CLIPFAST_CPU_API int clipfast_cpu_patch_embed(const clipfast_cpu_patch_embed_args *args);

/* The loop of fused multiply-adds; returns when it is done. */
CLIPFAST_CPU_API int clipfast_cpu_peak(const clipfast_cpu_peak_args *args);

/* Reads a buffer; returns when it is done. */
CLIPFAST_CPU_API int clipfast_cpu_read(const clipfast_cpu_read_args *args);

#ifdef __cplusplus
}
#endif

#endif
