// One event loop: a listener, the connections it accepted, the requests they brought.
//
// Threads    Main runs on its own thread and owns everything here but the outbox. Start, Stop, Post: the thread that
// owns
//            the front end.
// Round      wait -> read what arrived -> push the new requests to their queues (one lock per version) -> take answers
// from
//            the outbox -> write (one write per connection that changed) -> timers. Shared pointers (route table,
//            versions) are loaded inside a round and not kept across the wait (util/quiescence.h).
#pragma once

#include <atomic>
#include <iterator>
#include <memory>
#include <string_view>
#include <thread>
#include <vector>

#include "grpc/call.h"
#include "infer/codec.h"
#include "infer/request.h"
#include "net/budget.h"
#include "net/connection.h"
#include "net/frontend_settings.h"
#include "net/outbox.h"
#include "route/route_table.h"
#include "serving/stats.h"
#include "util/timer_wheel.h"

namespace tidegate {

class FrontendCore;
class Version;

// What one I/O thread counts. One writer, any reader.
struct alignas(64) IoCounters {
  Counter connections_accepted;
  Counter connections_refused;
  Counter connections_open;
  Counter accept_errors;
  Counter calls;
  Counter calls_open;
  Counter bytes_read;
  Counter bytes_written;
  Counter bytes_received;  // message bodies copied out of the read buffer
  Counter writes;
  Counter te_missing;
  Counter protocol_errors;  // frames that nghttp2 refused
  Counter glitch_closes;
  Counter ping_closes;
  Counter stall_closes;
  Counter stall_resets;  // streams whose answer nobody read, or whose message did not come
  Counter handshake_closes;
  Counter keepalive_closes;
  Counter http_refusals;  // 405, 415
  Counter resets_received;
  Counter deadline_expired;
  Counter requests_live;  // pooled objects in use
};

// Every counter by the name that it is shown under.
struct IoCounterName {
  const char* name;
  Counter IoCounters::* counter;
};
inline constexpr IoCounterName kIoCounterNames[] = {
    {"connections_accepted", &IoCounters::connections_accepted},
    {"connections_refused", &IoCounters::connections_refused},
    {"connections_open", &IoCounters::connections_open},
    {"accept_errors", &IoCounters::accept_errors},
    {"calls", &IoCounters::calls},
    {"calls_open", &IoCounters::calls_open},
    {"bytes_read", &IoCounters::bytes_read},
    {"bytes_written", &IoCounters::bytes_written},
    {"bytes_received", &IoCounters::bytes_received},
    {"writes", &IoCounters::writes},
    {"te_missing", &IoCounters::te_missing},
    {"protocol_errors", &IoCounters::protocol_errors},
    {"glitch_closes", &IoCounters::glitch_closes},
    {"ping_closes", &IoCounters::ping_closes},
    {"stall_closes", &IoCounters::stall_closes},
    {"stall_resets", &IoCounters::stall_resets},
    {"handshake_closes", &IoCounters::handshake_closes},
    {"keepalive_closes", &IoCounters::keepalive_closes},
    {"http_refusals", &IoCounters::http_refusals},
    {"resets_received", &IoCounters::resets_received},
    {"deadline_expired", &IoCounters::deadline_expired},
    {"requests_live", &IoCounters::requests_live},
};
static_assert(sizeof(IoCounters) >= std::size(kIoCounterNames) * sizeof(Counter) &&
              sizeof(IoCounters) < (std::size(kIoCounterNames) + 8) * sizeof(Counter));

class IoThread {
 public:
  enum class Command : int { kDrain, kStop };

  IoThread(FrontendCore& frontend, uint32_t index);
  ~IoThread();
  IoThread(const IoThread&) = delete;
  IoThread& operator=(const IoThread&) = delete;

  // Takes the listening socket.
  void Start(int listen_fd);
  void Post(Command command);
  void Join();

  const std::shared_ptr<Outbox>& outbox() const { return outbox_; }
  const IoCounters& counters() const { return counters_; }
  uint32_t open_connections() const { return static_cast<uint32_t>(counters_.connections_open.value()); }

 private:
  friend class Connection;

  void Main();
  // Whether the backlog may hold more.
  bool Accept();
  void Open(int fd, std::string peer);
  void PushArrivals();
  // A timeout of the queue has struck while the request waits (or is it running?).
  void Expire(Request* request);
  void DrainOutbox();
  void FlushDirty();
  void Bury();
  void Sweep();
  void Obey(Command command);
  int WaitMs() const;

  // -- for Connection
  Request* NewRequest();
  void Recycle(Request* request);
  Call* NewCall();
  void FreeCall(Call* call);
  void Enqueue(Version* version, Request* request);
  // Takes a request back from its queue. False: it runs, or will come back by itself.
  bool TakeBack(Request* request);
  // Counts the outcome of a request that came back (or never got into a queue).
  void Finalize(Request* request);
  void CountRefusal(Version* version, const Request* request, Reason reason);
  // A request that was accepted before and is out of the queue now: counts it as abandoned and recycles it.
  void DropAbandoned(Request* request);

  FrontendCore& frontend_;
  const FrontendSettings& settings_;
  const uint32_t index_;
  const int64_t sweep_every_ns_;
  const std::shared_ptr<Outbox> outbox_;
  IoCounters counters_;
  LocalBudget budget_;
  std::thread thread_;

  int epoll_fd_ = -1;
  int listen_fd_ = -1;
  int spare_fd_ = -1;  // given up for a moment to refuse a connection when the process is out of descriptors
  bool stopping_ = false;
  bool draining_ = false;
  int64_t now_ns_ = 0;  // of this round
  int64_t swept_ns_ = 0;
  const RouteTable* table_ = nullptr;  // of this round

  std::vector<std::unique_ptr<Connection>> connections_;  // by slot
  std::vector<uint32_t> generations_;
  std::vector<uint32_t> free_slots_;
  std::vector<Connection*> dirty_;
  std::vector<Connection*> dying_;
  std::vector<uint8_t> read_buffer_;

  struct Arrivals {
    Version* version;
    RequestList list;
  };
  std::vector<Arrivals> arrivals_;
  size_t n_arrivals_ = 0;
  ParsedRequest parsed_;  // reused by every request
  TimerWheel wheel_;      // deadlines of calls
  TimerWheel expiries_;   // of requests that their queue would give up before their call does

  std::vector<Request*> free_requests_;
  size_t pooled_bytes_ = 0;
  std::vector<Call*> free_calls_;
  std::vector<Mail> mail_;
  std::vector<Request*> ready_;
};

}  // namespace tidegate
