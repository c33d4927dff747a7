#include "net/io_thread.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "net/frontend.h"
#include "serving/version.h"
#include "util/clock.h"
#include "util/scheduling.h"

namespace tidegate {
namespace {

constexpr int kEventsPerRound = 256;
constexpr int kAcceptsPerRound = 64;
constexpr int64_t kSweepMostNs = INT64_C(1'000'000'000);
constexpr int64_t kSweepLeastNs = 10'000'000;
constexpr int64_t kDrainSweepNs = 10'000'000;
// Buffers that free requests and calls may keep per thread; beyond it memory goes back to the allocator.
constexpr size_t kPooledBytesMost = 64u << 20;
constexpr size_t kPooledObjectsMost = 8192;
constexpr size_t kKeepBytes = 4u << 20;

constexpr uint64_t kListenerTag = UINT64_MAX;
constexpr uint64_t kOutboxTag = UINT64_MAX - 1;

std::string PeerName(const sockaddr_storage& address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET) {
    const auto& in = reinterpret_cast<const sockaddr_in&>(address);
    inet_ntop(AF_INET, &in.sin_addr, text, sizeof text);
    return std::string(text) + ":" + std::to_string(ntohs(in.sin_port));
  }
  const auto& in6 = reinterpret_cast<const sockaddr_in6&>(address);
  inet_ntop(AF_INET6, &in6.sin6_addr, text, sizeof text);
  return "[" + std::string(text) + "]:" + std::to_string(ntohs(in6.sin6_port));
}

// How often clocks are looked at: often enough that the shortest timeout is kept to a quarter.
int64_t SweepNs(const FrontendSettings& settings) {
  int64_t sweep_ns = kSweepMostNs;
  for (int64_t timeout_ns :
       {settings.keepalive_time_ns, settings.keepalive_timeout_ns, settings.handshake_timeout_ns,
        settings.max_connection_age_ns, settings.max_connection_idle_ns, settings.stall_timeout_ns}) {
    if (timeout_ns > 0) sweep_ns = std::min(sweep_ns, timeout_ns / 4);
  }
  return std::max(sweep_ns, kSweepLeastNs);
}

size_t Capacity(const Request& request) {
  return request.body.capacity() + request.scratch.capacity() + request.reply.capacity();
}

}  // namespace

IoThread::IoThread(FrontendCore& frontend, uint32_t index)
    : frontend_(frontend),
      settings_(frontend.settings()),
      index_(index),
      sweep_every_ns_(SweepNs(settings_)),
      outbox_(std::make_shared<Outbox>()),
      budget_(frontend.budget()),
      read_buffer_(kReadBytes),
      wheel_(NowNs()),
      expiries_(NowNs()) {}

IoThread::~IoThread() {
  Join();
  for (Request* request : free_requests_) delete request;
  for (Call* call : free_calls_) delete call;
  if (epoll_fd_ >= 0) close(epoll_fd_);
  if (listen_fd_ >= 0) close(listen_fd_);
  if (spare_fd_ >= 0) close(spare_fd_);
}

void IoThread::Start(int listen_fd) {
  listen_fd_ = listen_fd;
  spare_fd_ = open("/dev/null", O_RDONLY | O_CLOEXEC);
  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kListenerTag;
  epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, listen_fd_, &event);
  event.data.u64 = kOutboxTag;
  epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, outbox_->event_fd(), &event);
  thread_ = std::thread([this] { Main(); });
}

void IoThread::Post(Command command) {
  Mail mail;
  mail.kind = Mail::Kind::kCommand;
  mail.command = static_cast<int>(command);
  outbox_->PostMail(std::move(mail));
}

void IoThread::Join() {
  if (thread_.joinable()) thread_.join();
}

