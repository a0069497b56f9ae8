// A team of threads for each thread that calls kernels: they spin for a moment between parallel regions, then sleep.
//
// A decode step is hundreds of regions of 20 to 100 microseconds with a little Python between them. OpenMP's threads go
// to sleep in that pause as soon as a process has more of them than cores (torch's own teams count), and waking one
// costs as much as the region itself. These spin for SPIN_US, offering the core to others now and then, so a region
// starts within a microsecond, an idle engine uses no processor time, and two lanes' teams do not disturb each other.
#include "common.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include <sched.h>

namespace {

constexpr int64_t SPIN_US = 2000;
constexpr int PAUSES_A_LOOK = 64, LOOKS_A_YIELD = 16;

inline void pause_a_little() {
    for (int i = 0; i < PAUSES_A_LOOK; i++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
}

inline int64_t now_us() {
    using namespace std::chrono;
    return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

struct Shared {
    std::atomic<uint64_t> region{0};  // counts up; a worker that sees a new number has work
    std::atomic<int> unfinished{0};
    std::atomic<int> sleepers{0};
    std::atomic<bool> closing{false};
    std::mutex mutex;
    std::condition_variable wake;
    int n_threads = 1;
    void (*call)(void*, int, int) = nullptr;
    void* context = nullptr;
};

// Spin, then sleep, until there is a region after `seen`.
void wait_for_region(Shared& s, uint64_t seen) {
    const int64_t give_up = now_us() + SPIN_US;
    for (int look = 1;; look++) {
        if (s.region.load(std::memory_order_acquire) != seen) return;
        pause_a_little();
        if (look % LOOKS_A_YIELD) continue;
        sched_yield();
        if (now_us() > give_up) break;
    }
    std::unique_lock<std::mutex> lock(s.mutex);
    s.sleepers.fetch_add(1);
    s.wake.wait(lock, [&] { return s.region.load() != seen; });
    s.sleepers.fetch_sub(1);
}

void work(std::shared_ptr<Shared> shared, int thread) {
    Shared& s = *shared;
    for (uint64_t seen = 0;; seen++) {
        wait_for_region(s, seen);
        if (s.closing.load(std::memory_order_acquire)) return;
        if (thread < s.n_threads) s.call(s.context, thread, s.n_threads);
        s.unfinished.fetch_sub(1, std::memory_order_release);
    }
}

struct Team {
    std::shared_ptr<Shared> shared = std::make_shared<Shared>();
    int size = 1;

    explicit Team(int n) : size(n) {
        for (int i = 1; i < n; i++) std::thread(work, shared, i).detach();
    }
    ~Team() {
        shared->closing.store(true, std::memory_order_release);
        announce();
    }
    void announce() {
        shared->region.fetch_add(1);
        if (shared->sleepers.load() > 0) {
            std::lock_guard<std::mutex> lock(shared->mutex);
            shared->wake.notify_all();
        }
    }
    void run(int n, void (*call)(void*, int, int), void* context) {
        Shared& s = *shared;
        s.n_threads = n, s.call = call, s.context = context;
        s.unfinished.store(size - 1, std::memory_order_relaxed);
        announce();
        call(context, 0, n);
        for (int look = 1; s.unfinished.load(std::memory_order_acquire) > 0; look++) {
            pause_a_little();
            if (look % LOOKS_A_YIELD == 0) sched_yield();
        }
    }
};

}  // namespace

void run_team(int n, void (*call)(void*, int, int), void* context) {
    static thread_local std::unique_ptr<Team> team;
    if (!team || team->size < n) team.reset(new Team(n));
    team->run(n, call, context);
}
