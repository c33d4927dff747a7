#include "serving/version.h"

#include <malloc.h>
#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>

#include "infer/codec.h"
#include "infer/refusal.h"
#include "net/outbox.h"
#include "util/clock.h"
#include "util/scheduling.h"

namespace tidegate {

// The thread of one instance: takes a batch, runs it, hands the answers back.
class Version::Executor {
 public:
  Executor(Version& version, uint32_t index)
      : version_(version),
        index_(index),
        instance_(*version.instances_[index]),
        shard_(*version.executor_shards_[index]) {}

  void Start() {
    thread_ = std::thread([this] { Main(); });
  }
  bool ended() const { return ended_.load(std::memory_order_acquire); }
  void Join() {
    if (thread_.joinable()) thread_.join();
  }

 private:
  void Main() {
    const std::string name = "exec-" + version_.spec_.name;
    pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
    AskForSlices(kExecutorSliceNs);
    Batch batch;
    while (version_.queue_.Take(index_, &batch)) {
      for (Request* request : batch.dropped) HandBack(request);
      if (!batch.dropped.empty()) Flush();  // they have waited for long enough
      if (!batch.requests.empty()) {
        const int64_t began_ns = NowNs();
        for (Request* request : batch.requests) request->times.dispatched_ns = began_ns;
        const Attempt first = RunBatch(batch.requests, batch.rows);
        Flush();
        // Once per Take, and after the answers have left: they matter more than the queue's bookkeeping.
        version_.queue_.Finished(index_, batch.rows, first.run_ns, first.ok, NowNs());
      }
    }
    ended_.store(true, std::memory_order_release);
  }

  struct Attempt {
    bool ok;
    int64_t run_ns;
  };

  // Runs the requests; halves a batch that failed until the bad rows stand alone, so that the good ones succeed.
  // Returns how the first attempt, on all of them, went.
  Attempt RunBatch(std::span<Request* const> requests, uint32_t rows) {
    const int64_t began_ns = NowNs();
    RunTimes times;
    Status status = instance_.Run(requests, rows, &times);
    if (status.ok()) status = CheckOutputs(version_.spec_, instance_.outputs(), rows);
    const Attempt attempt{status.ok(), times.infer_done_ns - began_ns};
    if (!attempt.ok) {
      if (requests.size() == 1) {
        Fail(requests[0], std::move(status));
        return attempt;
      }
      shard_.bisections.Add(1);
      const auto half = requests.size() / 2;
      RunHalf(requests.first(half));
      RunHalf(requests.subspan(half));
      return attempt;
    }
    uint32_t first_row = 0;
    for (Request* request : requests) {
      request->times.input_done_ns = times.input_done_ns;
      request->times.infer_done_ns = times.infer_done_ns;
      if (!request->cancelled.load(std::memory_order_relaxed)) {
        EncodeInferResponse(version_.spec_, instance_.outputs(), first_row, request);
      }
      first_row += request->rows;
    }
    const int64_t ended_ns = NowNs();
    uint64_t bytes = 0;
    for (Request* request : requests) {
      for (const InputView& input : request->inputs) bytes += input.bytes;
      request->times.output_done_ns = ended_ns;
      HandBack(request);
    }
    Count(rows, bytes, began_ns, times, ended_ns);
    return attempt;
  }

  void RunHalf(std::span<Request* const> requests) {
    // Flush first: whoever succeeded already should not wait for the hunt.
    Flush();
    uint32_t rows = 0;
    for (const Request* request : requests) rows += request->rows;
    RunBatch(requests, rows);
  }

  void Fail(Request* request, Status status) {
    // The runtime knows nodes; whoever asked knows models.
    if (status.reason == Reason::kModelRaised) {
      status.message = "model " + Quoted(version_.spec_.name) + " failed: " + status.message;
    }
    request->status = std::move(status);
    request->times.output_done_ns = NowNs();
    HandBack(request);
  }

  void Count(uint32_t rows, uint64_t bytes, int64_t began_ns, const RunTimes& times, int64_t ended_ns) {
    shard_.executions.Add(1);
    shard_.rows.Add(rows);
    shard_.bytes_gathered.Add(bytes);
    shard_.last_inference_ms.Set(static_cast<uint64_t>(WallMs()));
    BatchCounters& counters = shard_.batches[std::min<size_t>(rows, shard_.batches.size() - 1)];
    counters.count.Add(1);
    counters.input_ns.Add(static_cast<uint64_t>(times.input_done_ns - began_ns));
    counters.infer_ns.Add(static_cast<uint64_t>(times.infer_done_ns - times.input_done_ns));
    counters.output_ns.Add(static_cast<uint64_t>(ended_ns - times.infer_done_ns));
    shard_.batch_rows.Observe(kRowsBounds, rows);
  }

  // Collects an answer for its I/O thread; nobody else may touch the request from Flush on.
  void HandBack(Request* request) {
    if (version_.batching_.preserve_ordering) {
      finished_.push_back(request);
    } else {
      Collect(request);
    }
  }

