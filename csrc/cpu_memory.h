// Memory for what an operator computes in between, kept from call to call.
//
// glibc gives large blocks back to the system at once, and each page that comes anew is a fault: 37,000 for 16 images of
// ViT-B/32, a twentieth of the time (AMD EPYC, Zen 4, two threads, 2026-11-30).
#ifndef CLIPFAST_CPU_MEMORY_H
#define CLIPFAST_CPU_MEMORY_H

#include <cstdint>
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t PAGE = 4096;
constexpr int64_t LARGE_PAGE = 2 << 20;
constexpr int64_t KEPT = 64 << 20; // bytes, and what is more goes back at the next call that wants less

// Asks for large pages where memory is new: a weight has thousands of small ones, more than a CPU's TLB holds.
inline void use_large_pages(void *memory, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t start = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = reinterpret_cast<uintptr_t>(memory) + bytes;
    if (start < end) madvise(reinterpret_cast<void *>(start), (end - start) / PAGE * PAGE, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// Bytes from one thread's part of memory to the next one's. A core asks ahead for what it may touch next, up to 8 KiB
// behind what it touches, and so took lines from the core that was writing them: two threads whose parts lay side by side
// multiplied 50 rows at 110 to 165 GFLOP/s, and 180 since they do not (AMD EPYC, Zen 4, held to AVX2, bfloat16).
inline int64_t apart(int64_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE + 4 * PAGE; }

// One operator's, of one thread.
class Memory {
  public:
    Memory() = default;
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    ~Memory() { free(start); }

    // at least `bytes` bytes at the start of a page, until the next call; null if there are not so many
    void *reserve(int64_t bytes) {
        if (bytes <= size && (size <= KEPT || bytes > KEPT)) return start;
        free(start);
        const int64_t unit = bytes < LARGE_PAGE ? PAGE : LARGE_PAGE;
        size = (bytes + unit - 1) / unit * unit;
        start = aligned_alloc(unit, size);
        if (start == nullptr)
            size = 0;
        else if (unit == LARGE_PAGE)
            use_large_pages(start, size);
        return start;
    }

  private:
    void *start = nullptr;
    int64_t size = 0;
};

} // namespace

#endif
