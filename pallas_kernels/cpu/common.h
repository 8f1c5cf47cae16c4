// What all kernels share: types of numbers, how a float behaves, a parallel loop on XLA's own threads, scratch memory.
#pragma once
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>
#include <vector>

namespace jaxengine {

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };
enum class Type { F32, F16, BF16 };

struct Array {  // of any type; null where there is none
  const void* data;
  Type type;
  explicit operator bool() const { return data != nullptr; }
};

// While in scope: rounding to nearest, no traps, subnormals read and written as zero. That is how AMX computes whatever
// the thread's settings are, so all bodies do, on every thread.
class Arithmetic {
 public:
  Arithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80 | 0x8000 | 0x0040); }
  ~Arithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

class Threads {  // XLA's own, as kernels.cc has them
 public:
  virtual int64_t count() const = 0;
  virtual void start(std::function<void()> work) = 0;

 protected:
  ~Threads() = default;
};

// f(i) for i in [0, n), on the calling thread and the others. Threads claim indices one by one, so a helper that comes
// late finds nothing left and touches nothing; the caller works too, and never waits for a thread that has not begun.
// f may find no memory: that is thrown on the calling thread, once nobody uses f any more.
template <class F>
void parallel(Threads& threads, int64_t n, const F& f) {
  const int64_t helpers = std::min<int64_t>(n, threads.count()) - 1;
  if (helpers <= 0) {
    Arithmetic arithmetic;
    for (int64_t i = 0; i < n; i++) f(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> no_memory{false};
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, n, &f] {
    Arithmetic arithmetic;
    int64_t mine = 0;
    for (int64_t i; (i = shared->next.fetch_add(1)) < n; mine++) {
      try {
        f(i);
      } catch (const std::bad_alloc&) {
        shared->no_memory = true;
      }
    }
    shared->done.fetch_add(mine, std::memory_order_release);
  };
  for (int64_t h = 0; h < helpers; h++) threads.start(work);
  work();
  while (shared->done.load(std::memory_order_acquire) < n) _mm_pause();
  if (shared->no_memory) throw std::bad_alloc();
}

// Asks for a line of memory. Compilers take a function that does nothing else for one without effects, and drop its calls.
template <_mm_hint HINT = _MM_HINT_T1>
inline void fetch(const void* line) {
  _mm_prefetch((const char*)line, HINT);
  asm volatile("");
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t ceil_to(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t SMALL_PAGE = 4096, HUGE_PAGE = 1 << 21;

// For what is whole huge pages of memory that nobody has touched. The system may refuse, or have none.
inline void wish_for_huge_pages(void* data, int64_t bytes) {
  const int64_t first = ceil_to(int64_t(data), HUGE_PAGE), end = (int64_t(data) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

// A thread's memory that stays between calls, so that a step does not fetch fresh pages for every op. Logits are written
// a few of every row at a time, which in small pages costs as much as their product.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* floats(int64_t count) {
    const int64_t wanted = count * int64_t(sizeof(float)), page = wanted < HUGE_PAGE ? SMALL_PAGE : HUGE_PAGE;
    const int64_t bytes = ceil_to(wanted, page);
    if (bytes > size_) {
      std::free(data_);
      size_ = 0, data_ = std::aligned_alloc(page, bytes);
      if (!data_) throw std::bad_alloc();
      wish_for_huge_pages(data_, bytes);
      size_ = bytes;
    }
    return static_cast<float*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// Memory lent from what was given back, for as long as this is in scope.
class Lent {
 public:
  explicit Lent(int64_t count) {
    {
      const std::lock_guard<std::mutex> guard(lock());
      if (!kept().empty()) own_ = std::move(kept().back()), kept().pop_back();
    }
    if (!own_) own_ = std::make_unique<Scratch>();
    floats = own_->floats(count);
  }
  ~Lent() {
    const std::lock_guard<std::mutex> guard(lock());
    kept().push_back(std::move(own_));
  }

  float* floats;

 private:
  // Never freed, because XLA's threads may still work while the process ends.
  static std::mutex& lock() {
    static auto* one = new std::mutex;
    return *one;
  }
  static std::vector<std::unique_ptr<Scratch>>& kept() {
    static auto* all = new std::vector<std::unique_ptr<Scratch>>;
    return *all;
  }
  std::unique_ptr<Scratch> own_;
};

}  // namespace jaxengine
