// A gRPC client connection for tests: libnghttp2's client side over a socket, stopped and cut wherever a test wants.
//
// Threads    One: every method is called by the thread that drives the connection. Nothing happens between calls.
// Time       Nothing waits without a limit: a test that would hang fails instead.
#pragma once

#include <nghttp2/nghttp2.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tidegate::test {

using Headers = std::vector<std::pair<std::string, std::string>>;

// What happened to one call, as the client saw it.
struct ClientStream {
  int32_t id = 0;
  bool sent = false;    // its HEADERS left
  bool closed = false;  // nothing more will come
  uint32_t error_code = NGHTTP2_NO_ERROR;
  bool lost = false;  // closed by the end of the connection
  Headers headers;    // of all blocks, in order
  std::string data;

  // The first of that name; "" when there is none.
  std::string Header(std::string_view name) const;
  int http_status() const;
  int grpc_status() const;  // -1: none came
  // The whole messages that came so far, without their prefixes.
  std::vector<std::string> Messages() const;

  // -- what is still to be sent
  std::string body;
  size_t body_sent = 0;
  bool body_ends = false;
  bool deferred = false;
  uint64_t tag = 0;  // the test's own
};

struct ClientOptions {
  // What the server may send on a stream before the test grants more (with Grant); the default never runs out.
  uint32_t stream_window = 1u << 30;
};

class H2Client {
 public:
  explicit H2Client(uint16_t port, ClientOptions options = {});
  ~H2Client();
  H2Client(const H2Client&) = delete;
  H2Client& operator=(const H2Client&) = delete;

  // False: refused.
  bool connected() const { return fd_ >= 0; }
  // How many clients of this process are connected now.
  static int n_connected() { return n_connected_.load(); }

  // Submits a POST with gRPC's headers and `extra`; what it sends leaves with the next Pump. The stream lives until
  // Forget, or as long as the client.
  ClientStream* Open(std::string_view path, const Headers& extra = {});
  // Submits a request with exactly these headers.
  ClientStream* OpenRaw(const Headers& headers);
  void Send(ClientStream* stream, std::string_view bytes, bool end);
  void Reset(ClientStream* stream, uint32_t error_code = NGHTTP2_CANCEL);
  void Grant(ClientStream* stream, int32_t bytes);
  void Ping();
  void Forget(ClientStream* stream);

  // Sends what is ready, waits up to timeout_ms for the socket, takes what came.
  void Pump(int timeout_ms);
  static void PumpAll(std::span<const std::unique_ptr<H2Client>> clients, int timeout_ms);
  // Pumps until the condition holds; false when it does not in time or the connection ends before.
  template <typename Condition>
  bool PumpUntil(Condition&& condition, int timeout_ms = 20'000) {
    const int64_t deadline_ms = NowMs() + timeout_ms;
    while (!condition()) {
      if (gone() || NowMs() >= deadline_ms) return condition();
      Pump(5);
    }
    return true;
  }
  // Until the call is over: true when it is.
  bool Finish(ClientStream* stream) {
    return PumpUntil([&] { return stream->closed; }) && stream->closed;
  }

  // The frames that are ready, instead of sending them; and bytes of the test's own.
  std::string TakeOutput();
  bool SendRaw(std::string_view bytes);

  // The connection is over: the server closed it, or one of the two below did.
  bool gone() const { return fd_ < 0; }
  void Close();  // FIN
  void Abort();  // RST, with whatever was under way

  bool goaway() const { return goaway_; }
  uint32_t goaway_error() const { return goaway_error_; }
  // Whether the server has promised that it did nothing for this call.
  bool TurnedAway(const ClientStream& stream) const;
  // Whether the server has said anything: it has not taken the connection before.
  bool heard() const { return heard_; }
  size_t n_open() const { return n_open_; }
  int pongs() const { return pongs_; }

 private:
  static int64_t NowMs();
  static ssize_t ReadBody(nghttp2_session*, int32_t id, uint8_t* to, size_t size, uint32_t* flags,
                          nghttp2_data_source* source, void* self);
  static int OnHeader(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                      const uint8_t* value, size_t value_size, uint8_t flags, void* self);
  static int OnData(nghttp2_session*, uint8_t flags, int32_t id, const uint8_t* data, size_t size, void* self);
  static int OnClose(nghttp2_session*, int32_t id, uint32_t error_code, void* self);
  static int OnFrameRecv(nghttp2_session*, const nghttp2_frame* frame, void* self);
  static int OnFrameSend(nghttp2_session*, const nghttp2_frame* frame, void* self);

  ClientStream* Find(int32_t id);
  void Write();
  void Read();
  void End();

  static inline std::atomic<int> n_connected_{0};
  nghttp2_session* session_ = nullptr;
  int fd_ = -1;
  std::string out_;
  size_t out_sent_ = 0;
  std::map<int32_t, std::unique_ptr<ClientStream>> streams_;
  size_t n_open_ = 0;
  bool heard_ = false;
  bool goaway_ = false;
  uint32_t goaway_error_ = NGHTTP2_NO_ERROR;
  int32_t goaway_last_id_ = INT32_MAX;
  int pongs_ = 0;
};

}  // namespace tidegate::test
