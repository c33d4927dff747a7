#include "net/connection.h"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "net/frontend.h"
#include "net/io_thread.h"
#include "net/octets.h"

namespace tidegate {
namespace {

constexpr uint8_t kDrainPing[8] = {'d', 'r', 'a', 'i', 'n', 0, 0, 0};
constexpr uint8_t kKeepalivePing[8] = {'a', 'l', 'i', 'v', 'e', 0, 0, 0};

}  // namespace

nghttp2_session_callbacks* Connection::MakeCallbacks() {
  nghttp2_session_callbacks* callbacks = nullptr;
  if (nghttp2_session_callbacks_new(&callbacks) != 0) return nullptr;
  nghttp2_session_callbacks_set_on_begin_frame_callback(callbacks, OnBeginFrame);
  nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, OnBeginHeaders);
  nghttp2_session_callbacks_set_on_header_callback(callbacks, OnHeader);
  nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, OnFrameRecv);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, OnDataChunk);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, OnStreamClose);
  nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, OnFrameSend);
  nghttp2_session_callbacks_set_on_invalid_frame_recv_callback(callbacks, OnInvalidFrame);
  nghttp2_session_callbacks_set_unpack_extension_callback(callbacks, IgnoreExtension);
  return callbacks;
}

nghttp2_option* Connection::MakeOptions() {
  nghttp2_option* option = nullptr;
  if (nghttp2_option_new(&option) != 0) return nullptr;
  // Closed streams are kept for the priority tree only, which we do not use.
  nghttp2_option_set_no_closed_streams(option, 1);
  // Frames of unknown types are ignored, as they must be, but through our hands: otherwise nobody would count them.
  for (int type = NGHTTP2_CONTINUATION + 1; type <= UINT8_MAX; ++type) {
    nghttp2_option_set_user_recv_extension_type(option, static_cast<uint8_t>(type));
  }
  // gRPC allows blanks at both ends of a value.
  nghttp2_option_set_no_rfc9113_leading_and_trailing_ws_validation(option, 1);
#ifdef TIDEGATE_HAVE_STREAM_RESET_RATE_LIMIT
  // A lawful client whose deadlines expire under overload resets far more than the default 33 streams a second; a reset
  // takes its work out of the queue and costs us some 10 us, so the work is what we bound.
  nghttp2_option_set_stream_reset_rate_limit(option, 20'000, 10'000);
#endif
#ifdef TIDEGATE_HAVE_GLITCH_RATE_LIMIT
  nghttp2_option_set_glitch_rate_limit(option, 10'000, 330);
#endif
  return option;
}

Connection::Connection(IoThread& io, int fd, uint32_t slot, uint32_t generation, std::string peer)
    : io_(io),
      fd_(fd),
      slot_(slot),
      generation_(generation),
      peer_(std::move(peer)),
      interest_(EPOLLIN),
      opened_ns_(io.now_ns_),
      heard_ns_(io.now_ns_),
      progress_ns_(io.now_ns_),
      idle_since_ns_(io.now_ns_) {
  static nghttp2_session_callbacks* const callbacks = MakeCallbacks();
  static nghttp2_option* const option = MakeOptions();
  if (nghttp2_session_server_new2(&session_, callbacks, this, option) != 0) {
    session_ = nullptr;
    Die();
    return;
  }
  const FrontendSettings& settings = io_.settings_;
  const nghttp2_settings_entry entries[] = {
      {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, settings.max_streams},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, kStreamWindowBytes},
      {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, kMaxFrameBytes},
      {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, kHeaderListBytes},
  };
  nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, entries, std::size(entries));
  nghttp2_session_set_local_window_size(session_, NGHTTP2_FLAG_NONE, 0, kConnectionWindowBytes);
  if (settings.max_connection_age_ns > 0) {
    // +-10 %, from the address space of slots and time, so that connections opened together do not end together.
    const int64_t tenth = settings.max_connection_age_ns / 10;
    const uint64_t mixed = (static_cast<uint64_t>(opened_ns_) ^ (uint64_t{slot_} << 20)) * 0x9E3779B97F4A7C15u;
    age_limit_ns_ = settings.max_connection_age_ns - tenth + static_cast<int64_t>((mixed >> 33) % (2 * tenth + 1));
  }
  MarkDirty();
  if (io_.draining_) BeginDrain();
}

Connection::~Connection() {
  while (calls_) {
    Call* call = calls_;
    Abandon(call, Reason::kCancelled);
    ReleaseCall(call);
  }
  if (session_) nghttp2_session_del(session_);
  close(fd_);
}

