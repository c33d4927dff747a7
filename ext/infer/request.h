// One inference on its way through the server.
//
// Owner      The memory belongs to the I/O thread that received it (`home`), always: that thread allocates it from its
//            pool and is the only one to free it. The right to touch the fields passes on:
//              I/O thread -> queue (successful Push) -> executor (Take) -> outbox of `home` -> I/O thread.
//            A request that a queue refuses, or that Remove() takes back, is the I/O thread's again.
// Exception  `cancelled` may be set by the I/O thread at any time; executors only read it.
// Invariants (1) Every request that a queue accepted comes back to its home outbox, or out of Remove(), exactly once.
//            (2) `inputs` views point into `body` or `scratch`, which do not move while the request is not the I/O
//                thread's.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "infer/tensor.h"
#include "util/clock.h"
#include "util/live.h"
#include "util/status.h"
#include "util/timer_wheel.h"

namespace tidegate {

class Outbox;
class Version;

// Names a stream without a pointer, so that it may outlive it: a slot that was reused has another generation.
struct StreamRef {
  uint32_t slot = 0;
  uint32_t generation = 0;
  int32_t stream_id = 0;
};

struct InputView {
  // Numeric types: the elements, little-endian, row-major, any alignment. BYTES: for each element a 4-byte
  // little-endian length and its bytes; the lengths have been checked against the size and the element count.
  const std::byte* data = nullptr;
  size_t bytes = 0;
  Dims dims;  // as sent, batch dimension included
};

struct Request;

struct RequestTimer : TimerNode {
  Request* request = nullptr;
};

struct RequestTimes {
  int64_t arrived_ns = 0;      // the last byte was read
  int64_t dispatched_ns = 0;   // left the queue
  int64_t input_done_ns = 0;   // gathered
  int64_t infer_done_ns = 0;   // the runtime returned
  int64_t output_done_ns = 0;  // reply encoded
};

struct Request {
  // -- the message ---------------------------------------------------------------------------------------------------
  std::vector<std::byte> body;        // one serialized ModelInferRequest
  std::vector<std::byte> scratch;     // inputs that came as typed contents, converted to raw form
  std::string_view id;                // into body
  std::vector<InputView> inputs;      // in the order of ModelSpec::inputs
  uint64_t outputs_wanted = 0;        // bit i: ModelSpec::outputs[i]; never 0 after the check
  uint32_t rows = 0;                  // 1 for a model without batch dimension
  uint32_t priority = 0;              // as sent; 0: the model's default
  int64_t timeout_us = 0;             // the `timeout` parameter; 0: none
  uint64_t shape_key = 0;             // hash of the non-batch dimensions; 0 when the model has no free ones
  bool empty_final_response = false;  // triton_enable_empty_final_response

  // -- where it stands -----------------------------------------------------------------------------------------------
  Version* version = nullptr;  // valid until the request is back in the outbox
  int64_t due_ns = kNever;     // when the answer is too late: earliest of grpc-timeout and `timeout`
  RequestTimes times;
  std::atomic<bool> cancelled{false};

  // -- the answer ----------------------------------------------------------------------------------------------------
  Status status;
  std::vector<std::byte> reply;  // one whole gRPC message, 5-byte prefix included; empty on error outside a stream

  // -- where the answer goes -----------------------------------------------------------------------------------------
  Outbox* home = nullptr;
  StreamRef stream;
  Request* call_next = nullptr;    // the next request of the same call; the I/O thread's alone
  bool done = false;               // back from the queue or executor; the I/O thread's alone
  Reason abandoned = Reason::kOk;  // why nobody waits for the answer any more; the I/O thread's alone
  int64_t charged_bytes = 0;       // of the node's byte budget; the I/O thread's alone
  RequestTimer expiry;             // set while the queue's timeouts may take it; the I/O thread's alone
  bool in_stream = false;          // ModelStreamInfer: reply is a ModelStreamInferResponse and errors travel inside it

  // -- links, used by whoever holds the request
  // ------------------------------------------------------------------------
  Request* next = nullptr;
  Request* prev = nullptr;

  // -- the queue's alone, from Push until it hands the request out
  // -------------------------------------------------------
  Request* shape_next = nullptr;  // among those of its shape
  Request* shape_prev = nullptr;
  uint64_t ticket = 0;            // arrival order within its version's queue
  int64_t queue_due_ns = kNever;  // when the queue's own timeout strikes
  int64_t listed_ns = 0;          // since when it waits in its list
  uint8_t queue_list = 0;         // which one
  bool queued = false;            // guarded by the queue's lock

  [[no_unique_address]] LiveCounted<LiveKind::kRequest> live;

  // Back to a blank request with its buffers' capacity kept (a buffer above `keep_bytes` is given back).
  void Reset(size_t keep_bytes) {
    auto blank = [keep_bytes](std::vector<std::byte>& buffer) {
      if (buffer.capacity() > keep_bytes) {
        std::vector<std::byte>().swap(buffer);
      } else {
        buffer.clear();
      }
    };
    blank(body);
    blank(scratch);
    blank(reply);
    id = {};
    inputs.clear();
    outputs_wanted = 0;
    rows = 0;
    priority = 0;
    timeout_us = 0;
    shape_key = 0;
    empty_final_response = false;
    version = nullptr;
    due_ns = kNever;
    times = {};
    cancelled.store(false, std::memory_order_relaxed);
    status = {};
    stream = {};
    call_next = nullptr;
    done = false;
    abandoned = Reason::kOk;
    charged_bytes = 0;
    in_stream = false;
    next = prev = nullptr;
    shape_next = shape_prev = nullptr;
    ticket = 0;
    queue_due_ns = kNever;
    listed_ns = 0;
    queue_list = 0;
    queued = false;
  }
};

// A chain of requests through their links; owns nothing.
class RequestList {
 public:
  bool empty() const { return head_ == nullptr; }
  Request* head() const { return head_; }
  size_t size() const { return size_; }

  void PushBack(Request* request) {
    request->next = nullptr;
    request->prev = tail_;
    (tail_ ? tail_->next : head_) = request;
    tail_ = request;
    ++size_;
  }
  void Remove(Request* request) {
    (request->prev ? request->prev->next : head_) = request->next;
    (request->next ? request->next->prev : tail_) = request->prev;
    request->next = request->prev = nullptr;
    --size_;
  }
  Request* PopFront() {
    Request* request = head_;
    if (request) Remove(request);
    return request;
  }
  // Appends all of `other`, which is empty afterwards.
  void Splice(RequestList* other) {
    if (other->empty()) return;
    other->head_->prev = tail_;
    (tail_ ? tail_->next : head_) = other->head_;
    tail_ = other->tail_;
    size_ += other->size_;
    *other = RequestList();
  }

 private:
  Request* head_ = nullptr;
  Request* tail_ = nullptr;
  size_t size_ = 0;
};

}  // namespace tidegate
