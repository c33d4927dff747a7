#include "batch/batch_queue.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <string>
#include <unordered_map>
#include <utility>

#include "batch/admission.h"
#include "batch/policy.h"
#include "batch/predictor.h"
#include "util/clock.h"
#include "util/dcheck.h"

namespace tidegate {
namespace {

// Shapes with a run-time model of their own; beyond it the one that ran longest ago gives its model up.
constexpr size_t kShapeModels = 16;
// Shapes without work or model that are kept for their memory.
constexpr size_t kSpareShapes = 64;
// So that the first of many expired requests are answered, and I/O threads let in, before the last has been looked at.
constexpr size_t kDropsPerTake = 256;
// Instances woken by one call; each that finds work wakes the next.
constexpr size_t kWakesPerCall = 16;
// Priority levels have two lists each (policy.h), and a list's number is a byte.
constexpr uint32_t kMostLevels = 100;

bool IsDelayed(const Request& request) { return (request.queue_list & 1) != 0; }

int64_t After(int64_t arrived_ns, int64_t timeout_us) {
  return SaturatingAdd(arrived_ns, SaturatingMul(timeout_us, 1000));
}

// When half of the time that a request has for its answer has passed.
int64_t HalfNs(const Request& request) {
  return request.due_ns == kNever ? kNever : request.times.arrived_ns + (request.due_ns - request.times.arrived_ns) / 2;
}

// Requests of one shape in one list, oldest first; linked by shape_next and shape_prev.
class Lane {
 public:
  Request* head() const { return head_; }
  uint64_t size() const { return size_; }
  uint64_t rows() const { return rows_; }

  void PushBack(Request* request) {
    request->shape_next = nullptr;
    request->shape_prev = tail_;
    (tail_ ? tail_->shape_next : head_) = request;
    tail_ = request;
    ++size_;
    rows_ += request->rows;
  }
  void Remove(Request* request) {
    (request->shape_prev ? request->shape_prev->shape_next : head_) = request->shape_next;
    (request->shape_next ? request->shape_next->shape_prev : tail_) = request->shape_prev;
    request->shape_next = request->shape_prev = nullptr;
    --size_;
    rows_ -= request->rows;
  }

 private:
  Request* head_ = nullptr;
  Request* tail_ = nullptr;
  uint64_t size_ = 0;
  uint64_t rows_ = 0;
};

// How much time passes between two rows that arrive, over windows of about 10 ms: several rounds of an I/O thread, and
// a small part of the time in which a load changes.
class ArrivalGap {
 public:
  // kNever before the first window has ended.
  int64_t gap_ns() const { return gap_ns_; }

  void Note(uint32_t rows, int64_t now_ns) {
    if (now_ns - since_ns_ >= kWindowNs) {
      if (rows_ > 0) gap_ns_ = std::max<int64_t>((now_ns - since_ns_) / static_cast<int64_t>(rows_), 1);
      since_ns_ = now_ns;
      rows_ = 0;
    }
    rows_ += rows;
  }

 private:
  static constexpr int64_t kWindowNs = 10'000'000;
  int64_t gap_ns_ = kNever;
  int64_t since_ns_ = 0;
  uint64_t rows_ = 0;
};

struct ShapeModel;

// The requests whose non-batch dimensions are the same: only they share batches.
struct Shape {
  Shape(uint64_t key_in, size_t lists) : key(key_in), lanes(lists) {}

  uint64_t key;
  std::vector<Lane> lanes;  // one per list
  uint64_t waiting = 0;     // requests in all lanes
  uint32_t running = 0;     // batches
  int64_t last_start_ns = 0;
  int64_t last_refusal_ns = kLongAgo;
  ArrivalGap arrivals;
  ShapeModel* model = nullptr;
};

struct ShapeModel {
  ShapeModel(uint32_t max_rows, int64_t slo_ns) : predictor(max_rows, slo_ns) {}