void Connection::MarkDirty() {
  if (dirty || dead_) return;
  dirty = true;
  io_.dirty_.push_back(this);
}

void Connection::Die() {
  if (dead_) return;
  dead_ = true;
  epoll_ctl(io_.epoll_fd_, EPOLL_CTL_DEL, fd_, nullptr);
  // Work of a connection that is gone is worth nothing: take it out of the queues now.
  AbandonAll();
  io_.dying_.push_back(this);
}

void Connection::AbandonAll() {
  for (Call* call = calls_; call; call = call->list_next) {
    Abandon(call, Reason::kCancelled);
    CancelSlow(call);
  }
}

Call* Connection::FindCall(int32_t stream_id) {
  return static_cast<Call*>(nghttp2_session_get_stream_user_data(session_, stream_id));
}

// ---- reading ------------------------------------------------------------------------------------------------------

void Connection::OnReadable() {
  // A few reads a round, so that one fast sender does not starve the other connections of this thread.
  for (int i = 0; i < 4; ++i) {
    const ssize_t n = recv(fd_, io_.read_buffer_.data(), io_.read_buffer_.size(), 0);
    if (n == 0) {
      Die();
      return;
    }
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) Die();
      return;
    }
    heard_ns_ = io_.now_ns_;
    io_.counters_.bytes_read.Add(static_cast<uint64_t>(n));
    if (lingering_) continue;
    const ssize_t used = nghttp2_session_mem_recv(session_, io_.read_buffer_.data(), static_cast<size_t>(n));
    MarkDirty();
    if (used < 0) {
      // nghttp2 has queued a GOAWAY where the protocol asks for one; a peer that does not speak HTTP/2 gets nothing.
      io_.counters_.protocol_errors.Add(1);
      if (used != NGHTTP2_ERR_BAD_CLIENT_MAGIC) Flush();
      Die();
      return;
    }
    if (static_cast<size_t>(n) < io_.read_buffer_.size()) return;
  }
}

int Connection::IgnoreExtension(nghttp2_session*, void**, const nghttp2_frame_hd*, void*) { return NGHTTP2_ERR_CANCEL; }

int Connection::OnBeginFrame(nghttp2_session* session, const nghttp2_frame_hd* hd, void* self) {
  auto* connection = static_cast<Connection*>(self);
  switch (hd->type) {
    case NGHTTP2_DATA:
      if (hd->length == 0 && !(hd->flags & NGHTTP2_FLAG_END_STREAM)) connection->Glitch();
      break;
    case NGHTTP2_HEADERS:
      // On a stream that is over they are decompressed for nothing.
      if (hd->stream_id <= nghttp2_session_get_last_proc_stream_id(session) && !connection->FindCall(hd->stream_id)) {
        connection->Glitch();
      }
      break;
    case NGHTTP2_RST_STREAM:
    case NGHTTP2_WINDOW_UPDATE:
    case NGHTTP2_CONTINUATION: break;
    default: connection->Glitch(); break;  // PRIORITY, SETTINGS, PING, GOAWAY, PUSH_PROMISE, unknown types
  }
  return 0;
}

int Connection::OnBeginHeaders(nghttp2_session* session, const nghttp2_frame* frame, void* self) {
  auto* connection = static_cast<Connection*>(self);
  if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
  Call* call = connection->io_.NewCall();
  call->connection = connection;
  call->stream_id = frame->hd.stream_id;
  call->opened_ns = connection->io_.now_ns_;
  call->list_next = connection->calls_;
  if (connection->calls_) connection->calls_->list_prev = call;
  connection->calls_ = call;
  ++connection->n_calls_;
  nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, call);
  return 0;
}

