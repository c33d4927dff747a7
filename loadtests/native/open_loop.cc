// An open-loop load generator for unary gRPC calls over HTTP/2 in the clear.
//
// Requests fall due at the times of a Poisson process and are sent then, whatever has come back: unlike a closed loop
// it offers more than a server can take, and shows the queueing that users would see. Latency counts from when a
// request was due, not from when it was sent, so a generator that falls behind cannot hide it. A request that leaves
// later than
// --late-us after it was due is counted as late; a run with more than 1 % of them says nothing about the server.
//
// Threads    One. It owns every connection and every request.
// Bounds     --duration, --most-inflight and kMostRequests: a mistake in the arguments ends, it does not fill memory.
// Output     One JSON document on stdout; exit 0 when the run was carried out, whatever the server answered.

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace {

constexpr int64_t kSecondNs = 1'000'000'000;
// Latencies are kept as they are (4 bytes each), which bounds a run at 160 MB.
constexpr uint64_t kMostRequests = 40'000'000;
constexpr int kStatuses = 17;         // gRPC's 0 to 16
constexpr int kNoStatus = kStatuses;  // the stream ended without one

int64_t NowNs() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * kSecondNs + now.tv_nsec;
}

struct Options {
  std::string body_file;
  std::string path = "/inference.GRPCInferenceService/ModelInfer";
  int port = 0;
  double rate = 0;
  double duration_s = 10;
  double warm_up_s = 1;
  double drain_s = 10;
  int connections = 8;
  int64_t timeout_us = 0;  // grpc-timeout; 0: none
  bool cancel = false;     // reset the stream when its deadline is over, as gRPC clients do
  int64_t late_us = 100;
  int64_t spin_us = 30;  // the last stretch before a request is due is waited for awake: timers wake up that late
  uint64_t most_inflight = 200'000;
  uint64_t seed = 1;
};

[[noreturn]] void Die(const std::string& why) {
  std::fprintf(stderr, "open_loop: %s\n", why.c_str());
  std::exit(2);
}

// One request. Lives from the moment it is due until its stream has closed.
struct Flight {
  int64_t due_ns = 0;
  int64_t sent_ns = 0;  // 0: still waits inside nghttp2, e.g. for the peer's stream limit
  size_t body_sent = 0;
  int32_t stream_id = -1;
  uint32_t generation = 0;  // so that the deadline queue can tell a reused object
  int status = kNoStatus;
  bool measured = false;  // due after the warm-up
  bool cancelled = false;
  bool http_error = false;
};

class Generator;

struct Connection {
  Generator* generator = nullptr;
  int fd = -1;
  nghttp2_session* session = nullptr;
  std::string out;  // what the socket did not take
  size_t out_at = 0;
  bool dirty = false;
  bool dead = false;
};

struct Deadline {
  int64_t at_ns;
  Flight* flight;
  uint32_t generation;
  Connection* connection;
};

struct Totals {
  uint64_t due = 0;
  uint64_t sent = 0;
  uint64_t late = 0;
  uint64_t answered = 0;
  uint64_t in_deadline = 0;  // status 0, and back within the timeout counted from when it was due
  uint64_t cancelled = 0;    // by this client, at the deadline
  uint64_t http_errors = 0;
  uint64_t not_offered = 0;  // the bound on requests in flight
  std::array<uint64_t, kStatuses + 1> by_status{};
};

class Generator {
 public:
  Generator(const Options& options, std::string body)
      : options_(options), body_(std::move(body)), random_(options.seed), gap_(options.rate) {
    if (options_.timeout_us > 0) timeout_text_ = TimeoutText(options_.timeout_us);
  }

  void Connect() {
    for (int i = 0; i < options_.connections; ++i) {
      auto connection = std::make_unique<Connection>();
      connection->generator = this;
      Open(*connection);
      connections_.push_back(std::move(connection));
    }
    // The peer's SETTINGS (its stream limit) come before the first request.
    const int64_t until = NowNs() + kSecondNs / 5;
    while (NowNs() < until) Wait(until);
  }

  void Run() {
    began_ns_ = NowNs();
    measure_from_ns_ = began_ns_ + static_cast<int64_t>(options_.warm_up_s * 1e9);
    end_ns_ = measure_from_ns_ + static_cast<int64_t>(options_.duration_s * 1e9);
    next_due_ns_ = began_ns_ + Gap();
    while (next_due_ns_ < end_ns_ && requests_ < kMostRequests && alive_ > 0) {
      Offer();
      ExpireDeadlines();
      FlushAll();
      int64_t until = next_due_ns_;
      if (!deadlines_.empty()) until = std::min(until, deadlines_.front().at_ns);
      Wait(until);
    }
    const int64_t give_up_ns = NowNs() + static_cast<int64_t>(options_.drain_s * 1e9);
    while (inflight_ > 0 && alive_ > 0 && NowNs() < give_up_ns) {
      ExpireDeadlines();
      FlushAll();
      Wait(deadlines_.empty() ? give_up_ns : std::min(give_up_ns, deadlines_.front().at_ns));
    }
    finished_ns_ = NowNs();
  }