  Predictor predictor;
  Shape* shape = nullptr;
  uint64_t used = 0;  // the count of starts when it last ran
};

// One executor, as the queue sees it.
struct Slot {
  std::condition_variable wake;
  bool signalled = false;
  Slot* parked_next = nullptr;
  // The batch that it runs.
  Shape* shape = nullptr;  // null: none
  uint32_t rows = 0;
  int64_t ends_ns = 0;  // predicted
  bool probe = false;
};

// Whose answer may leave, where answers leave in the order of arrival. A ring over the tickets that were given out and
// have not left yet.
class AnswerOrder {
 public:
  size_t outstanding() const { return static_cast<size_t>(end_ - begin_); }

  uint64_t Expect() {
    if (outstanding() == ring_.size()) Grow();
    At(end_) = {};
    return end_++;
  }
  // The answer of `ticket` is ready, or will never come (null). Appends to *ready what may leave.
  void Settle(uint64_t ticket, Request* request, std::vector<Request*>* ready) {
    TIDEGATE_DCHECK(ticket >= begin_ && ticket < end_ && !At(ticket).settled, "every request ends exactly once");
    At(ticket) = {true, request};
    for (; begin_ != end_ && At(begin_).settled; ++begin_) {
      if (At(begin_).request) ready->push_back(At(begin_).request);
    }
  }

 private:
  struct Place {
    bool settled = false;
    Request* request = nullptr;
  };

  Place& At(uint64_t ticket) { return ring_[ticket % ring_.size()]; }
  void Grow() {
    std::vector<Place> wider(std::max<size_t>(ring_.size() * 2, 64));
    for (uint64_t ticket = begin_; ticket != end_; ++ticket) wider[ticket % wider.size()] = At(ticket);
    ring_.swap(wider);
  }

  std::vector<Place> ring_;
  uint64_t begin_ = 0;
  uint64_t end_ = 0;
};

// The executors to wake once the lock is released: a copy, since a slot's links are the lock's.
struct Wakes {
  std::array<Slot*, kWakesPerCall> slots;
  size_t n = 0;

  void Notify() {
    for (size_t i = 0; i < n; ++i) slots[i]->wake.notify_one();
  }
};

// Texts are made outside the lock; under it a refusal is a reason and a number.
void Explain(Request* request, uint32_t max_rows, uint32_t levels) {
  std::string& message = request->status.message;
  switch (request->status.reason) {
    case Reason::kInvalidTensor:
      message = request->rows == 0 || request->rows > max_rows
                    ? "a request has from 1 to " + std::to_string(max_rows) + " rows, this one has " +
                          std::to_string(request->rows)
                    : "priority " + std::to_string(request->priority) +
                          " does not exist; the model has 1 (highest) to " + std::to_string(levels);
      break;
    case Reason::kQueueFull: message = "too many requests are waiting for this model; try again later"; break;
    case Reason::kTooLate:
      message = "the answer would come after the request's deadline: too much work is waiting; try again later";
      break;
    case Reason::kDeadlinePassed:
      message =
          "the request's deadline passed, or would have passed before its answer, while it waited for an instance";
      break;
    case Reason::kCancelled: message = "the request was cancelled"; break;
    case Reason::kVersionNotReady: message = "this version is being unloaded"; break;
    default: break;
  }
}

}  // namespace

struct BatchQueue::Impl {
  Impl(const BatchSettings& given, NodeLoad& node_load)
      : settings(given),
        node(node_load),
        levels(std::clamp<uint32_t>(given.priority_levels, 1, kMostLevels)),
        max_rows(std::max<uint32_t>(given.max_batch_rows, 1)),
        aging_ns(SaturatingMul(given.priority_aging_us, 1000)),
        unknown(UnknownPrediction(max_rows)),
        lists(2 * size_t{levels}),
        slots(std::max<uint32_t>(given.instances, 1)) {
    limits.max_delay_ns = given.dynamic_batching ? SaturatingMul(given.max_queue_delay_us, 1000) : 0;
    for (uint32_t size : given.preferred_batch_sizes) {
      if (size > 0 && (limits.preferred_rows == 0 || size < limits.preferred_rows)) limits.preferred_rows = size;
    }
    policies.assign(levels, given.default_policy);
    for (const auto& [level, policy] : given.level_policies) {
      if (level >= 1 && level <= levels) policies[level - 1] = policy;
    }
    for (QueuePolicy& policy : policies) {
      if (policy.max_queue_size == 0) policy.max_queue_size = kDefaultMaxQueueSize;
    }
    models.reserve(kShapeModels);
    spare_shapes.reserve(kSpareShapes);
    free_ns.reserve(slots.size());
    picked.reserve(max_rows);
    candidates.reserve(max_rows);
    node.Join(&published);
  }
  ~Impl() {
    TIDEGATE_DCHECK(waiting == 0, "a queue ends empty");
    node.Leave(&published);
  }