int Connection::OnHeader(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                         const uint8_t* value, size_t value_size, uint8_t, void* self) {
  auto* connection = static_cast<Connection*>(self);
  Call* call = connection->FindCall(frame->hd.stream_id);
  if (!call) return 0;
  call->header_bytes += static_cast<uint32_t>(name_size + value_size + 32);
  // Over the limit nothing more is kept; the call is refused when its headers end.
  if (call->header_bytes > kHeaderListBytes) return 0;
  if (frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;  // request trailers: counted, not used
  connection->HeaderOf(call, View(name, name_size), View(value, value_size));
  return 0;
}

int Connection::OnFrameRecv(nghttp2_session* session, const nghttp2_frame* frame, void* self) {
  auto* connection = static_cast<Connection*>(self);
  switch (frame->hd.type) {
    case NGHTTP2_HEADERS: {
      Call* call = connection->FindCall(frame->hd.stream_id);
      if (!call) return 0;
      if (frame->headers.cat == NGHTTP2_HCAT_REQUEST) {
        connection->HeadersDone(call);
      } else if (call->header_bytes > kHeaderListBytes) {
        connection->Finish(call, Status::Error(Reason::kMessageTooLarge, "request trailers are larger than 16 KiB"));
      }
      if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) connection->RemoteClosed(call);
      return 0;
    }
    case NGHTTP2_DATA:
      if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) {
        if (Call* call = connection->FindCall(frame->hd.stream_id)) connection->RemoteClosed(call);
      }
      return 0;
    case NGHTTP2_SETTINGS: connection->settings_seen_ = true; return 0;
    case NGHTTP2_RST_STREAM: connection->io_.counters_.resets_received.Add(1); return 0;
    case NGHTTP2_PING:
      if (!(frame->hd.flags & NGHTTP2_FLAG_ACK)) {
        connection->PingReceived();
      } else if (std::memcmp(frame->ping.opaque_data, kDrainPing, 8) == 0 && connection->drain_ns_ != 0 &&
                 connection->final_goaway_ns_ == 0) {
        connection->final_goaway_ns_ = connection->io_.now_ns_;
        nghttp2_submit_goaway(session, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(session),
                              NGHTTP2_NO_ERROR, nullptr, 0);
      } else if (std::memcmp(frame->ping.opaque_data, kKeepalivePing, 8) == 0) {
        connection->ping_sent_ns_ = 0;
      }
      return 0;
    default: return 0;
  }
}

int Connection::OnDataChunk(nghttp2_session*, uint8_t, int32_t stream_id, const uint8_t* data, size_t size,
                            void* self) {
  auto* connection = static_cast<Connection*>(self);
  if (Call* call = connection->FindCall(stream_id)) connection->Data(call, data, size);
  return 0;
}

int Connection::OnInvalidFrame(nghttp2_session*, const nghttp2_frame*, int, void* self) {
  static_cast<Connection*>(self)->io_.counters_.protocol_errors.Add(1);
  return 0;
}

void Connection::PingReceived() {
  // gRPC's rule against floods: more than two pings closer than five minutes (two hours without a call) with nothing
  // sent in between.
  const int64_t now_ns = io_.now_ns_;
  const int64_t gap_ns = n_calls_ > 0 ? kPingGapNs : INT64_C(7'200'000'000'000);
  if (last_ping_ns_ != 0 && now_ns - last_ping_ns_ < gap_ns && ++ping_strikes_ > kPingStrikes) {
    io_.counters_.ping_closes.Add(1);
    Terminate(NGHTTP2_ENHANCE_YOUR_CALM, "too_many_pings");
  }
  last_ping_ns_ = now_ns;
}

void Connection::ForgivePings() {
  ping_strikes_ = 0;
  last_ping_ns_ = 0;
}

void Connection::Glitch() {
  if (glitches_.Take(io_.now_ns_)) return;
  io_.counters_.glitch_closes.Add(1);
  Terminate(NGHTTP2_ENHANCE_YOUR_CALM, "too many frames without effect");
}

void Connection::Terminate(uint32_t error_code, std::string_view debug) {
  if (terminated_) return;
  terminated_ = true;
  nghttp2_submit_goaway(session_, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(session_), error_code,
                        Bytes(debug), debug.size());
  nghttp2_session_terminate_session(session_, error_code);
  MarkDirty();
}

