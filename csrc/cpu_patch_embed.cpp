// The patches of images, embedded, with class token, positions and LayerNorm, compiled once for each instruction set
// (CMakeLists.txt).
//
// Some images at a time, so that what is computed in between is in the cache where it is read: their pixels are laid out
// patch by patch (bytes become numbers on the way), clipfast_cpu_linear multiplies them, and each token is put together and
// normalised in one pass.
#include <cstring>
#include <omp.h>

#include "clipfast_cpu.h"
#include "cpu_memory.h"
#include "cpu_norm.h"

namespace {

// patches that are multiplied together, unless one image has more
constexpr int64_t TOGETHER = 1024;
// values of a byte
constexpr int64_t LEVELS = 256;

template <typename T>
class Embedding {
  public:
    explicit Embedding(const clipfast_cpu_patch_embed_args &args)
        : args(args), across(args.width / args.patch), patches(args.height / args.patch * across),
          terms(args.channels * args.patch * args.patch) {}

    int run() const {
        if (args.batch == 0) return CLIPFAST_CPU_OK;
        // about as many images each time
        const int64_t parts = units(args.batch, patches < TOGETHER ? TOGETHER / (patches > 0 ? patches : 1) : 1);
        const int64_t most = units(args.batch, parts);
        const int64_t of_table = args.mean == nullptr ? 0 : up(args.channels * LEVELS * sizeof(T), 64);
        const int64_t of_pixels = up(most * patches * terms * sizeof(T), 64);
        const int64_t of_products = up(most * patches * args.features * sizeof(T), 64);
        const int64_t of_thread = apart(4 * args.features);
        static thread_local Memory kept;
        char *memory = static_cast<char *>(kept.reserve(of_table + of_pixels + of_products + args.threads * of_thread));
        if (memory == nullptr) return CLIPFAST_CPU_ERROR_MEMORY;
        const auto take = [&](int64_t bytes) {
            memory += bytes;
            return memory - bytes;
        };
        T *const table = reinterpret_cast<T *>(take(of_table)), *const pixels = reinterpret_cast<T *>(take(of_pixels));
        T *const products = reinterpret_cast<T *>(take(of_products));
        if (args.mean != nullptr) fill_table(table);
        for (int64_t part = 0; part < parts; part++) {
            const int64_t first = args.batch * part / parts, last = args.batch * (part + 1) / parts;
            unfold(first, last, table, pixels);
            const int code = multiply((last - first) * patches, pixels, products);
            if (code != CLIPFAST_CPU_OK) return code;
            finish(first, last, products, memory, of_thread);
        }
        return CLIPFAST_CPU_OK;
    }

  private:
    const clipfast_cpu_patch_embed_args &args;
    const int64_t across, patches, terms;

    // table[channel][byte]: (byte / 255 - mean) / std in float32, rounded to T
    void fill_table(T *table) const {
        for (int64_t c = 0; c < args.channels; c++)
            for (int64_t level = 0; level < LEVELS; level++) {
                const float number = (float(level) / 255.0f - float(args.mean[c])) / float(args.std[c]);
                store_some(table + c * LEVELS + level, Floats{} + number, 1);
            }
    }

    // pixels[image][patch][channel][row][column] of images [first, last)
    void unfold(int64_t first, int64_t last, const T *table, T *pixels) const {
        const int64_t size = args.patch;
#pragma omp parallel for num_threads(args.threads) schedule(static)
        for (int64_t i = 0; i < (last - first) * patches; i++) {
            const int64_t image = first + i / patches, down = i % patches / across * size, right = i % patches % across * size;
            T *to = pixels + i * terms;
            for (int64_t c = 0; c < args.channels; c++)
                for (int64_t row = 0; row < size; row++, to += size) {
                    const int64_t place = ((image * args.channels + c) * args.height + down + row) * args.width + right;
                    if (args.mean == nullptr) {
                        memcpy(to, static_cast<const T *>(args.images) + place, size * sizeof(T));
                        continue;
                    }
                    const uint8_t *const bytes = static_cast<const uint8_t *>(args.images) + place;
                    for (int64_t x = 0; x < size; x++) to[x] = table[c * LEVELS + bytes[x]];
                }
        }
    }

    int multiply(int64_t rows, const T *pixels, T *products) const {
        clipfast_cpu_linear_args call = {};
        call.struct_size = sizeof call;
        call.x = pixels;
        call.weight = args.weight;
        call.out = products;
        call.rows = rows;
        call.columns = args.features;
        call.terms = terms;
        call.dtype = args.dtype;
        call.threads = args.threads;
        call.instructions = args.instructions;
        return clipfast_cpu_linear(&call);
    }

    // Class token or product, plus its position; then LayerNorm of that. In float32, and rounded once.
    // memory: `of_thread` bytes for each thread
    void finish(int64_t first, int64_t last, const T *products, char *memory, int64_t of_thread) const {
        const int64_t n = args.features, places = patches + 1;
        const Norm norm{static_cast<const float *>(args.norm_weight), static_cast<const float *>(args.norm_bias), args.eps};
#pragma omp parallel for num_threads(args.threads) schedule(static)
        for (int64_t i = 0; i < (last - first) * places; i++) {
            const int64_t image = i / places, place = i % places;
            const T *const token = place == 0 ? static_cast<const T *>(args.class_embedding)
                                              : products + (image * patches + place - 1) * n;
            const T *const position = static_cast<const T *>(args.positional_embedding) + place * n;
            float *const sum = reinterpret_cast<float *>(memory + omp_get_thread_num() * of_thread);
            for (int64_t j = 0; j < n; j += LANES)
                store_some(sum + j, load_some(token + j, n - j) + load_some(position + j, n - j), n - j);
            if (norm.weight != nullptr) normalise(sum, n, norm, sum);
            T *const to = static_cast<T *>(args.out) + (first * places + i) * n;
            for (int64_t j = 0; j < n; j += LANES) store_some(to + j, load_some(sum + j, n - j), n - j);
        }
    }
};

} // namespace

int CLIPFAST_IN_THIS_FORM(clipfast_cpu_patch_embed)(const clipfast_cpu_patch_embed_args &args) {
    return args.dtype == CLIPFAST_CPU_BFLOAT16 ? Embedding<uint16_t>(args).run() : Embedding<float>(args).run();
}
