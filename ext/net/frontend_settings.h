// How the front end listens and what it allows. Constant once built.
#pragma once

#include <cstdint>
#include <string>

namespace tidegate {

struct FrontendSettings {
  std::string host = "127.0.0.1";
  uint16_t port = 8001;
  uint32_t io_threads = 1;
  uint32_t max_message_bytes = 64u << 20;
  int64_t max_inflight_bytes = INT64_C(256) << 20;
  uint32_t max_connections = 10'000;
  uint32_t max_streams = 1'000;
  int64_t keepalive_time_ns = 0;  // 0: the server sends no pings
  int64_t keepalive_timeout_ns = 0;
  int64_t handshake_timeout_ns = 0;
  int64_t max_connection_age_ns = 0;  // 0: no limit
  int64_t max_connection_age_grace_ns = 0;
  int64_t max_connection_idle_ns = 0;                  // 0: no limit
  int64_t stall_timeout_ns = INT64_C(30'000'000'000);  // no progress of an answer or an upload
};

// Limits that nobody has had a reason to turn yet, each with the reason for its number.
inline constexpr uint32_t kHeaderListBytes = 16 << 10;   // twice gRPC's suggested 8 KiB
inline constexpr uint32_t kStreamWindowBytes = 1 << 20;  // a 600 KB image needs no WINDOW_UPDATE; bodies are budgeted
inline constexpr int32_t kConnectionWindowBytes = 16 << 20;
inline constexpr uint32_t kMaxFrameBytes = 128 << 10;
inline constexpr size_t kReadBytes = 256 << 10;         // one read; all connections of a thread share the buffer
inline constexpr size_t kOutputPauseBytes = 64 << 10;   // unsent output above which a connection is not read
inline constexpr size_t kOutputChunkBytes = 256 << 10;  // frames made ahead of the socket
inline constexpr int64_t kPressedStallNs = INT64_C(1'000'000'000);  // the stall timeout while the byte budget is low
inline constexpr int64_t kUploadBytesPerSecond = 1 << 10;  // slower than this over the stall timeout is an attack
inline constexpr size_t kFirstBodyBytes = 1 << 20;         // of a body, got before its bytes come: a length may lie
inline constexpr int64_t kStreamGraceNs = INT64_C(1'000'000'000);  // of a drain, before it ends idle streams
inline constexpr int64_t kLingerNs = INT64_C(1'000'000'000);       // after the last byte, for the peer's FIN
inline constexpr int64_t kPingGapNs = INT64_C(300'000'000'000);    // pings closer than this are strikes (gRPC's 5 min)
inline constexpr int kPingStrikes = 2;

}  // namespace tidegate
