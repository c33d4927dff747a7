#include "test/h2_client.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "test/check.h"
#include "util/clock.h"

namespace tidegate::test {
namespace {

uint8_t* Bytes(std::string_view text) { return reinterpret_cast<uint8_t*>(const_cast<char*>(text.data())); }

int ConnectTo(uint16_t port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  CHECK(fd >= 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    close(fd);
    return -1;
  }
  const int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
  return fd;
}

}  // namespace

std::string ClientStream::Header(std::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (key == name) return value;
  }
  return {};
}

int ClientStream::http_status() const { return std::atoi(Header(":status").c_str()); }

int ClientStream::grpc_status() const {
  const std::string text = Header("grpc-status");
  return text.empty() ? -1 : std::atoi(text.c_str());
}

std::vector<std::string> ClientStream::Messages() const {
  std::vector<std::string> messages;
  std::string_view rest = data;
  while (rest.size() >= 5) {
    CHECK_EQ(int{rest[0]}, 0);
    uint32_t size = 0;
    for (int i = 1; i < 5; ++i) size = (size << 8) | static_cast<uint8_t>(rest[static_cast<size_t>(i)]);
    if (rest.size() - 5 < size) break;
    messages.emplace_back(rest.substr(5, size));
    rest.remove_prefix(5 + size);
  }
  return messages;
}

int64_t H2Client::NowMs() { return NowNs() / 1'000'000; }

H2Client::H2Client(uint16_t port, ClientOptions options) : fd_(ConnectTo(port)) {
  if (fd_ >= 0) ++n_connected_;
  nghttp2_session_callbacks* callbacks = nullptr;
  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_header_callback(callbacks, OnHeader);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, OnData);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, OnClose);
  nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, OnFrameRecv);
  nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, OnFrameSend);
  nghttp2_session_client_new(&session_, callbacks, this);
  nghttp2_session_callbacks_del(callbacks);
  const nghttp2_settings_entry entries[] = {
      {NGHTTP2_SETTINGS_ENABLE_PUSH, 0},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, options.stream_window},
  };
  nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, entries, std::size(entries));
  nghttp2_session_set_local_window_size(session_, NGHTTP2_FLAG_NONE, 0, 1 << 30);
}

H2Client::~H2Client() {
  End();
  nghttp2_session_del(session_);
}

ClientStream* H2Client::Open(std::string_view path, const Headers& extra) {
  Headers headers = {{":method", "POST"}, {":scheme", "http"}, {":path", std::string(path)}, {":authority", "test"}};
  headers.emplace_back("content-type", "application/grpc");
  headers.emplace_back("te", "trailers");
  headers.insert(headers.end(), extra.begin(), extra.end());
  return OpenRaw(headers);
}

ClientStream* H2Client::OpenRaw(const Headers& headers) {
  std::vector<nghttp2_nv> fields;
  for (const auto& [name, value] : headers) {
    fields.push_back({Bytes(name), Bytes(value), name.size(), value.size(), NGHTTP2_NV_FLAG_NONE});
  }
  auto stream = std::make_unique<ClientStream>();
  nghttp2_data_provider provider{};
  provider.source.ptr = stream.get();
  provider.read_callback = ReadBody;
  stream->id = nghttp2_submit_request(session_, nullptr, fields.data(), fields.size(), &provider, stream.get());
  CHECK(stream->id > 0);
  ++n_open_;
  return streams_.emplace(stream->id, std::move(stream)).first->second.get();
}

void H2Client::Send(ClientStream* stream, std::string_view bytes, bool end) {
  stream->body.append(bytes);
  stream->body_ends = stream->body_ends || end;
  if (stream->deferred) {
    stream->deferred = false;
    nghttp2_session_resume_data(session_, stream->id);
  }
}

void H2Client::Reset(ClientStream* stream, uint32_t error_code) {
  if (!stream->closed) nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, stream->id, error_code);
}

void H2Client::Grant(ClientStream* stream, int32_t bytes) {
  nghttp2_submit_window_update(session_, NGHTTP2_FLAG_NONE, stream->id, bytes);
}

void H2Client::Ping() { nghttp2_submit_ping(session_, NGHTTP2_FLAG_NONE, nullptr); }

void H2Client::Forget(ClientStream* stream) {
  CHECK(stream->closed);
  streams_.erase(stream->id);
}

ClientStream* H2Client::Find(int32_t id) {
  const auto at = streams_.find(id);
  return at == streams_.end() ? nullptr : at->second.get();
}

ssize_t H2Client::ReadBody(nghttp2_session*, int32_t, uint8_t* to, size_t size, uint32_t* flags,
                           nghttp2_data_source* source, void*) {
  auto* stream = static_cast<ClientStream*>(source->ptr);
  const size_t take = std::min(size, stream->body.size() - stream->body_sent);
  std::memcpy(to, stream->body.data() + stream->body_sent, take);
  stream->body_sent += take;
  if (stream->body_sent == stream->body.size() && stream->body_ends) {
    *flags |= NGHTTP2_DATA_FLAG_EOF;
  } else if (take == 0) {
    stream->deferred = true;
    return NGHTTP2_ERR_DEFERRED;
  }
  return static_cast<ssize_t>(take);
}

