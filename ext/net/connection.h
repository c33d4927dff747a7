// One client connection: a socket, an HTTP/2 session (libnghttp2) and the calls on it.
//
// Threads    The I/O thread that accepted it, for life. No other thread touches the session.
// Owner      IoThread, by slot. A connection that has to go is marked dead and destroyed at the end of the round, never
//            inside a callback of its own session.
// Bounds     Frames made ahead of the socket: kOutputChunkBytes. Unsent output above kOutputPauseBytes stops reading.
//            Calls: max_streams. Bodies and answers: the node's byte budget.
// Files      connection.cc: socket, session, time. connection_requests.cc: the way in. connection_answers.cc: the way
// out.
#pragma once

#include <nghttp2/nghttp2.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "grpc/call.h"
#include "net/outbox.h"
#include "util/live.h"
#include "util/status.h"
#include "util/token_bucket.h"

namespace tidegate {

class IoThread;

class Connection {
 public:
  Connection(IoThread& io, int fd, uint32_t slot, uint32_t generation, std::string peer);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  int fd() const { return fd_; }
  uint32_t slot() const { return slot_; }
  uint32_t generation() const { return generation_; }
  bool dead() const { return dead_; }
  bool dirty = false;  // in the I/O thread's list of connections to flush

  void OnReadable();
  // Makes and writes whatever is ready; called once per round for a connection that changed.
  void Flush();
  // Once a second (and every few milliseconds while draining): timeouts, keepalive, age.
  void OnSweep(int64_t now_ns);
  void OnDeadline(Call* call);

  // GOAWAY in two steps with a PING between them, so that no stream under way is lost; then the connection ends when
  // its last call has been answered.
  void BeginDrain();
  // Closes at once; destroyed at the end of the round.
  void Kill() { Die(); }

  Call* FindCall(int32_t stream_id);
  // A request of this call is done and counted: sends every answer whose turn it is.
  void Deliver(Call* call, Request* done);
  void DeliverMail(Call* call, Mail* mail);

  static nghttp2_session_callbacks* MakeCallbacks();
  static nghttp2_option* MakeOptions();

 private:
  // nghttp2 callbacks: C, so nothing may throw out of them.
  static int IgnoreExtension(nghttp2_session*, void** payload, const nghttp2_frame_hd* hd, void* self);
  static int OnBeginFrame(nghttp2_session*, const nghttp2_frame_hd* hd, void* self);
  static int OnBeginHeaders(nghttp2_session*, const nghttp2_frame* frame, void* self);
  static int OnHeader(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                      const uint8_t* value, size_t value_size, uint8_t flags, void* self);
  static int OnFrameRecv(nghttp2_session*, const nghttp2_frame* frame, void* self);
  static int OnDataChunk(nghttp2_session*, uint8_t flags, int32_t stream_id, const uint8_t* data, size_t size,
                         void* self);
  static int OnStreamClose(nghttp2_session*, int32_t stream_id, uint32_t error_code, void* self);
  static int OnFrameSend(nghttp2_session*, const nghttp2_frame* frame, void* self);
  static int OnInvalidFrame(nghttp2_session*, const nghttp2_frame* frame, int error, void* self);
  static ssize_t ReadReply(nghttp2_session*, int32_t stream_id, uint8_t* to, size_t size, uint32_t* flags,
                           nghttp2_data_source* source, void* self);

  void HeaderOf(Call* call, std::string_view name, std::string_view value);
  void HeadersDone(Call* call);
  void Data(Call* call, const uint8_t* data, size_t size);
  void PrefixDone(Call* call);
  // Charges bytes of a message. False: the node's limit is reached, the call has been refused and the request is gone.
  bool TakeBytes(Call* call, Request* request, size_t bytes);
  void MessageDone(Call* call);
  void RemoteClosed(Call* call);
  void StartInfer(Call* call, Request* request);
  void PingReceived();
  void ForgivePings();

  // Ends a call with a status: trailers-only when nothing was sent yet, else after what is waiting.
  void Finish(Call* call, const Status& status);
  void FinishWith(Call* call, int grpc_status, std::string_view message, int32_t pushback_ms);
  void FinishHttp(Call* call, int http_status);
  void FinishStreamIfDone(Call* call);
  void AddReply(Call* call, Request* request);
  void SendReplies(Call* call);
  void SubmitTrailers(Call* call);
  void SubmitTrailersOnly(Call* call);
  void QueueReply(Call* call, Request* request);

  // Lets go of the call's requests: what waits is taken out of its queue, what runs is marked.
  void Abandon(Call* call, Reason reason);
  void AbandonAll();
  // Tells Python that nobody waits for this call any more, unless it has finished it.
  void CancelSlow(Call* call);
  // Refuses the call when the lane is full.
  void PushSlow(Call* call, SlowEvent::Kind kind, Request* message);
  void SweepCall(Call* call, int64_t now_ns, int64_t stall_ns);
  void ReleaseCall(Call* call);

  void Glitch();  // a frame that costs us and does nothing: counted, and too many end the connection
  void Terminate(uint32_t error_code, std::string_view debug);
  void UpdateInterest();
  void Die();
  void MarkDirty();

  IoThread& io_;
  const int fd_;
  const uint32_t slot_;
  const uint32_t generation_;
  const std::string peer_;
  nghttp2_session* session_ = nullptr;
  std::vector<uint8_t> out_;  // frames not yet written, from out_sent_ on
  size_t out_sent_ = 0;
  uint32_t interest_ = 0;  // epoll events asked for
  bool dead_ = false;
  bool lingering_ = false;  // our side is shut down; waiting for the peer's FIN
  bool terminated_ = false;

  Call* calls_ = nullptr;  // all open calls
  uint32_t n_calls_ = 0;

  // Clocks, all of CLOCK_MONOTONIC.
  const int64_t opened_ns_;
  int64_t heard_ns_;          // last bytes from the peer
  int64_t progress_ns_;       // bytes of out_ last moved, or the first of them came
  int64_t idle_since_ns_;     // since there has been no call
  int64_t ping_sent_ns_ = 0;  // keepalive under way
  int64_t drain_ns_ = 0;      // when the first GOAWAY went out
  int64_t final_goaway_ns_ = 0;
  int64_t lingering_ns_ = 0;
  int64_t age_limit_ns_ = 0;  // with jitter
  bool settings_seen_ = false;

  // Attack detection.
  TokenBucket glitches_{10'000, 330};
  TokenBucket bad_resets_{100, 10};
  int64_t last_ping_ns_ = 0;
  int ping_strikes_ = 0;

  LiveCounted<LiveKind::kConnection> live_;
};

}  // namespace tidegate
