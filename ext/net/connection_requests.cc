// The way in: headers make a call, DATA makes its messages, a message is checked and goes to its queue or to Python.
#include <algorithm>
#include <cstring>
#include <utility>

#include "grpc/inflate.h"
#include "grpc/timeout.h"
#include "infer/codec.h"
#include "net/connection.h"
#include "net/frontend.h"
#include "net/io_thread.h"
#include "serving/version.h"

namespace tidegate {
namespace {

constexpr std::string_view kInferPath = "/inference.GRPCInferenceService/ModelInfer";
constexpr std::string_view kStreamInferPath = "/inference.GRPCInferenceService/ModelStreamInfer";
constexpr std::string_view kAcceptEncoding = "identity,deflate,gzip";

Status BytesFull() {
  return Status::Error(Reason::kQueueFull, "the bytes of the requests in flight have reached their limit", 100);
}

}  // namespace

void Connection::HeaderOf(Call* call, std::string_view name, std::string_view value) {
  if (name.starts_with(':')) {
    if (name == ":path") {
      call->has_path = true;
      if (value == kInferPath) {
        call->method = Method::kInfer;
      } else if (value == kStreamInferPath) {
        call->method = Method::kStreamInfer;
      } else {
        call->path = value;
        if (const SlowMethod* slow = io_.frontend_.FindSlow(value)) {
          call->method = slow->stream ? Method::kSlowStream : Method::kSlowUnary;
          call->slow_lane = slow->lane;
        }
      }
    } else if (name == ":method") {
      call->is_post = value == "POST";
    }
    return;
  }
  switch (name.size()) {
    case 2:
      if (name == "te") call->has_te = value == "trailers";
      break;
    case 12:
      if (name == "content-type") {
        constexpr std::string_view kGrpc = "application/grpc";
        call->content_type_ok = value.starts_with(kGrpc) && (value.size() == kGrpc.size() ||
                                                             value[kGrpc.size()] == '+' || value[kGrpc.size()] == ';');
        return;
      }
      if (name == "grpc-timeout") {
        call->timeout_ns = ParseGrpcTimeout(value);
        call->timeout_bad = call->timeout_ns < 0;
        return;
      }
      break;
    case 13:
      if (name == "grpc-encoding") {
        call->encoding = value == "identity"  ? Encoding::kIdentity
                         : value == "gzip"    ? Encoding::kGzip
                         : value == "deflate" ? Encoding::kDeflate
                                              : Encoding::kUnknown;
        return;
      }
      break;
    case 17:
      if (name == "triton_grpc_error") {
        call->triton_grpc_error = value == "true";
        return;
      }
      break;
    default: break;
  }
  if (call->method == Method::kSlowUnary || call->method == Method::kSlowStream) {
    call->metadata.emplace_back(std::string(name), std::string(value));
  }
}

void Connection::HeadersDone(Call* call) {
  call->headers_done = true;
  if (!call->has_te) io_.counters_.te_missing.Add(1);
  if (call->header_bytes > kHeaderListBytes) {
    Finish(call, Status::Error(Reason::kMessageTooLarge, "request headers are larger than 16 KiB"));
    return;
  }
  if (!call->is_post) {
    FinishHttp(call, 405);
    return;
  }
  if (!call->content_type_ok) {
    FinishHttp(call, 415);
    return;
  }
  if (call->method == Method::kUnknown) {
    Finish(call, Status::Error(Reason::kNotSupported, "unknown method " + call->path));
    return;
  }
  if (call->timeout_bad) {
    Finish(call, Status::Error(Reason::kInternal,
                               "malformed grpc-timeout: expected 1 to 8 digits and one of H, M, S, m, u, n"));
    return;
  }
  if (call->timeout_ns >= 0) {
    call->deadline_ns = io_.now_ns_ + call->timeout_ns;
    if (call->timeout_ns == 0) {
      Finish(call, Status::Error(Reason::kDeadlinePassed, "the deadline had passed when the call arrived"));
      return;
    }
    io_.wheel_.Insert(call, call->deadline_ns);
  }
  call->accepting = true;
  if (call->method == Method::kSlowUnary || call->method == Method::kSlowStream) {
    call->slow = std::make_shared<SlowCall>(io_.outbox_, StreamRef{slot_, generation_, call->stream_id},
                                            std::move(call->path), peer_, std::move(call->metadata));
  }
}

void Connection::Data(Call* call, const uint8_t* data, size_t size) {
  call->body_bytes += size;
  while (size > 0 && call->accepting) {
    if (call->prefix_have < 5) {
      const size_t take = std::min<size_t>(size, 5u - call->prefix_have);
      std::memcpy(call->prefix + call->prefix_have, data, take);
      call->prefix_have = static_cast<uint8_t>(call->prefix_have + take);
      data += take;
      size -= take;
      if (call->prefix_have < 5) return;
      PrefixDone(call);
      if (!call->receiving) continue;  // refused, or an empty message
    }
    std::vector<std::byte>& body = call->receiving->body;
    const size_t take = std::min<size_t>(size, call->message_bytes - body.size());
    // Charged as it comes: a declared length is no claim on what others need.
    if (!TakeBytes(call, call->receiving, take)) return;
    if (body.size() + take > body.capacity()) body.reserve(call->message_bytes);
    const auto* bytes = reinterpret_cast<const std::byte*>(data);
    body.insert(body.end(), bytes, bytes + take);
    io_.counters_.bytes_received.Add(take);
    data += take;
    size -= take;
    if (body.size() == call->message_bytes) MessageDone(call);
  }
}

bool Connection::TakeBytes(Call* call, Request* request, size_t bytes) {
  if (io_.budget_.Take(static_cast<int64_t>(bytes))) {
    request->charged_bytes += static_cast<int64_t>(bytes);
    return true;
  }
  if (request != call->receiving) io_.Recycle(request);
  Finish(call, BytesFull());
  return false;
}

void Connection::PrefixDone(Call* call) {
  const uint8_t flag = call->prefix[0];
  call->message_bytes = (uint32_t{call->prefix[1]} << 24) | (uint32_t{call->prefix[2]} << 16) |
                        (uint32_t{call->prefix[3]} << 8) | call->prefix[4];
  const bool streams = call->method == Method::kStreamInfer || call->method == Method::kSlowStream;
  if (!streams && call->messages > 0) {
    Finish(call, Status::Error(Reason::kInternal, "a unary call carries one message; this one has a second"));
    return;
  }
  if (flag > 1) {
    Finish(call, Status::Error(Reason::kInternal, "the compressed flag of a message is neither 0 nor 1"));
    return;
  }
  call->compressed = flag == 1;
  if (call->compressed && call->encoding == Encoding::kIdentity) {
    Finish(call, Status::Error(Reason::kInternal, "a compressed message without grpc-encoding"));
    return;
  }
  if (call->compressed && call->encoding == Encoding::kUnknown) {
    call->trailers.emplace_back("grpc-accept-encoding", std::string(kAcceptEncoding));
    Finish(call, Status::Error(Reason::kNotSupported,
                               "message compression is not supported; use one of " + std::string(kAcceptEncoding)));
    return;
  }
  const uint32_t limit = io_.settings_.max_message_bytes;
  if (call->message_bytes > limit) {
    Finish(call, Status::Error(Reason::kMessageTooLarge, "message of " + std::to_string(call->message_bytes) +
                                                             " bytes is larger than the limit of " +
                                                             std::to_string(limit) + " bytes"));
    return;
  }
  call->receiving = io_.NewRequest();
  // What does not fit now is refused before it is sent.
  if (!TakeBytes(call, call->receiving, call->message_bytes)) return;
  io_.budget_.Return(std::exchange(call->receiving->charged_bytes, 0));
  call->receiving->body.reserve(std::min<size_t>(call->message_bytes, kFirstBodyBytes));
  if (call->message_bytes == 0) MessageDone(call);
}

void Connection::MessageDone(Call* call) {
  Request* request = std::exchange(call->receiving, nullptr);
  call->prefix_have = 0;
  ++call->messages;
  if (call->compressed) {
    std::vector<std::byte>& opened = request->scratch;
    const Status status = Inflate(request->body, io_.settings_.max_message_bytes, &opened);
    if (!status.ok()) {
      io_.Recycle(request);
      Finish(call, status);
      return;
    }
    if (!TakeBytes(call, request, opened.size())) return;
    request->body.swap(opened);
    opened.clear();
  }
  switch (call->method) {
    case Method::kInfer:
    case Method::kSlowUnary: call->complete = request; return;  // until END_STREAM proves it the only one
    case Method::kStreamInfer: StartInfer(call, request); return;
    case Method::kSlowStream: PushSlow(call, SlowEvent::Kind::kMessage, request); return;
    case Method::kUnknown: io_.Recycle(request); return;
  }
}

void Connection::RemoteClosed(Call* call) {
  call->remote_closed = true;
  if (!call->accepting) return;
  call->accepting = false;
  if (call->prefix_have != 0 || call->receiving) {
    Finish(call, Status::Error(Reason::kInternal, "the stream ended inside a message"));
    return;
  }
  switch (call->method) {
    case Method::kInfer:
    case Method::kSlowUnary: {
      if (!call->complete) {
        Finish(call, Status::Error(Reason::kInternal, "a unary call carries one message; this one has none"));
        return;
      }
      Request* request = std::exchange(call->complete, nullptr);
      if (call->method == Method::kInfer) {
        StartInfer(call, request);
        return;
      }
      PushSlow(call, SlowEvent::Kind::kMessage, request);
      return;
    }
    case Method::kStreamInfer: FinishStreamIfDone(call); return;
    case Method::kSlowStream: PushSlow(call, SlowEvent::Kind::kHalfClose, nullptr); return;
    case Method::kUnknown: return;
  }
}

void Connection::PushSlow(Call* call, SlowEvent::Kind kind, Request* message) {
  SlowEvent event;
  event.call = call->slow;
  event.kind = kind;
  if (message) {
    event.payload = std::exchange(message->body, {});
    event.held = BudgetHold(io_.frontend_.budget(), std::exchange(message->charged_bytes, 0));
    io_.Recycle(message);
  }
  if (io_.frontend_.lane(call->slow_lane).Push(std::move(event))) {
    call->slow_told = true;
  } else {
    Finish(call, Status::Error(Reason::kQueueFull, "too many calls are waiting; try again", 1000));
  }
}

void Connection::CancelSlow(Call* call) {
  const std::shared_ptr<SlowCall> slow = std::exchange(call->slow, nullptr);
  if (!slow) return;
  slow->Cancel();
  if (call->method != Method::kSlowStream || !call->slow_told) return;
  SlowEvent event;
  event.call = slow;
  event.kind = SlowEvent::Kind::kCancelled;
  io_.frontend_.lane(call->slow_lane).Push(std::move(event));
}

void Connection::StartInfer(Call* call, Request* request) {
  request->times.arrived_ns = io_.now_ns_;
  request->stream = {slot_, generation_, call->stream_id};
  request->in_stream = call->method == Method::kStreamInfer;
  request->due_ns = call->deadline_ns;
  ParsedRequest& parsed = io_.parsed_;
  const std::string_view body(reinterpret_cast<const char*>(request->body.data()), request->body.size());
  Version* version = nullptr;
  Status status = ParseInferRequest(body, &parsed);
  if (status.ok()) status = io_.table_->Resolve(parsed.model_name, parsed.model_version, &version);
  if (status.ok()) status = CheckInferRequest(parsed, version->spec(), request);
  if (status.ok() && !request->scratch.empty()) {
    // Typed contents are up to eight times as large in raw form as in the message.
    const auto converted = static_cast<int64_t>(request->scratch.size());
    if (io_.budget_.Take(converted)) {
      request->charged_bytes += converted;
    } else {
      status = BytesFull();
    }
  }
  // The call's chain holds every request of it until its answer is out.
  (call->requests_tail ? call->requests_tail->call_next : call->requests_head) = request;
  call->requests_tail = request;
  if (status.ok()) {
    io_.Enqueue(version, request);
    return;
  }
  request->id = parsed.id;
  if (version) io_.CountRefusal(version, request, status.reason);
  if (request->in_stream && status.reason != Reason::kMalformedMessage) {
    EncodeStreamError(parsed.model_name, parsed.model_version, request->id, status.message, &request->reply);
  }
  request->status = std::move(status);
  request->done = true;
  Deliver(call, request);
}

void Connection::Abandon(Call* call, Reason reason) {
  for (Request* request = call->requests_head; request;) {
    Request* next = std::exchange(request->call_next, nullptr);
    if (request->done) {
      io_.Recycle(request);  // counted already; it only waited for its turn
    } else {
      request->abandoned = reason;
      if (io_.TakeBack(request)) {
        io_.DropAbandoned(request);
      } else {
        request->cancelled.store(true, std::memory_order_relaxed);
      }
    }
    request = next;
  }
  call->requests_head = call->requests_tail = nullptr;
}

void Connection::OnDeadline(Call* call) {
  io_.counters_.deadline_expired.Add(1);
  Abandon(call, Reason::kDeadlinePassed);
  Finish(call, Status::Error(Reason::kDeadlinePassed, "the deadline of the call passed before its answer was ready"));
  MarkDirty();
}

void Connection::ReleaseCall(Call* call) {
  nghttp2_session_set_stream_user_data(session_, call->stream_id, nullptr);
  if (call->receiving) io_.Recycle(call->receiving);
  if (call->complete) io_.Recycle(call->complete);
  while (Request* request = call->replies.PopFront()) io_.Recycle(request);
  CancelSlow(call);
  (call->list_prev ? call->list_prev->list_next : calls_) = call->list_next;
  if (call->list_next) call->list_next->list_prev = call->list_prev;
  if (--n_calls_ == 0) idle_since_ns_ = io_.now_ns_;
  io_.FreeCall(call);
}

}  // namespace tidegate
