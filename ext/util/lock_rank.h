// The order in which locks of the native core may be taken: the whole story of deadlocks in one enum.
//
// A thread that holds rank r may only take a rank greater than r. Debug builds check every lock (ranked_mutex.h).
// The GIL comes before all of them: whoever holds a rank never takes the GIL.
#pragma once

namespace tidegate {

enum class LockRank : int {
  kRouteTableWriter = 10,
  kAnswerOrder = 15,  // the turn of answers that must leave in order (preserve_ordering)
  kBatchQueue = 20,
  kNodeLoad = 25,  // taken by a queue that thinks about holding a batch
  kOutbox = 30,
  kSlowQueue = 40,
};

}  // namespace tidegate
