#include "serving/statistics.h"

#include <algorithm>

#include "serving/version.h"

namespace tidegate {

VersionTotals Sum(const Version& version) {
  VersionTotals totals;
  for (const IoShard& shard : version.io_shards()) {
    totals.success += shard.success.value();
    totals.success_ns += shard.success_ns.value();
    totals.fail += shard.fail.value();
    totals.fail_ns += shard.fail_ns.value();
    totals.queue += shard.queue.value();
    totals.queue_ns += shard.queue_ns.value();
    totals.compute_input_ns += shard.compute_input_ns.value();
    totals.compute_infer_ns += shard.compute_infer_ns.value();
    totals.compute_output_ns += shard.compute_output_ns.value();
    for (size_t i = 0; i < totals.reasons.size(); ++i) totals.reasons[i] += shard.reasons[i].value();
    totals.request_duration.Add(shard.request_duration);
    totals.queue_duration.Add(shard.queue_duration);
  }
  for (const auto& shard : version.executor_shards()) {
    totals.executions += shard->executions.value();
    totals.rows += shard->rows.value();
    totals.last_inference_ms = std::max(totals.last_inference_ms, shard->last_inference_ms.value());
    totals.bytes_gathered += shard->bytes_gathered.value();
    totals.bisections += shard->bisections.value();
    totals.batch_rows.Add(shard->batch_rows);
    for (size_t rows = 0; rows < shard->batches.size(); ++rows) {
      const BatchCounters& batch = shard->batches[rows];
      if (batch.count.value() == 0) continue;
      auto at = std::lower_bound(totals.batches.begin(), totals.batches.end(), rows,
                                 [](const BatchTotals& one, size_t wanted) { return one.rows < wanted; });
      if (at == totals.batches.end() || at->rows != rows) {
        at = totals.batches.insert(at, BatchTotals{.rows = static_cast<uint32_t>(rows)});
      }
      at->count += batch.count.value();
      at->input_ns += batch.input_ns.value();
      at->infer_ns += batch.infer_ns.value();
      at->output_ns += batch.output_ns.value();
    }
  }
  totals.waiting = version.queue().View().waiting;
  return totals;
}

}  // namespace tidegate