  void Collect(Request* request) {
    for (auto& [home, list] : done_) {
      if (home == request->home) {
        list.PushBack(request);
        return;
      }
    }
    done_.emplace_back(request->home, RequestList());
    done_.back().second.PushBack(request);
  }

  void Flush() {
    BatchQueue::Turn turn(version_.queue_);
    for (Request* request : finished_) version_.queue_.Release(request, &ready_);
    for (Request* request : ready_) Collect(request);
    finished_.clear();
    ready_.clear();
    for (auto& [home, list] : done_) home->PostDone(&list);
  }

  Version& version_;
  const uint32_t index_;
  Instance& instance_;
  ExecutorShard& shard_;
  std::vector<std::pair<Outbox*, RequestList>> done_;  // one entry per I/O thread met so far
  std::vector<Request*> finished_;                     // preserve_ordering: finished and not yet released
  std::vector<Request*> ready_;                        // of those and others: whose turn it is
  std::atomic<bool> ended_{false};
  std::thread thread_;
};

namespace {
BatchSettings WithInstances(BatchSettings settings, size_t instances) {
  settings.instances = static_cast<uint32_t>(instances);
  return settings;
}
}  // namespace

Version::Version(ModelSpec spec, const BatchSettings& batching, std::vector<std::unique_ptr<Instance>> instances)
    : spec_(std::move(spec)),
      batching_(WithInstances(batching, instances.size())),
      queue_(batching_),
      instances_(std::move(instances)),
      io_shards_(kMaxIoThreads) {
  size_t bytes = 0;
  for (const auto& instance : instances_) {
    executor_shards_.push_back(std::make_unique<ExecutorShard>(batching_.max_batch_rows));
    bytes += instance->memory_bytes();
  }
  memory_bytes_.store(bytes, std::memory_order_relaxed);
}

Version::~Version() { Retire(0); }

Status Version::WarmUp(const WarmupBatch& batch) {
  ParsedRequest parsed;
  parsed.model_name = spec_.name;
  for (const WarmupTensor& tensor : batch.tensors) {
    ParsedInput& input = parsed.inputs.emplace_back();
    input.name = tensor.name;
    input.datatype = WireName(tensor.type);
    input.shape = tensor.dims;
    parsed.raw.push_back(tensor.data);
  }
  parsed.n_inputs = parsed.n_raw = batch.tensors.size();
  Request request;
  Status status = CheckInferRequest(parsed, spec_, &request);
  if (status.ok() && request.rows != batch.rows) {
    status = Status::Error(Reason::kInvalidTensor, "the batch says " + std::to_string(batch.rows) +
                                                       " rows and its tensors have " + std::to_string(request.rows));
  }
  if (!status.ok()) {
    status.reason = Reason::kLoadFailed;
    return status;
  }
  Request* const requests[] = {&request};
  // Its own thread, so that the low priority ends with it.
  std::thread([&] {
    TakeLowestPriority();
    for (const auto& instance : instances_) {
      for (uint32_t i = 0; i < batch.count && status.ok(); ++i) {
        RunTimes times;
        status = instance->Run(requests, batch.rows, &times);
        if (status.ok()) status = CheckOutputs(spec_, instance->outputs(), batch.rows);
      }
    }
  }).join();
  size_t bytes = 0;
  for (const auto& instance : instances_) bytes += instance->memory_bytes();
  memory_bytes_.store(bytes, std::memory_order_relaxed);
  return status;
}

void Version::Start() {
  if (!executors_.empty()) return;
  for (uint32_t i = 0; i < instances_.size(); ++i) executors_.push_back(std::make_unique<Executor>(*this, i));
  for (const auto& executor : executors_) executor->Start();
}

bool Version::Settled() const {
  uint64_t finalized = 0;
  uint64_t accepted = 0;
  // Finalized first: a sum that is equal read in this order was equal in between.
  for (const IoShard& shard : io_shards_) finalized += shard.finalized.value();
  for (const IoShard& shard : io_shards_) accepted += shard.accepted.value();
  return finalized == accepted;
}

bool Version::Retire(int64_t timeout_ns) {
  if (retired_) return true;
  retired_ = true;
  if (synchronizer_) synchronizer_->Synchronize();  // no I/O thread holds a table with us, so no Push is under way
  queue_.Close();
  const int64_t deadline_ns = NowNs() + timeout_ns;
  bool in_time = true;
  const timespec pause{0, 200'000};
  for (const auto& executor : executors_) {
    while (!executor->ended()) {
      if (NowNs() > deadline_ns) {
        if (in_time && timeout_ns > 0) in_time = false;
        for (const auto& instance : instances_) instance->Terminate();
      }
      nanosleep(&pause, nullptr);
    }
    executor->Join();
  }
  // What the executors handed back is still to be dealt with by the I/O threads, which they have been woken for.
  while (!Settled()) nanosleep(&pause, nullptr);
  if (synchronizer_) synchronizer_->Synchronize();
  executors_.clear();
  instances_.clear();
  memory_bytes_.store(0, std::memory_order_relaxed);
  synchronizer_.reset();
  return in_time;
}

}  // namespace tidegate
