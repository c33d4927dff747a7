// An instance without a runtime, for tests and benchmarks of everything round it: output i shows what input i brought.
//
// Threads    As Instance says; Release: any.
#pragma once

#include <memory>
#include <string_view>

#include "batch/instance.h"
#include "infer/model_spec.h"
#include "util/status.h"

namespace tidegate {

// What runs wait for under the script "hold", shared by the instances of a version and by the test that lets them go.
class MockGate {
 public:
  MockGate();
  ~MockGate();
  MockGate(const MockGate&) = delete;
  MockGate& operator=(const MockGate&) = delete;

  // Lets this many runs pass, now or later.
  void Release(uint32_t runs);

 private:
  friend class MockInstance;
  struct State;
  std::unique_ptr<State> state_;
};

// Scripts: "echo"; "sleep:US" (each run takes US microseconds); "spin:US" (the same, busy: a model that computes);
// "fail-on:BYTE" (a batch with a request whose first input byte is BYTE fails); "hold" (each run waits for the gate).
// kLoadFailed for another script, and for a spec whose outputs do not have the types and dimensions of its inputs.
Status MakeMockInstance(const ModelSpec& spec, std::string_view script, std::shared_ptr<MockGate> gate,
                        std::unique_ptr<Instance>* out);

}  // namespace tidegate
