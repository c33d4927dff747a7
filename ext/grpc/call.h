// One gRPC call: what its headers said, the message being put together, the answers waiting to go out.
//
// Threads    The I/O thread of its connection only.
// Owner      The connection; a call dies when its stream closes. A request of the call that is still queued or running
//            then lives on (it belongs to the I/O thread's pool) and comes back to find nobody.
// Invariants (1) `requests` chains every inference of the call, in arrival order, until its answer has moved to
// `replies`.
//            (2) After `answered` nothing more is submitted on the stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "infer/request.h"
#include "slow/slow_queue.h"
#include "util/timer_wheel.h"

namespace tidegate {

class Connection;

enum class Method : uint8_t {
  kUnknown,      // UNIMPLEMENTED
  kInfer,        // ModelInfer
  kStreamInfer,  // ModelStreamInfer
  kSlowUnary,    // one message in; Python answers
  kSlowStream,   // messages in until half-close; Python answers
};

enum class Encoding : uint8_t { kIdentity, kGzip, kDeflate, kUnknown };

struct Call : TimerNode {
  Connection* connection = nullptr;
  int32_t stream_id = 0;

  // -- from the headers
  Method method = Method::kUnknown;
  Encoding encoding = Encoding::kIdentity;
  bool is_post = false;
  bool has_path = false;
  bool content_type_ok = false;
  bool has_te = false;
  bool timeout_bad = false;
  bool triton_grpc_error = false;
  uint32_t header_bytes = 0;
  int64_t timeout_ns = -1;  // -1: none
  int64_t opened_ns = 0;
  int64_t deadline_ns = kNever;
  uint8_t slow_lane = 0;
  std::string path;                                           // slow and unknown methods only
  std::vector<std::pair<std::string, std::string>> metadata;  // slow methods only

  // -- the message being received
  uint8_t prefix[5] = {};
  uint8_t prefix_have = 0;
  bool compressed = false;
  bool headers_done = false;   // END_HEADERS seen
  bool accepting = false;      // headers were fine and no error has been answered: DATA counts
  bool remote_closed = false;  // END_STREAM seen
  uint32_t message_bytes = 0;
  uint32_t messages = 0;
  uint64_t body_bytes = 0;         // of all messages, to find slow writers:
  int64_t upload_mark_ns = 0;      // at this time (0: no message was under way)
  uint64_t upload_mark_bytes = 0;  // there were so many
  Request* receiving = nullptr;
  Request* complete = nullptr;  // unary: the message, until END_STREAM

  // -- inferences under way, oldest first
  Request* requests_head = nullptr;
  Request* requests_tail = nullptr;
  std::shared_ptr<SlowCall> slow;  // until Python has finished it or knows that it was cancelled
  bool slow_told = false;          // Python has had an event of it

  // -- the answer
  RequestList replies;  // messages to send; the head is partly sent up to reply_offset
  size_t reply_offset = 0;
  int64_t progress_ns = 0;  // when bytes of `replies` last moved, or the first of them came
  bool headers_sent = false;
  bool deferred = false;   // the data source waits for the next message
  bool finishing = false;  // status is decided; trailers follow the last message
  bool answered = false;   // trailers are submitted
  int grpc_status = 0;
  int32_t pushback_ms = -1;
  std::string grpc_message;
  std::string model_version;
  std::vector<std::pair<std::string, std::string>> trailers;

  // -- links in the connection's list of calls
  Call* list_next = nullptr;
  Call* list_prev = nullptr;

  void Clear() { *this = Call(); }
};

// Whether the error of a request travels as a message of its stream and leaves the stream open.
inline bool IsInBand(const Call& call, Reason reason) {
  return call.method == Method::kStreamInfer && !call.triton_grpc_error && reason != Reason::kMalformedMessage;
}

}  // namespace tidegate
