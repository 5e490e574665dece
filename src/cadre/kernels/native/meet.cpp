// Where processes that share memory wait for each other: each counts its turns in a place that the others read.
#include <sched.h>
#include <time.h>

#include <cstdint>

namespace {

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Mostly the others come within microseconds, and a processor that has gone to sleep takes long to wake. Later on someone else may
// need this one.
constexpr int LOOKS = 64;
constexpr double EAGER = 1e-3, PATIENT = 1e-2;

}  // namespace

// Says in `mine` that this process has come to `turn`, with all that it has written, and waits until all `others` have. Returns
// -1, or after so many seconds the first of them that has not.
extern "C" int64_t cadre_meet(int64_t* mine, const int64_t* const* others, int64_t count, int64_t turn, double seconds) {
    __atomic_store_n(mine, turn, __ATOMIC_RELEASE);
    const double began = now();
    for (int64_t i = 0; i < count; i++)
        for (int looks = 0; __atomic_load_n(others[i], __ATOMIC_ACQUIRE) < turn; looks++) {
            if (looks < LOOKS) {
                pause_briefly();
                continue;
            }
            looks = 0;
            const double waited = now() - began;
            if (waited > seconds) return i;
            if (waited > PATIENT) {
                const timespec nap = {0, 100'000};
                nanosleep(&nap, nullptr);
            } else if (waited > EAGER) {
                sched_yield();
            }
        }
    return -1;
}