  void Print() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const double cpu_s = static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                         static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    std::printf("{\"rate\": %.3f, \"duration_s\": %.3f, \"wall_s\": %.6f, \"cpu_s\": %.3f, \"connections\": %d",
                options_.rate, options_.duration_s, static_cast<double>(finished_ns_ - began_ns_) / 1e9, cpu_s,
                options_.connections);
    std::printf(", \"connections_lost\": %d, \"requests\": %llu, \"ok\": %llu, \"unanswered\": %llu",
                options_.connections - alive_, static_cast<unsigned long long>(requests_),
                static_cast<unsigned long long>(all_ok_), static_cast<unsigned long long>(inflight_));
    const Totals& t = totals_;
    std::printf(
        ", \"measured\": {\"due\": %llu, \"sent\": %llu, \"late\": %llu, \"late_share\": %.6f, \"answered\": %llu",
        static_cast<unsigned long long>(t.due), static_cast<unsigned long long>(t.sent),
        static_cast<unsigned long long>(t.late),
        t.sent ? static_cast<double>(t.late) / static_cast<double>(t.sent) : 0.0,
        static_cast<unsigned long long>(t.answered));
    std::printf(
        ", \"in_deadline\": %llu, \"cancelled\": %llu, \"http_errors\": %llu, \"not_offered\": %llu, \"by_status\": {",
        static_cast<unsigned long long>(t.in_deadline), static_cast<unsigned long long>(t.cancelled),
        static_cast<unsigned long long>(t.http_errors), static_cast<unsigned long long>(t.not_offered));
    const char* comma = "";
    for (int status = 0; status <= kStatuses; ++status) {
      if (t.by_status[static_cast<size_t>(status)] == 0) continue;
      const std::string name = status == kNoStatus ? "none" : std::to_string(status);
      std::printf("%s\"%s\": %llu", comma, name.c_str(),
                  static_cast<unsigned long long>(t.by_status[static_cast<size_t>(status)]));
      comma = ", ";
    }
    std::printf("}, \"ok_latency_us\": ");
    PrintLatencies(ok_us_);
    std::printf(", \"refused_latency_us\": ");
    PrintLatencies(refused_us_);
    std::printf("}}\n");
  }

 private:
  // -- arrivals

  int64_t Gap() { return std::max<int64_t>(1, static_cast<int64_t>(gap_(random_) * 1e9)); }

  void Offer() {
    // Time does not move inside this loop: a generator that is behind sends what is due and looks at the sockets again.
    const int64_t now = NowNs();
    int offered = 0;
    while (next_due_ns_ <= now && next_due_ns_ < end_ns_ && offered < 256) {
      Submit(next_due_ns_);
      next_due_ns_ += Gap();
      ++offered;
    }
  }

  void Submit(int64_t due_ns) {
    const bool measured = due_ns >= measure_from_ns_;
    if (measured) ++totals_.due;
    ++requests_;
    Connection* connection = NextConnection();
    if (inflight_ >= options_.most_inflight || connection == nullptr) {
      if (measured) ++totals_.not_offered;
      return;
    }
    Flight* flight = NewFlight();
    flight->due_ns = due_ns;
    flight->measured = measured;

    std::array<nghttp2_nv, 7> headers = {Header(":method", "POST"),
                                         Header(":scheme", "http"),
                                         Header(":path", options_.path),
                                         Header(":authority", "127.0.0.1"),
                                         Header("content-type", "application/grpc"),
                                         Header("te", "trailers"),
                                         Header("grpc-timeout", timeout_text_)};
    const size_t count = timeout_text_.empty() ? headers.size() - 1 : headers.size();
    nghttp2_data_provider provider{};
    provider.source.ptr = this;
    provider.read_callback = &ReadBody;
    const int32_t id = nghttp2_submit_request(connection->session, nullptr, headers.data(), count, &provider, flight);
    if (id < 0) {
      Release(flight);
      if (measured) ++totals_.not_offered;
      return;
    }
    flight->stream_id = id;
    ++inflight_;
    connection->dirty = true;
  }

  Connection* NextConnection() {
    for (size_t tried = 0; tried < connections_.size(); ++tried) {
      Connection* connection = connections_[turn_++ % connections_.size()].get();
      if (!connection->dead) return connection;
    }
    return nullptr;
  }

  void ExpireDeadlines() {
    const int64_t now = NowNs();
    while (!deadlines_.empty() && deadlines_.front().at_ns <= now) {
      const Deadline deadline = deadlines_.front();
      deadlines_.pop_front();
      Flight* flight = deadline.flight;
      if (flight->generation != deadline.generation || deadline.connection->dead) continue;
      flight->cancelled = true;
      nghttp2_submit_rst_stream(deadline.connection->session, NGHTTP2_FLAG_NONE, flight->stream_id, NGHTTP2_CANCEL);
      deadline.connection->dirty = true;
    }
  }

  // -- flights

  Flight* NewFlight() {
    if (free_.empty()) {
      flights_.emplace_back();
      return &flights_.back();
    }
    Flight* flight = free_.back();
    free_.pop_back();
    const uint32_t generation = flight->generation;
    *flight = Flight{};
    flight->generation = generation;
    return flight;
  }

  void Release(Flight* flight) {
    ++flight->generation;
    free_.push_back(flight);
  }

  void Sent(Connection& connection, Flight& flight) {
    flight.sent_ns = NowNs();
    if (flight.measured) {
      ++totals_.sent;
      if (flight.sent_ns - flight.due_ns > options_.late_us * 1000) ++totals_.late;
    }
    if (options_.cancel && options_.timeout_us > 0) {
      deadlines_.push_back({flight.sent_ns + options_.timeout_us * 1000, &flight, flight.generation, &connection});
    }
  }

  void Closed(Flight* flight) {
    --inflight_;
    if (flight->status == 0) ++all_ok_;
    if (flight->measured) {
      const int64_t took_us = (NowNs() - flight->due_ns) / 1000;
      if (flight->cancelled && flight->status == kNoStatus) {
        ++totals_.cancelled;
      } else {
        ++totals_.answered;
        ++totals_.by_status[static_cast<size_t>(flight->status)];
        if (flight->http_error) ++totals_.http_errors;
        (flight->status == 0 ? ok_us_ : refused_us_).push_back(static_cast<float>(took_us));
        if (flight->status == 0 && (options_.timeout_us == 0 || took_us <= options_.timeout_us)) ++totals_.in_deadline;
      }
    }
    Release(flight);
  }

  // -- sockets

  void Open(Connection& connection) {
    connection.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connection.fd < 0) Die("socket: " + std::string(std::strerror(errno)));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(options_.port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(connection.fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      Die("connect to port " + std::to_string(options_.port) + ": " + std::strerror(errno));
    }
    const int on = 1;
    setsockopt(connection.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(connection.fd, F_SETFL, fcntl(connection.fd, F_GETFL) | O_NONBLOCK);

    nghttp2_session_callbacks* callbacks = nullptr;
    nghttp2_session_callbacks_new(&callbacks);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, &OnHeader);
    nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, &OnFrameSend);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, &OnStreamClose);
    nghttp2_session_client_new(&connection.session, callbacks, &connection);
    nghttp2_session_callbacks_del(callbacks);
    const nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 1 << 20},
                                               {NGHTTP2_SETTINGS_ENABLE_PUSH, 0}};
    nghttp2_submit_settings(connection.session, NGHTTP2_FLAG_NONE, settings, std::size(settings));
    nghttp2_session_set_local_window_size(connection.session, NGHTTP2_FLAG_NONE, 0, 1 << 24);
    connection.dirty = true;
    ++alive_;
    Flush(connection);
  }

  void FlushAll() {
    for (auto& connection : connections_) {
      if (connection->dirty) Flush(*connection);
    }
  }

  void Flush(Connection& connection) {
    if (connection.dead) return;
    connection.dirty = false;
    for (;;) {
      while (connection.out_at < connection.out.size()) {
        const ssize_t wrote = send(connection.fd, connection.out.data() + connection.out_at,
                                   connection.out.size() - connection.out_at, MSG_NOSIGNAL);
        if (wrote < 0) {
          if (errno == EINTR) continue;
          if (errno != EAGAIN && errno != EWOULDBLOCK) Lose(connection);
          return;  // poll() says when there is room
        }
        connection.out_at += static_cast<size_t>(wrote);
      }
      connection.out.clear();
      connection.out_at = 0;
      while (connection.out.size() < (1 << 18)) {
        const uint8_t* data = nullptr;
        const ssize_t size = nghttp2_session_mem_send(connection.session, &data);
        if (size < 0) return Lose(connection);
        if (size == 0) break;
        connection.out.append(reinterpret_cast<const char*>(data), static_cast<size_t>(size));
      }
      if (connection.out.empty()) return;
    }
  }

  void Read(Connection& connection) {
    std::array<uint8_t, 1 << 17> buffer;
    for (;;) {
      const ssize_t got = recv(connection.fd, buffer.data(), buffer.size(), 0);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
      if (got <= 0 || nghttp2_session_mem_recv(connection.session, buffer.data(), static_cast<size_t>(got)) < 0) {
        return Lose(connection);
      }
      if (static_cast<size_t>(got) < buffer.size()) break;
    }
    connection.dirty = true;  // window updates, acknowledgements
  }

  void Lose(Connection& connection) {
    if (connection.dead) return;
    connection.dead = true;
    --alive_;
    close(connection.fd);
    connection.fd = -1;
    // What was in flight stays counted as unanswered: it was.
  }

  // Sleeps until a socket is ready or `until` is near, then stays awake for the last stretch.
  void Wait(int64_t until_ns) {
    polls_.clear();
    owners_.clear();
    for (auto& connection : connections_) {
      if (connection->dead) continue;
      const bool waits_to_write = connection->out_at < connection->out.size();
      polls_.push_back({connection->fd, static_cast<short>(waits_to_write ? POLLIN | POLLOUT : POLLIN), 0});
      owners_.push_back(connection.get());
    }
    const int64_t left = std::max<int64_t>(0, until_ns - NowNs() - options_.spin_us * 1000);
    const timespec timeout{left / kSecondNs, left % kSecondNs};
    if (ppoll(polls_.data(), polls_.size(), &timeout, nullptr) <= 0) return;
    for (size_t i = 0; i < polls_.size(); ++i) {
      if (polls_[i].revents == 0) continue;
      if (polls_[i].revents & POLLOUT) Flush(*owners_[i]);
      if (!owners_[i]->dead && polls_[i].revents & ~POLLOUT) Read(*owners_[i]);
      if (owners_[i]->dirty) Flush(*owners_[i]);
    }
  }

  // -- nghttp2

  static nghttp2_nv Header(std::string_view name, std::string_view value) {
    return {const_cast<uint8_t*>(reinterpret_cast<const uint8_t*>(name.data())),
            const_cast<uint8_t*>(reinterpret_cast<const uint8_t*>(value.data())), name.size(), value.size(),
            NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE};
  }

  static ssize_t ReadBody(nghttp2_session* session, int32_t stream_id, uint8_t* buffer, size_t length, uint32_t* flags,
                          nghttp2_data_source* source, void*) {
    const std::string& body = static_cast<Generator*>(source->ptr)->body_;
    auto* flight = static_cast<Flight*>(nghttp2_session_get_stream_user_data(session, stream_id));
    if (flight == nullptr) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    const size_t size = std::min(length, body.size() - flight->body_sent);
    std::memcpy(buffer, body.data() + flight->body_sent, size);
    flight->body_sent += size;
    if (flight->body_sent == body.size()) *flags |= NGHTTP2_DATA_FLAG_EOF;
    return static_cast<ssize_t>(size);
  }

  static int OnFrameSend(nghttp2_session* session, const nghttp2_frame* frame, void* user) {
    if (frame->hd.type == NGHTTP2_DATA && (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) != 0) {
      auto& connection = *static_cast<Connection*>(user);
      auto* flight = static_cast<Flight*>(nghttp2_session_get_stream_user_data(session, frame->hd.stream_id));
      if (flight != nullptr) connection.generator->Sent(connection, *flight);
    }
    return 0;
  }

  static int OnHeader(nghttp2_session* session, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                      const uint8_t* value, size_t value_size, uint8_t, void*) {
    auto* flight = static_cast<Flight*>(nghttp2_session_get_stream_user_data(session, frame->hd.stream_id));
    if (flight == nullptr) return 0;
    const std::string_view key(reinterpret_cast<const char*>(name), name_size);
    const std::string_view text(reinterpret_cast<const char*>(value), value_size);
    if (key == "grpc-status") {
      int status = kNoStatus;
      std::from_chars(text.data(), text.data() + text.size(), status);
      flight->status = status >= 0 && status < kStatuses ? status : kNoStatus;
    } else if (key == ":status" && text != "200") {
      flight->http_error = true;
    }
    return 0;
  }

  static int OnStreamClose(nghttp2_session* session, int32_t stream_id, uint32_t, void* user) {
    auto* flight = static_cast<Flight*>(nghttp2_session_get_stream_user_data(session, stream_id));
    if (flight != nullptr) static_cast<Connection*>(user)->generator->Closed(flight);
    return 0;
  }

  // -- output

  static std::string TimeoutText(int64_t us) {
    // gRPC allows eight digits.
    return us < 100'000'000 ? std::to_string(us) + "u" : std::to_string(us / 1000) + "m";
  }

  static void PrintLatencies(std::vector<float>& us) {
    std::sort(us.begin(), us.end());
    const auto at = [&us](double share) {
      if (us.empty()) return 0.0;
      const auto rank = static_cast<size_t>(std::ceil(share * static_cast<double>(us.size())));
      return static_cast<double>(us[std::min(us.size() - 1, rank == 0 ? 0 : rank - 1)]);
    };
    double sum = 0;
    for (const float one : us) sum += one;
    std::printf(
        "{\"count\": %zu, \"mean\": %.1f, \"p50\": %.0f, \"p90\": %.0f, \"p99\": %.0f, \"p99_9\": %.0f, \"max\": %.0f}",
        us.size(), us.empty() ? 0.0 : sum / static_cast<double>(us.size()), at(0.5), at(0.9), at(0.99), at(0.999),
        at(1));
  }

  const Options options_;
  const std::string body_;
  std::string timeout_text_;
  std::mt19937_64 random_;
  std::exponential_distribution<double> gap_;  // seconds

  std::vector<std::unique_ptr<Connection>> connections_;
  size_t turn_ = 0;
  int alive_ = 0;
  std::vector<pollfd> polls_;
  std::vector<Connection*> owners_;

  std::deque<Flight> flights_;  // addresses stay
  std::vector<Flight*> free_;
  std::deque<Deadline> deadlines_;  // one timeout for all, so in order of sending

  int64_t began_ns_ = 0;
  int64_t measure_from_ns_ = 0;
  int64_t end_ns_ = 0;
  int64_t finished_ns_ = 0;
  int64_t next_due_ns_ = 0;
  uint64_t requests_ = 0;
  uint64_t all_ok_ = 0;
  uint64_t inflight_ = 0;
  Totals totals_;
  std::vector<float> ok_us_;
  std::vector<float> refused_us_;
};