  // ---- levels and deadlines: constant after construction -----------------------------------------------------------

  // 0 is the highest. False: the model has no such level.
  bool LevelOf(const Request& request, uint32_t* level) const {
    *level = 0;
    if (settings.priority_levels == 0) return true;  // a model without levels takes any priority for its only one
    const uint32_t priority =
        request.priority != 0 ? request.priority : std::max<uint32_t>(settings.default_priority_level, 1);
    if (priority > levels) return false;
    *level = priority - 1;
    return true;
  }

  int64_t SetDeadlines(Request* request) const {
    uint32_t level;
    LevelOf(*request, &level);
    const QueuePolicy& policy = policies[level];
    const bool delay = policy.timeout_action == TimeoutAction::kDelay;
    const int64_t arrived_ns = request->times.arrived_ns;
    int64_t queue_due_ns = policy.default_timeout_us > 0 ? After(arrived_ns, policy.default_timeout_us) : kNever;
    if (request->timeout_us > 0) {
      const int64_t timeout_ns = After(arrived_ns, request->timeout_us);
      // Where the model delays what is late and lets the caller say when that is, `timeout` says only that.
      int64_t& counts_for = delay && policy.allow_timeout_override ? queue_due_ns : request->due_ns;
      counts_for = std::min(counts_for, timeout_ns);
    }
    request->queue_due_ns = queue_due_ns;
    return delay ? request->due_ns : std::min(request->due_ns, queue_due_ns);
  }

  bool Rejects(const Request& request) const {
    return policies[request.queue_list / 2].timeout_action == TimeoutAction::kReject;
  }

  // ---- shapes -----------------------------------------------------------------------------------------------------

  Shape& ShapeOf(uint64_t key) {
    if (recent && recent->key == key) return *recent;
    auto found = shapes.find(key);
    if (found == shapes.end()) {
      if (spare_shapes.empty()) {
        found = shapes.try_emplace(key, key, lists.size()).first;
      } else {
        auto node_handle = std::move(spare_shapes.back());
        spare_shapes.pop_back();
        node_handle.key() = key;
        Shape& shape = node_handle.mapped();
        shape.key = key;
        shape.last_start_ns = 0;
        shape.last_refusal_ns = kLongAgo;
        shape.arrivals = ArrivalGap();
        found = shapes.insert(std::move(node_handle)).position;
      }
    }
    recent = &found->second;
    return *recent;
  }

  // Lets go of a shape that has neither work nor a model.
  void Tidy(Shape& shape) {
    if (shape.waiting > 0 || shape.running > 0 || shape.model) return;
    if (recent == &shape) recent = nullptr;
    auto node_handle = shapes.extract(shape.key);
    if (spare_shapes.size() < kSpareShapes) spare_shapes.push_back(std::move(node_handle));
  }

  const Prediction& PredictionOf(const Shape& shape) const {
    return shape.model ? shape.model->predictor.prediction() : unknown;
  }

  Predictor& PredictorOf(Shape& shape) {
    if (!shape.model) {
      if (models.size() < kShapeModels) {
        models.push_back(std::make_unique<ShapeModel>(max_rows, SaturatingMul(settings.slo_us, 1000)));
        shape.model = models.back().get();
      } else {
        shape.model = std::min_element(models.begin(), models.end(), [](const auto& a, const auto& b) {
                        return a->used < b->used;
                      })->get();
        shape.model->predictor.Reset();
        Shape* const loser = std::exchange(shape.model->shape, nullptr);
        loser->model = nullptr;
        Tidy(*loser);
      }
      shape.model->shape = &shape;
    }
    shape.model->used = starts;
    return shape.model->predictor;
  }