int Connection::OnFrameSend(nghttp2_session* session, const nghttp2_frame* frame, void* self) {
  auto* connection = static_cast<Connection*>(self);
  switch (frame->hd.type) {
    case NGHTTP2_DATA: connection->ForgivePings(); return 0;
    case NGHTTP2_HEADERS: {
      connection->ForgivePings();
      if (!(frame->hd.flags & NGHTTP2_FLAG_END_STREAM)) return 0;
      Call* call = connection->FindCall(frame->hd.stream_id);
      // Answered before the peer had sent all: tell it to stop.
      if (call && !call->remote_closed) {
        nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_NO_ERROR);
      }
      return 0;
    }
    case NGHTTP2_GOAWAY:
      if (frame->goaway.last_stream_id == INT32_MAX) nghttp2_submit_ping(session, NGHTTP2_FLAG_NONE, kDrainPing);
      // After too many resets nghttp2 says GOAWAY and goes on reading what it then ignores.
      if (frame->goaway.error_code != NGHTTP2_NO_ERROR) {
        nghttp2_session_terminate_session(session, frame->goaway.error_code);
      }
      return 0;
    case NGHTTP2_RST_STREAM:
      switch (frame->rst_stream.error_code) {
        case NGHTTP2_NO_ERROR:
        case NGHTTP2_CANCEL:
        case NGHTTP2_REFUSED_STREAM: return 0;
        default: break;
      }
      // A peer that makes us reset streams by provoking errors gets work done for nothing.
      if (!connection->bad_resets_.Take(connection->io_.now_ns_)) {
        connection->io_.counters_.glitch_closes.Add(1);
        connection->Terminate(NGHTTP2_ENHANCE_YOUR_CALM, "too many stream errors");
      }
      return 0;
    default: return 0;
  }
}

int Connection::OnStreamClose(nghttp2_session*, int32_t stream_id, uint32_t, void* self) {
  auto* connection = static_cast<Connection*>(self);
  Call* call = connection->FindCall(stream_id);
  if (!call) return 0;
  connection->Abandon(call, Reason::kCancelled);
  connection->ReleaseCall(call);
  return 0;
}

// ---- writing ------------------------------------------------------------------------------------------------------

void Connection::Flush() {
  if (dead_) return;
  while (true) {
    while (!lingering_ && out_.size() - out_sent_ < kOutputChunkBytes) {
      const uint8_t* data = nullptr;
      const ssize_t n = nghttp2_session_mem_send(session_, &data);
      if (n < 0) {
        Die();
        return;
      }
      if (n == 0) break;
      if (out_.empty()) progress_ns_ = io_.now_ns_;
      out_.insert(out_.end(), data, data + n);
    }
    if (out_.size() == out_sent_) break;
    const ssize_t n = send(fd_, out_.data() + out_sent_, out_.size() - out_sent_, MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) {
        Die();
        return;
      }
      break;
    }
    io_.counters_.writes.Add(1);
    io_.counters_.bytes_written.Add(static_cast<uint64_t>(n));
    progress_ns_ = io_.now_ns_;
    out_sent_ += static_cast<size_t>(n);
    if (out_sent_ < out_.size()) break;
    out_.clear();
    out_sent_ = 0;
  }
  if (out_.size() == out_sent_) {
    out_.clear();
    out_sent_ = 0;
    if (out_.capacity() > 2 * kOutputChunkBytes) std::vector<uint8_t>().swap(out_);
    const bool over = !nghttp2_session_want_read(session_) && !nghttp2_session_want_write(session_);
    if (!lingering_ && (over || (final_goaway_ns_ != 0 && n_calls_ == 0))) {
      // Everything is said. Half-close and wait for the peer to do the same: closing with unread bytes in the kernel
      // would reset the connection and could take our last answers with it.
      lingering_ = true;
      lingering_ns_ = io_.now_ns_;
      shutdown(fd_, SHUT_WR);
      AbandonAll();  // after a protocol error there may be calls, whom nothing can be said any more
    }
  }
  UpdateInterest();
}

void Connection::UpdateInterest() {
  if (dead_) return;
  const size_t waiting = out_.size() - out_sent_;
  const uint32_t wanted = (waiting < kOutputPauseBytes ? EPOLLIN : 0u) | (waiting > 0 ? EPOLLOUT : 0u);
  if (wanted == interest_) return;
  interest_ = wanted;
  epoll_event event{};
  event.events = wanted;
  event.data.u64 = (static_cast<uint64_t>(generation_) << 32) | slot_;
  epoll_ctl(io_.epoll_fd_, EPOLL_CTL_MOD, fd_, &event);
}

// ---- time ---------------------------------------------------------------------------------------------------------

void Connection::BeginDrain() {
  if (drain_ns_ != 0) return;
  drain_ns_ = io_.now_ns_;
  nghttp2_submit_shutdown_notice(session_);  // OnFrameSend lets a PING follow: it would overtake in the queue
  MarkDirty();
}