template <typename T>
T Number(std::string_view flag, std::string_view text, T least) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || !(value >= least)) {
    Die(std::string(flag) + " '" + std::string(text) + "' is not a number of at least " + std::to_string(least));
  }
  return value;
}

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (flag == "--cancel") {
      options.cancel = true;
      continue;
    }
    if (i + 1 == argc) Die(std::string(flag) + " lacks its value, or is not known");
    const std::string_view text = argv[++i];
    if (flag == "--port") {
      options.port = Number<int>(flag, text, 1);
    } else if (flag == "--body") {
      options.body_file = text;
    } else if (flag == "--path") {
      options.path = text;
    } else if (flag == "--rate") {
      options.rate = Number<double>(flag, text, 0.001);
    } else if (flag == "--duration") {
      options.duration_s = Number<double>(flag, text, 0.01);
    } else if (flag == "--warm-up") {
      options.warm_up_s = Number<double>(flag, text, 0);
    } else if (flag == "--drain") {
      options.drain_s = Number<double>(flag, text, 0);
    } else if (flag == "--connections") {
      options.connections = Number<int>(flag, text, 1);
    } else if (flag == "--timeout-us") {
      options.timeout_us = Number<int64_t>(flag, text, 0);
    } else if (flag == "--late-us") {
      options.late_us = Number<int64_t>(flag, text, 1);
    } else if (flag == "--spin-us") {
      options.spin_us = Number<int64_t>(flag, text, 0);
    } else if (flag == "--most-inflight") {
      options.most_inflight = Number<uint64_t>(flag, text, 1);
    } else if (flag == "--seed") {
      options.seed = Number<uint64_t>(flag, text, 0);
    } else {
      Die("unknown flag " + std::string(flag));
    }
  }
  if (options.port == 0 || options.port > 65535 || options.rate <= 0 || options.body_file.empty()) {
    Die("--port, --rate and --body are needed; see the head of open_loop.cc");
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = Parse(argc, argv);
  std::ifstream file(options.body_file, std::ios::binary);
  if (!file) Die("cannot read the body file");
  std::string body{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  prctl(PR_SET_TIMERSLACK, 1UL);  // the default lets a sleep end 50 us late
  Generator generator(options, std::move(body));
  generator.Connect();
  generator.Run();
  generator.Print();
  return 0;
}