  // ---- lists ------------------------------------------------------------------------------------------------------

  void Enlist(Request* request, Shape& shape, uint8_t list, int64_t now_ns) {
    // I/O threads read the clock before they get here, so their times may come out of order; lists must not.
    clock_ns = std::max(clock_ns, now_ns);
    request->queue_list = list;
    request->listed_ns = clock_ns;
    request->queued = true;
    lists[list].PushBack(request);
    shape.lanes[list].PushBack(request);
    if (shape.waiting++ == 0) ++shapes_waiting;
    ++waiting;
    waiting_rows += request->rows;
  }

  void Unlist(Request* request, Shape& shape) {
    TIDEGATE_DCHECK(request->queued, "only what waits can leave");
    const uint8_t list = request->queue_list;
    request->queued = false;
    lists[list].Remove(request);
    shape.lanes[list].Remove(request);
    if (--shape.waiting == 0) --shapes_waiting;
    --waiting;
    waiting_rows -= request->rows;
  }

  void Publish() { published.store(waiting, std::memory_order_relaxed); }

  // ---- coming in --------------------------------------------------------------------------------------------------

  // When the instances are predicted to be free, for admission: the same for all requests of one Push.
  void NoteFree() {
    free_ns.clear();
    for (const Slot& slot : slots) free_ns.push_back(slot.shape ? slot.ends_ns : INT64_MIN);
    std::sort(free_ns.begin(), free_ns.end());
  }

  // REQUIRES: NoteFree.
  Admission Accept(Request* request, int64_t now_ns) {
    if (closed) return {Reason::kVersionNotReady};
    if (request->cancelled.load(std::memory_order_relaxed)) return {Reason::kCancelled};
    uint32_t level;
    if (!LevelOf(*request, &level)) return {Reason::kInvalidTensor};
    const auto list = static_cast<uint8_t>(2 * level);
    Shape& shape = ShapeOf(request->shape_key);
    AdmissionView view{
        .waiting = lists[list].size() + lists[list + 1].size(),
        .max_waiting = policies[level].max_queue_size,
        .free_ns = free_ns,
        .gap_ns = shape.arrivals.gap_ns(),
        .max_rows = max_rows,
        .batching = settings.dynamic_batching,
    };
    // Answers that wait for their turn hold memory too.
    if (settings.preserve_ordering && order.outstanding() >= waiting + kDefaultMaxQueueSize) view.max_waiting = 0;
    for (uint8_t ahead = 0; ahead <= list; ++ahead) {
      view.rows_ahead += shape.lanes[ahead].rows();
      view.requests_ahead += shape.lanes[ahead].size();
    }
    const bool rejects = policies[level].timeout_action == TimeoutAction::kReject;
    const Admission admission = Admit(view, PredictionOf(shape),
                                      {.rows = request->rows,
                                       .due_ns = request->due_ns,
                                       .half_ns = HalfNs(*request),
                                       .start_by_ns = rejects ? request->queue_due_ns : kNever},
                                      now_ns);
    if (admission.reason != Reason::kOk) {
      if (admission.reason != Reason::kInvalidTensor) shape.last_refusal_ns = now_ns;
      Tidy(shape);
      return admission;
    }
    request->ticket = settings.preserve_ordering ? order.Expect() : next_ticket++;
    Enlist(request, shape, list, now_ns);
    shape.arrivals.Note(request->rows, now_ns);
    if (hold_until_ns != kNever && EndsHold(*request, shape)) hold_until_ns = kNever;
    return admission;
  }

  // Whether the batch that is being held open has what it waits for, or must not wait for it after `request` came.
  bool EndsHold(const Request& request, const Shape& shape) const {
    if (shapes_waiting > 1) return true;
    const Prediction& prediction = PredictionOf(shape);
    const uint32_t full = limits.preferred_rows > 0 ? std::min(limits.preferred_rows, prediction.cap) : prediction.cap;
    if (waiting_rows >= full || (prediction.trusted && waiting_rows >= prediction.knee)) return true;
    const auto rows = static_cast<uint32_t>(waiting_rows);
    const int64_t run_ns = std::max(prediction.L99(rows), prediction.L99(rows + 1));
    return request.queue_due_ns < hold_until_ns || request.due_ns < SaturatingAdd(hold_until_ns, run_ns + kSlackNs);
  }

