#include "slow/slow_queue.h"

#include <cstring>

namespace tidegate {

void SlowCall::Send(const char* data, size_t size) {
  if (cancelled() || finished_.load(std::memory_order_acquire)) return;
  Mail mail;
  mail.kind = Mail::Kind::kMessage;
  mail.stream = stream_;
  mail.message.resize(5 + size);
  for (int i = 0; i < 4; ++i) mail.message[1 + i] = static_cast<std::byte>(size >> (24 - 8 * i));
  if (size > 0) std::memcpy(mail.message.data() + 5, data, size);
  home_->PostMail(std::move(mail));
}

void SlowCall::Finish(int grpc_status, std::string message, std::vector<std::pair<std::string, std::string>> trailers) {
  if (finished_.exchange(true, std::memory_order_acq_rel) || cancelled()) return;
  Mail mail;
  mail.kind = Mail::Kind::kFinish;
  mail.stream = stream_;
  mail.grpc_status = grpc_status >= 0 && grpc_status <= 16 ? grpc_status : 2;  // UNKNOWN
  mail.grpc_message = std::move(message);
  mail.trailers = std::move(trailers);
  home_->PostMail(std::move(mail));
}

bool SlowQueue::Push(SlowEvent event) {
  {
    RankedLock lock(mutex_);
    if (closed_) return false;
    if (event.kind != SlowEvent::Kind::kCancelled && events_.size() >= kMostWaiting) return false;
    events_.push_back(std::move(event));
  }
  arrived_.notify_one();
  return true;
}

bool SlowQueue::Pop(double timeout_s, SlowEvent* event) {
  RankedLock lock(mutex_);
  const bool ready = arrived_.wait_for(lock.native(), std::chrono::duration<double>(timeout_s),
                                       [this] { return closed_ || !events_.empty(); });
  if (!ready || events_.empty()) return false;
  *event = std::move(events_.front());
  events_.pop_front();
  return true;
}

void SlowQueue::Close() {
  {
    RankedLock lock(mutex_);
    closed_ = true;
  }
  arrived_.notify_all();
}

}  // namespace tidegate
