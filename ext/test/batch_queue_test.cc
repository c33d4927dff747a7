// The queue between threads: I/O threads that push, take back and cancel at random, executors that take, a close in the
// middle. Run under TSan and ASan. What a single thread can show is tested from Python (tests/ext/test_batch_queue.py).
#include "batch/batch_queue.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <thread>
#include <unordered_map>
#include <vector>

#include "test/check.h"
#include "util/clock.h"

namespace {
thread_local uint64_t allocations = 0;
}  // namespace

// Not inlined: the compiler would take the pair of them for a mistake.
[[gnu::noinline]] void* operator new(size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace tidegate {
namespace {

// Where answers come back to: the outbox of one I/O thread.
class Inbox {
 public:
  void Post(const std::vector<Request*>& requests) {
    std::lock_guard lock(mutex_);
    arrived_.insert(arrived_.end(), requests.begin(), requests.end());
  }
  void Post(Request* request) {
    std::lock_guard lock(mutex_);
    arrived_.push_back(request);
  }
  void Drain(std::vector<Request*>* out) {
    out->clear();
    std::lock_guard lock(mutex_);
    out->swap(arrived_);
  }

 private:
  std::mutex mutex_;
  std::vector<Request*> arrived_;
};

// How one world of threads behaves.
struct Scenario {
  BatchSettings settings;
  uint32_t io_threads = 2;
  uint32_t rounds = 1500;  // of each I/O thread
  uint32_t most_rows = 3;  // of a request
  uint32_t shapes = 1;
  uint32_t priorities = 0;  // 0 to this
  bool deadlines = false;
  bool closes_early = false;  // while the I/O threads still push
  int64_t run_ns = 20'000;
};

struct Counts {
  std::atomic<uint64_t> pushed{0};
  std::atomic<uint64_t> refused{0};
  std::atomic<uint64_t> removed{0};
  std::atomic<uint64_t> ran{0};
  std::atomic<uint64_t> dropped{0};
};

class World {
 public:
  explicit World(const Scenario& scenario)
      : scenario_(scenario),
        node_(/*measure_cpu=*/false),
        queue_(scenario.settings, node_),
        inboxes_(scenario.io_threads) {}

  void Run() {
    std::vector<std::thread> io;
    std::vector<std::thread> executors;
    for (uint32_t i = 0; i < scenario_.settings.instances; ++i) executors.emplace_back([this, i] { Execute(i); });
    for (uint32_t i = 0; i < scenario_.io_threads; ++i) io.emplace_back([this, i] { Serve(i); });
    if (scenario_.closes_early) {
      while (counts_.ran.load() < 200) std::this_thread::yield();
      queue_.Close();
    }
    for (std::thread& thread : io) thread.join();
    queue_.Close();
    for (std::thread& thread : executors) thread.join();

    CHECK_EQ(counts_.pushed.load(),
             counts_.refused.load() + counts_.removed.load() + counts_.ran.load() + counts_.dropped.load());
    CHECK(counts_.ran.load() > 0);
    const QueueView view = queue_.View();
    CHECK_EQ(view.waiting, 0u);
    CHECK_EQ(view.waiting_rows, 0u);
    CHECK_EQ(view.running_rows, 0u);
  }
  const Counts& counts() const { return counts_; }

 private:
  // An I/O thread: makes requests, pushes them in bursts, takes some back, frees each when it has come home.
  void Serve(uint32_t index) {
    std::mt19937 random(index + 1);
    const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
    std::unordered_map<Request*, std::unique_ptr<Request>> out;
    std::vector<Request*> waiting;  // in the order of pushing; some have come back since
    std::vector<Request*> home;
    const auto take_home = [&] {
      inboxes_[index].Drain(&home);
      for (Request* request : home) CHECK_EQ(out.erase(request), 1u);
    };
    const auto take_back = [&](Request* request) {
      if (!out.contains(request)) return;
      std::vector<Request*> ready;
      BatchQueue::Turn turn(queue_);
      const bool removed = queue_.Remove(request, &ready);
      HandOut(ready);
      if (removed) {
        counts_.removed.fetch_add(1);
        out.erase(request);
      } else {
        request->cancelled.store(true, std::memory_order_relaxed);
      }
    };
    for (uint32_t round = 0; round < scenario_.rounds; ++round) {
      RequestList burst;
      const uint32_t size = 1 + below(12);
      const int64_t now_ns = NowNs();
      for (uint32_t i = 0; i < size; ++i) {
        auto request = std::make_unique<Request>();
        request->rows = 1 + below(scenario_.most_rows);
        request->shape_key = below(scenario_.shapes);
        request->priority = below(scenario_.priorities + 1);
        request->times.arrived_ns = now_ns;
        request->stream.slot = index;
        if (scenario_.deadlines && below(2) == 0) request->due_ns = now_ns + 100'000 + below(5'000'000);
        if (scenario_.deadlines && below(4) == 0) request->timeout_us = 1 + below(2000);
        queue_.SetDeadlines(request.get());
        burst.PushBack(request.get());
        waiting.push_back(request.get());
        out.emplace(request.get(), std::move(request));
      }
      counts_.pushed.fetch_add(size);
      RequestList refused;
      queue_.Push(&burst, &refused, now_ns);
      CHECK(burst.empty());
      while (Request* request = refused.PopFront()) {
        CHECK(!request->status.ok() && !request->status.message.empty());
        counts_.refused.fetch_add(1);
        CHECK_EQ(out.erase(request), 1u);
      }
      for (uint32_t n = below(4); n > 0; --n) take_back(waiting[below(static_cast<uint32_t>(waiting.size()))]);
      take_home();
      std::erase_if(waiting, [&](Request* request) { return !out.contains(request); });
      if (waiting.empty()) continue;
      if (below(8) == 0) std::this_thread::yield();
    }
    while (!out.empty()) {
      take_home();
      std::this_thread::yield();
    }
  }

  void Execute(uint32_t index) {
    Batch batch;
    std::vector<Request*> ready;
    while (queue_.Take(index, &batch)) {
      CHECK(!batch.empty());
      uint32_t rows = 0;
      for (Request* request : batch.requests) {
        CHECK(request->status.ok());
        CHECK_EQ(request->shape_key, batch.requests[0]->shape_key);
        rows += request->rows;
      }
      CHECK_EQ(rows, batch.rows);
      CHECK(rows <= scenario_.settings.max_batch_rows);
      CHECK(scenario_.settings.dynamic_batching || batch.requests.size() <= 1);
      for (Request* request : batch.dropped) CHECK(!request->status.ok() && !request->status.message.empty());
      const int64_t began_ns = NowNs();
      if (!batch.requests.empty()) {
        while (NowNs() - began_ns < scenario_.run_ns) {
        }
      }
      counts_.ran.fetch_add(batch.requests.size());
      counts_.dropped.fetch_add(batch.dropped.size());
      const int64_t ended_ns = NowNs();
      {
        BatchQueue::Turn turn(queue_);
        ready.clear();
        for (Request* request : batch.dropped) queue_.Release(request, &ready);
        for (Request* request : batch.requests) queue_.Release(request, &ready);
        HandOut(ready);
      }
      if (!batch.requests.empty()) queue_.Finished(index, rows, ended_ns - began_ns, true, ended_ns);
    }
  }

  // To their I/O threads; with preserve_ordering called inside a Turn, so the last ticket needs no lock of its own.
  void HandOut(const std::vector<Request*>& ready) {
    for (Request* request : ready) {
      if (scenario_.settings.preserve_ordering) {
        CHECK(!any_left_ || request->ticket > last_ticket_);
        any_left_ = true;
        last_ticket_ = request->ticket;
      }
      inboxes_[request->stream.slot].Post(request);
    }
  }

  const Scenario scenario_;
  NodeLoad node_;
  BatchQueue queue_;
  std::vector<Inbox> inboxes_;
  Counts counts_;
  bool any_left_ = false;
  uint64_t last_ticket_ = 0;
};

BatchSettings Settings(uint32_t instances, uint32_t max_rows) {
  BatchSettings settings;
  settings.instances = instances;
  settings.max_batch_rows = max_rows;
  return settings;
}

TIDEGATE_TEST(every_request_ends_once_with_one_instance) { World({.settings = Settings(1, 16)}).Run(); }

TIDEGATE_TEST(every_request_ends_once_with_several_threads_on_both_sides) {
  World({.settings = Settings(3, 8), .io_threads = 4}).Run();
}

TIDEGATE_TEST(every_request_ends_once_with_more_shapes_than_models) {
  World({.settings = Settings(2, 8), .shapes = 40}).Run();
}

TIDEGATE_TEST(every_request_ends_once_with_levels_and_deadlines) {
  Scenario scenario{.settings = Settings(2, 8), .shapes = 3, .priorities = 3, .deadlines = true, .run_ns = 200'000};
  scenario.settings.priority_levels = 3;
  scenario.settings.default_priority_level = 2;
  scenario.settings.priority_aging_us = 300;
  scenario.settings.level_policies[3] = {.timeout_action = TimeoutAction::kDelay, .default_timeout_us = 500};
  scenario.settings.level_policies[1] = {.default_timeout_us = 2'000, .max_queue_size = 20};
  World world(scenario);
  world.Run();
  CHECK(world.counts().refused.load() > 0);
}

TIDEGATE_TEST(every_request_ends_once_while_batches_are_held) {
  Scenario scenario{.settings = Settings(2, 16), .rounds = 500, .shapes = 2, .deadlines = true};
  scenario.settings.max_queue_delay_us = 200;
  scenario.settings.preferred_batch_sizes = {8, 16};
  World(scenario).Run();
}

TIDEGATE_TEST(without_batching_a_batch_is_one_request) {
  Scenario scenario{.settings = Settings(2, 8), .run_ns = 2'000};
  scenario.settings.dynamic_batching = false;
  World(scenario).Run();
}

TIDEGATE_TEST(answers_leave_in_order_whoever_finishes_first) {
  Scenario scenario{.settings = Settings(3, 4), .io_threads = 3, .shapes = 2, .deadlines = true};
  scenario.settings.preserve_ordering = true;
  scenario.settings.default_policy.default_timeout_us = 3'000;
  World(scenario).Run();
}

TIDEGATE_TEST(a_close_while_busy_drains_what_was_accepted) {
  Scenario scenario{.settings = Settings(2, 8), .io_threads = 3, .rounds = 3000, .closes_early = true};
  World world(scenario);
  world.Run();
  CHECK(world.counts().refused.load() > 0);
}

TIDEGATE_TEST(a_close_ends_executors_that_wait) {
  NodeLoad node(false);
  BatchQueue queue(Settings(3, 8), node);
  std::vector<std::thread> executors;
  std::atomic<uint32_t> ended{0};
  for (uint32_t i = 0; i < 3; ++i) {
    executors.emplace_back([&, i] {
      Batch batch;
      CHECK(!queue.Take(i, &batch));
      ended.fetch_add(1);
    });
  }
  queue.Close();
  for (std::thread& executor : executors) executor.join();
  CHECK_EQ(ended.load(), 3u);
}

TIDEGATE_TEST(every_instance_is_woken_when_there_is_work_for_all) {
  // More than one call wakes, so that who was woken has to wake others.
  constexpr uint32_t kInstances = 24;
  NodeLoad node(false);
  BatchQueue queue(Settings(kInstances, 4), node);
  std::atomic<uint32_t> working{0};
  std::vector<std::thread> executors;
  for (uint32_t i = 0; i < kInstances; ++i) {
    executors.emplace_back([&, i] {
      Batch batch;
      while (queue.Take(i, &batch)) {
        working.fetch_add(1);
        working.notify_all();
        // Nobody goes on before all have a batch: whoever is left sleeping makes this hang.
        for (uint32_t n; (n = working.load()) < kInstances;) working.wait(n);
        queue.Finished(i, batch.rows, 1'000, true, NowNs());
      }
    });
  }
  std::vector<std::unique_ptr<Request>> requests;
  RequestList burst, refused;
  for (uint32_t i = 0; i < 4 * kInstances; ++i) {
    requests.push_back(std::make_unique<Request>());
    requests.back()->rows = 1;
    queue.SetDeadlines(requests.back().get());
    burst.PushBack(requests.back().get());
  }
  queue.Push(&burst, &refused, NowNs());
  for (uint32_t n; (n = working.load()) < kInstances;) working.wait(n);
  queue.Close();
  for (std::thread& executor : executors) executor.join();
  CHECK_EQ(working.load(), kInstances);
}

TIDEGATE_TEST(a_held_batch_starts_when_its_time_has_come) {
  NodeLoad node(false);
  BatchSettings settings = Settings(1, 8);
  settings.max_queue_delay_us = 2'000;
  BatchQueue queue(settings, node);
  Request request;
  request.rows = 1;
  request.times.arrived_ns = NowNs();
  queue.SetDeadlines(&request);
  RequestList burst, refused;
  burst.PushBack(&request);
  queue.Push(&burst, &refused, request.times.arrived_ns);
  Batch batch;
  CHECK(queue.Take(0, &batch));
  CHECK_EQ(batch.requests.size(), 1u);
  CHECK(NowNs() - request.times.arrived_ns >= 2'000'000);
  queue.Finished(0, 1, 1'000, true, NowNs());
}

TIDEGATE_TEST(a_queue_that_has_warmed_up_allocates_nothing) {
  NodeLoad node(false);
  BatchSettings settings = Settings(2, 32);
  settings.preserve_ordering = true;
  settings.priority_levels = 2;
  BatchQueue queue(settings, node);
  std::vector<std::unique_ptr<Request>> requests;
  for (int i = 0; i < 200; ++i) requests.push_back(std::make_unique<Request>());
  Batch batch;
  std::vector<Request*> ready;
  ready.reserve(requests.size());
  int64_t now_ns = 1'000'000'000;
  const auto cycle = [&](uint64_t n) {
    RequestList burst, refused;
    for (size_t i = 0; i < requests.size(); ++i) {
      Request& request = *requests[i];
      request.Reset(0);
      request.rows = 1 + static_cast<uint32_t>(i % 3);
      request.shape_key = (n * 7 + i) % 24;  // more than have a model
      request.priority = static_cast<uint32_t>(i % 3);
      request.times.arrived_ns = now_ns;
      request.due_ns = i % 2 == 0 ? now_ns + 1'000'000'000 : kNever;
      queue.SetDeadlines(&request);
      burst.PushBack(&request);
    }
    queue.Push(&burst, &refused, now_ns);
    CHECK(refused.empty());
    ready.clear();
    for (size_t i = 0; i < 10; ++i) CHECK(queue.Remove(requests[i * 11].get(), &ready));
    while (ready.size() < requests.size() - 10) {
      now_ns += 10'000;
      queue.TryTake(0, now_ns, &batch);
      CHECK(batch.dropped.empty());
      for (Request* request : batch.requests) queue.Release(request, &ready);
      queue.Finished(0, batch.rows, 10'000, true, now_ns);
    }
  };
  for (uint64_t n = 0; n < 50; ++n) cycle(n);
  const uint64_t before = allocations;
  for (uint64_t n = 50; n < 100; ++n) cycle(n);
  CHECK_EQ(allocations - before, 0u);
}

}  // namespace
}  // namespace tidegate

int main(int argc, char** argv) { return tidegate::test::RunAll(argc, argv); }
