// One pool for all kernels. Who waits looks for work for a tenth of a millisecond, giving the core to whoever wants it,
// and then sleeps: to be woken takes 50 us, as long as many a kernel, but a team that spins takes the core that the
// caller, or another process, needs.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "common.h"

namespace pangu {

thread_local int64_t num_entries = 0;

namespace {

thread_local bool inside_task = false;

// Whether the condition came true within the time that waiting awake is worth.
template <typename Condition>
bool wait_awake(Condition condition) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
  do {
    for (int i = 0; i < 16; i++) {
      if (condition()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    sched_yield();
  } while (std::chrono::steady_clock::now() < until);
  return condition();
}

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int64_t count, const std::function<void(int64_t)>& body) {
    std::unique_lock<std::mutex> exclusive(busy_, std::try_to_lock);
    if (inside_task || count < 2 || workers_.empty() || !exclusive.owns_lock()) {
      for (int64_t i = 0; i < count; i++) body(i);
      return;
    }
    int helpers;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      count_ = count;
      next_.store(0);
      error_ = nullptr;
      open_ = true;
      generation_++;
      helpers = std::min(static_cast<int>(std::min<int64_t>(count - 1, workers_.size())), asleep_);
    }
    for (int i = 0; i < helpers; i++) wake_.notify_one();
    take_tasks();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_ = false;  // who wakes up only now has nothing left to do
    }
    wait_awake([this] { return active_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void take_tasks() {
    inside_task = true;
    try {
      for (int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) (*body_)(i);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(count_);
    }
    inside_task = false;
  }

  void work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      lock.unlock();
      const bool came = wait_awake([&] { return generation_ != seen; });
      lock.lock();
      if (!came) {
        asleep_++;
        wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
        asleep_--;
      }
      if (stopping_) return;
      seen = generation_;
      if (!open_) continue;
      active_++;
      lock.unlock();
      take_tasks();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int64_t> next_{0};
  const std::function<void(int64_t)>* body_ = nullptr;
  int64_t count_ = 0;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> active_{0};  // workers at tasks
  int asleep_ = 0;
  bool open_ = false, stopping_ = false;
  std::exception_ptr error_;
};

int num_usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return std::max(1u, std::thread::hardware_concurrency());
  return std::max(1, CPU_COUNT(&set));
}

std::mutex pool_mutex;
Pool* pool = nullptr;

Pool& the_pool() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool == nullptr) pool = new Pool(num_usable_cores());  // never deleted: MindSpore's threads may outlive statics
  return *pool;
}

}  // namespace

int num_threads() { return the_pool().size(); }

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  if (!inside_task) num_entries++;
  the_pool().run(count, body);
}

void parallel_blocks(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  // Some blocks more than threads, so that a slow core does not hold up the rest.
  int64_t block = std::max(grain, (count + 4 * num_threads() - 1) / (4 * num_threads()));
  int64_t num_blocks = block > 0 ? (count + block - 1) / block : 0;
  parallel_for(num_blocks, [&](int64_t i) { body(i * block, std::min(count, (i + 1) * block)); });
}

}  // namespace pangu

// Sets the number of threads; to be called while no kernel runs.
PANGU_EXPORT void pangu_set_num_threads(int threads) {
  using namespace pangu;
  std::lock_guard<std::mutex> lock(pool_mutex);
  delete pool;
  pool = new Pool(std::max(1, threads));
}
