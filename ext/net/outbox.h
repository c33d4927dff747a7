// Where executors and Python leave answers for one I/O thread.
//
// Threads    Post*: any. Drain*: the I/O thread that owns it.
// Owner      A request in the outbox belongs to the outbox; Drain hands it to the I/O thread.
// Lock       mutex_, rank kOutbox: held for a splice only.
// Waking     One eventfd write at most between two drains, and none while the I/O thread is awake: it looks at
// has_mail_
//            after it has announced that it is about to wait, and a poster looks at that announcement after it has set
//            has_mail_ (both sequentially consistent), so one of the two always sees the other.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "infer/request.h"
#include "util/quiescence.h"
#include "util/ranked_mutex.h"

namespace tidegate {

// A message, an end or a command for the I/O thread that did not come from an executor.
struct Mail {
  enum class Kind : uint8_t { kMessage, kFinish, kCommand };
  Kind kind = Kind::kMessage;
  StreamRef stream;
  std::vector<std::byte> message;                             // kMessage: one gRPC message, 5-byte prefix included
  int grpc_status = 0;                                        // kFinish
  std::string grpc_message;                                   // kFinish
  std::vector<std::pair<std::string, std::string>> trailers;  // kFinish
  int command = 0;                                            // kCommand: IoThread::Command
};

class Outbox {
 public:
  Outbox() : event_fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}
  ~Outbox() { close(event_fd_); }
  Outbox(const Outbox&) = delete;
  Outbox& operator=(const Outbox&) = delete;

  int event_fd() const { return event_fd_; }
  Quiescence& quiescence() { return quiescence_; }

  // Hands over finished requests; *done is empty afterwards.
  void PostDone(RequestList* done) {
    if (done->empty()) return;
    {
      RankedLock lock(mutex_);
      done_.Splice(done);
    }
    Wake();
  }

  void PostMail(Mail mail) {
    {
      RankedLock lock(mutex_);
      mail_.push_back(std::move(mail));
    }
    Wake();
  }

  bool has_mail() const { return has_mail_.load(std::memory_order_seq_cst); }

  // Takes everything. `mail` is swapped, so its capacity is reused.
  void Drain(RequestList* done, std::vector<Mail>* mail) {
    mail->clear();
    has_mail_.store(false, std::memory_order_seq_cst);
    RankedLock lock(mutex_);
    done->Splice(&done_);
    mail->swap(mail_);
  }

  // Empties the eventfd after epoll reported it.
  void ClearWake() {
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t n = read(event_fd_, &count, sizeof count);
    woken_.store(false, std::memory_order_seq_cst);
  }

 private:
  void Wake() {
    has_mail_.store(true, std::memory_order_seq_cst);
    if (quiescence_.waiting() && !woken_.exchange(true, std::memory_order_seq_cst)) {
      const uint64_t one = 1;
      [[maybe_unused]] const ssize_t n = write(event_fd_, &one, sizeof one);
    }
  }

  const int event_fd_;
  Quiescence quiescence_;
  std::atomic<bool> has_mail_{false};
  std::atomic<bool> woken_{false};
  RankedMutex<LockRank::kOutbox> mutex_;
  RequestList done_;
  std::vector<Mail> mail_;
};

}  // namespace tidegate
