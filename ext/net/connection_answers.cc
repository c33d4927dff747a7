// The way out: answers in the order of their requests, then the status.
#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>

#include "grpc/percent.h"
#include "infer/codec.h"
#include "net/connection.h"
#include "net/io_thread.h"
#include "net/octets.h"
#include "serving/version.h"

namespace tidegate {
namespace {

// Error texts on the wire: enough for any of ours, and a trailer block stays within a client's default 8 KiB.
constexpr size_t kGrpcMessageMost = 1024;

// A header whose name and value are static: nghttp2 need not copy them.
nghttp2_nv StaticHeader(std::string_view name, std::string_view value) {
  return {Bytes(name), Bytes(value), name.size(), value.size(),
          NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE};
}

// A header whose value is ours for this call only: nghttp2 copies it.
nghttp2_nv CopiedHeader(std::string_view name, std::string_view value) {
  return {Bytes(name), Bytes(value), name.size(), value.size(), NGHTTP2_NV_FLAG_NONE};
}

constexpr std::array<std::string_view, 17> kStatusText = {"0", "1",  "2",  "3",  "4",  "5",  "6",  "7", "8",
                                                          "9", "10", "11", "12", "13", "14", "15", "16"};

}  // namespace

void Connection::Deliver(Call* call, Request* done) {
  MarkDirty();
  // The answer may have to wait for earlier ones of its stream, longer than its version lives: what it needs of that is
  // taken now. (Without a version it was refused at the door and has its answer already.)
  if (const Version* version = std::exchange(done->version, nullptr)) {
    const ModelSpec& spec = version->spec();
    call->model_version = spec.version;
    if (!done->status.ok() && IsInBand(*call, done->status.reason)) {
      EncodeStreamError(spec.name, spec.version, done->id, done->status.message, &done->reply);
    }
  }
  // Answers leave in the order of their requests; one that is ready early waits here.
  while (call->requests_head && call->requests_head->done) {
    Request* ready = call->requests_head;
    call->requests_head = ready->call_next;
    if (!call->requests_head) call->requests_tail = nullptr;
    ready->call_next = nullptr;
    QueueReply(call, ready);
  }
  if (call->method == Method::kStreamInfer) FinishStreamIfDone(call);
}

void Connection::QueueReply(Call* call, Request* request) {
  if (call->finishing || call->answered) {  // an earlier error has ended the call
    io_.Recycle(request);
    return;
  }
  if (!request->status.ok() && !IsInBand(*call, request->status.reason)) {
    const Status status = std::move(request->status);
    io_.Recycle(request);
    Finish(call, status);
    return;
  }
  // The body stays charged as well: its memory goes back together with the answer's.
  AddReply(call, request);
  if (call->method == Method::kInfer) {
    call->finishing = true;
    call->grpc_status = 0;
    io_.wheel_.Remove(call);
  }
  SendReplies(call);
}

void Connection::AddReply(Call* call, Request* request) {
  const auto bytes = static_cast<int64_t>(request->reply.size());
  io_.budget_.Force(bytes);
  request->charged_bytes += bytes;
  if (call->replies.empty()) call->progress_ns = io_.now_ns_;
  call->replies.PushBack(request);
}

void Connection::SendReplies(Call* call) {
  if (!call->headers_sent) {
    call->headers_sent = true;
    static const nghttp2_nv headers[] = {StaticHeader(":status", "200"),
                                         StaticHeader("content-type", "application/grpc")};
    nghttp2_data_provider provider{};
    provider.source.ptr = call;
    provider.read_callback = ReadReply;
    nghttp2_submit_response(session_, call->stream_id, headers, std::size(headers), &provider);
  } else if (call->deferred) {
    call->deferred = false;
    nghttp2_session_resume_data(session_, call->stream_id);
  }
  MarkDirty();
}

ssize_t Connection::ReadReply(nghttp2_session*, int32_t, uint8_t* to, size_t size, uint32_t* flags,
                              nghttp2_data_source* source, void* self) {
  auto* connection = static_cast<Connection*>(self);
  auto* call = static_cast<Call*>(source->ptr);
  call->progress_ns = connection->io_.now_ns_;
  size_t written = 0;
  while (Request* request = call->replies.head()) {
    const size_t take = std::min(size - written, request->reply.size() - call->reply_offset);
    std::memcpy(to + written, request->reply.data() + call->reply_offset, take);
    written += take;
    call->reply_offset += take;
    if (call->reply_offset < request->reply.size()) return static_cast<ssize_t>(written);
    call->replies.PopFront();
    call->reply_offset = 0;
    connection->io_.Recycle(request);
  }
  if (call->finishing) {
    *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
    connection->SubmitTrailers(call);
    return static_cast<ssize_t>(written);
  }
  if (written > 0) return static_cast<ssize_t>(written);
  call->deferred = true;
  return NGHTTP2_ERR_DEFERRED;
}

void Connection::SubmitTrailers(Call* call) {
  call->answered = true;
  std::array<nghttp2_nv, 16> headers;
  size_t n = 0;
  headers[n++] = StaticHeader("grpc-status", kStatusText[static_cast<size_t>(call->grpc_status)]);
  std::string pushback;
  if (!call->grpc_message.empty()) headers[n++] = CopiedHeader("grpc-message", call->grpc_message);
  if (call->pushback_ms >= 0) {
    pushback = std::to_string(call->pushback_ms);
    headers[n++] = CopiedHeader("grpc-retry-pushback-ms", pushback);
  }
  if (!call->model_version.empty()) headers[n++] = CopiedHeader("x-model-version", call->model_version);
  for (const auto& [name, value] : call->trailers) {
    if (n < headers.size()) headers[n++] = CopiedHeader(name, value);
  }
  nghttp2_submit_trailer(session_, call->stream_id, headers.data(), n);
}

void Connection::SubmitTrailersOnly(Call* call) {
  call->answered = true;
  call->headers_sent = true;
  std::array<nghttp2_nv, 16> headers;
  size_t n = 0;
  headers[n++] = StaticHeader(":status", "200");
  headers[n++] = StaticHeader("content-type", "application/grpc");
  headers[n++] = StaticHeader("grpc-status", kStatusText[static_cast<size_t>(call->grpc_status)]);
  std::string pushback;
  if (!call->grpc_message.empty()) headers[n++] = CopiedHeader("grpc-message", call->grpc_message);
  if (call->pushback_ms >= 0) {
    pushback = std::to_string(call->pushback_ms);
    headers[n++] = CopiedHeader("grpc-retry-pushback-ms", pushback);
  }
  if (!call->model_version.empty()) headers[n++] = CopiedHeader("x-model-version", call->model_version);
  for (const auto& [name, value] : call->trailers) {
    if (n < headers.size()) headers[n++] = CopiedHeader(name, value);
  }
  nghttp2_submit_response(session_, call->stream_id, headers.data(), n, nullptr);
}

void Connection::Finish(Call* call, const Status& status) {
  FinishWith(call, GrpcStatus(status.reason), status.message, status.pushback_ms);
}

void Connection::FinishWith(Call* call, int grpc_status, std::string_view message, int32_t pushback_ms) {
  if (call->finishing || call->answered) return;
  call->finishing = true;
  call->accepting = false;
  call->grpc_status = grpc_status;
  call->grpc_message = GrpcMessage(message, kGrpcMessageMost);
  call->pushback_ms = pushback_ms;
  io_.wheel_.Remove(call);
  CancelSlow(call);
  if (Request* request = std::exchange(call->receiving, nullptr)) io_.Recycle(request);
  if (Request* request = std::exchange(call->complete, nullptr)) io_.Recycle(request);
  if (call->requests_head) Abandon(call, Reason::kCancelled);
  if (call->headers_sent) {
    SendReplies(call);
  } else {
    SubmitTrailersOnly(call);
  }
  MarkDirty();
}

void Connection::FinishHttp(Call* call, int http_status) {
  io_.counters_.http_refusals.Add(1);
  call->finishing = call->answered = call->headers_sent = true;
  call->accepting = false;
  const nghttp2_nv wrong_type[] = {StaticHeader(":status", "415"), StaticHeader("accept-post", "application/grpc")};
  const nghttp2_nv wrong_method[] = {StaticHeader(":status", "405"), StaticHeader("allow", "POST")};
  nghttp2_submit_response(session_, call->stream_id, http_status == 415 ? wrong_type : wrong_method, 2, nullptr);
  MarkDirty();
}

void Connection::FinishStreamIfDone(Call* call) {
  if (!call->remote_closed || call->requests_head || call->finishing) return;
  FinishWith(call, 0, {}, -1);
}

void Connection::DeliverMail(Call* call, Mail* mail) {
  MarkDirty();
  if (call->finishing || call->answered) return;
  if (mail->kind == Mail::Kind::kMessage) {
    Request* holder = io_.NewRequest();
    holder->reply.swap(mail->message);
    AddReply(call, holder);
    // A unary answer and its status come together: they leave in one piece.
    if (call->method == Method::kSlowStream) SendReplies(call);
    return;
  }
  call->slow = nullptr;
  // nghttp2 sends what it is given, and a bad header costs a client its whole connection.
  std::erase_if(mail->trailers, [](const auto& trailer) {
    const auto& [name, value] = trailer;
    return !nghttp2_check_header_name(Bytes(name), name.size()) || name.starts_with(':') ||
           !nghttp2_check_header_value(Bytes(value), value.size());
  });
  call->trailers = std::move(mail->trailers);
  if (!call->headers_sent && !call->replies.empty()) {
    call->finishing = true;
    call->accepting = false;
    call->grpc_status = mail->grpc_status;
    call->grpc_message = GrpcMessage(mail->grpc_message, kGrpcMessageMost);
    io_.wheel_.Remove(call);
    SendReplies(call);
    return;
  }
  FinishWith(call, mail->grpc_status, mail->grpc_message, -1);
}

}  // namespace tidegate