int IoThread::WaitMs() const {
  if (outbox_->has_mail() || !dirty_.empty()) return 0;
  const int64_t sweep_ns = swept_ns_ + (draining_ ? kDrainSweepNs : sweep_every_ns_) - now_ns_;
  const int64_t timer_ns = std::min(wheel_.NextNs(now_ns_), expiries_.NextNs(now_ns_));
  const int64_t wait_ns = std::clamp<int64_t>(std::min(timer_ns, sweep_ns), 0, kSweepMostNs);
  return static_cast<int>((wait_ns + 999'999) / 1'000'000);
}

void IoThread::Main() {
  pthread_setname_np(pthread_self(), ("io-" + std::to_string(index_)).c_str());
  AskForSlices(kIoSliceNs);
  epoll_event events[kEventsPerRound];
  Quiescence& quiescence = outbox_->quiescence();
  now_ns_ = NowNs();
  swept_ns_ = now_ns_;
  while (true) {
    // Announced as waiting (the count is even) before the last look for mail: see Outbox.
    const int n = epoll_wait(epoll_fd_, events, kEventsPerRound, WaitMs());
    quiescence.BeginRound();
    table_ = frontend_.routes();
    now_ns_ = NowNs();
    bool accept = false;
    for (int i = 0; i < n; ++i) {
      const uint64_t tag = events[i].data.u64;
      if (tag == kListenerTag) {
        accept = true;
      } else if (tag == kOutboxTag) {
        outbox_->ClearWake();
      } else {
        Connection* connection = connections_[static_cast<uint32_t>(tag)].get();
        if (!connection || connection->generation() != static_cast<uint32_t>(tag >> 32) || connection->dead()) continue;
        if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) connection->OnReadable();
        if (!connection->dead() && (events[i].events & EPOLLOUT) && !connection->dirty) {
          connection->dirty = true;
          dirty_.push_back(connection);
        }
      }
    }
    PushArrivals();
    if (outbox_->has_mail()) DrainOutbox();
    wheel_.Advance(now_ns_, [this](TimerNode* node) {
      Call* call = static_cast<Call*>(node);
      call->connection->OnDeadline(call);
    });
    expiries_.Advance(now_ns_, [this](TimerNode* node) { Expire(static_cast<RequestTimer*>(node)->request); });
    if (now_ns_ - swept_ns_ >= (draining_ ? kDrainSweepNs : sweep_every_ns_)) Sweep();
    FlushDirty();
    if (accept) Accept();
    Bury();
    // A connection that closed gave requests back; some may have been pushed to by this very round.
    PushArrivals();
    table_ = nullptr;
    const bool ended = stopping_ && counters_.requests_live.value() == 0;
    quiescence.EndRound();
    if (ended) return;
  }
}

bool IoThread::Accept() {
  if (listen_fd_ < 0) return false;
  for (int i = 0; i < kAcceptsPerRound; ++i) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    const int fd = accept4(listen_fd_, reinterpret_cast<sockaddr*>(&address), &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      if (errno == EMFILE || errno == ENFILE) {
        // Out of descriptors: the listener would stay readable and the loop spin. Give up the spare one to take the
        // connection off the backlog and refuse it, which the peer sees at once.
        counters_.accept_errors.Add(1);
        if (spare_fd_ < 0) return false;
        close(spare_fd_);
        const int refused = accept4(listen_fd_, nullptr, nullptr, SOCK_CLOEXEC);
        if (refused >= 0) close(refused);
        spare_fd_ = open("/dev/null", O_RDONLY | O_CLOEXEC);
        counters_.connections_refused.Add(1);
        continue;
      }
      if (errno == EINTR || errno == ECONNABORTED) continue;
      if (errno != EAGAIN) counters_.accept_errors.Add(1);
      return false;
    }
    if (frontend_.connections().fetch_add(1, std::memory_order_relaxed) >= settings_.max_connections) {
      frontend_.connections().fetch_sub(1, std::memory_order_relaxed);
      counters_.connections_refused.Add(1);
      close(fd);
      continue;
    }
    Open(fd, PeerName(address));
  }
  return true;
}

void IoThread::Open(int fd, std::string peer) {
  const int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  uint32_t slot;
  if (free_slots_.empty()) {
    slot = static_cast<uint32_t>(connections_.size());
    connections_.emplace_back();
    generations_.push_back(0);
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
  }
  const uint32_t generation = ++generations_[slot];
  connections_[slot] = std::make_unique<Connection>(*this, fd, slot, generation, std::move(peer));
  counters_.connections_accepted.Add(1);
  counters_.connections_open.Add(1);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = (static_cast<uint64_t>(generation) << 32) | slot;
  epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event);
}

void IoThread::Bury() {
  for (Connection* connection : dying_) {
    const uint32_t slot = connection->slot();
    if (connection->dirty) std::erase(dirty_, connection);
    connections_[slot].reset();
    free_slots_.push_back(slot);
    frontend_.connections().fetch_sub(1, std::memory_order_relaxed);
    counters_.connections_open.Set(counters_.connections_open.value() - 1);
  }
  dying_.clear();
}