  // ---- going out --------------------------------------------------------------------------------------------------

  void Drop(Request* request, Shape& shape, Reason reason, Batch* batch) {
    Unlist(request, shape);
    request->status.reason = reason;
    batch->dropped.push_back(request);
  }

  // Whether a request that has come to the head may run. If not it is dropped, or set back behind the others of its
  // level.
  bool MayRun(Request* request, Shape& shape, int64_t now_ns, Batch* batch) {
    if (request->cancelled.load(std::memory_order_relaxed)) {
      Drop(request, shape, Reason::kCancelled, batch);
      return false;
    }
    if (now_ns >= request->due_ns) {
      Drop(request, shape, Reason::kDeadlinePassed, batch);
      return false;
    }
    if (now_ns < request->queue_due_ns || IsDelayed(*request)) return true;
    if (Rejects(*request)) {
      Drop(request, shape, Reason::kDeadlinePassed, batch);
    } else {
      Unlist(request, shape);
      Enlist(request, shape, static_cast<uint8_t>(request->queue_list + 1), now_ns);
    }
    return false;
  }

  // Who is served first: by rank, then by how long it has waited in its list. Between requests of two lists; inside a
  // list the first comes first, which agrees.
  bool Before(const Request& a, const Request& b, int64_t now_ns) const {
    const uint32_t rank_a = Rank(a.queue_list, a.listed_ns, aging_ns, now_ns);
    const uint32_t rank_b = Rank(b.queue_list, b.listed_ns, aging_ns, now_ns);
    if (rank_a != rank_b) return rank_a < rank_b;
    if (a.listed_ns != b.listed_ns) return a.listed_ns < b.listed_ns;
    return a.queue_list < b.queue_list;
  }

  // The request that is served next. Null: none, or so many were dropped on the way that they are to be answered first.
  Request* Head(int64_t now_ns, Batch* batch) {
    Request* best = nullptr;
    for (RequestList& list : lists) {
      while (Request* head = list.head()) {
        if (batch->dropped.size() >= kDropsPerTake) return nullptr;
        Shape& shape = ShapeOf(head->shape_key);
        if (MayRun(head, shape, now_ns, batch)) {
          if (!best || Before(*head, *best, now_ns)) best = head;
          break;
        }
        Tidy(shape);
      }
    }
    return best;
  }

  // Appends to `picked` and `candidates` whoever would share a batch with those already there, in the order of service,
  // as long as there is room.
  void Gather(Shape& shape, uint32_t cap, int64_t now_ns, Batch* batch) {
    while (picked_rows < cap && (picked.empty() || settings.dynamic_batching)) {
      size_t best = cursors.size();
      for (size_t i = 0; i < cursors.size(); ++i) {
        while (cursors[i]) {
          Request* const at = cursors[i];
          Request* const next = at->shape_next;
          if (MayRun(at, shape, now_ns, batch)) break;
          cursors[i] = next;
        }
        if (cursors[i] && (best == cursors.size() || Before(*cursors[i], *cursors[best], now_ns))) best = i;
      }
      if (best == cursors.size()) return;
      Request* const request = cursors[best];
      if (!picked.empty() && picked_rows + request->rows > cap) return;
      cursors[best] = request->shape_next;
      picked.push_back(request);
      candidates.push_back({request->rows, request->due_ns, HalfNs(*request)});
      picked_rows += request->rows;
    }
  }

  void StartGathering(const Shape& shape) {
    picked.clear();
    candidates.clear();
    picked_rows = 0;
    cursors.clear();
    for (const Lane& lane : shape.lanes) {
      if (lane.head()) cursors.push_back(lane.head());
    }
  }

