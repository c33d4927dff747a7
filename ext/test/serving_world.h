// A front end with mock models in one process, for tests: what they load, publish and take away again, and the proof
// that nothing of it is left at the end.
//
// Threads    A World belongs to the test's thread; clients of any thread may talk to its port.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "batch/settings.h"
#include "net/frontend.h"
#include "serving/mock_instance.h"
#include "serving/statistics.h"
#include "serving/version.h"
#include "test/check.h"
#include "test/random.h"
#include "util/clock.h"

namespace tidegate::test {

inline constexpr std::string_view kInferPath = "/inference.GRPCInferenceService/ModelInfer";
inline constexpr std::string_view kStreamInferPath = "/inference.GRPCInferenceService/ModelStreamInfer";

// What a longer run multiplies its work by, and where its random numbers start. Set by main before the cases run.
inline uint32_t scale = 1;
inline uint64_t seed = 1;

// Looks again and again until the condition holds; fails the test when it does not within half a minute.
template <typename Condition>
void Eventually(Condition&& condition, const char* text, const char* file, int line) {
  const int64_t deadline_ns = NowNs() + 30'000'000'000;
  const timespec pause{0, 200'000};
  while (!condition()) {
    if (NowNs() > deadline_ns) Fail(file, line, std::string("never came true: ") + text);
    nanosleep(&pause, nullptr);
  }
}
#define EVENTUALLY(condition) \
  ::tidegate::test::Eventually([&] { return static_cast<bool>(condition); }, #condition, __FILE__, __LINE__)

struct Loaded {
  std::shared_ptr<Version> version;
  std::shared_ptr<MockGate> gate;

  VersionTotals Totals() const { return Sum(*version); }
  QueueView View() const { return version->queue().View(); }
};

struct LoadOptions {
  std::string script = "echo";
  uint32_t instances = 2;
  uint32_t max_batch_rows = 64;
  bool dynamic_batching = true;
  bool preserve_ordering = false;
  uint32_t priority_levels = 0;
  uint32_t max_queue_size = 0;
};

// A started version whose input x and output y are UINT8 [rows, columns], both free.
Loaded Load(const std::string& model, const std::string& version, const LoadOptions& options = {});

FrontendSettings TwoIoThreads();

class World {
 public:
  explicit World(FrontendSettings settings = TwoIoThreads(),
                 std::map<std::string, SlowMethod, std::less<>> slow_methods = {});
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  uint16_t port() const { return port_; }
  FrontendCore& frontend() { return *frontend_; }
  const std::shared_ptr<FrontendCore>& shared_frontend() const { return frontend_; }

  // Publishes the version beside what is there; it becomes its model's default.
  const Loaded& Serve(const Loaded& loaded);
  const Loaded& Serve(const std::string& model, const std::string& script, uint32_t instances = 2);
  // Publishes the version in the place of all others of its model, which are returned.
  std::vector<Loaded> Replace(const Loaded& loaded);
  // Publishes without the model; returns its versions.
  std::vector<Loaded> Withdraw(const std::string& model);

  uint64_t Count(std::string_view counter) const;
  // Waits until no call and no request is alive in the front end.
  void AwaitQuiet();
  // Stops the front end, retires every version and checks that no native object is left. Idempotent.
  void End();

 private:
  void Publish();

  std::shared_ptr<FrontendCore> frontend_;
  uint16_t port_ = 0;
  std::map<std::string, std::vector<Loaded>> models_;
};

// No native object of any kind is alive.
void CheckNothingLives();

}  // namespace tidegate::test