void IoThread::Obey(Command command) {
  if (listen_fd_ >= 0) {
    // What the kernel has already accepted for us would be reset by close(): take it in first.
    while (Accept()) {
    }
    epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, listen_fd_, nullptr);
    close(listen_fd_);
    listen_fd_ = -1;
  }
  if (command == Command::kDrain && !draining_) {
    draining_ = true;
    for (const auto& connection : connections_) {
      if (connection && !connection->dead()) connection->BeginDrain();
    }
  }
  if (command == Command::kStop && !stopping_) {
    stopping_ = true;
    for (const auto& connection : connections_) {
      if (connection && !connection->dead()) {
        connection->Flush();
        connection->Kill();
      }
    }
  }
}

void IoThread::PushArrivals() {
  for (size_t i = 0; i < n_arrivals_; ++i) {
    Version* version = arrivals_[i].version;
    RequestList& list = arrivals_[i].list;
    IoShard& shard = version->io_shard(index_);
    // Counted before they can come back, so that accepted >= finalized always holds.
    shard.accepted.Add(list.size());
    RequestList refused;
    version->queue().Push(&list, &refused, now_ns_);
    while (Request* request = refused.PopFront()) {
      request->done = true;
      Finalize(request);
      Connection* connection = connections_[request->stream.slot].get();
      Call* call = nullptr;
      if (connection && connection->generation() == request->stream.generation) {
        call = connection->FindCall(request->stream.stream_id);
      }
      if (call && request->abandoned == Reason::kOk) {
        connection->Deliver(call, request);
      } else {
        Recycle(request);
      }
    }
  }
  n_arrivals_ = 0;
}

void IoThread::Enqueue(Version* version, Request* request) {
  request->version = version;
  // Executors look at what waits when they are free, which may be too late for the queue's own timeouts.
  const int64_t call_due_ns = request->due_ns;
  const int64_t expires_ns = version->queue().SetDeadlines(request);
  if (expires_ns < call_due_ns) {
    request->expiry.request = request;
    expiries_.Insert(&request->expiry, expires_ns);
  }
  for (size_t i = 0; i < n_arrivals_; ++i) {
    if (arrivals_[i].version == version) {
      arrivals_[i].list.PushBack(request);
      return;
    }
  }
  if (n_arrivals_ == arrivals_.size()) arrivals_.emplace_back();
  arrivals_[n_arrivals_].version = version;
  arrivals_[n_arrivals_].list = RequestList();
  arrivals_[n_arrivals_].list.PushBack(request);
  ++n_arrivals_;
}

bool IoThread::TakeBack(Request* request) {
  BatchQueue& queue = request->version->queue();
  BatchQueue::Turn turn(queue);
  ready_.clear();
  const bool taken = queue.Remove(request, &ready_);
  for (Request* ready : ready_) {
    RequestList one;
    one.PushBack(ready);
    ready->home->PostDone(&one);
  }
  return taken;
}

void IoThread::Expire(Request* request) {
  if (!TakeBack(request)) return;
  request->status =
      Status::Error(Reason::kDeadlinePassed, "the request waited for an instance until its timeout had passed");
  request->done = true;
  Finalize(request);
  // It waited, so nobody has abandoned it and its stream is there.
  Connection* connection = connections_[request->stream.slot].get();
  connection->Deliver(connection->FindCall(request->stream.stream_id), request);
}

void IoThread::DrainOutbox() {
  RequestList done;
  outbox_->Drain(&done, &mail_);
  now_ns_ = NowNs();
  while (Request* request = done.PopFront()) {
    request->done = true;
    Finalize(request);
    if (request->abandoned != Reason::kOk) {
      Recycle(request);
      continue;
    }
    Connection* connection = connections_[request->stream.slot].get();
    // A request whose call is gone was marked abandoned when it went, so the stream is there.
    connection->Deliver(connection->FindCall(request->stream.stream_id), request);
  }
  for (Mail& mail : mail_) {
    if (mail.kind == Mail::Kind::kCommand) {
      Obey(static_cast<Command>(mail.command));
      continue;
    }
    if (mail.stream.slot >= connections_.size()) continue;
    Connection* connection = connections_[mail.stream.slot].get();
    if (!connection || connection->dead() || connection->generation() != mail.stream.generation) continue;
    if (Call* call = connection->FindCall(mail.stream.stream_id)) connection->DeliverMail(call, &mail);
  }
}

