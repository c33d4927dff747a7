#include "net/frontend.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "util/clock.h"

namespace tidegate {
namespace {

// A listening socket on one address, shared between threads by SO_REUSEPORT. *port 0 picks one and says which.
Status Listen(const std::string& host, uint16_t* port, int* fd) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), std::to_string(*port).c_str(), &hints, &found); error != 0) {
    return Status::Error(Reason::kInternal, "cannot resolve host '" + host + "': " + gai_strerror(error));
  }
  std::string why = "no address";
  for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
    const int socket_fd = socket(at->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (socket_fd < 0) continue;
    const int one = 1;
    setsockopt(socket_fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(socket_fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
    if (bind(socket_fd, at->ai_addr, at->ai_addrlen) == 0 && listen(socket_fd, 4096) == 0) {
      sockaddr_storage bound{};
      socklen_t size = sizeof bound;
      getsockname(socket_fd, reinterpret_cast<sockaddr*>(&bound), &size);
      *port = ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port
                                                : reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
      *fd = socket_fd;
      freeaddrinfo(found);
      return Status::Ok();
    }
    why = strerror(errno);
    close(socket_fd);
  }
  freeaddrinfo(found);
  return Status::Error(Reason::kInternal, "cannot listen on " + host + " port " + std::to_string(*port) + ": " + why);
}

// Whether another process is listening there: SO_REUSEPORT would silently share its connections.
Status CheckFree(const std::string& host, uint16_t port) {
  if (port == 0) return Status::Ok();
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) return Status::Ok();
  Status status;
  const int probe = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int one = 1;
  setsockopt(probe, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (probe >= 0 && bind(probe, found->ai_addr, found->ai_addrlen) != 0) {
    status = Status::Error(Reason::kInternal, "cannot listen on " + host + " port " + std::to_string(port) + ": " +
                                                  strerror(errno) + "; choose another port, or 0 for a free one");
  }
  if (probe >= 0) close(probe);
  freeaddrinfo(found);
  return status;
}

}  // namespace

FrontendCore::FrontendCore(FrontendSettings settings, std::map<std::string, SlowMethod, std::less<>> slow_methods)
    : settings_(std::move(settings)), slow_methods_(std::move(slow_methods)), budget_(settings_.max_inflight_bytes) {
  owned_routes_ = std::make_unique<const RouteTable>(std::vector<ModelRoute>());
  routes_.store(owned_routes_.get());
  for (uint32_t i = 0; i < settings_.io_threads; ++i) io_threads_.push_back(std::make_unique<IoThread>(*this, i));
}

FrontendCore::~FrontendCore() { Stop(); }

Status FrontendCore::Start(uint16_t* port) {
  if (started_) return Status::Error(Reason::kInternal, "the front end has been started already");
  if (Status status = CheckFree(settings_.host, settings_.port); !status.ok()) return status;
  *port = settings_.port;
  std::vector<int> fds;
  for (size_t i = 0; i < io_threads_.size(); ++i) {
    int fd = -1;
    if (Status status = Listen(settings_.host, port, &fd); !status.ok()) {
      for (int open : fds) close(open);
      return status;
    }
    fds.push_back(fd);
  }
  for (size_t i = 0; i < io_threads_.size(); ++i) io_threads_[i]->Start(fds[i]);
  started_ = true;
  return Status::Ok();
}

void FrontendCore::Publish(std::vector<ModelRoute> models) {
  auto table = std::make_unique<const RouteTable>(std::move(models));
  RankedLock lock(publish_mutex_);
  // A table published now would never be taken down, and its versions and this front end would keep each other alive.
  if (stopped_) return;
  for (const ModelRoute& model : table->models()) {
    for (const VersionRoute& route : model.versions) {
      if (route.version) route.version->set_synchronizer(shared_from_this());
    }
  }
  routes_.store(table.get(), std::memory_order_seq_cst);
  owned_routes_.swap(table);
  Synchronize();
  // `table` is the old one: nobody can see it any more.
}

void FrontendCore::Synchronize() {
  for (const auto& io : io_threads_) io->outbox()->quiescence().Synchronize();
}

std::vector<std::pair<std::string, uint64_t>> FrontendCore::Counters() const {
  std::vector<std::pair<std::string, uint64_t>> counters;
  for (const IoCounterName& one : kIoCounterNames) {
    uint64_t sum = 0;
    for (const auto& io : io_threads_) sum += (io->counters().*one.counter).value();
    counters.emplace_back(one.name, sum);
  }
  // What the threads hold as credit counts as taken: up to 2 MiB each.
  const int64_t taken = settings_.max_inflight_bytes - budget_.free_bytes();
  counters.emplace_back("inflight_bytes", static_cast<uint64_t>(std::max<int64_t>(taken, 0)));
  return counters;
}

bool FrontendCore::Drain(int64_t timeout_ns) {
  if (!started_ || stopped_) return true;
  for (const auto& io : io_threads_) io->Post(IoThread::Command::kDrain);
  const int64_t deadline_ns = NowNs() + timeout_ns;
  const timespec pause{0, 2'000'000};
  // Accepted sockets are counted before the listener closes, so zero stays zero once the command was obeyed.
  while (true) {
    bool quiet = true;
    for (const auto& io : io_threads_) quiet = quiet && !io->outbox()->has_mail() && io->open_connections() == 0;
    if (quiet) {
      Synchronize();
      bool still = true;
      for (const auto& io : io_threads_) still = still && io->open_connections() == 0;
      if (still) return true;
    }
    if (NowNs() >= deadline_ns) return false;
    nanosleep(&pause, nullptr);
  }
}

void FrontendCore::Stop() {
  if (stopped_.exchange(true)) return;
  for (SlowQueue& lane : lanes_) lane.Close();
  if (started_) {
    for (const auto& io : io_threads_) io->Post(IoThread::Command::kStop);
    for (const auto& io : io_threads_) io->Join();
  }
  RankedLock lock(publish_mutex_);
  routes_.store(nullptr, std::memory_order_seq_cst);
  owned_routes_.reset();
}

}  // namespace tidegate
