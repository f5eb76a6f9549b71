/* The C interface of libclipfast: what clipfast/kernels/native.py calls through ctypes.
 *
 * Every function returns 0, or a code whose text clipfast_error_text() gives: negative codes are CLIPFAST_ERROR_*,
 * positive ones are those of the CUDA runtime (cudaError_t). Nothing exits, throws, prints or allocates device memory.
 * Sizes are int64; strides are in elements. Bump CLIPFAST_ABI_VERSION with any change here, there and in native.py.
 */
#ifndef CLIPFAST_H
#define CLIPFAST_H

#include <stdint.h>

#define CLIPFAST_ABI_VERSION 1

#if defined(__GNUC__)
#define CLIPFAST_API __attribute__((visibility("default")))
#else
#define CLIPFAST_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum clipfast_dtype { CLIPFAST_FLOAT32 = 0, CLIPFAST_FLOAT16 = 1, CLIPFAST_BFLOAT16 = 2, CLIPFAST_UINT8 = 3 };

enum clipfast_error {
    CLIPFAST_OK = 0,
    CLIPFAST_ERROR_NULL = -1,  /* a required pointer is null, or only one of a pair is given */
    CLIPFAST_ERROR_SIZE = -2,  /* a size is negative or zero, too large for a launch, or struct_size is not ours */
    CLIPFAST_ERROR_DTYPE = -3, /* an unknown dtype, or uint8 weights */
    CLIPFAST_ERROR_PLAN = -4,  /* the plan asked for does not take these arguments */
    CLIPFAST_ERROR_MEMORY = -5 /* the host twin found no memory */
};

/* How a call is computed. AUTO takes a tensor-core plan where one takes the arguments, else GENERIC. */
enum clipfast_plan {
    CLIPFAST_PLAN_AUTO = 0,
    CLIPFAST_PLAN_GENERIC = 1, /* any arguments; float32 multiply-adds without tensor cores */
    CLIPFAST_PLAN_SPLIT = 2,   /* tensor cores; ln_pre, if any, in a second kernel on the rounded tokens */
    CLIPFAST_PLAN_FUSED = 3    /* tensor cores; a block holds whole tokens: ln_pre on the float32 sums; width <= 1024 */
};

/* tokens[b, 0] = class + position[0];  tokens[b, 1 + g] = weight . pixels of patch g + position[1 + g];
 * out = LayerNorm(tokens) over the features if norm_weight is given, else tokens.
 *
 * L = 1 + (height / patch) * (width / patch); pixels past the last whole patch are not read. uint8 pixels become
 * (pixel / 255 - mean) / std. Pixels are rounded to the weight's dtype, products summed in float32, class and position
 * added in float32, and the result rounded once (plan SPLIT with ln_pre: once before and once after the LayerNorm).
 * SPLIT and FUSED take float16 and bfloat16 weights, 3 channels, patch 14, 16 or 32, features a multiple of 8, and
 * weight and out at multiples of 16 bytes.
 */
typedef struct clipfast_patch_embed_args {
    int64_t struct_size;               /* sizeof(clipfast_patch_embed_args) */
    const void *images;                /* [batch, channels, height, width] of image_dtype, strides below, the last 1 */
    const void *weight;                /* [features, channels, patch, patch] of weight_dtype, contiguous */
    const float *class_embedding;      /* [features] */
    const float *positional_embedding; /* [L, features], contiguous */
    const float *mean;                 /* [channels]; read for uint8 images only, may be null for others */
    const float *std;                  /* [channels]; likewise */
    const float *norm_weight;          /* [features], or null for no ln_pre */
    const float *norm_bias;            /* [features]; null exactly if norm_weight is */
    void *out;                         /* [batch, L, features] of weight_dtype, contiguous */
    int64_t batch;                     /* may be 0: nothing is read or written */
    int64_t channels;
    int64_t height; /* of an image, in pixels */
    int64_t width;  /* of an image, in pixels */
    int64_t patch;  /* P, in pixels */
    int64_t features;
    int64_t stride_batch;   /* of images, in elements */
    int64_t stride_channel; /* of images, in elements */
    int64_t stride_row;     /* of images, in elements */
    float eps;              /* of ln_pre */
    int32_t image_dtype;    /* clipfast_dtype */
    int32_t weight_dtype;   /* clipfast_dtype, of weight and out */
    int32_t plan;           /* clipfast_plan */
} clipfast_patch_embed_args;

/* CLIPFAST_ABI_VERSION of the built library. */
CLIPFAST_API int clipfast_abi_version(void);

/* What a returned code means; never null, static storage. */
CLIPFAST_API const char *clipfast_error_text(int code);

/* Enqueues the work on a stream and returns without waiting; pointers are of device memory.
 * device: the CUDA device index of pointers and stream, current during the call only.
 * stream: cudaStream_t, null for the default stream.
 */
CLIPFAST_API int clipfast_patch_embed(const clipfast_patch_embed_args *args, int device, void *stream);

/* The same result computed on the CPU by running the kernels' own code, block by block and lane by lane, with the
 * tensor cores emulated. For tests: it is slow. Pointers are of host memory; AUTO prefers FUSED.
 * reversed: nonzero runs warps and lanes from the last to the first; a missing barrier then shows in the result.
 */
CLIPFAST_API int clipfast_patch_embed_host(const clipfast_patch_embed_args *args, int reversed);

#ifdef __cplusplus
}
#endif

#endif
