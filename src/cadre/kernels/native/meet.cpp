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

constexpr int LOOKS = 64;  // between two looks at the clock
constexpr double PATIENT = 1e-2;

}  // namespace

// Says in `mine` that this process has come to `turn`, with all that it has written, and waits until all `others` have: for `eager`
// seconds without letting go of its processor, for one that has gone to sleep takes long to wake. Whether they have within `seconds`.
extern "C" int32_t cadre_meet(int64_t* mine, const int64_t* const* others, int64_t count, int64_t turn, double eager, double seconds) {
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
            if (waited > seconds) return 0;
            if (waited > PATIENT) {
                const timespec nap = {0, 100'000};
                nanosleep(&nap, nullptr);
            } else if (waited > eager) {
                sched_yield();
            }
        }
    return 1;
}
