#include "test/serving_world.h"

#include <unistd.h>

#include "util/live.h"

namespace tidegate::test {

Loaded Load(const std::string& model, const std::string& version, const LoadOptions& options) {
  ModelSpec spec;
  spec.name = model;
  spec.version = version;
  spec.max_batch_size = options.max_batch_rows;
  spec.has_free_dims = true;
  TensorSpec tensor;
  tensor.name = "x";
  tensor.type = DataType::kUint8;
  tensor.dims = tensor.model_dims = Dims{2, {-1, -1}};
  spec.inputs = {tensor};
  tensor.name = "y";
  spec.outputs = {tensor};
  Loaded loaded;
  loaded.gate = std::make_shared<MockGate>();
  std::vector<std::unique_ptr<Instance>> instances(options.instances);
  for (auto& instance : instances) CHECK(MakeMockInstance(spec, options.script, loaded.gate, &instance).ok());
  BatchSettings batching;
  batching.max_batch_rows = options.max_batch_rows;
  batching.dynamic_batching = options.dynamic_batching;
  batching.preserve_ordering = options.preserve_ordering;
  batching.priority_levels = options.priority_levels;
  batching.default_priority_level = options.priority_levels;
  batching.default_policy.max_queue_size = options.max_queue_size;
  loaded.version = std::make_shared<Version>(spec, batching, std::move(instances));
  loaded.version->Start();
  return loaded;
}

FrontendSettings TwoIoThreads() {
  FrontendSettings settings;
  settings.port = 0;
  settings.io_threads = 2;
  return settings;
}

World::World(FrontendSettings settings, std::map<std::string, SlowMethod, std::less<>> slow_methods)
    : frontend_(std::make_shared<FrontendCore>(settings, std::move(slow_methods))) {
  // A case that hangs ends here, with its name as the last line of output.
  alarm(120 * scale);
  const Status started = frontend_->Start(&port_);
  if (!started.ok()) Fail(__FILE__, __LINE__, started.message);
}

World::~World() { End(); }

const Loaded& World::Serve(const Loaded& loaded) {
  std::vector<Loaded>& versions = models_[loaded.version->spec().name];
  versions.push_back(loaded);
  Publish();
  return versions.back();
}

const Loaded& World::Serve(const std::string& model, const std::string& script, uint32_t instances) {
  return Serve(Load(model, "1", {.script = script, .instances = instances}));
}

std::vector<Loaded> World::Replace(const Loaded& loaded) {
  std::vector<Loaded> before = {loaded};
  models_[loaded.version->spec().name].swap(before);
  Publish();
  return before;
}

std::vector<Loaded> World::Withdraw(const std::string& model) {
  std::vector<Loaded> before;
  models_[model].swap(before);
  models_.erase(model);
  Publish();
  return before;
}

void World::Publish() {
  std::vector<ModelRoute> routes;
  for (const auto& [name, versions] : models_) {
    ModelRoute& route = routes.emplace_back();
    route.name = name;
    for (const Loaded& loaded : versions) {
      route.versions.push_back({loaded.version->spec().version, loaded.version, ""});
      route.default_version = loaded.version->spec().version;
    }
  }
  frontend_->Publish(std::move(routes));
}

uint64_t World::Count(std::string_view counter) const {
  for (const auto& [name, value] : frontend_->Counters()) {
    if (name == counter) return value;
  }
  Fail(__FILE__, __LINE__, "no counter " + std::string(counter));
}

void World::AwaitQuiet() {
  EVENTUALLY(Count("calls_open") == 0);
  EVENTUALLY(Count("requests_live") == 0);
}

void World::End() {
  if (!frontend_) return;
  for (const auto& [name, versions] : models_) {
    for (const Loaded& loaded : versions) loaded.gate->Release(1'000'000);
  }
  frontend_->Stop();
  CHECK_EQ(Count("calls_open"), 0u);
  CHECK_EQ(Count("requests_live"), 0u);
  CHECK_EQ(Count("connections_open"), 0u);
  for (const auto& [name, versions] : models_) {
    for (const Loaded& loaded : versions) {
      CHECK(loaded.version->Retire(10'000'000'000));
      CHECK_EQ(loaded.Totals().waiting, 0u);
      uint64_t accepted = 0;
      uint64_t finalized = 0;
      for (const IoShard& shard : loaded.version->io_shards()) {
        accepted += shard.accepted.value();
        finalized += shard.finalized.value();
      }
      CHECK_EQ(accepted, finalized);
      CHECK_EQ(loaded.version->published.load(), 0);
    }
  }
  models_.clear();
  CHECK_EQ(frontend_.use_count(), 1);
  frontend_.reset();
  CheckNothingLives();
  alarm(0);
}

void CheckNothingLives() {
  for (size_t kind = 0; kind < kLiveKindNames.size(); ++kind) {
    const int64_t alive = LiveCount(static_cast<LiveKind>(kind));
    if (alive != 0) {
      Fail(__FILE__, __LINE__,
           std::to_string(alive) + " objects are alive of kind " + std::string(kLiveKindNames[kind]));
    }
  }
}

}  // namespace tidegate::test
