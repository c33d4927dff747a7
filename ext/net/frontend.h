// The front end: I/O threads, the route table they read, the lanes to Python.
//
// Threads    Start, Publish, Drain, Stop: one managing thread at a time. routes(), lanes: the I/O threads.
// Owner      Shared by Python's Frontend object and by each version it has published (which needs it to retire).
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "grpc/call.h"
#include "net/budget.h"
#include "net/frontend_settings.h"
#include "net/io_thread.h"
#include "route/route_table.h"
#include "serving/version.h"
#include "slow/slow_queue.h"
#include "util/ranked_mutex.h"
#include "util/status.h"

namespace tidegate {

struct SlowMethod {
  uint8_t lane = 0;  // index into FrontendCore::lanes
  bool stream = false;
};

inline constexpr uint8_t kFastLane = 0;
inline constexpr uint8_t kGeneralLane = 1;
inline constexpr size_t kLanes = 2;

class FrontendCore : public Synchronizer, public std::enable_shared_from_this<FrontendCore> {
 public:
  FrontendCore(FrontendSettings settings, std::map<std::string, SlowMethod, std::less<>> slow_methods);
  ~FrontendCore() override;

  Status Start(uint16_t* port);
  // Returns when no I/O thread can still see the table that was replaced. Does nothing after Stop.
  void Publish(std::vector<ModelRoute> models);
  // Takes no new connections, says GOAWAY, waits for the calls in flight. True: every connection ended in time.
  bool Drain(int64_t timeout_ns);
  void Stop();
  void Synchronize() override;
  // What the I/O threads have counted, summed, by name; plus the bytes of the budget that are taken.
  std::vector<std::pair<std::string, uint64_t>> Counters() const;

  // -- for the I/O threads
  const FrontendSettings& settings() const { return settings_; }
  const RouteTable* routes() const { return routes_.load(std::memory_order_seq_cst); }
  const SlowMethod* FindSlow(std::string_view path) const {
    const auto at = slow_methods_.find(path);
    return at == slow_methods_.end() ? nullptr : &at->second;
  }
  SlowQueue& lane(uint8_t index) { return lanes_[index]; }
  Budget& budget() { return budget_; }
  std::atomic<uint32_t>& connections() { return connections_; }

  const std::vector<std::unique_ptr<IoThread>>& io_threads() const { return io_threads_; }

 private:
  const FrontendSettings settings_;
  const std::map<std::string, SlowMethod, std::less<>> slow_methods_;
  Budget budget_;
  SlowQueue lanes_[kLanes];
  std::atomic<uint32_t> connections_{0};
  RankedMutex<LockRank::kRouteTableWriter> publish_mutex_;
  std::unique_ptr<const RouteTable> owned_routes_;
  std::atomic<const RouteTable*> routes_{nullptr};
  std::vector<std::unique_ptr<IoThread>> io_threads_;
  bool started_ = false;
  std::atomic<bool> stopped_{false};
};

}  // namespace tidegate
