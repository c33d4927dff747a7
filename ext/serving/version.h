// One loaded version of a model: what it promises, what waits for it, the executors that run it.
//
// Threads    Start, WarmUp, Retire: the Python thread that manages it, one at a time. The request path (queue, shards)
// as
//            their own heads say.
// Owner      shared_ptr: the managing thread and each route table that names it. Requests point to it without owning
// it;
//            Retire proves that none is left before anything is freed.
// Life       constructed -> WarmUp* -> Start -> (published, serves) -> unpublished -> Retire -> closed.
// Invariants (1) A request in the queue or on an executor is counted accepted and not finalized by its I/O thread.
//            (2) Retire returns after the sums of both are equal and every I/O thread has ended the round in which it
//                finalized the last one: nothing points here any more.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "batch/batch_queue.h"
#include "batch/instance.h"
#include "batch/settings.h"
#include "infer/model_spec.h"
#include "infer/request.h"
#include "serving/stats.h"
#include "util/live.h"
#include "util/status.h"

namespace tidegate {

// I/O threads beyond this share no version; `--io-threads` is checked against it.
inline constexpr size_t kMaxIoThreads = 64;

// Waits until no I/O thread can see what was unpublished before the call. The front end is one.
class Synchronizer {
 public:
  virtual ~Synchronizer() = default;
  virtual void Synchronize() = 0;
};

// One input of a warm-up batch, as it would come over the wire.
struct WarmupTensor {
  std::string name;
  DataType type = DataType::kInvalid;
  Dims dims;         // batch dimension included
  std::string data;  // raw form
};

struct WarmupBatch {
  uint32_t rows = 1;
  uint32_t count = 1;  // times that every instance runs it
  std::vector<WarmupTensor> tensors;
};

class Version {
 public:
  Version(ModelSpec spec, const BatchSettings& batching, std::vector<std::unique_ptr<Instance>> instances);
  ~Version();
  Version(const Version&) = delete;
  Version& operator=(const Version&) = delete;

  const ModelSpec& spec() const { return spec_; }
  BatchQueue& queue() { return queue_; }
  const BatchQueue& queue() const { return queue_; }
  const BatchSettings& batching() const { return batching_; }
  IoShard& io_shard(uint32_t io_thread) { return io_shards_[io_thread]; }
  const std::vector<IoShard>& io_shards() const { return io_shards_; }
  const std::vector<std::unique_ptr<ExecutorShard>>& executor_shards() const { return executor_shards_; }
  size_t n_instances() const { return instances_.size(); }
  size_t memory_bytes() const { return memory_bytes_.load(std::memory_order_relaxed); }

  // Runs the batch on every instance, on a thread of low priority. Before Start. kLoadFailed when it does not fit the
  // spec; otherwise whatever the run says.
  Status WarmUp(const WarmupBatch& batch);

  void Start();

  // REQUIRES: no route table names this version. Refuses new work, runs what waits, joins the executors, frees the
  // instances. False when the timeout forced running work to end with an error. Idempotent.
  bool Retire(int64_t timeout_ns);

  // Set by the first table that publishes this version; Retire needs it.
  void set_synchronizer(std::shared_ptr<Synchronizer> synchronizer) { synchronizer_ = std::move(synchronizer); }

  // How many live route tables name this version.
  std::atomic<int> published{0};

 private:
  class Executor;
  bool Settled() const;

  const ModelSpec spec_;
  const BatchSettings batching_;
  BatchQueue queue_;
  std::vector<std::unique_ptr<Instance>> instances_;
  std::vector<IoShard> io_shards_;
  std::vector<std::unique_ptr<ExecutorShard>> executor_shards_;
  std::vector<std::unique_ptr<Executor>> executors_;
  std::shared_ptr<Synchronizer> synchronizer_;
  std::atomic<size_t> memory_bytes_{0};
  bool retired_ = false;
  LiveCounted<LiveKind::kVersion> live_;
};

}  // namespace tidegate
