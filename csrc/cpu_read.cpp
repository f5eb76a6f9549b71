// What a CPU reads from memory at best: each thread goes once through its own part of a buffer. Compiled once for each
// instruction set (CMakeLists.txt).
#include "clipfast_cpu.h"
#include "cpu_vectors.h"

namespace {

constexpr int64_t BLOCK = CLIPFAST_CPU_READ_BLOCK, LINE = 64;
// sums that do not wait for one another
constexpr int SUMS = 4;
constexpr int64_t TOGETHER = SUMS * sizeof(Words);
static_assert(BLOCK % TOGETHER == 0 && BLOCK % LINE == 0, "a block is whole vectors and lines");

} // namespace

int CLIPFAST_IN_THIS_FORM(clipfast_cpu_read)(const clipfast_cpu_read_args &args) {
    const char *data = static_cast<const char *>(args.data);
    const int64_t blocks = args.bytes / BLOCK;
#pragma omp parallel num_threads(args.threads)
    {
        Words sums[SUMS] = {};
        // one part each, as a product's threads read a weight
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            const char *from = data + block * BLOCK;
            if (args.ahead > 0) {
                for (int64_t i = 0; i < BLOCK; i += LINE) __builtin_prefetch(from + args.ahead + i);
            }
            for (int64_t i = 0; i < BLOCK; i += TOGETHER) {
#pragma GCC unroll 4
                for (int s = 0; s < SUMS; s++) {
                    Words words;
                    memcpy(&words, from + i + s * sizeof words, sizeof words);
                    sums[s] += words;
                }
            }
        }
        // somebody reads them, as far as the compiler knows
        asm volatile("" : : "m"(sums));
    }
    return CLIPFAST_CPU_OK;
}