  Decision Ask(const Shape& shape, int64_t now_ns) {
    PlanView view{
        .candidates = candidates,
        .all_waiting = picked.size() == waiting,
        .draining = closed,
        .head_arrived_ns = picked[0]->times.arrived_ns,
        .last_start_ns = shape.last_start_ns,
        .last_refusal_ns = shape.last_refusal_ns,
    };
    if (limits.max_delay_ns > 0) {
      for (const Request* request : picked) {
        if (!IsDelayed(*request)) view.start_by_ns = std::min(view.start_by_ns, request->queue_due_ns);
      }
      view.expected_gap_ns = shape.arrivals.gap_ns();
      view.other_work = node.OtherWork(&published, now_ns);
    }
    return Plan(limits, PredictionOf(shape), view, now_ns);
  }

  void Dispatch(Slot& slot, Shape& shape, const Decision& decision, int64_t now_ns, Batch* batch) {
    for (uint32_t i = 0; i < decision.count; ++i) {
      Unlist(picked[i], shape);
      batch->requests.push_back(picked[i]);
      batch->rows += picked[i]->rows;
    }
    TIDEGATE_DCHECK(!slot.shape, "an instance runs one batch at a time");
    TIDEGATE_DCHECK(batch->rows <= max_rows, "a batch has at most max_batch_rows rows");
    TIDEGATE_DCHECK(settings.dynamic_batching || decision.count == 1,
                    "without dynamic batching a batch is one request");
    slot.shape = &shape;
    slot.rows = batch->rows;
    slot.ends_ns = SaturatingAdd(now_ns, PredictionOf(shape).L50(batch->rows));
    slot.probe = decision.probe;
    ++shape.running;
    shape.last_start_ns = now_ns;
    ++starts;
    if (shape.model) shape.model->used = starts;
    running_rows += batch->rows;
  }

  // Fills *batch if there is something to run or to drop; else says when asking again makes sense.
  int64_t Decide(Slot& slot, int64_t now_ns, Batch* batch) {
    TIDEGATE_DCHECK(!slot.shape, "Finished comes before the next Take");
    hold_until_ns = kNever;
    while (Request* head = Head(now_ns, batch)) {
      Shape& shape = ShapeOf(head->shape_key);
      const uint32_t cap = PredictionOf(shape).cap;
      StartGathering(shape);
      Gather(shape, cap, now_ns, batch);
      TIDEGATE_DCHECK(picked[0] == head, "the head of the queue heads the batch");
      while (!picked.empty()) {
        const Decision decision = Ask(shape, now_ns);
        if (decision.action == Action::kDispatch) {
          Dispatch(slot, shape, decision, now_ns, batch);
          return now_ns;
        }
        if (decision.action == Action::kHold) {
          TIDEGATE_DCHECK(limits.max_delay_ns > 0 && decision.until_ns > now_ns, "no hold at delay 0");
          if (!batch->dropped.empty()) return now_ns;  // they must not wait for company
          hold_until_ns = decision.until_ns;
          return decision.until_ns;
        }
        picked_rows -= picked[decision.index]->rows;
        Drop(picked[decision.index], shape, Reason::kDeadlinePassed, batch);
        shape.last_refusal_ns = now_ns;
        if (batch->dropped.size() >= kDropsPerTake) break;
        // The head is gone: if others wait too, it may be another shape's turn.
        if (decision.index == 0 && shapes_waiting > 1) break;
        picked.erase(picked.begin() + decision.index);
        candidates.erase(candidates.begin() + decision.index);
        Gather(shape, cap, now_ns, batch);
      }
      Tidy(shape);
      if (batch->dropped.size() >= kDropsPerTake) break;
    }
    return batch->dropped.empty() ? kNever : now_ns;
  }

  // ---- waking -----------------------------------------------------------------------------------------------------

  void Park(Slot& slot) {
    slot.parked_next = parked;
    parked = &slot;
    ++n_parked;
  }

  void Unpark(Slot& slot) {
    Slot** link = &parked;
    while (*link != &slot) link = &(*link)->parked_next;
    *link = slot.parked_next;
    --n_parked;
  }

  // About how many batches could start now: too few is made good by whoever takes one, too many wakes somebody for
  // nothing.
  uint64_t Startable() const {
    if (!settings.dynamic_batching || waiting == 0) return waiting;
    const uint64_t cap = shapes_waiting == 1 && recent ? PredictionOf(*recent).cap : max_rows;
    return std::max<uint64_t>(shapes_waiting, (waiting_rows + cap - 1) / cap);
  }