void IoThread::FlushDirty() {
  // Flushing may finish calls, which can make their connection dirty again: that is for the next round.
  const size_t n = dirty_.size();
  for (size_t i = 0; i < n; ++i) {
    Connection* connection = dirty_[i];
    connection->dirty = false;
    if (!connection->dead()) connection->Flush();
  }
  dirty_.erase(dirty_.begin(), dirty_.begin() + static_cast<ptrdiff_t>(n));
}

void IoThread::Sweep() {
  swept_ns_ = now_ns_;
  for (const auto& connection : connections_) {
    if (connection && !connection->dead()) connection->OnSweep(now_ns_);
  }
}

Request* IoThread::NewRequest() {
  Request* request;
  if (free_requests_.empty()) {
    request = new Request();
  } else {
    request = free_requests_.back();
    free_requests_.pop_back();
    pooled_bytes_ -= Capacity(*request);
  }
  request->home = outbox_.get();
  counters_.requests_live.Add(1);
  return request;
}

void IoThread::Recycle(Request* request) {
  counters_.requests_live.Set(counters_.requests_live.value() - 1);
  if (request->charged_bytes != 0) budget_.Return(request->charged_bytes);
  if (free_requests_.size() >= kPooledObjectsMost) {
    delete request;
    return;
  }
  request->Reset(pooled_bytes_ + Capacity(*request) > kPooledBytesMost ? 0 : kKeepBytes);
  pooled_bytes_ += Capacity(*request);
  free_requests_.push_back(request);
}

Call* IoThread::NewCall() {
  counters_.calls.Add(1);
  counters_.calls_open.Add(1);
  if (free_calls_.empty()) return new Call();
  Call* call = free_calls_.back();
  free_calls_.pop_back();
  return call;
}

void IoThread::FreeCall(Call* call) {
  counters_.calls_open.Set(counters_.calls_open.value() - 1);
  wheel_.Remove(call);
  if (free_calls_.size() >= kPooledObjectsMost) {
    delete call;
    return;
  }
  call->Clear();
  free_calls_.push_back(call);
}

void IoThread::Finalize(Request* request) {
  expiries_.Remove(&request->expiry);
  IoShard& shard = request->version->io_shard(index_);
  const int64_t took_ns = now_ns_ - request->times.arrived_ns;
  const Reason reason = request->abandoned != Reason::kOk ? request->abandoned : request->status.reason;
  const RequestTimes& times = request->times;
  if (reason == Reason::kOk) {
    // Times are those of answered requests, in all phases alike: dashboards divide them by the number of successes.
    const int64_t queued_ns = times.dispatched_ns - times.arrived_ns;
    shard.success.Add(1);
    shard.success_ns.Add(static_cast<uint64_t>(std::max<int64_t>(took_ns, 0)));
    shard.queue.Add(1);
    shard.queue_ns.Add(static_cast<uint64_t>(std::max<int64_t>(queued_ns, 0)));
    shard.queue_duration.Observe(kDurationBoundsNs, queued_ns);
    shard.compute_input_ns.Add(static_cast<uint64_t>(times.input_done_ns - times.dispatched_ns));
    shard.compute_infer_ns.Add(static_cast<uint64_t>(times.infer_done_ns - times.input_done_ns));
    shard.compute_output_ns.Add(static_cast<uint64_t>(times.output_done_ns - times.infer_done_ns));
    shard.request_duration.Observe(kDurationBoundsNs, took_ns);
  } else {
    shard.fail.Add(1);
    shard.fail_ns.Add(static_cast<uint64_t>(std::max<int64_t>(took_ns, 0)));
    shard.reasons[static_cast<size_t>(reason)].Add(1);
  }
  // Last: from here on the version may go once this round ends.
  shard.finalized.Add(1);
}

void IoThread::CountRefusal(Version* version, const Request* request, Reason reason) {
  IoShard& shard = version->io_shard(index_);
  shard.fail.Add(1);
  shard.fail_ns.Add(static_cast<uint64_t>(std::max<int64_t>(now_ns_ - request->times.arrived_ns, 0)));
  shard.reasons[static_cast<size_t>(reason)].Add(1);
}

void IoThread::DropAbandoned(Request* request) {
  Finalize(request);
  Recycle(request);
}

}  // namespace tidegate
