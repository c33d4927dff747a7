#include "serving/mock_instance.h"

#include <time.h>

#include <charconv>
#include <condition_variable>
#include <mutex>
#include <string>
#include <vector>

#include "util/clock.h"

namespace tidegate {

struct MockGate::State {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t runs = 0;        // that may pass
  bool terminated = false;  // everything passes, with an error
};

MockGate::MockGate() : state_(std::make_unique<State>()) {}
MockGate::~MockGate() = default;

void MockGate::Release(uint32_t runs) {
  {
    std::lock_guard lock(state_->mutex);
    state_->runs += runs;
  }
  state_->changed.notify_all();
}

namespace {

enum class Script : uint8_t { kEcho, kSleep, kSpin, kFailOn, kHold };

Status Parse(std::string_view text, Script* script, int64_t* argument) {
  const auto bad = [&] {
    return Status::Error(Reason::kLoadFailed, "unknown mock script '" + std::string(text) +
                                                  "'; there are echo, sleep:US, spin:US, fail-on:BYTE and hold");
  };
  const size_t colon = text.find(':');
  const std::string_view name = text.substr(0, colon);
  const bool takes_number = name == "sleep" || name == "spin" || name == "fail-on";
  if (takes_number != (colon != std::string_view::npos)) return bad();
  if (takes_number) {
    const std::string_view number = text.substr(colon + 1);
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), *argument);
    if (error != std::errc() || end != number.data() + number.size() || *argument < 0) return bad();
  }
  if (name == "echo") {
    *script = Script::kEcho;
  } else if (name == "sleep") {
    *script = Script::kSleep;
  } else if (name == "spin") {
    *script = Script::kSpin;
  } else if (name == "fail-on") {
    *script = Script::kFailOn;
  } else if (name == "hold") {
    *script = Script::kHold;
  } else {
    return bad();
  }
  return Status::Ok();
}

}  // namespace

class MockInstance final : public Instance {
 public:
  MockInstance(const ModelSpec& spec, Script script, int64_t argument, std::shared_ptr<MockGate> gate)
      : spec_(spec),
        script_(script),
        argument_(argument),
        gate_(std::move(gate)),
        buffers_(spec.outputs.size()),
        views_(spec.outputs.size()) {}

  Status Run(std::span<Request* const> requests, uint32_t rows, RunTimes* times) override {
    for (size_t i = 0; i < spec_.outputs.size(); ++i) {
      size_t bytes = 0;
      for (const Request* request : requests) bytes += request->inputs[i].bytes;
      buffers_[i].resize(bytes);
      GatherInput(requests, i, buffers_[i].data());
      views_[i].type = spec_.outputs[i].type;
      views_[i].dims = requests[0]->inputs[i].dims;
      if (spec_.max_batch_size > 0) views_[i].dims.d[0] = rows;
      views_[i].data = buffers_[i].data();
      views_[i].bytes = bytes;
    }
    times->input_done_ns = NowNs();
    Status status = Act(requests);
    times->infer_done_ns = NowNs();
    return status;
  }

  std::span<const OutputView> outputs() const override { return views_; }

  size_t memory_bytes() const override {
    size_t bytes = 0;
    for (const auto& buffer : buffers_) bytes += buffer.capacity();
    return bytes;
  }

  void Terminate() override {
    {
      std::lock_guard lock(gate_->state_->mutex);
      gate_->state_->terminated = true;
    }
    gate_->state_->changed.notify_all();
  }

 private:
  Status Act(std::span<Request* const> requests) {
    switch (script_) {
      case Script::kEcho: return Status::Ok();
      case Script::kSleep: {
        const timespec pause{argument_ / 1'000'000, argument_ % 1'000'000 * 1'000};
        nanosleep(&pause, nullptr);
        return Status::Ok();
      }
      case Script::kSpin: {
        const int64_t until_ns = NowNs() + argument_ * 1'000;
        while (NowNs() < until_ns) {
        }
        return Status::Ok();
      }
      case Script::kFailOn:
        for (const Request* request : requests) {
          if (request->inputs[0].bytes > 0 && static_cast<int64_t>(request->inputs[0].data[0]) == argument_) {
            return Status::Error(Reason::kModelRaised, "the mock was told to fail on this row");
          }
        }
        return Status::Ok();
      case Script::kHold: {
        MockGate::State& gate = *gate_->state_;
        std::unique_lock lock(gate.mutex);
        gate.changed.wait(lock, [&] { return gate.runs > 0 || gate.terminated; });
        if (gate.runs == 0) return Status::Error(Reason::kModelRaised, "the run was ended");
        --gate.runs;
        return Status::Ok();
      }
    }
    return Status::Ok();
  }

  const ModelSpec spec_;
  const Script script_;
  const int64_t argument_;
  const std::shared_ptr<MockGate> gate_;
  std::vector<std::vector<std::byte>> buffers_;
  std::vector<OutputView> views_;
};

Status MakeMockInstance(const ModelSpec& spec, std::string_view script, std::shared_ptr<MockGate> gate,
                        std::unique_ptr<Instance>* out) {
  Script parsed = Script::kEcho;
  int64_t argument = 0;
  if (Status status = Parse(script, &parsed, &argument); !status.ok()) return status;
  bool fits = spec.outputs.size() <= spec.inputs.size();
  for (size_t i = 0; fits && i < spec.outputs.size(); ++i) {
    const TensorSpec& input = spec.inputs[i];
    const TensorSpec& output = spec.outputs[i];
    fits = input.type == output.type && input.dims == output.dims && input.type != DataType::kBytes;
  }
  if (!fits) {
    return Status::Error(Reason::kLoadFailed,
                         "a mock shows its inputs: output i needs the type and dimensions of input i, and no BYTES");
  }
  *out = std::make_unique<MockInstance>(spec, parsed, argument, std::move(gate));
  return Status::Ok();
}

}  // namespace tidegate