  // Chooses whom to wake for what waits, last parked first: its caches are the warmest, and the others can sleep on.
  void Wake(Wakes* wakes) {
    const uint64_t startable = Startable();
    while (parked && n_waking < startable && wakes->n < kWakesPerCall) {
      Slot* const slot = parked;
      parked = slot->parked_next;
      --n_parked;
      slot->signalled = true;
      ++n_waking;
      wakes->slots[wakes->n++] = slot;
    }
  }

  void ExplainAll(const std::vector<Request*>& requests) const {
    for (Request* request : requests) Explain(request, max_rows, levels);
  }

  // ---- constant after construction ----------------------------------------------------------------------------------
  const BatchSettings settings;
  NodeLoad& node;
  const uint32_t levels;
  const uint32_t max_rows;
  const int64_t aging_ns;
  const Prediction unknown;
  PlanLimits limits;
  std::vector<QueuePolicy> policies;  // by level; max_queue_size is never 0

  // ---- guarded by mutex ---------------------------------------------------------------------------------------------
  mutable RankedMutex<LockRank::kBatchQueue> mutex;
  bool closed = false;
  uint64_t waiting = 0;
  uint64_t waiting_rows = 0;
  uint64_t running_rows = 0;
  uint64_t next_ticket = 0;
  uint64_t starts = 0;
  int64_t clock_ns = 0;            // the latest time anybody came with
  std::vector<RequestList> lists;  // all shapes: 2 * level, and behind each what DELAY has set back

  std::unordered_map<uint64_t, Shape> shapes;
  std::vector<std::unordered_map<uint64_t, Shape>::node_type> spare_shapes;
  Shape* recent = nullptr;  // the shape looked up last
  uint64_t shapes_waiting = 0;
  std::vector<std::unique_ptr<ShapeModel>> models;

  std::deque<Slot> slots;  // by instance; a deque since slots do not move
  Slot* parked = nullptr;  // who waits, last comer first
  uint32_t n_parked = 0;
  uint64_t n_waking = 0;           // signalled and not yet awake
  int64_t hold_until_ns = kNever;  // a parked instance holds a batch open until then

  AnswerOrder order;

  // Scratch.
  std::vector<int64_t> free_ns;   // of Push
  std::vector<Request*> cursors;  // of Decide, as all below
  std::vector<Request*> picked;
  std::vector<Candidate> candidates;
  uint32_t picked_rows = 0;