void Connection::OnSweep(int64_t now_ns) {
  const FrontendSettings& settings = io_.settings_;
  if (lingering_) {
    if (now_ns - lingering_ns_ > kLingerNs) Die();
    return;
  }
  if (!settings_seen_ && settings.handshake_timeout_ns > 0 && now_ns - opened_ns_ > settings.handshake_timeout_ns) {
    io_.counters_.handshake_closes.Add(1);
    Die();
    return;
  }
  // A peer that has not answered the drain ping within a second is slow or gone: it gets the last GOAWAY anyway.
  if (drain_ns_ != 0 && final_goaway_ns_ == 0 && now_ns - drain_ns_ > INT64_C(1'000'000'000)) {
    final_goaway_ns_ = now_ns;
    nghttp2_submit_goaway(session_, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(session_),
                          NGHTTP2_NO_ERROR, nullptr, 0);
    MarkDirty();
  }
  const int64_t stall_ns =
      io_.budget_.low() ? std::min(settings.stall_timeout_ns, kPressedStallNs) : settings.stall_timeout_ns;
  if (out_.size() > out_sent_ && now_ns - progress_ns_ > stall_ns) {
    io_.counters_.stall_closes.Add(1);
    Die();
    return;
  }
  for (Call* call = calls_; call;) {
    Call* next = call->list_next;
    // While a header block is unfinished nothing else can come on the connection.
    if (!call->headers_done && settings.handshake_timeout_ns > 0 &&
        now_ns - call->opened_ns > settings.handshake_timeout_ns) {
      io_.counters_.stall_closes.Add(1);
      Die();
      return;
    }
    SweepCall(call, now_ns, stall_ns);
    call = next;
  }
  if (ping_sent_ns_ != 0 && now_ns - ping_sent_ns_ > settings.keepalive_timeout_ns) {
    io_.counters_.keepalive_closes.Add(1);
    Die();
    return;
  }
  if (settings.keepalive_time_ns > 0 && ping_sent_ns_ == 0 && now_ns - heard_ns_ > settings.keepalive_time_ns) {
    ping_sent_ns_ = now_ns;
    nghttp2_submit_ping(session_, NGHTTP2_FLAG_NONE, kKeepalivePing);
    MarkDirty();
  }
  if (settings.max_connection_idle_ns > 0 && n_calls_ == 0 &&
      now_ns - idle_since_ns_ > settings.max_connection_idle_ns) {
    BeginDrain();
  }
  if (age_limit_ns_ > 0 && now_ns - opened_ns_ > age_limit_ns_) {
    BeginDrain();
    if (now_ns - opened_ns_ > age_limit_ns_ + settings.max_connection_age_grace_ns) Die();
  }
}

void Connection::SweepCall(Call* call, int64_t now_ns, int64_t stall_ns) {
  // A stop does not wait for streams that may never end (a Watch, an idle ModelStreamInfer). One that was opened just
  // before the last GOAWAY, or is in the middle of a message, is not idle.
  const bool idle_stream = call->method == Method::kStreamInfer && !call->requests_head && call->replies.empty() &&
                           !call->receiving && call->prefix_have == 0 && now_ns - final_goaway_ns_ > kStreamGraceNs;
  if (io_.draining_ && final_goaway_ns_ != 0 && (idle_stream || call->method == Method::kSlowStream)) {
    Finish(call, Status::Error(Reason::kNodeDraining, "the server is shutting down"));
  }
  // Answers that nobody reads: the stream's window is closed, or the whole connection stands.
  if (!call->replies.empty() && now_ns - call->progress_ns > stall_ns) {
    io_.counters_.stall_resets.Add(1);
    nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, call->stream_id, NGHTTP2_CANCEL);
    call->progress_ns = now_ns;  // once is enough
    MarkDirty();
    return;
  }
  const bool uploading = call->headers_done && !call->remote_closed && !call->finishing &&
                         (call->method == Method::kInfer || call->method == Method::kSlowUnary ||
                          call->receiving != nullptr || call->prefix_have != 0);
  if (!uploading) {
    call->upload_mark_ns = 0;
    return;
  }
  const int64_t marked_ns = now_ns - call->upload_mark_ns;
  if (call->upload_mark_ns != 0 && marked_ns <= stall_ns) return;
  const auto came = static_cast<int64_t>(call->body_bytes - call->upload_mark_bytes);
  if (call->upload_mark_ns != 0 && came < marked_ns / 1'000'000 * kUploadBytesPerSecond / 1000) {
    io_.counters_.stall_resets.Add(1);
    Finish(call, Status::Error(Reason::kDeadlinePassed, "the request was sent too slowly"));
    return;
  }
  call->upload_mark_ns = now_ns;
  call->upload_mark_bytes = call->body_bytes;
}

}  // namespace tidegate