int H2Client::OnHeader(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                       const uint8_t* value, size_t value_size, uint8_t, void* self) {
  if (ClientStream* stream = static_cast<H2Client*>(self)->Find(frame->hd.stream_id)) {
    stream->headers.emplace_back(std::string(reinterpret_cast<const char*>(name), name_size),
                                 std::string(reinterpret_cast<const char*>(value), value_size));
  }
  return 0;
}

int H2Client::OnData(nghttp2_session*, uint8_t, int32_t id, const uint8_t* data, size_t size, void* self) {
  if (ClientStream* stream = static_cast<H2Client*>(self)->Find(id)) {
    stream->data.append(reinterpret_cast<const char*>(data), size);
  }
  return 0;
}

int H2Client::OnClose(nghttp2_session*, int32_t id, uint32_t error_code, void* self) {
  auto* client = static_cast<H2Client*>(self);
  ClientStream* stream = client->Find(id);
  if (!stream || stream->closed) return 0;
  stream->closed = true;
  stream->error_code = error_code;
  --client->n_open_;
  return 0;
}

int H2Client::OnFrameRecv(nghttp2_session*, const nghttp2_frame* frame, void* self) {
  auto* client = static_cast<H2Client*>(self);
  if (frame->hd.type == NGHTTP2_GOAWAY) {
    client->goaway_ = true;
    client->goaway_error_ = frame->goaway.error_code;
    client->goaway_last_id_ = frame->goaway.last_stream_id;
  }
  if (frame->hd.type == NGHTTP2_PING && (frame->hd.flags & NGHTTP2_FLAG_ACK)) ++client->pongs_;
  return 0;
}

int H2Client::OnFrameSend(nghttp2_session*, const nghttp2_frame* frame, void* self) {
  if (frame->hd.type != NGHTTP2_HEADERS) return 0;
  if (ClientStream* stream = static_cast<H2Client*>(self)->Find(frame->hd.stream_id)) stream->sent = true;
  return 0;
}

bool H2Client::TurnedAway(const ClientStream& stream) const {
  return stream.error_code == NGHTTP2_REFUSED_STREAM || (goaway_ && stream.id > goaway_last_id_);
}

std::string H2Client::TakeOutput() {
  std::string output = out_.substr(out_sent_);
  out_.clear();
  out_sent_ = 0;
  const uint8_t* data = nullptr;
  ssize_t n;
  while ((n = nghttp2_session_mem_send(session_, &data)) > 0) {
    output.append(reinterpret_cast<const char*>(data), static_cast<size_t>(n));
  }
  CHECK(n == 0);
  return output;
}

bool H2Client::SendRaw(std::string_view bytes) {
  const int64_t deadline_ms = NowMs() + 20'000;
  while (!bytes.empty() && fd_ >= 0) {
    const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n > 0) {
      bytes.remove_prefix(static_cast<size_t>(n));
    } else if (errno == EAGAIN) {
      CHECK(NowMs() < deadline_ms);
      pollfd waiting{fd_, POLLOUT, 0};
      poll(&waiting, 1, 5);
    } else if (errno != EINTR) {
      End();
    }
  }
  return fd_ >= 0;
}

void H2Client::Write() {
  out_ = TakeOutput();
  while (fd_ >= 0 && out_sent_ < out_.size()) {
    const ssize_t n = send(fd_, out_.data() + out_sent_, out_.size() - out_sent_, MSG_NOSIGNAL);
    if (n > 0) {
      out_sent_ += static_cast<size_t>(n);
    } else if (errno == EAGAIN) {
      return;
    } else if (errno != EINTR) {
      // What the server said before it went is still to be read: Read finds the end.
      out_.clear();
      out_sent_ = 0;
      return;
    }
  }
}

void H2Client::Read() {
  uint8_t buffer[64 << 10];
  while (fd_ >= 0) {
    const ssize_t n = recv(fd_, buffer, sizeof buffer, 0);
    if (n > 0) {
      heard_ = true;
      if (nghttp2_session_mem_recv(session_, buffer, static_cast<size_t>(n)) < 0) End();
      continue;
    }
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    End();
  }
}

// The connection is over: so is whatever was open on it.
void H2Client::End() {
  if (fd_ < 0) return;
  close(fd_);
  fd_ = -1;
  --n_connected_;
  for (const auto& [id, stream] : streams_) {
    if (stream->closed) continue;
    stream->closed = true;
    stream->lost = true;
    --n_open_;
  }
}

void H2Client::Pump(int timeout_ms) {
  if (fd_ < 0) return;
  Write();
  pollfd waiting{fd_, static_cast<short>(POLLIN | (out_sent_ < out_.size() ? POLLOUT : 0)), 0};
  poll(&waiting, 1, timeout_ms);
  Read();
  Write();
}

void H2Client::PumpAll(std::span<const std::unique_ptr<H2Client>> clients, int timeout_ms) {
  std::vector<pollfd> waiting;
  for (const auto& client : clients) {
    if (client->fd_ < 0) continue;
    client->Write();
    waiting.push_back(
        {client->fd_, static_cast<short>(POLLIN | (client->out_sent_ < client->out_.size() ? POLLOUT : 0)), 0});
  }
  poll(waiting.data(), waiting.size(), timeout_ms);
  for (const auto& client : clients) client->Read();
}

void H2Client::Close() { End(); }

void H2Client::Abort() {
  if (fd_ < 0) return;
  const linger now{1, 0};
  setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof now);
  End();
}

}  // namespace tidegate::test