  // ---- any thread ---------------------------------------------------------------------------------------------------
  std::atomic<uint64_t> published{0};  // `waiting`, for NodeLoad
};

BatchQueue::BatchQueue(const BatchSettings& settings, NodeLoad& node)
    : ordered_(settings.preserve_ordering), impl_(std::make_unique<Impl>(settings, node)) {}

BatchQueue::~BatchQueue() = default;

int64_t BatchQueue::SetDeadlines(Request* request) const { return impl_->SetDeadlines(request); }

void BatchQueue::Push(RequestList* arrivals, RequestList* refused, int64_t now_ns) {
  Impl& queue = *impl_;
  Wakes wakes;
  RequestList turned_away;
  {
    RankedLock lock(queue.mutex);
    queue.NoteFree();
    while (Request* request = arrivals->PopFront()) {
      const Admission admission = queue.Accept(request, now_ns);
      if (admission.reason != Reason::kOk) {
        request->status.reason = admission.reason;
        request->status.pushback_ms = PushbackMs(admission.pushback_ns);
        turned_away.PushBack(request);
      }
    }
    if (queue.hold_until_ns == kNever) queue.Wake(&wakes);
    queue.Publish();
  }
  wakes.Notify();
  for (Request* request = turned_away.head(); request; request = request->next) {
    Explain(request, queue.max_rows, queue.levels);
  }
  refused->Splice(&turned_away);
}

bool BatchQueue::Remove(Request* request, std::vector<Request*>* ready) {
  Impl& queue = *impl_;
  RankedLock lock(queue.mutex);
  if (!request->queued) return false;
  Shape& shape = queue.ShapeOf(request->shape_key);
  queue.Unlist(request, shape);
  queue.Tidy(shape);
  if (ordered_) queue.order.Settle(request->ticket, nullptr, ready);
  queue.Publish();
  return true;
}

bool BatchQueue::Take(uint32_t instance, Batch* batch) {
  using std::chrono::nanoseconds;
  using std::chrono::steady_clock;
  Impl& queue = *impl_;
  Slot& slot = queue.slots[instance];
  Wakes wakes;
  batch->Clear();
  RankedLock lock(queue.mutex);
  while (true) {
    const int64_t again_ns = queue.Decide(slot, NowNs(), batch);
    if (!batch->empty()) break;
    if (queue.closed) return false;
    queue.Park(slot);
    while (!slot.signalled) {
      if (again_ns == kNever) {
        slot.wake.wait(lock.native());
      } else if (slot.wake.wait_until(lock.native(), steady_clock::time_point(nanoseconds(again_ns))) ==
                 std::cv_status::timeout) {
        break;
      }
    }
    if (slot.signalled) {
      slot.signalled = false;
      --queue.n_waking;
    } else {
      queue.Unpark(slot);
    }
  }
  queue.Wake(&wakes);
  queue.Publish();
  lock.Unlock();
  wakes.Notify();
  queue.ExplainAll(batch->dropped);
  return true;
}

int64_t BatchQueue::TryTake(uint32_t instance, int64_t now_ns, Batch* batch) {
  Impl& queue = *impl_;
  batch->Clear();
  RankedLock lock(queue.mutex);
  const int64_t again_ns = queue.Decide(queue.slots[instance], now_ns, batch);
  queue.Publish();
  lock.Unlock();
  queue.ExplainAll(batch->dropped);
  return again_ns;
}

void BatchQueue::Finished(uint32_t instance, uint32_t rows, int64_t run_ns, bool ok, int64_t now_ns) {
  Impl& queue = *impl_;
  RankedLock lock(queue.mutex);
  Slot& slot = queue.slots[instance];
  TIDEGATE_DCHECK(slot.shape, "only what was taken can finish");
  Shape& shape = *std::exchange(slot.shape, nullptr);
  queue.running_rows -= slot.rows;
  if (ok) queue.PredictorOf(shape).Observe(rows, run_ns, slot.probe, now_ns);
  --shape.running;
  queue.Tidy(shape);
}

void BatchQueue::Release(Request* request, std::vector<Request*>* ready) {
  if (!ordered_) {
    ready->push_back(request);
    return;
  }
  RankedLock lock(impl_->mutex);
  impl_->order.Settle(request->ticket, request, ready);
}

void BatchQueue::Close() {
  Impl& queue = *impl_;
  // Woken under the lock: this is the end, and an executor that has seen it may let the queue go.
  RankedLock lock(queue.mutex);
  queue.closed = true;
  while (Slot* slot = queue.parked) {
    queue.Unpark(*slot);
    slot->signalled = true;
    ++queue.n_waking;
    slot->wake.notify_one();
  }
}

QueueView BatchQueue::View() const {
  const Impl& queue = *impl_;
  QueueView view;
  view.l50_ns.resize(static_cast<size_t>(queue.unknown.n));
  view.l99_ns.resize(static_cast<size_t>(queue.unknown.n));
  RankedLock lock(queue.mutex);
  view.waiting = queue.waiting;
  view.waiting_rows = queue.waiting_rows;
  view.running_rows = queue.running_rows;
  view.knee = queue.unknown.knee;
  view.cap = queue.unknown.cap;
  const auto last = std::max_element(queue.models.begin(), queue.models.end(),
                                     [](const auto& a, const auto& b) { return a->used < b->used; });
  if (last == queue.models.end()) return view;
  const Predictor& predictor = (*last)->predictor;
  view.knee = predictor.prediction().knee;
  view.cap = predictor.prediction().cap;
  for (int size = 0; size < queue.unknown.n; ++size) {
    view.l50_ns[static_cast<size_t>(size)] = predictor.MeasuredL50(size);
    view.l99_ns[static_cast<size_t>(size)] = predictor.MeasuredL99(size);
  }
  return view;
}

}  // namespace tidegate
